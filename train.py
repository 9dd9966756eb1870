"""Trains a U-Net to cut out cars, or whatever your masks show.

    python train.py                                   # with the constants below; without photos in data/, on drawn ones
    python train.py --num-epochs 10 --batch-size 16   # every constant is a flag of the same name, for one run
    python train.py --load-model --num-epochs 20      # continues from my_checkpoint.pth.tar up to epoch 20

Open saved_images/index.html in a browser: it shows what the network has learned after every epoch.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or importing it asks the network for a newer version
import albumentations as A
import cv2
import torch
from albumentations.pytorch import ToTensorV2
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
import utils
from dataset import UserError
from model import UNet
from optimizer import Muon
from report import Report, save_train_batch
from sample_data import draw_dataset

# Your data: xxx.jpg in an image folder has its mask as xxx_mask.gif (or .png, ...) in the mask folder.
TRAIN_IMG_DIR = "data/train_images"
TRAIN_MASK_DIR = "data/train_masks"
VAL_IMG_DIR = "data/val_images"
VAL_MASK_DIR = "data/val_masks"
CACHE_DIR: str | None = "data/cache"  # for decoded photos, 4 bytes a pixel; None decodes them in every epoch

# The network, and the size at which it sees photos. Larger finds finer edges; time and memory grow with the area.
IMAGE_HEIGHT = 160  # pixels, at least 16; Carvana's photos are 1280
IMAGE_WIDTH = 240  # pixels, at least 16; Carvana's photos are 1918
FEATURES = (64, 128, 256, 512)  # channels of each stage; (16, 32, 64, 128) is 16 times faster and less exact

# The recipe.
NUM_EPOCHS = 3  # in total; more for few photos, or when Dice still rises at the end
BATCH_SIZE = 4  # images in a step, of all processes together; smaller if memory runs out
LEARNING_RATE = 0.05  # Muon's, at its peak after a warm-up; smaller if the loss jumps
WEIGHT_DECAY = 0.01  # kernels shrink by LEARNING_RATE times this in a step; larger against overfitting
ACCUMULATION = 1  # parts in which a step's images are computed, one after the other: each needs less memory
CLIP_NORM = 0.0  # longer gradients are cut to this norm, so that no batch outweighs the others; 0 cuts none
SEED = 0  # of weights, order and augmentation

# The machine.
DEVICE = "auto"  # "cuda", "cuda:1", "mps" or "cpu"; "auto" takes the first that is there
PRECISION = "auto"  # "bf16", "fp16" or "fp32"; "auto" takes the fastest that the hardware has
COMPILE = "auto"  # "yes" or "no" to torch.compile; "auto" compiles for long runs of one process on CUDA
ACTIVATION_CHECKPOINTING = False  # True computes activations twice and keeps few: big images on a small GPU
NUM_WORKERS = -1  # processes that load images; -1 chooses, 0 loads in this one
SYNC_BATCHNORM = True  # under torchrun on CUDA, BatchNorm sees the whole batch; False sees each process's share
TIMEOUT_MINUTES = 10.0  # under torchrun, until a process that is silent counts as lost

# What a run reads and leaves.
LOAD_MODEL = False  # True continues from CHECKPOINT
CHECKPOINT = "my_checkpoint.pth.tar"  # the newest state; the best weights go to my_checkpoint_best.pth.tar
CHECKPOINT_MINUTES = 10.0  # between two checkpoints, of which every epoch's end has one, too
SAVED_IMAGES_DIR = "saved_images"  # pictures, metrics.csv, and a page to browse them: index.html
PAGE_PHOTOS = 1000  # on that page, at most; smaller if large photos make it slow
TENSORBOARD_DIR: str | None = None  # "runs" for those who use TensorBoard

MEAN = (0.485, 0.456, 0.406)  # of RGB in 0 to 1 in photos (ImageNet's); the network sees (RGB - MEAN) / STD
STD = (0.229, 0.224, 0.225)  # likewise


def make_transforms(s: SimpleNamespace) -> tuple[A.Compose, A.Compose]:
    """Augmentation for training, and what remains of it for validation."""
    to_tensor = [A.Normalize(s.mean, s.std), ToTensorV2()]
    augment = [
        A.HorizontalFlip(p=0.5),
        A.Affine((0.85, 1.15), (-0.06, 0.06), rotate=(-8, 8), border_mode=cv2.BORDER_REFLECT_101, p=0.7),
        A.RandomBrightnessContrast(0.2, 0.2, p=0.5),
        A.HueSaturationValue(10, 25, 10, p=0.3),
    ]
    return A.Compose([*augment, *to_tensor]), A.Compose(to_tensor)


def check_settings(s: SimpleNamespace) -> None:
    """Raises UserError for a value of the wrong type or out of its range."""
    whole, number, processes = int, (int, float), distributed.WORLD_SIZE
    smallest = max(16, 2 ** len(s.features)) if isinstance(s.features, tuple) else 16
    wanted_batch = "a whole number, at least 1" if processes == 1 else f"a multiple of {processes}, the processes"
    for name, kind, is_valid, wanted in (
        ("FEATURES", tuple, lambda v: v and all(type(f) is int and f > 0 for f in v), "channels of each stage"),
        ("IMAGE_HEIGHT", whole, lambda v: v >= smallest, f"a whole number, at least {smallest}"),
        ("IMAGE_WIDTH", whole, lambda v: v >= smallest, f"a whole number, at least {smallest}"),
        ("NUM_EPOCHS", whole, lambda v: v >= 1, "a whole number, at least 1"),
        ("BATCH_SIZE", whole, lambda v: v >= 1 and v % processes == 0, wanted_batch),
        ("LEARNING_RATE", number, lambda v: 0 < v < math.inf, "a number above 0, such as 0.05"),
        ("WEIGHT_DECAY", number, lambda v: 0 <= v < math.inf, "a number, at least 0"),
        ("MEAN", tuple, lambda v: len(v) == 3 and all(math.isfinite(c) for c in v), "three numbers"),
        ("STD", tuple, lambda v: len(v) == 3 and all(0 < c < math.inf for c in v), "three numbers above 0"),
        ("ACCUMULATION", whole, lambda v: v >= 1, "a whole number, at least 1"),
        ("CLIP_NORM", number, lambda v: 0 <= v < math.inf, "a number, at least 0"),
        ("SEED", whole, lambda v: v >= 0, "a whole number, at least 0"),
        ("NUM_WORKERS", whole, lambda v: v >= -1, "a whole number, at least 0, or to -1"),
        ("TIMEOUT_MINUTES", number, lambda v: 0 < v <= 1e6, "a number above 0, such as 10"),
        ("DEVICE", str, bool, '"auto", "cuda", "mps" or "cpu"'),
        ("PRECISION", str, lambda v: v in ("auto", "bf16", "fp16", "fp32"), '"auto", "bf16", "fp16" or "fp32"'),
        ("COMPILE", str, lambda v: v in ("auto", "yes", "no"), '"auto", "yes" or "no"'),
        ("CHECKPOINT", str, lambda v: v and not Path(v).is_dir(), "a file's name"),
        ("CHECKPOINT_MINUTES", number, lambda v: v >= 0, "a number, at least 0"),
        ("SAVED_IMAGES_DIR", str, bool, "a folder's name"),
        ("PAGE_PHOTOS", whole, lambda v: v >= 1, "a whole number, at least 1"),
    ):
        value = getattr(s, name.lower())
        if not isinstance(value, kind) or isinstance(value, bool) or not is_valid(value):
            raise UserError(f"{name} is {value!r}: set it to {wanted}")
    for name, folder in (("CHECKPOINT", Path(s.checkpoint).parent), ("SAVED_IMAGES_DIR", Path(s.saved_images_dir))):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"{name}: {folder} cannot be written ({error.strerror}): choose another folder") from error


def use_sample_if_empty(s: SimpleNamespace) -> None:
    """A fresh clone trains: while the four folders of data/ are there and all empty, cars are drawn and trained on."""
    folders = (s.train_img_dir, s.train_mask_dir, s.val_img_dir, s.val_mask_dir)
    if folders != ("data/train_images", "data/train_masks", "data/val_images", "data/val_masks"):
        return
    for folder in map(Path, folders):
        if not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir()):
            return
    sample = Path("data/sample")
    print(f"data/ has no photos of yours yet: training on drawn cars in {sample}/")
    if not sample.exists():
        try:
            draw_dataset(sample)
        except OSError as error:
            raise UserError(f"{sample} cannot be drawn ({error}): make room for 20 MB there") from error
    s.train_img_dir, s.train_mask_dir = str(sample / "train_images"), str(sample / "train_masks")
    s.val_img_dir, s.val_mask_dir = str(sample / "val_images"), str(sample / "val_masks")


def learning_rate(progress: float, peak: float) -> float:
    """At `progress` (0 to 1) of the run: a linear warm-up over the first tenth, then half a cosine down to 0."""
    if progress < 0.1:
        return peak * (0.02 + 9.8 * progress)
    return peak * (1 + math.cos(math.pi * (progress - 0.1) / 0.9)) / 2


@dataclass
class State:
    """All that training changes: what a checkpoint keeps, and continuing restores."""

    model: UNet
    forward: nn.Module  # the model, compiled or not, and sharing its gradients under torchrun
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    history: list[dict] = field(default_factory=list)  # the rows of metrics.csv, one for each epoch that has ended
    photo_dice: list[list[float]] = field(default_factory=list)  # of each validation photo in each of these epochs
    best: float = -1.0  # Dice of the best epoch
    images: int = 0  # of the epoch under way that were trained on
    losses: dict[int, Tensor] = field(default_factory=dict)  # of its batches, summed; by the `images` before each
    seconds: float = 0.0  # of training in it


def new_state(
    s: SimpleNamespace, device: torch.device, precision: torch.dtype, foreground: float, images: int
) -> State:
    """An untrained network, whose first guess is the mean mask, and its optimizer, for epochs of so many images."""
    torch.manual_seed(s.seed)
    model = UNet(3, 1, s.features, s.activation_checkpointing)
    nn.init.constant_(model.head.bias, math.log(foreground / (1 - foreground)))
    model.to(device, memory_format=utils.memory_format(device))
    if distributed.WORLD_SIZE > 1 and device.type == "cuda" and s.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    forward = model
    shape = (-(-s.batch_size // distributed.WORLD_SIZE // s.accumulation), 3, s.image_height, s.image_width)
    if utils.should_compile(s.compile, device, s.num_epochs * -(-images // s.batch_size)):
        forward = utils.compile_model(model, shape, device, precision)
    optimizer = Muon(model, s.learning_rate, s.weight_decay)
    if distributed.WORLD_SIZE > 1:
        forward = distributed.parallel(forward)
        # It arranges its exchange after the first backward pass. A run that goes on would do so after another step than
        # one that was never stopped, and sums of three and more gradients would be rounded otherwise.
        utils.rehearse(forward, model, shape, device, precision)
    return State(model, forward, optimizer, torch.amp.GradScaler(device.type, enabled=precision == torch.float16))


def train_step(
    state: State, images: Tensor, masks: Tensor, lr: float, precision: torch.dtype, s: SimpleNamespace, count: int
) -> Tensor:
    """Learns from images (N, 3, H, W) and masks (N, 1, H, W) on the device, this process's share of `count` images.

    Returns the sum of the `count` images' losses, 0-dim. An image without a mask does not count.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    is_compiled = count == s.batch_size  # which only one shape is
    forward = state.forward if is_compiled or distributed.WORLD_SIZE > 1 else state.model
    state.optimizer.zero_grad()
    total = torch.zeros((), device=images.device)
    done = 0
    for some in images.chunk(s.accumulation):
        their_masks = masks[done : done + len(some)]
        done += len(some)
        with distributed.without_exchange(forward, done < len(images)):
            with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
                logits = forward(some)[: len(their_masks)].float()  # (n, 1, H, W)
            losses = nn.functional.binary_cross_entropy_with_logits(logits, their_masks, reduction="none")
            loss = losses.flatten(1).mean(1).sum()
            # DistributedDataParallel takes the mean of the processes' gradients, not their sum
            state.scaler.scale(loss * distributed.WORLD_SIZE / count).backward()
        total += loss.detach()
    if s.clip_norm:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), s.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return distributed.sum_(total)


def train_epoch(
    loader: DataLoader, state: State, precision: torch.dtype, s: SimpleNamespace, save_if_due: Callable[[], None]
) -> None:
    """Trains on the images of an epoch, or on those of them that remain. Raises UserError if the loss is not finite."""
    device = next(state.model.parameters()).device
    epoch, number = len(state.history), len(loader.dataset)
    batches = loader.batch_sampler
    batches.epoch, batches.start = epoch, state.images
    start, steps_before = time.perf_counter() - state.seconds, steps_taken(state.optimizer)
    title = f"epoch {epoch + 1}/{s.num_epochs}"
    with utils.progress(total=number, initial=state.images, desc=title, unit="img") as bar:
        step, line_due = 0, time.monotonic() + 60
        for step, (images, masks) in enumerate(loader, start=1):
            utils.stop_if_asked()
            if step == 1 and distributed.RANK == 0:
                save_train_batch(images, masks, s.mean, s.std, Path(s.saved_images_dir, "train_batch.png"))
            images, masks = utils.to_device(images, masks, device)
            lr = learning_rate((epoch + state.images / number) / s.num_epochs, s.learning_rate)
            count = min(s.batch_size, number - state.images)
            masks = masks[: len(range(count)[distributed.share(count)])]
            loss = state.losses[state.images] = train_step(state, images, masks, lr, precision, s, count)
            state.images += count
            state.seconds = time.perf_counter() - start

            if step % 10 == 1:  # reading a loss waits for the device
                bar.set_postfix(loss=f"{loss.item() / count:.4f}", refresh=False)
                if not loss.isfinite():
                    break
            bar.update(count)
            if bar.disable and time.monotonic() > line_due:  # no terminal: a line a minute in the log
                print(f"{title}: {state.images} of {number} images, loss {loss.item() / count:.4f}", flush=True)
                line_due = time.monotonic() + 60
            save_if_due()
        if state.scaler.is_enabled() and step and (skipped := step + steps_before - steps_taken(state.optimizer)):
            tqdm.write(f"{skipped} of {step} steps were skipped since a gradient overflowed fp16: a few are normal.")
    raise_if_not_finite(state, loader)
    state.seconds = time.perf_counter() - start


def estimate_statistics(loader: DataLoader, model: UNet, precision: torch.dtype) -> None:
    """Sets BatchNorm's running statistics to those of the epoch's last 16 images or more, with the weights of now.

    Those kept while training lag behind weights that move fast: Dice after the first epoch was 0.66, with this 0.94.
    """
    device = next(model.parameters()).device
    norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    batches = loader.batch_sampler
    batches.start = max(0, batches.length - -(-16 // batches.size) * batches.size)
    with torch.no_grad(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
        for images, masks in loader:
            model(utils.to_device(images, masks, device)[0])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        for statistic in (norm.running_mean, norm.running_var):
            distributed.sum_(statistic).div_(distributed.WORLD_SIZE)


def end_epoch(
    train_loader: DataLoader, val_loader: DataLoader, state: State, precision: torch.dtype, report: Report | None
) -> bool:
    """Validates, and adds a row to the history; returns whether it is the best."""
    device = next(state.model.parameters()).device
    start, number = time.perf_counter(), len(train_loader.dataset)
    estimate_statistics(train_loader, state.model, precision)
    metrics = utils.check_accuracy(val_loader, state.model, device, precision, report and report.add)
    predicted, photo_dice = metrics.pop("predicted"), metrics.pop("photo_dice")
    row = {
        "epoch": len(state.history) + 1,
        "train_loss": (torch.stack(list(state.losses.values())).sum() / number).item(),
        **metrics,
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "seconds": state.seconds + time.perf_counter() - start,
        "images_per_second": number / state.seconds,
    }
    is_best = row["dice"] > state.best
    state.history.append(row)
    state.photo_dice.append(photo_dice)
    state.best = max(state.best, row["dice"])
    state.images, state.losses, state.seconds = 0, {}, 0.0
    if report:
        utils.save_metrics(state.history, report.folder / "metrics.csv")
        report.finish(state.history, state.photo_dice)
    if predicted in (0, 1):
        share = 100 * train_loader.dataset.infos["foreground"].mean()
        print(
            f"WARNING: it predicts {('background', 'foreground')[int(predicted)]} for every pixel, and {share:.1f} % "
            "of the training masks are foreground: raise NUM_EPOCHS, or for objects of a few pixels IMAGE_HEIGHT and "
            "IMAGE_WIDTH"
        )
    return is_best


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """The steps that the optimizer has counted: those that GradScaler skips are not among them."""
    return next((int(weight["step"]) for weight in optimizer.state.values()), 0)


def raise_if_not_finite(state: State, loader: DataLoader) -> None:
    """Raises UserError with the names of the epoch's first batch that made the loss or a weight infinite or nan."""
    starts, losses = list(state.losses), torch.stack(list(state.losses.values()))
    bad = (~losses.isfinite()).nonzero()
    if len(bad) or not all(weight.isfinite().all() for weight in state.model.parameters()):
        first = bad[0].item() if len(bad) else len(starts) - 1
        loader.batch_sampler.start = starts[first]
        names = [loader.dataset.pairs[index][0].name for index in loader.batch_sampler.batches()[0]]
        raise UserError(
            f"training broke down (loss {losses[first].item():.3g}) with {', '.join(names)}: look at these photos and "
            f"their masks, or lower LEARNING_RATE; checkpoints are as they were before"
        )


def checkpoint_to_continue(s: SimpleNamespace, is_restart: bool) -> dict | None:
    """The checkpoint from which this run goes on, or None. Raises UserError if these settings do not allow it.

    When torchrun starts the processes again because one has died, `is_restart`, they go on by themselves.
    """
    path = Path(s.checkpoint)
    if is_restart or s.load_model:
        utils.restore_previous(path)
    if not (s.load_model or (is_restart and path.exists())):
        return None
    checkpoint = utils.load_checkpoint(path)
    if not {"optimizer", "scaler", "settings", "data", "images", "losses"} <= checkpoint.keys():
        raise UserError(f"{path} has weights only: set CHECKPOINT to the one without _best in its name")
    before = checkpoint["settings"]
    fixed = ("features", "image_height", "image_width", "mean", "std")
    if differing := [f"{name.upper()} = {before[name]}" for name in fixed if before[name] != getattr(s, name)]:
        raise UserError(
            f"{s.checkpoint} was trained with {', '.join(differing)}: set that again, or LOAD_MODEL = False"
        )
    if checkpoint["epoch"] >= s.num_epochs:
        print(f"{path} has {checkpoint['epoch']} epochs already: set NUM_EPOCHS to more, and it goes on.")
    free = ("batch_size", "accumulation", "num_epochs", "learning_rate", "weight_decay", "clip_norm", "seed")
    for name in (*free, "device", "precision", "num_workers"):
        if before[name] != getattr(s, name):
            print(f"{name.upper()} was {before[name]} and is {getattr(s, name)} from here on.")
    return checkpoint


def restore(state: State, checkpoint: dict, header: dict) -> None:
    """Puts `state` where the checkpoint was left, as far as settings and data are the same today."""
    state.model.load_state_dict(checkpoint["state_dict"])
    state.optimizer.load_state_dict(checkpoint["optimizer"])
    for group in state.optimizer.param_groups:
        group["weight_decay"] = header["settings"]["weight_decay"]
    if checkpoint["scaler"]:  # empty unless it was trained in fp16
        state.scaler.load_state_dict(checkpoint["scaler"])
    state.history, state.best = checkpoint["history"], checkpoint["best"]
    state.photo_dice = checkpoint.get("photo_dice", [])

    data, data_before = header["data"], checkpoint["data"]
    if data["val"] != data_before["val"]:
        print("The validation photos have changed: scores before and after do not compare, and a new best is sought.")
        state.best, state.photo_dice = -1.0, []
    if not utils.sibling(Path(header["settings"]["checkpoint"]), "_best").exists():
        state.best = -1.0
    if data["train"] != data_before["train"]:
        print("The training photos have changed.")
    if data["train"] == data_before["train"] and header["settings"]["seed"] == checkpoint["settings"]["seed"]:
        state.images, state.seconds = checkpoint["images"], checkpoint["seconds"]
        device = next(state.model.parameters()).device
        state.losses = {images: torch.tensor(loss, device=device) for images, loss in checkpoint["losses"].items()}
    elif checkpoint["images"]:
        print("The epoch that was cut off begins anew.")
    print(f"Continuing after {len(state.history)} epochs and {state.images} images of the next.")


def save(s: SimpleNamespace, header: dict, state: State, writer: utils.CheckpointWriter, is_best: bool = False) -> None:
    """Has the newest state written, and the best weights if these are; each rebuilds the model and its input."""
    if distributed.RANK > 0:
        return
    weights = header | {
        "state_dict": state.model.state_dict(),
        "epoch": len(state.history),
        "history": state.history,
    }
    newest = weights | {
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "photo_dice": state.photo_dice,
        "best": state.best,
        "images": state.images,
        "losses": {images: loss.item() for images, loss in state.losses.items()},
        "seconds": state.seconds,
    }
    path = Path(s.checkpoint)
    files = [(newest, path, utils.sibling(path, ".prev"))]
    if is_best:
        files.insert(0, (weights, utils.sibling(path, "_best"), None))
    writer.save(files)


def train(s: SimpleNamespace) -> None:
    """A whole run with the settings s, the constants by their lower-case names."""
    device = utils.choose_device(s.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    precision = utils.choose_precision(s.precision, device)
    # Of several machines' torchruns only the one whose process has died counts it
    checkpoint = distributed.from_first(checkpoint_to_continue, s, distributed.highest(distributed.RESTARTS) > 0)
    with distributed.first_on_machine():
        use_sample_if_empty(s)

    train_loader, val_loader = utils.get_loaders(
        *map(Path, (s.train_img_dir, s.train_mask_dir, s.val_img_dir, s.val_mask_dir)),
        (s.image_height, s.image_width),
        s.batch_size,
        *make_transforms(s),
        utils.choose_num_workers(s.num_workers, device),
        pin_memory=device.type == "cuda",
        seed=s.seed,
        cache_dir=s.cache_dir,
    )
    number = len(train_loader.dataset)
    smallest = (number % s.batch_size or s.batch_size) // distributed.WORLD_SIZE // s.accumulation
    if smallest <= 1 and max(s.image_height, s.image_width) <= 2 ** len(s.features):
        raise UserError(f"BATCH_SIZE {s.batch_size} leaves one image for a step, too few at this size: choose another")

    utils.tune(device, precision)
    state = new_state(s, device, precision, train_loader.dataset.infos["foreground"].mean(), number)
    header = {  # of every checkpoint
        "model": {"in_channels": 3, "out_channels": 1, "features": list(s.features)},
        "preprocessing": {"height": s.image_height, "width": s.image_width, "mean": s.mean, "std": s.std},
        "settings": vars(s),
        "data": {"train": train_loader.dataset.fingerprint(), "val": val_loader.dataset.fingerprint()},
    }
    if len(set(map(str, distributed.everyones(header["data"])))) > 1:
        raise UserError("the machines have different photos or masks: give all of them the same, or a shared disk")
    if checkpoint:
        restore(state, checkpoint, header)

    report = distributed.RANK == 0 and Report(
        Path(s.saved_images_dir), val_loader.dataset, s.page_photos, vars(s),
        utils.describe(train_loader.dataset, val_loader.dataset), s.tensorboard_dir,
    )  # fmt: skip
    if not checkpoint and distributed.RANK == 0:
        utils.set_aside(Path(s.checkpoint))
    with utils.CheckpointWriter() as writer, report or nullcontext(), utils.signals_wait():
        print(f"Training on {device} in {str(precision).removeprefix('torch.')}, {s.batch_size} images a step.")
        print("epoch  train_loss  val_loss  pixel_accuracy    dice     iou  seconds")

        def save_if_due() -> None:
            if distributed.RANK == 0 and writer.seconds_since_save() > 60 * s.checkpoint_minutes:
                raise_if_not_finite(state, train_loader)
                save(s, header, state, writer)

        try:
            while len(state.history) < s.num_epochs:
                train_epoch(train_loader, state, precision, s, save_if_due)
                is_best = end_epoch(train_loader, val_loader, state, precision, report)
                save(s, header, state, writer, is_best)
                print(
                    "{epoch:5}  {train_loss:10.4f}  {val_loss:8.4f}  {pixel_accuracy:14.4f}  {dice:6.4f}  {iou:6.4f}"
                    "  {seconds:7.1f}".format(**state.history[-1])
                    + "  best" * is_best
                )
        except utils.Stopped as stopped:
            if not state.history and not state.images:
                print(f"Stopped by {stopped} before the first step: nothing was saved.")
                raise
            if state.losses:
                raise_if_not_finite(state, train_loader)
            save(s, header, state, writer)
            writer.wait()
            print(
                f"Stopped by {stopped} after {len(state.history)} epochs and {state.images} images of the next, which "
                f"{s.checkpoint} holds: continue with the same flags and --load-model"
            )
            raise
        writer.wait()
    best = utils.sibling(Path(s.checkpoint), "_best")
    state.model.load_state_dict(distributed.from_first(utils.load_checkpoint, best)["state_dict"])
    full = utils.full_size_dice(val_loader, state.model, device, precision)
    print(f"Dice of the best weights: {state.best:.4f} at training size, {full:.4f} at the photos' own size.")
    print(f"The best weights are in {best}, the newest state in {s.checkpoint}.")
    print(f"Look at {Path(s.saved_images_dir, 'index.html').resolve().as_uri()}")


def main(argv: list[str] | None = None) -> None:
    s = utils.parse_settings(globals(), argv)
    check_settings(s)
    try:
        with distributed.process_group(s.timeout_minutes):
            train(s)
    except RuntimeError as error:
        cause = f"{error} {error.__context__}"  # PyTorch raises its own error of a lost worker within another
        if "shared memory" in cause or "Bus error" in cause:  # as in a container, which has 64 MB
            raise UserError(
                "/dev/shm, where workers put their images, is too small: enlarge it (docker run --shm-size=8g), or set "
                "NUM_WORKERS = 0"
            ) from error
        if "by signal: Killed" in cause:
            raise UserError("the system has killed a worker, most likely for memory: lower NUM_WORKERS") from error
        if not distributed.is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory at BATCH_SIZE {s.batch_size} and {s.image_height} x {s.image_width} pixels: halve "
            "BATCH_SIZE or double ACCUMULATION, set ACTIVATION_CHECKPOINTING = True, or halve height and width"
        ) from error


if __name__ == "__main__":
    utils.run(main)

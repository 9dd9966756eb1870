"""Trains a U-Net to cut out cars, or whatever your masks show.

    python train.py                                   # with the constants below; without photos in data/, on drawn ones
    python train.py --num-epochs 10 --batch-size 16   # every constant is a flag of the same name, for one run
    python train.py --load-model --num-epochs 20      # continues from my_checkpoint.pth.tar up to epoch 20

Open saved_images/index.html in a browser: it shows what the network has learned after every epoch.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import augmentation
import distributed
import utils
from crops import CropDataset, part_to_validate
from dataset import CarvanaDataset, describe
from decoding import UserError, rule_from
from device import Device, choose_device, choose_num_workers, compiled_and_parallel, memory_errors, tune
from metrics import soft_dice_losses
from model import UNet, encoder_normalisation, update_batch_norm
from optimizer import Muon, muon_groups, restore
from report import Report, save_train_batch
from sample_data import use_sample_if_empty
from settings import advise_on_epochs, check_settings, check_start, parse_settings

# Your data.
TRAIN_IMG_DIR = "data/train_images"
TRAIN_MASK_DIR = "data/train_masks"
VAL_IMG_DIR = "data/val_images"
VAL_MASK_DIR = "data/val_masks"
MASK_SUFFIX = "_mask"  # the mask of xxx.jpg is xxx_mask.gif (or .png, ...), or plain xxx.png
FOREGROUND_VALUES: tuple[int, ...] | None = None  # of masks with several labels, the foreground's; None takes all but 0
CACHE_DIR: str | None = "data/cache"  # for decoded photos, 4 bytes a pixel; None decodes them in every epoch

# The network, and the size at which it sees photos. Larger finds finer edges; time and memory grow with the area.
IMAGE_HEIGHT = 160  # pixels, at least 16; Carvana's photos are 1280
IMAGE_WIDTH = 240  # pixels, at least 16; Carvana's photos are 1918
CROP: tuple[int, int] | None = None  # height and width of crops at (nearly) full size instead: for small, thin things
SCALE = 1.0  # with CROP, the size of photos as a share of their own
FEATURES = (64, 128, 256, 512)  # channels of each stage; (16, 32, 64, 128) is 16 times faster and less exact
ENCODER: str | None = None  # a pretrained network of timm as encoder, such as "resnet34": learns from few photos
ENCODER_WEIGHTS: str | None = None  # a file of its weights; None downloads them

# The recipe.
NUM_EPOCHS = 3  # in total; more for few photos, or when Dice still rises at the end
BATCH_SIZE = 4  # images in a step, of all processes together; smaller if memory runs out
LEARNING_RATE = 0.05  # Muon's, at its peak after a warm-up; smaller if the loss jumps
WEIGHT_DECAY = 0.01  # kernels shrink by LEARNING_RATE times this in a step; larger against overfitting
ACCUMULATION = 1  # parts in which a step's images are computed, one after the other: each needs less memory
CLIP_NORM = 0.0  # longer gradients are cut to this norm, so that no batch outweighs the others; 0 cuts none
DICE_WEIGHT = 0.0  # of soft Dice beside cross-entropy; in docs/crops.md it costs calibration and gains nothing
SEED = 0  # of weights, order and augmentation

# The machine.
DEVICE = "auto"  # "cuda", "cuda:1", "mps" or "cpu"; "auto" takes the first that is there
PRECISION = "auto"  # "bf16", "fp16" or "fp32"; "auto" takes the fastest that the hardware has
COMPILE = "auto"  # "yes" or "no" to torch.compile; "auto" compiles for long runs of one process on CUDA
ACTIVATION_CHECKPOINTING = False  # True computes activations twice and keeps few: big images on a small GPU
NUM_WORKERS = -1  # processes that load images; -1 chooses, 0 loads in this one
SYNC_BATCHNORM = True  # under torchrun on CUDA, BatchNorm sees the whole batch; False sees each process's shard
TIMEOUT_MINUTES = 10.0  # under torchrun, until a process that is silent counts as lost

# What a run reads and leaves.
LOAD_MODEL = False  # True continues from CHECKPOINT
START_FROM: str | None = None  # a checkpoint whose weights a new run begins with: for other photos or another size
CHECKPOINT = "my_checkpoint.pth.tar"  # the newest state; the best weights go to my_checkpoint_best.pth.tar
CHECKPOINT_MINUTES = 10.0  # between two checkpoints, of which every epoch's end has one, too
SAVED_IMAGES_DIR = "saved_images"  # pictures, metrics.csv, and a page to browse them: index.html
PAGE_PHOTOS = 1000  # on that page, at most; smaller if large photos make it slow
TENSORBOARD_DIR: str | None = None  # "runs" for those who use TensorBoard

MEAN = (0.485, 0.456, 0.406)  # mean of each RGB channel, range 0 to 1 (ImageNet's); the network sees (RGB - MEAN) / STD
STD = (0.229, 0.224, 0.225)  # standard deviation of each RGB channel, range 0 to 1 (ImageNet's)


def make_augmentation() -> list[tuple[float, augmentation.Step]]:
    """What training changes at random in every sample: with which probability, and what (augmentation.py)."""
    return [
        (0.5, augmentation.horizontal_flip),
        (0.7, partial(augmentation.affine, scale=0.15, shift=0.06, degrees=8)),
        (0.5, partial(augmentation.brightness_contrast, brightness=0.2, contrast=0.2)),
        (0.5, partial(augmentation.hue_saturation_value, hue=20, saturation=30, value=20)),
    ]


def image_losses(logits: Tensor, masks: Tensor, dice_weight: float = 0.0) -> Tensor:
    """Each image's loss, (N,), from float32 logits and masks (N, 1, H, W), whose void is nan and does not count."""
    known, masks = ~masks.isnan(), masks.nan_to_num()
    losses = nn.functional.binary_cross_entropy_with_logits(logits, masks, reduction="none") * known
    losses = losses.flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)
    return losses + dice_weight * soft_dice_losses(logits, masks, known) if dice_weight else losses


def schedule(progress: float) -> float:
    """The learning rate's factor at `progress`, 0 to 1: a linear warm-up for a tenth, then half a cosine down to 0."""
    if progress < 0.1:
        return 0.02 + 9.8 * progress
    return (1 + math.cos(math.pi * (progress - 0.1) / 0.9)) / 2


@dataclass
class Epoch:
    """The part of the state that begins anew with each epoch."""

    images: int = 0  # photos that were trained on
    computed: int = 0  # the same, and those that came twice to fill the last batch
    losses: dict[int, Tensor] = field(default_factory=dict)  # of each batch, summed; by the `images` before it
    seconds: float = 0.0  # of training


@dataclass
class State:
    """All that training changes: a checkpoint keeps it, and continuing restores it."""

    model: UNet
    forward: nn.Module  # the model, compiled or not, which under torchrun shares its gradients
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    history: list[dict] = field(default_factory=list)  # the rows of metrics.csv, one for each epoch that has ended
    photo_dice: list[list[float]] = field(default_factory=list)  # of each validation photo in each of these epochs
    best: float = -1.0  # Dice of the best epoch
    epoch: Epoch = field(default_factory=Epoch)  # the one under way

    def state_dict(self) -> dict:
        return vars(self.epoch) | {
            "losses": {images: loss.item() for images, loss in self.epoch.losses.items()},
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": type(self.optimizer).__name__,
            "scaler": self.scaler.state_dict(),  # empty unless it trains in fp16
            "epoch": len(self.history),
            "history": self.history,
            "photo_dice": self.photo_dice,
            "best": self.best,
        }

    def load_state_dict(self, checkpoint: dict) -> None:
        self.model.load_state_dict(checkpoint["state_dict"])
        restore(self.optimizer, checkpoint["optimizer_name"], checkpoint["optimizer"])
        if checkpoint["scaler"]:
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.history, self.photo_dice, self.best = (checkpoint[name] for name in ("history", "photo_dice", "best"))
        self.epoch = Epoch(**{name: checkpoint[name] for name in vars(self.epoch)})
        device = next(self.model.parameters()).device
        self.epoch.losses = {images: torch.tensor(loss, device=device) for images, loss in self.epoch.losses.items()}


def new_state(s: SimpleNamespace, device: Device, foreground: float, photos: int) -> State:
    """An untrained network, whose first prediction is the mean mask, and its optimizer, for epochs of `photos`."""
    torch.manual_seed(s.seed)
    model = UNet(3, 1, s.features, s.activation_checkpointing, s.encoder, s.crop)
    model.start_from(foreground)
    model.to(device.device, memory_format=device.memory_format)
    if distributed.WORLD_SIZE > 1 and device.device.type == "cuda" and s.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    rate = s.learning_rate * (0.3 if s.start_from else 1)  # at its full rate Dice fell from 0.977 to 0.962 at first
    optimizer = Muon(muon_groups(model, rate, s.weight_decay))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # which the schedule multiplies

    shape = (s.batch_size // distributed.WORLD_SIZE // s.accumulation, 3, s.image_height, s.image_width)
    forward = compiled_and_parallel(model, shape, device, s.compile, s.num_epochs * math.ceil(photos / s.batch_size))
    scaler = torch.amp.GradScaler(device.device.type, enabled=device.precision == torch.float16)
    return State(model, forward, optimizer, scaler)


def train_step(state: State, images: Tensor, masks: Tensor, device: Device, s: SimpleNamespace) -> Tensor:
    """Learns from images (N, 3, H, W) and masks (N, 1, H, W) on the device, this process's shard of a batch.

    Returns the sum of the losses of all processes' images, 0-dim.
    """
    total = torch.zeros((), device=images.device)
    state.optimizer.zero_grad()
    parts = list(zip(images.chunk(s.accumulation), masks.chunk(s.accumulation), strict=True))
    for part, (some_images, some_masks) in enumerate(parts, start=1):
        with distributed.no_sync(state.forward, is_last=part == len(parts)):
            with device.autocast():
                logits = state.forward(some_images)
            loss = image_losses(logits.float(), some_masks, s.dice_weight).sum()
            state.scaler.scale(loss / len(images)).backward()
        total += loss.detach()
    if s.clip_norm:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), s.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return distributed.all_reduce_sum(total)


def train_epoch(loader: DataLoader, state: State, device: Device, s: SimpleNamespace, autosave: Callable) -> None:
    """Trains on the photos of an epoch, or on those of them that remain. Raises UserError if the loss is not finite."""
    epoch, photos, skipped = state.epoch, len(loader.dataset), 0
    loader.batch_sampler.epoch, loader.batch_sampler.start = len(state.history), epoch.images
    start, title = time.perf_counter() - epoch.seconds, f"epoch {len(state.history) + 1}/{s.num_epochs}"
    with utils.progress(total=photos, initial=epoch.images, desc=title, unit="img") as bar:
        line_due = time.monotonic() + 60
        for step, (images, masks) in enumerate(loader):
            distributed.stop_if_asked()
            if step == 0 and distributed.RANK == 0:
                save_train_batch(images, masks, Path(s.saved_images_dir, "train_batch.png"))
            images, masks = device.to(images, masks)

            # Learn
            progress = (len(state.history) + epoch.images / photos) / s.num_epochs
            for group in state.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule(progress)
            scale = state.scaler.get_scale()
            loss = epoch.losses[epoch.images] = train_step(state, images, masks, device, s)
            skipped += state.scaler.get_scale() < scale  # fp16: a gradient has overflowed

            # Count
            count = min(s.batch_size, photos - epoch.images)
            epoch.images, epoch.computed = epoch.images + count, epoch.computed + s.batch_size
            epoch.seconds = time.perf_counter() - start

            # Show
            bar.update(count)
            if step % 10 == 0:  # reading a loss waits for the device
                bar.set_postfix(loss=f"{loss.item() / s.batch_size:.4f}", refresh=False)
                if not loss.isfinite():
                    break
            if bar.disable and time.monotonic() > line_due:  # no terminal: a line a minute in the log
                print(f"{title}: {epoch.images} of {photos} images, loss {loss.item() / s.batch_size:.4f}", flush=True)
                line_due = time.monotonic() + 60
            autosave()
        if skipped:
            tqdm.write(f"{skipped} of {step + 1} steps were skipped: gradients overflowed fp16. A few are normal.")
    raise_if_not_finite(state, loader)
    epoch.seconds = time.perf_counter() - start


def end_epoch(
    train_loader: DataLoader,
    val_loader: DataLoader,
    state: State,
    device: Device,
    report: Report | None,
    s: SimpleNamespace,
) -> bool:
    """Validates, and adds a row to the history; returns whether it is the best."""
    start = time.perf_counter()
    update_batch_norm(train_loader, state.model, device)
    show = report.begin(len(state.history) + 1) if report else None
    losses = partial(image_losses, dice_weight=s.dice_weight)
    metrics, photo_dice = utils.check_accuracy(val_loader, state.model, device, losses, show)
    row = {
        "epoch": len(state.history) + 1,
        "train_loss": torch.stack(list(state.epoch.losses.values())).sum().item() / state.epoch.computed,
        **metrics,
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "seconds": state.epoch.seconds + time.perf_counter() - start,
        "images_per_second": state.epoch.computed / state.epoch.seconds,
    }
    is_best = row["dice"] > state.best
    state.history.append(row)
    state.photo_dice.append(photo_dice)
    state.best = max(state.best, row["dice"])
    state.epoch = Epoch()
    if report:
        utils.save_metrics(state.history, report.folder / "metrics.csv")
        report.finish(state.history, state.photo_dice)
    return is_best


def raise_if_not_finite(state: State, loader: DataLoader) -> None:
    """Raises UserError with the names of the epoch's first batch that made the loss or a weight infinite or nan."""
    starts, losses = list(state.epoch.losses), torch.stack(list(state.epoch.losses.values()))
    bad = (~losses.isfinite()).nonzero()
    if len(bad) or not all(weight.isfinite().all() for weight in state.model.parameters()):
        first = bad[0].item() if len(bad) else len(starts) - 1
        loader.batch_sampler.start = starts[first]
        names = dict.fromkeys(loader.dataset.image_of(index).name for index in loader.batch_sampler.batches()[0])
        raise UserError(
            f"training diverged (loss {losses[first].item():.3g}) with {', '.join(names)}: look at these photos and "
            "their masks, or lower LEARNING_RATE; no checkpoint was changed"
        )


def prepare(
    s: SimpleNamespace, device: Device
) -> tuple[State, utils.CheckpointWriter, DataLoader, DataLoader, Report | None]:
    """What a run begins with: its state, what writes its checkpoints, the loaders, and the report.

    The weights are a checkpoint's, a pretrained encoder's, or random. Before a new run, older checkpoints are renamed.
    """
    # Of several machines' torchruns only the one whose process has died counts the restart
    is_restart = distributed.all_reduce_max(distributed.RESTARTS) > 0
    checkpoint, start = distributed.broadcast_object(utils.checkpoint_to_continue, s, is_restart), None
    if checkpoint:
        s.start_from = checkpoint["settings"].get("start_from")  # it goes on as it began
    elif s.start_from:
        start = distributed.broadcast_object(utils.load_checkpoint, Path(s.start_from))
        check_start(start, s)
    with distributed.main_process_first():
        use_sample_if_empty(s)
    size = float(s.scale) if s.crop else (s.image_height, s.image_width)
    dataset = partial(CropDataset, crop=s.crop) if s.crop else CarvanaDataset
    train_set = dataset(s.train_img_dir, s.train_mask_dir, size, make_augmentation(), s.seed, s.mask_suffix)
    val_set = CarvanaDataset(s.val_img_dir, s.val_mask_dir, size, mask_suffix=s.mask_suffix)
    train_set.prepare(s.cache_dir, rule_from(checkpoint and checkpoint["rule"]), s.foreground_values)
    val_set.prepare(s.cache_dir, train_set.rule)
    print(describe(train_set, val_set))
    val_set = part_to_validate(val_set, s.crop)
    workers = choose_num_workers(s.num_workers, device)
    loaders = utils.get_loaders(train_set, val_set, s.batch_size, workers, device.device.type == "cuda", s.seed)
    state = new_state(s, device, train_set.infos["foreground"].mean(), len(train_set))
    header = utils.checkpoint_header(state.model, s, train_set, val_set)
    if len(set(map(str, distributed.all_gather_object(header["data"])))) > 1:
        raise UserError("the machines have different photos or masks: give all of them the same, or a shared disk")
    if checkpoint:
        state.load_state_dict(utils.adapted(checkpoint, header))
    elif start:
        state.model.load_state_dict(start["state_dict"])
    elif s.encoder:
        state.model.encoder.load_pretrained(s.encoder_weights)
    report = Report(s, train_set, val_set) if distributed.RANK == 0 else None
    if not checkpoint and distributed.RANK == 0:
        utils.set_aside(Path(s.checkpoint))
    return state, utils.CheckpointWriter(Path(s.checkpoint), header), *loaders, report


def train(s: SimpleNamespace) -> None:
    """A whole run with the settings s, the constants by their lower-case names."""
    if s.encoder:
        s.mean, s.std = encoder_normalisation(s.encoder, s.mean, s.std)
    device = choose_device(s.device, s.precision, mean=s.mean, std=s.std)
    tune(device)
    state, writer, train_loader, val_loader, report = prepare(s, device)
    with writer, report or nullcontext(), distributed.signals_wait():
        print(f"Training on {device}, {s.batch_size} images a step.")
        print("epoch  train_loss  val_loss  pixel_accuracy    dice     iou  seconds")

        def autosave() -> None:
            if distributed.RANK == 0 and writer.seconds_since_save() > 60 * s.checkpoint_minutes:
                raise_if_not_finite(state, train_loader)
                writer.save(state)

        try:
            while len(state.history) < s.num_epochs:
                train_epoch(train_loader, state, device, s, autosave)
                is_best = end_epoch(train_loader, val_loader, state, device, report, s)
                writer.save(state, is_best)
                print(
                    "{epoch:5}  {train_loss:10.4f}  {val_loss:8.4f}  {pixel_accuracy:14.4f}  {dice:6.4f}  {iou:6.4f}"
                    "  {seconds:7.1f}".format(**state.history[-1])
                    + "  best" * is_best
                )
                if len(state.history) == 1:
                    advise_on_epochs(s, len(train_loader.dataset), state.history[0]["seconds"])
        except distributed.Stopped as stopped:
            if not state.history and not state.epoch.images:
                print(f"Stopped by {stopped} before the first step: nothing was saved.")
                raise
            if state.epoch.losses:
                raise_if_not_finite(state, train_loader)
            writer.save(state)
            writer.wait()
            print(
                f"Stopped by {stopped} after {len(state.history)} epochs and {state.epoch.images} images of the next, "
                f"which {s.checkpoint} holds: continue with the same flags and --load-model"
            )
            raise
        writer.wait()

    best = utils.sibling(Path(s.checkpoint), "_best")
    state.model.load_state_dict(distributed.broadcast_object(utils.load_checkpoint, best)["state_dict"])
    full, threshold, highest = utils.full_size_dice(val_loader, state.model, device)
    print(f"Dice of the best weights: {state.best:.4f} at training size, {full:.4f} at the photos' original size.")
    if highest:
        print(f"On these photos the best threshold would be {threshold:g}, with {highest:.4f}.")
    print(f"The best weights are in {best}, the newest state in {s.checkpoint}.")
    print(f"Look at {Path(s.saved_images_dir, 'index.html').resolve().as_uri()}")


def main(argv: list[str] | None = None) -> None:
    s = parse_settings(globals(), argv)
    check_settings(s)
    s.image_height, s.image_width = s.crop or (s.image_height, s.image_width)  # a crop is all that the network sees
    advice = (
        f"at BATCH_SIZE {s.batch_size} and {s.image_height} x {s.image_width} pixels: halve BATCH_SIZE or double "
        "ACCUMULATION, set ACTIVATION_CHECKPOINTING = True, or halve height and width"
    )
    with distributed.process_group(s.timeout_minutes), distributed.reserved(s), memory_errors(advice):
        train(s)


if __name__ == "__main__":
    distributed.run(main)

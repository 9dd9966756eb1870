"""Trains a U-Net to cut out cars, or whatever your masks show.

    python train.py                                   # with the constants below; without photos in data/, on drawn ones
    python train.py --num-epochs 10 --batch-size 16   # every constant is a flag of the same name, for one run
    python train.py --load-model --num-epochs 20      # continues from my_checkpoint.pth.tar up to epoch 20

After every epoch look into saved_images/: pred_<n>.png is what the network says, <n>.png the truth, metrics.csv scores.
"""

import math
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or importing it asks the network for a newer version
import albumentations as A
import cv2
import torch
from albumentations.pytorch import ToTensorV2
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
from dataset import UserError
from model import UNet
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
BATCH_SIZE = 4  # images in a step; smaller if memory runs out
LEARNING_RATE = 1e-3  # at its peak, after a warm-up; smaller if the loss jumps
WEIGHT_DECAY = 1e-2  # AdamW's; larger against overfitting
SEED = 0  # of weights, order and augmentation

# The machine.
DEVICE = "auto"  # "cuda", "cuda:1", "mps" or "cpu"; "auto" takes the first that is there
PRECISION = "auto"  # "bf16", "fp16" or "fp32"; "auto" takes the fastest that the hardware has
NUM_WORKERS = -1  # processes that load images; -1 chooses, 0 loads in this one

# What a run reads and leaves.
LOAD_MODEL = False  # True continues from CHECKPOINT
CHECKPOINT = "my_checkpoint.pth.tar"  # the newest state; the best weights go to my_checkpoint_best.pth.tar
SAVED_IMAGES_DIR = "saved_images"  # pictures and metrics.csv

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
    whole, number = int, (int, float)
    for name, kind, is_valid, wanted in (
        ("FEATURES", tuple, lambda v: v and all(type(f) is int and f > 0 for f in v), "channels of each stage"),
        ("IMAGE_HEIGHT", whole, lambda v: v >= max(16, 2 ** len(s.features)), "a whole number, at least 16"),
        ("IMAGE_WIDTH", whole, lambda v: v >= max(16, 2 ** len(s.features)), "a whole number, at least 16"),
        ("NUM_EPOCHS", whole, lambda v: v >= 1, "a whole number, at least 1"),
        ("BATCH_SIZE", whole, lambda v: v >= 1, "a whole number, at least 1"),
        ("LEARNING_RATE", number, lambda v: 0 < v < math.inf, "a number above 0, such as 1e-3"),
        ("WEIGHT_DECAY", number, lambda v: 0 <= v < math.inf, "a number, at least 0"),
        ("MEAN", tuple, lambda v: len(v) == 3 and all(math.isfinite(c) for c in v), "three numbers"),
        ("STD", tuple, lambda v: len(v) == 3 and all(0 < c < math.inf for c in v), "three numbers above 0"),
        ("SEED", whole, lambda v: v >= 0, "a whole number, at least 0"),
        ("NUM_WORKERS", whole, lambda v: v >= -1, "a whole number, at least 0, or to -1"),
        ("DEVICE", str, bool, '"auto", "cuda", "mps" or "cpu"'),
        ("PRECISION", str, lambda v: v in ("auto", "bf16", "fp16", "fp32"), '"auto", "bf16", "fp16" or "fp32"'),
        ("CHECKPOINT", str, lambda v: v and not Path(v).is_dir(), "a file's name"),
        ("SAVED_IMAGES_DIR", str, bool, "a folder's name"),
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


def train_epoch(
    loader: DataLoader,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: torch.dtype,
    s: SimpleNamespace,
    epoch: int,
) -> float:
    """One pass over the training images; returns the mean loss of the images as they were trained on."""
    device = next(model.parameters()).device
    loss_fn = nn.BCEWithLogitsLoss()
    loader.sampler.epoch = epoch
    total = torch.zeros((), device=device)  # of losses, on the device: reading it would make the loop wait
    with tqdm(
        total=len(loader.dataset), desc=f"epoch {epoch + 1}/{s.num_epochs}", unit="img", leave=False, disable=None
    ) as bar:
        for step, (images, masks) in enumerate(loader):
            if step == 0:
                utils.save_train_batch(images, masks, s.mean, s.std, Path(s.saved_images_dir, "train_batch.png"))
            images, masks = utils.to_device(images, masks, device)  # (N, 3, H, W), (N, 1, H, W)
            lr = learning_rate((epoch + step / len(loader)) / s.num_epochs, s.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                logits = model(images)  # (N, 1, H, W)
            loss = loss_fn(logits.float(), masks)

            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

            total += loss.detach() * len(images)
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update(len(images))
    return (total / len(loader.dataset)).item()


def load_model(s: SimpleNamespace) -> dict:
    """The checkpoint to continue from. Raises UserError if it cannot be continued with these settings."""
    checkpoint = utils.load_checkpoint(Path(s.checkpoint))
    if not {"optimizer", "scaler", "epoch", "history"} <= checkpoint.keys():
        raise UserError(f"{s.checkpoint} has weights only: set CHECKPOINT to the one without _best in its name")
    settings = checkpoint["preprocessing"]
    for name, before, now in (
        ("FEATURES", checkpoint["model"]["features"], s.features),
        ("IMAGE_HEIGHT and IMAGE_WIDTH", (settings["height"], settings["width"]), (s.image_height, s.image_width)),
        ("MEAN and STD", (settings["mean"], settings["std"]), (s.mean, s.std)),
    ):
        if tuple(before) != now:
            raise UserError(f"{s.checkpoint} was trained with {name} {before}: set that again, or LOAD_MODEL = False")
    if checkpoint["epoch"] >= s.num_epochs:
        raise UserError(f"{s.checkpoint} has {checkpoint['epoch']} epochs already: set NUM_EPOCHS to more than that")
    return checkpoint


def restore(
    checkpoint: dict,
    model: UNet,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    s: SimpleNamespace,
) -> list[dict]:
    """Puts model, optimizer and scaler into the checkpoint's state; returns its history."""
    model.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    for group in optimizer.param_groups:
        group["weight_decay"] = s.weight_decay  # today's, like the learning rate
    if checkpoint["scaler"]:  # empty unless it was trained in fp16
        scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["history"]


def train(s: SimpleNamespace) -> None:
    """A whole run with the settings s, the constants by their lower-case names."""
    check_settings(s)
    device = utils.choose_device(s.device)
    precision = utils.choose_precision(s.precision, device)
    checkpoint = load_model(s) if s.load_model else None
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

    last_batch = len(train_loader.dataset) % s.batch_size or s.batch_size
    if last_batch == 1 and max(s.image_height, s.image_width) <= 2 ** len(s.features):
        raise UserError(f"BATCH_SIZE {s.batch_size} leaves one image for a step, too few at this size: choose another")

    torch.manual_seed(s.seed)
    model = UNet(3, 1, s.features)
    foreground = train_loader.dataset.infos["foreground"].mean()
    nn.init.constant_(model.head.bias, math.log(foreground / (1 - foreground)))  # the first guess is the mean mask
    model.to(device, memory_format=utils.memory_format(device))
    optimizer = torch.optim.AdamW(model.parameters(), s.learning_rate, weight_decay=s.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    history: list[dict] = []  # the rows of metrics.csv
    if checkpoint:
        history = restore(checkpoint, model, optimizer, scaler, s)

    print(f"Training on {device} in {str(precision).removeprefix('torch.')}, {s.batch_size} images a step.")
    print("epoch  train_loss  val_loss  pixel_accuracy    dice     iou  seconds")
    saved = len(history)  # epochs in the newest checkpoint
    try:
        for epoch in range(saved, s.num_epochs):
            start = time.perf_counter()
            train_loss = train_epoch(train_loader, model, optimizer, scaler, precision, s, epoch)
            train_seconds = time.perf_counter() - start
            metrics = utils.check_accuracy(val_loader, model, device, precision, Path(s.saved_images_dir))
            row = {
                "epoch": epoch + 1,
                "train_loss": train_loss,
                **metrics,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "seconds": time.perf_counter() - start,
                "images_per_second": len(train_loader.dataset) / train_seconds,
            }
            is_best = all(row["dice"] > earlier["dice"] for earlier in history)
            history.append(row)
            save(s, model, optimizer, scaler, history, is_best)
            saved = epoch + 1
            print(
                "{epoch:5}  {train_loss:10.4f}  {val_loss:8.4f}  {pixel_accuracy:14.4f}  {dice:6.4f}  {iou:6.4f}"
                "  {seconds:7.1f}".format(**row)
                + "  best" * is_best
            )
    except KeyboardInterrupt:
        resume = f"{s.checkpoint} is good, with {saved} epochs: continue with the same flags and --load-model"
        print(f"Stopped. {resume if saved else 'No epoch had ended, and nothing was saved.'}")
        raise
    model.load_state_dict(utils.load_checkpoint(best_path(s))["state_dict"])
    best, full = max(row["dice"] for row in history), utils.full_size_dice(val_loader, model, device, precision)
    print(f"Dice of the best weights: {best:.4f} at training size, {full:.4f} at the photos' own size.")
    print(
        f"Look into {s.saved_images_dir}/. The best weights are in {best_path(s)}, the newest state in {s.checkpoint}."
    )


def save(
    s: SimpleNamespace,
    model: UNet,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    history: list[dict],
    is_best: bool,
) -> None:
    """Saves the newest state, the best weights and metrics.csv; each checkpoint rebuilds the model and its input."""
    state = {
        "state_dict": model.state_dict(),
        "model": {"in_channels": 3, "out_channels": 1, "features": list(s.features)},
        "preprocessing": {"height": s.image_height, "width": s.image_width, "mean": s.mean, "std": s.std},
        "epoch": len(history),
        "history": history,
        "settings": vars(s),
    }
    if is_best:
        utils.save_checkpoint(state, best_path(s))
    utils.save_checkpoint(
        state | {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}, Path(s.checkpoint)
    )
    utils.save_metrics(history, Path(s.saved_images_dir, "metrics.csv"))


def best_path(s: SimpleNamespace) -> Path:
    """my_checkpoint.pth.tar -> my_checkpoint_best.pth.tar"""
    stem, dot, suffixes = Path(s.checkpoint).name.partition(".")
    return Path(s.checkpoint).with_name(f"{stem}_best{dot}{suffixes}")


def main(argv: list[str] | None = None) -> None:
    train(utils.parse_settings(globals(), argv))


if __name__ == "__main__":
    utils.run(main)

"""Train a U-Net to cut objects out of photos: Carvana's cars, or whatever your masks show.

    python train.py                                   # with the constants below; without photos in data/, on drawn ones
    python train.py --num-epochs 10 --batch-size 16   # every constant is a flag of the same name, for one run
    python train.py --load-model --num-epochs 20      # continues from my_checkpoint.pth.tar up to epoch 20
    python train.py --minutes 30                      # takes half an hour, with as many epochs as there is time for

Open saved_images/index.html in a browser: it shows what the network has learned so far.
"""

import math
import os
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # otherwise each import of it asks the internet for a newer version
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads wait briefly; else two runs take five times as long

import albumentations as A
import cv2
import torch
from torch import Tensor, nn

from dataset import CarvanaDataset, CropDataset
from machinery import processes
from machinery.checkpoints import Beginning, CheckpointWriter, State, reserved, settle
from machinery.device import Device, choose_device, memory_errors, to_device
from machinery.errors import run as run_script
from machinery.muon import Muon, muon_groups
from machinery.report import Report
from machinery.runs import Run
from machinery.settings import read_settings
from model import new_network, size_multiple, update_batch_norm
from predict import full_size_dice
from utils import check_accuracy, get_loaders, load_checkpoint, save_predictions_as_imgs, score_names

# Your data.
TRAIN_IMG_DIR = "data/train_images"
TRAIN_MASK_DIR = "data/train_masks"
VAL_IMG_DIR = "data/val_images"
VAL_MASK_DIR = "data/val_masks"
MASK_SUFFIX = "_mask"  # the mask of xxx.jpg is xxx_mask.gif (or .png, ...), or plain xxx.png
FOREGROUND_VALUES: tuple[int, ...] | str | None = None  # (15,): only label 15; "labels": all but 0; "brightness"
CACHE_DIR: str | None = "data/cache"  # for decoded photos, 4 bytes a pixel; None decodes them in every epoch

# The network, and the size at which it sees photos. Larger finds finer edges; time and memory grow with the area.
IMAGE_HEIGHT = 160  # pixels, at least 16 (64 with ENCODER); Carvana's photos are 1280
IMAGE_WIDTH = 240  # pixels, at least 16 (64 with ENCODER); Carvana's photos are 1918
CROP: tuple[int, int] | None = None  # height and width of crops to train on, not whole photos: for small, thin things
SCALE = 1.0  # with CROP, the share of their size to which photos are reduced before
FEATURES = (64, 128, 256, 512)  # channels of each stage; (16, 32, 64, 128) is much faster and less exact
ENCODER: str | None = None  # a pretrained network of timm, such as "tf_efficientnet_lite0": learns from few photos
ENCODER_WEIGHTS: str | None = None  # a file of its weights; None downloads them

# The recipe.
NUM_EPOCHS = 3  # in total; more for few photos, or when Dice still rises at the end
MINUTES: float | None = None  # how long the run may take; it tries a few steps first and chooses NUM_EPOCHS
BATCH_SIZE = 4  # images in a step, of all processes together; smaller if memory runs out
LEARNING_RATE = 0.05  # Muon's, at its peak after a warm-up; smaller if the loss jumps
WEIGHT_DECAY = 0.01  # kernels shrink by LEARNING_RATE times this in a step; larger against overfitting
ACCUMULATION = 1  # parts in which a step's images are computed, one after the other: each needs less memory
CLIP_NORM = 0.0  # longer gradients are cut to this norm, so that no batch outweighs the others; 0 cuts none
DICE_WEIGHT = 0.0  # weight of soft Dice beside cross-entropy; it gained nothing (docs/measurements.md)
SEED = 0  # for initial weights, order and augmentation

# The machine.
DEVICE = "auto"  # "cuda", "cuda:1", "mps" or "cpu"; "auto" takes the first that is there
PRECISION = "auto"  # "bf16", "fp16" or "fp32"; "auto" takes the fastest that the hardware has
COMPILE = "auto"  # "yes" or "no" to torch.compile; "auto" compiles for long runs of one process on CUDA
ACTIVATION_CHECKPOINTING = False  # True computes activations twice and keeps few: big images on a small GPU
NUM_WORKERS = -1  # processes that load images; -1 chooses, 0 loads in this one

# What a run reads and leaves.
LOAD_MODEL = False  # True continues from CHECKPOINT
START_FROM: str | None = None  # a checkpoint whose weights a new run begins with: for other photos or another size
CHECKPOINT = "my_checkpoint.pth.tar"  # the newest state; the best weights go to my_checkpoint_best.pth.tar
CHECKPOINT_MINUTES = 10.0  # at most between two checkpoints; each validation writes one, too
SAVED_IMAGES_DIR = "saved_images"  # pictures, metrics.csv, and a page to browse them: index.html
TENSORBOARD_DIR: str | None = None  # "runs" for those who use TensorBoard

MEAN = (0.485, 0.456, 0.406)  # mean of each RGB channel, range 0 to 1 (ImageNet's); the network sees (RGB - MEAN) / STD
STD = (0.229, 0.224, 0.225)  # standard deviation of each RGB channel, range 0 to 1 (ImageNet's)


def make_augmentation() -> A.Compose:
    """Return what training changes at random in image and mask alike: any transforms that leave images uint8."""
    mirrored = cv2.BORDER_REFLECT_101
    return A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.Affine(scale=(0.85, 1.15), translate_percent=(-0.06, 0.06), rotate=(-8, 8), border_mode=mirrored, p=0.7),
            A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5),
            A.HueSaturationValue(hue_shift_limit=10, sat_shift_limit=30, val_shift_limit=20, p=0.5),  # hue: of 180
        ]
    )


def image_losses(logits: Tensor, masks: Tensor) -> Tensor:
    """Return each image's loss, (N,), not their mean, from float32 logits and masks (N, 1, H, W).

    Masks are 0 or 1, and nan where pixels are ignored (void): these do not count.
    """
    known, masks = ~masks.isnan(), masks.nan_to_num()
    losses = nn.functional.binary_cross_entropy_with_logits(logits, masks, reduction="none") * known
    losses = losses.flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)
    if DICE_WEIGHT:
        losses = losses + DICE_WEIGHT * soft_dice_losses(logits, masks, known)
    return losses


def soft_dice_losses(logits: Tensor, masks: Tensor, known: Tensor) -> Tensor:
    """Return 1 - Dice of each image, (N,), computed from probabilities, so that it has a gradient.

    All three are (N, 1, H, W). 1 is added to both sides of the fraction, for images without foreground. V-Net's loss
    squares the probabilities below the line: https://arxiv.org/abs/1606.04797
    """
    probabilities, masks, known = (part.flatten(1) for part in (logits.sigmoid(), masks, known))
    hits, predicted, wanted = ((part * known).sum(1) for part in (probabilities * masks, probabilities, masks))
    return 1 - (2 * hits + 1) / (predicted + wanted + 1)


def schedule(progress: float) -> float:
    """Return the learning rate's factor at `progress`, 0 to 1: a linear warm-up for a tenth, then half a cosine."""
    if progress < 0.1:
        return 0.02 + 9.8 * progress
    return (1 + math.cos(math.pi * (progress - 0.1) / 0.9)) / 2


def train_step(state: State, images: Tensor, masks: Tensor, device: Device, s: SimpleNamespace) -> Tensor:
    """Learn from images (N, 3, H, W) and masks (N, 1, H, W) on the device; return the sum of their losses, 0-dim."""
    total = torch.zeros((), device=images.device)
    state.optimizer.zero_grad()
    parts = list(zip(images.chunk(s.accumulation), masks.chunk(s.accumulation), strict=True))
    for number, (some_images, some_masks) in enumerate(parts, start=1):
        with processes.no_sync(state.forward, is_last=number == len(parts)):  # processes add gradients up at the last
            with device.autocast():
                logits = state.forward(some_images)
            loss = image_losses(logits.float(), some_masks).sum()
            state.scaler.scale(loss / len(images)).backward()
        total += loss.detach()
    if s.clip_norm:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), s.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return total


def train_epoch(run: Run, device: Device, s: SimpleNamespace) -> None:
    """Train until the next validation: for an epoch, or for several where photos are few."""
    state = run.state
    state.model.train()
    for images, masks in run.batches():  # uint8; between two batches it may save, or stop after Ctrl-C
        images, masks = device.to(images, masks)  # float32 (N, 3, H, W), normalised; (N, 1, H, W), nan where ignored
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(run.progress)
        loss = train_step(state, images, masks, device, s)
        run.add(loss)


def load_data(s: SimpleNamespace, beginning: Beginning) -> tuple[CarvanaDataset, CarvanaDataset]:
    """Return the training and validation photos. What values mean is the checkpoint's rule, if it has one."""
    size = float(s.scale) if s.crop else (s.image_height, s.image_width)
    dataset = partial(CropDataset, crop=s.crop) if s.crop else CarvanaDataset
    train_set = dataset(s.train_img_dir, s.train_mask_dir, size, make_augmentation(), s.seed, s.mask_suffix)
    val_set = CarvanaDataset(s.val_img_dir, s.val_mask_dir, size, mask_suffix=s.mask_suffix)
    train_set.prepare(s.cache_dir, beginning.rule, s.foreground_values)
    val_set.prepare(s.cache_dir, train_set.rule)
    return train_set, val_set


def new_state(s: SimpleNamespace, device: Device, foreground: float, photos: int, beginning: Beginning) -> State:
    """Return an untrained network, its optimizer and its gradient scaler.

    Args:
        foreground: the masks' mean share of foreground; the network first predicts that everywhere.
        photos: their number in an epoch.
        beginning: the checkpoint that the run continues or starts from. Its network is made here, without its weights.
    """
    torch.manual_seed(s.seed)
    config = beginning.network | {"features": s.features, "encoder": s.encoder, "tile": s.crop}
    model = new_network(config, s.activation_checkpointing, foreground)  # build_network makes it
    shape = (s.batch_size // s.accumulation, 3, s.image_height, s.image_width)
    steps = s.num_epochs * math.ceil(photos / s.batch_size)
    if s.minutes:
        steps = 500 * s.minutes  # a guess, by which COMPILE = "auto" compiles from 10 minutes on
    model, forward = to_device(model, shape, device, s.compile, steps)

    rate = s.learning_rate
    if beginning.is_pretrained:
        rate *= 0.3  # Dice after an epoch was 0.977 with it, 0.962 without (docs/measurements.md)
    optimizer = Muon(muon_groups(model, rate, s.weight_decay))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # which the schedule multiplies
    scaler = torch.amp.GradScaler(device.device.type, enabled=device.precision == torch.float16)
    return State(model, config, forward, optimizer, scaler)


def train(s: SimpleNamespace, load_data: Callable = load_data) -> None:
    """Train, validate and save, with the settings s: the constants by their lower-case names."""
    started = time.monotonic() - (processes.age() if __name__ == "__main__" else 0)  # imports count, too
    device = choose_device(s.device, s.precision, mean=s.mean, std=s.std)
    beginning = Beginning.of(s, load_checkpoint)

    # 1. Data
    train_set, val_set = load_data(s, beginning)
    val_part, show_size = val_set.part_to_validate(s.crop)
    train_loader, val_loader = get_loaders(train_set, val_part, s.batch_size, s.num_workers, device, s.seed)
    # Prints the data report, and draws pictures later
    report = Report(s.saved_images_dir, train_set, val_set, val_part, vars(s), save_predictions_as_imgs)

    # 2. Network and optimizer
    state = new_state(s, device, train_set.infos["foreground"].mean(), len(train_set), beginning)
    state.started = started
    header = beginning.header(s, state.config, train_set, val_set)
    writer = CheckpointWriter(Path(s.checkpoint), header, is_new=not beginning.continued)
    if beginning.has_weights:
        beginning.load_into(state, header)
    elif s.encoder:
        state.model.encoder.load_pretrained(s.encoder_weights)

    # 3. Epochs
    run = Run(state, train_loader, val_loader, writer, report, s)
    check = partial(check_accuracy, val_loader, state.model, device, image_losses, show_size=show_size)
    score = partial(full_size_dice, device=device, batch_size=s.batch_size)
    print(f"Training on {device}; images in a step: {s.batch_size}.")
    update = partial(update_batch_norm, train_loader, 0, state.model, device)
    # For MINUTES it tries these on a few batches, to choose NUM_EPOCHS, and leaves the weights as they are
    run.plan(train=partial(train_epoch, device=device, s=s), update=update, check=check, score=score, val_set=val_set)
    with closing(train_loader), closing(val_loader), run.until_stopped():
        run.print_names(score_names())
        while not run.is_done:
            train_epoch(run, device, s)
            update_batch_norm(train_loader, state.epochs, state.model, device)
            metrics, photo_dice = check(run.pictures())
            run.end_epoch(metrics, photo_dice)

    # 4. Result
    run.print_result(*score(writer.best_path, val_set))


def main(argv: list[str] | None = None, load_data: Callable = load_data) -> None:
    with read_settings(globals(), argv, size_multiple, processes.WORLD_SIZE) as s:  # flags change the constants, too
        advice = (
            f"at BATCH_SIZE {s.batch_size} and {s.image_height} x {s.image_width} pixels: halve BATCH_SIZE or double "
            "ACCUMULATION, set ACTIVATION_CHECKPOINTING = True, or halve height and width"
        )
        with processes.process_group(), reserved(s), memory_errors(advice):
            settle(s, load_checkpoint)
            train(s, load_data)


if __name__ == "__main__":
    run_script(main)

"""What the scripts share: loaders, checkpoints, pixel accuracy / Dice / IoU, saved masks."""

import csv
import errno
import os
import pickle
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
from dataset import NUM_THREADS, Batches, CarvanaDataset, in_threads, large_ones_wait, written_whole
from decoding import VOID, Rule, UserError, decode_mask, enlarge, read_image
from device import Device
from metrics import confusion, dice_at_thresholds, dice_scores, image_scores
from model import UNet
from tiles import pooled

progress = partial(tqdm, leave=False, disable=None if distributed.RANK == 0 else True)  # None: not without a terminal

# ---------------------------------------------------------------------------------------------------------------------
# Loaders


class Loader(DataLoader):
    """A DataLoader whose workers leave the signals that stop a run to the run."""

    def __iter__(self) -> Iterator:
        with distributed.signals_blocked() if self.num_workers else nullcontext():
            return super().__iter__()


def get_loaders(
    train_set: CarvanaDataset,
    val_set: CarvanaDataset,
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    seed: int = 0,
) -> tuple[Loader, Loader]:
    """Loaders for training and validation, of images uint8 (N, H, W, 3) and masks uint8 (N, H, W) in {0, 1, VOID}.

    Batches do not depend on num_workers. Validation photos of different sizes come one by one, and from this process:
    workers would queue whole large photos in shared memory.
    """

    def loader(data: CarvanaDataset, batches: Batches, workers: int) -> Loader:
        options = {"num_workers": workers, "pin_memory": pin_memory, "persistent_workers": workers > 0}
        return Loader(data, batch_sampler=batches, worker_init_fn=distributed.ignore_signals, **options)

    train_loader = loader(train_set, Batches(len(train_set), batch_size, seed), num_workers)
    if isinstance(val_set.size, float):
        return train_loader, loader(val_set, Batches(len(val_set), distributed.WORLD_SIZE), 0)
    return train_loader, loader(val_set, Batches(len(val_set), batch_size), num_workers)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@contextmanager
def saving(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """written_whole that raises UserError where `path` cannot be written."""
    try:
        with written_whole(path, previous) as temporary:
            yield temporary
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        is_too_long = getattr(error, "errno", None) == errno.ENAMETOOLONG
        advice = "shorten the photo's name" if is_too_long else "make room, close what holds it, continue"
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path} could not be written ({reason}): {advice}") from error


def sibling(path: Path, tag: str) -> Path:
    """A file that belongs to a checkpoint: my_checkpoint.pth.tar, "_best" -> my_checkpoint_best.pth.tar"""
    stem, dot, suffixes = path.name.partition(".")
    return path.with_name(f"{stem}{tag}{dot}{suffixes}")


def set_aside(path: Path) -> None:
    """Renames the checkpoints of an earlier run, so that a new one does not overwrite them, and prints a line."""
    if not any(sibling(path, tag).exists() for tag in ("", ".prev", "_best")):
        return
    run = 1
    while any(sibling(path, f"_{run}{tag}").exists() for tag in ("", ".prev", "_best")):
        run += 1
    kept = sibling(path, f"_{run}")
    for tag in ("", ".prev", "_best"):
        if sibling(path, tag).exists():
            sibling(path, tag).replace(sibling(kept, tag))
    print(f"{path} of an earlier run is now {kept} (LOAD_MODEL = True would have continued it).")


def save_checkpoint(state: dict, path: Path, previous: Path | None = None) -> None:
    """Writes a checkpoint, which appears when it is complete; the one before is kept as `previous` if that is given.

    Raises UserError where it cannot be written.
    """
    with saving(path, previous) as temporary:
        torch.save(state, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())


class CheckpointWriter:
    """Writes a run's checkpoints in a thread: training waits only until tensors are copied to the host's memory.

    `header` begins each of them; the newest state goes to `path`, the best weights to its sibling "_best".
    """

    def __init__(self, path: Path, header: dict) -> None:
        self.path, self.header = path, header

    def __enter__(self) -> "CheckpointWriter":
        self.thread, self.pending, self.saved_at = ThreadPoolExecutor(1), None, time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown()

    def save(self, state: object, is_best: bool = False) -> None:
        """Queues what state.state_dict() returns, which is copied now, and the best weights if these are."""
        if distributed.RANK > 0:
            return
        newest = self.header | state.state_dict()
        files = [(newest, self.path, sibling(self.path, ".prev"))]
        if is_best:
            weights = self.header | {name: newest[name] for name in ("state_dict", "epoch", "history")}
            files.insert(0, (weights, sibling(self.path, "_best"), None))
        self.wait()
        self.pending = self.thread.submit(lambda copies: [save_checkpoint(*copy) for copy in copies], _copy(files, {}))
        self.saved_at = time.monotonic()

    def seconds_since_save(self) -> float:
        return time.monotonic() - self.saved_at

    def wait(self) -> None:
        """Waits until everything is written. Raises UserError where that failed."""
        if self.pending:
            self.pending.result()


def _copy(value: object, copies: dict[int, Tensor]) -> object:
    """A copy whose tensors are in the host's memory; one that occurs twice is copied once."""
    if isinstance(value, Tensor):
        if id(value) not in copies:
            copies[id(value)] = value.detach().to("cpu", copy=True)
        return copies[id(value)]
    if isinstance(value, dict):
        return {key: _copy(item, copies) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(item, copies) for item in value)
    return value


def restore_previous(path: Path) -> None:
    """Where a checkpoint is damaged, or missing since a kill fell between two renames, puts the one before there."""
    damage, previous = _damage(path), sibling(path, ".prev")
    if damage and not _damage(previous):
        print(f"{path} {damage}: {previous.name}, the checkpoint before it, takes its place.")
        if path.exists():
            path.replace(sibling(path, ".damaged"))
        previous.replace(path)


FORMAT = 5  # of checkpoints; raise it when their entries change, and tell _upgraded what older ones lack


def checkpoint_header(model: UNet, s: SimpleNamespace, train_set: CarvanaDataset, val_set: CarvanaDataset) -> dict:
    """What each checkpoint of a run with the settings s holds besides its state: enough to predict and to continue."""
    return {
        "format": FORMAT,
        "model": model.config,
        "preprocessing": {"height": s.image_height, "width": s.image_width, "mean": s.mean, "std": s.std}
        | ({"scale": float(s.scale)} if s.crop else {}),
        "rule": asdict(train_set.rule),
        "photo_size": [int(np.median(train_set.infos[name])) for name in ("height", "width")],
        "settings": vars(s),
        "data": {"train": train_set.fingerprint(), "val": val_set.whole.fingerprint()},
    }


def _upgraded(checkpoint: dict) -> dict:
    """A checkpoint of any format as one of today's."""
    lacking = {"format": 1, "photo_dice": [], "computed": checkpoint.get("images", 0), "optimizer_name": "Muon"}
    lacking |= {"rule": asdict(Rule(low=0.0, high=65535.0)), "photo_size": None}
    return lacking | checkpoint


def load_checkpoint(path: Path) -> dict:
    """Reads a checkpoint of train.py onto the CPU: {"state_dict", "model", "preprocessing", "epoch", "history", ...}.

    UNet(**checkpoint["model"]) takes its state_dict. Raises UserError if it is missing, damaged or something else.
    """
    if damage := _damage(path):
        raise UserError(f"{path} {damage}: choose another, or train first")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} could run code, which no checkpoint of train.py does: use another") from error
    except Exception as error:  # torch.load raises many kinds on files of other kinds
        raise UserError(f"{path} is not from this train.py: choose another, or train again") from error
    is_newer = False
    try:
        checkpoint = _upgraded(checkpoint)
        is_newer = checkpoint["format"] > FORMAT
        with torch.device("meta"):
            wanted = UNet(**checkpoint["model"]).state_dict()
        fits = {"height", "width", "mean", "std"} <= checkpoint["preprocessing"].keys() and {
            name: weight.shape for name, weight in checkpoint["state_dict"].items()
        } == {name: weight.shape for name, weight in wanted.items()}
    except (KeyError, TypeError, AttributeError, RuntimeError):
        fits = False
    if is_newer:
        raise UserError(f"{path} has format {checkpoint['format']}, newer than this train.py's: update the repository")
    if not fits:
        raise UserError(f"{path} is not from this train.py: choose another, or train again")
    return checkpoint


def checkpoint_to_continue(s: SimpleNamespace, is_restart: bool) -> dict | None:
    """The checkpoint that this run continues, or None. Raises UserError if these settings do not allow it.

    When torchrun starts the processes again because one has died, `is_restart`, they continue by themselves.
    """
    path = Path(s.checkpoint)
    if is_restart or s.load_model:
        restore_previous(path)
    if not (s.load_model or (is_restart and path.exists())):
        return None
    checkpoint = load_checkpoint(path)
    if not {"optimizer", "scaler", "settings", "data", "images", "losses"} <= checkpoint.keys():
        raise UserError(f"{path} has weights only: set CHECKPOINT to the one without _best in its name")
    newer = {"encoder": None, "crop": None, "scale": 1.0, "dice_weight": 0.0}  # settings, which older checkpoints lack
    before = vars(s) | newer | checkpoint["settings"]
    network = "encoder" if s.encoder or before["encoder"] else "features"  # another encoder has its own MEAN, too
    size = ("crop", "scale") if s.crop or before["crop"] else ("image_height", "image_width")
    fixed = (network, *size, "mean", "std", "foreground_values") if before["encoder"] == s.encoder else (network,)
    if differing := [f"{name.upper()} = {before[name]}" for name in fixed if before[name] != getattr(s, name)]:
        raise UserError(f"{path} was trained with {', '.join(differing)}: set that again, or LOAD_MODEL = False")
    if checkpoint["epoch"] >= s.num_epochs:
        print(f"{path} has {checkpoint['epoch']} epochs already: a larger NUM_EPOCHS continues it.")
    free = ("batch_size", "accumulation", "num_epochs", "learning_rate", "weight_decay", "dice_weight", "clip_norm")
    for name in (*free, "seed", "device", "precision", "num_workers"):
        if before[name] != getattr(s, name):
            print(f"{name.upper()} was {before[name]} and is {getattr(s, name)} from here on.")
    return checkpoint


def adapted(checkpoint: dict, header: dict) -> dict:
    """The checkpoint without what is void with today's photos, masks and seed; prints what that is."""
    data, settings = ([side[name] for side in (header, checkpoint)] for name in ("data", "settings"))
    if data[0]["val"] != data[1]["val"]:
        print("The validation photos have changed: scores before and after do not compare, and a new best is sought.")
        checkpoint |= {"best": -1.0, "photo_dice": []}
    if not sibling(Path(settings[0]["checkpoint"]), "_best").exists():
        checkpoint["best"] = -1.0
    if data[0]["train"] != data[1]["train"]:
        print("The training photos have changed.")
    if data[0]["train"] != data[1]["train"] or settings[0]["seed"] != settings[1]["seed"]:
        if checkpoint["images"]:
            print("The epoch that was cut off begins anew.")
        checkpoint |= {"images": 0, "computed": 0, "losses": {}, "seconds": 0.0}
    print(f"Continuing after {checkpoint['epoch']} epochs and {checkpoint['images']} images of the next.")
    return checkpoint


def _damage(path: Path) -> str | None:
    """What is wrong with the zip file that torch.save has written: torch.load does not look at its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                return "is damaged"
        torch.load(path, "cpu", weights_only=True, mmap=True)  # looks at the rest of the zip file, and reads no weights
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): fix that, or choose another") from error
    except pickle.UnpicklingError:  # of which load_checkpoint says more
        pass
    except Exception:  # zipfile raises many kinds on damaged files
        return "is damaged or no checkpoint"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def full_size_dice(loader: Loader, model: nn.Module, device: Device) -> tuple[float, float, float]:
    """The mean Dice of all validation photos at their original size, as predict.py --mask-dir measures it.

    Returns it at threshold 0.5, the best of 19 thresholds, and the mean Dice at that.
    """
    model.eval()
    data, size = loader.dataset.whole, loader.batch_sampler.size
    mine = [batch[distributed.shard(len(batch))] for batch in Batches(len(data), size).batches()]
    depth = 2 if isinstance(data.size, float) else 2 * NUM_THREADS  # such photos are large: few wait

    def read(indices: list[int]) -> tuple[list[int], list[np.ndarray]]:
        return indices, [data.sample(index)[0] for index in indices]

    def predicted() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        decoded = in_threads(pool, depth, read, ((indices,) for indices in mine if indices))
        for future in progress(decoded, desc="at original size", unit="batch", total=len(mine)):
            indices, images = future.result()
            with torch.inference_mode(), device.autocast():
                logits = model(device.normalised(torch.from_numpy(np.stack(images))))
            yield from zip(indices, images, logits[:, 0].float().cpu().numpy(), strict=True)

    def dice(index: int, image: np.ndarray, logits: np.ndarray) -> np.ndarray:
        image_path, mask_path = data.pairs[index]
        with large_ones_wait(image_path):
            prediction = enlarge(logits, image, image if data.size == 1 else read_image(image_path, None, data.rule))
            mask = decode_mask(mask_path, None, data.rule)[0]
            return dice_at_thresholds(prediction, mask == 1, mask != VOID)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        total = sum((future.result() for future in in_threads(pool, depth, dice, predicted())), np.zeros(19))
    means = distributed.all_reduce_sum(torch.from_numpy(total)).numpy() / len(data)
    best = max(range(len(means)), key=lambda number: (means[number], -abs(number - 9)))
    return means[9], (best + 1) / 20, means[best]


@torch.inference_mode()
def check_accuracy(
    loader: Loader,
    model: nn.Module,
    device: Device,
    image_losses: Callable[[Tensor, Tensor], Tensor],
    show: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[dict[str, float], list[float]]:
    """Validates: returns the images' mean "val_loss" and image_scores, and each image's Dice.

    The model's weights and BatchNorm statistics stay as they are, and so does its mode.

    Args:
        image_losses: train.py's, logits and masks (N, 1, H, W) -> (N,).
        show: called with every batch's logits, float32 (N, 1, H, W) on the device, reduced to the loader's
            `dataset.shown` if that is a size, and with each image's Dice, (N,).
    """
    was_training, shown = model.training, loader.dataset.shown
    model.eval()
    losses, counts = [], []  # stay on the device until the end
    with progress(total=loader.batch_sampler.length, desc="validating", unit="img") as bar:
        for indices, (images, masks) in zip(loader.batch_sampler.batches(), loader, strict=True):
            distributed.stop_if_asked()
            images, masks = device.to(images, masks)
            with device.autocast():
                logits = model(images)
            logits = logits.float()
            mine = slice(len(indices[distributed.shard(len(indices))]))
            batch_losses = image_losses(logits, masks)
            batch_counts = torch.stack(confusion(logits > 0, masks > 0, ~masks.isnan()), 1)  # sigmoid(logits) > 0.5
            losses.append(distributed.all_gather(batch_losses[mine], len(indices)))
            counts.append(distributed.all_gather(batch_counts[mine], len(indices)))
            if show or distributed.WORLD_SIZE > 1:
                logits = pooled(logits, shown) if shown else logits
                logits = distributed.all_gather(logits[mine], len(indices))
            if show:
                show(logits, dice_scores(*counts[-1].T[:3]))
            if len(losses) % 10 == 1:
                bar.set_postfix(loss=f"{losses[-1].mean().item():.4f}", refresh=False)
            bar.update(len(indices))
    model.train(was_training)

    tp, fp, fn, tn = torch.cat(counts).cpu().double().T
    scores = {"val_loss": torch.cat(losses).cpu().double()} | image_scores(tp, fp, fn, tn)
    predicted, foreground = ((part / (tp + fp + fn + tn)).nanmean().item() for part in (tp + fp, tp + fn))
    if predicted in (0, 1):
        print(
            f"WARNING: it predicts {('background', 'foreground')[int(predicted)]} for every pixel, and "
            f"{100 * foreground:.1f} % of the validation masks are foreground: raise NUM_EPOCHS; objects of a few "
            "pixels need crops (docs/crops.md)"
        )
    return {name: score.mean().item() for name, score in scores.items()}, scores["dice"].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves to look at


def save_predictions_as_imgs(predictions: np.ndarray, masks: np.ndarray, batch: int, folder: Path) -> None:
    """Saves a batch's predictions, bool (N, H, W), as pred_<batch>.png, and true masks, uint8, as <batch>.png."""
    save_grid(predictions * np.uint8(255), folder / f"pred_{batch}.png")
    save_grid(masks, folder / f"{batch}.png")


def save_grid(pictures: np.ndarray, path: Path) -> None:
    """Saves pictures, uint8 (N, H, W) or (N, H, W, 3), in 4 columns with grey lines between them as one PNG."""
    count, height, width = pictures.shape[:3]
    columns, rows = min(4, count), -(-count // 4)
    grid = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, *pictures.shape[3:]), 128, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = 2 + number // 4 * (height + 2), 2 + number % 4 * (width + 2)
        grid[top : top + height, left : left + width] = picture
    with saving(path) as temporary:
        Image.fromarray(grid).save(temporary, "PNG", compress_type=3)  # run lengths: faster


def save_metrics(rows: list[dict], path: Path) -> None:
    """Writes metrics.csv, a row for each epoch, or scores.csv, a row for each photo. Rows may lack newer columns."""
    table = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}  # a name may be no text
    with saving(path) as temporary, temporary.open("w", **table) as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)

"""What the scripts share: settings, loaders, checkpoints, pixel accuracy / Dice / IoU, saved pictures."""

import argparse
import copy
import csv
import ctypes
import os
import pickle
import re
import signal
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from operator import itemgetter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from torchvision.utils import save_image
from tqdm import tqdm

import distributed
from dataset import CarvanaDataset, UserError, car_of, read_image, read_mask, written_whole
from model import UNet

# ---------------------------------------------------------------------------------------------------------------------
# Settings


def run(main: Callable[[], None]) -> None:
    """Calls a script's main; a user's error ends it with one line and exit status 1, a signal with 128 + its number."""
    status, message = 0, ""
    wait = 10 if distributed.RANK else 0  # seconds: most errors are everyone's, and the first process is to say it
    try:
        main()
    except Stopped as stopped:
        status, wait = 128 + stopped.signal, 0
    except UserError as error:  # from a DataLoader's worker it arrives with the worker's traceback before it
        status, message = 1, "error: " + str(error).splitlines()[-1].removeprefix("dataset.UserError: ")
        if isinstance(error, distributed.Lost):  # the one that was lost may still want to say why
            print(message, file=sys.stderr, flush=True)
            message, wait = "", 20
    except KeyboardInterrupt:
        status = 130
    except Exception:
        status, message = 1, traceback.format_exc()
    # Here the exception is gone, and with it the DataLoader that its frames held, and its workers
    if status:
        time.sleep(wait)  # during which torchrun ends this process, if another one has ended
    if message:
        print(message, file=sys.stderr)
    distributed.exit_(status)


class Stopped(Exception):
    """A signal asked the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_signals: list[int] = []  # that have arrived and wait for stop_if_asked


@contextmanager
def signals_wait() -> Iterator[None]:
    """Within it Ctrl-C, SIGTERM and SIGUSR1 (Slurm's warning) wait for stop_if_asked; a second Ctrl-C ends at once."""

    def note(number: int, _: object) -> None:
        if _signals and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        _signals.append(number)
        os.write(2, b"\nStopping after this step; Ctrl-C again ends at once.\n")  # print is not safe in a handler

    handlers = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield
    finally:
        _signals.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def stop_if_asked() -> None:
    """Raises Stopped if a signal is waiting in any process. Called between two batches, where the state is whole."""
    if number := distributed.highest(_signals[0] if _signals else 0):
        raise Stopped(number)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (python {self.prog} --help shows all flags)")


def parse_settings(constants: dict, argv: list[str] | None = None) -> SimpleNamespace:
    """Makes every upper-case constant of a script a flag of the same name: IMAGE_HEIGHT = 160 is --image-height 160.

    Args:
        constants: the script's globals(). A constant's type is its flag's, and the comment beside it is the help. One
            that is annotated with None (X: str | None = "a") takes "none" as a value.
        argv: the command line, sys.argv[1:] by default.

    Returns the settings by lower-case name. Raises UserError for an unknown flag and a value of the wrong type.
    """
    source = Path(constants["__file__"])
    lines = re.findall(r"^([A-Z_]+)(: .*None)? = .*?  # (.*)$", source.read_text(encoding="utf-8"), re.MULTILINE)
    comments = {name: comment for name, _, comment in lines}
    may_be_none = {name.lower() for name, annotation, _ in lines if annotation}
    parser = Parser(source.name, description=constants["__doc__"].splitlines()[0], allow_abbrev=False)
    for name, default in constants.items():
        if not name.isupper() or isinstance(default, ModuleType):
            continue
        if isinstance(default, list | Path):
            default = tuple(default) if isinstance(default, list) else str(default)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        options = {"default": default, "help": f"{comments.get(name, '')} [{shown}]".replace("%", "%%")}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            options |= {"type": type((*default, 0)[0]), "nargs": "+", "metavar": "N"}
        else:
            options |= {"type": str if default is None else type(default), "metavar": name.split("_")[-1]}
        parser.add_argument("--" + name.lower().replace("_", "-"), **options)
    settings = vars(parser.parse_args(argv))
    for name, value in settings.items():
        if isinstance(value, list):
            settings[name] = tuple(value)
        elif str(value).lower() == "none" and name in may_be_none:
            settings[name] = None
    return SimpleNamespace(**settings)


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA, else Apple's MPS, else the CPU. Raises UserError if it is not there.

    CUDA's devices have an index. Under torchrun "cuda" and "auto" give each process of a machine a GPU of its own; MPS
    is for one process. Where "auto" finds a GPU that cannot compute, it says why and takes the CPU.
    """
    alone, wanted = distributed.WORLD_SIZE == 1, name
    if name == "auto":
        has_mps = torch.backends.mps.is_available() and alone
        wanted = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if not alone and wanted not in ("cpu", "cuda"):
        raise UserError(f'DEVICE {name} is one for all processes: set it to "cuda" (a GPU for each) or "cpu"')
    if not alone and wanted == "cuda" and not torch.distributed.is_nccl_available():
        raise UserError('processes on GPUs need NCCL, which this PyTorch lacks: set DEVICE to "cpu", or use Linux')
    if wanted == "cuda":
        wanted = f"cuda:{distributed.LOCAL_RANK}"
        if 0 < torch.cuda.device_count() <= distributed.LOCAL_RANK:
            raise UserError(f"there are {torch.cuda.device_count()} GPUs here: set --nproc_per_node to that")
    try:
        device = torch.device(wanted)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("only cpu, cuda and mps are supported")
        image = torch.ones(1, 1, 4, 4, device=device)
        F.conv2d(image, image)  # memory is to be had on GPUs for which this PyTorch has no kernels, too
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        if name != "auto":
            raise UserError(f'DEVICE {name} cannot be used here ({reason}): set it to "auto", or "cpu"') from error
    print(f"{wanted} cannot be used ({reason}): the CPU computes.")
    return torch.device("cpu")


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The type in which autocast computes: "bf16", "fp16" or "fp32"; "auto" is the fastest that the hardware has.

    A CPU without bf16 instructions would emulate them, slower than fp32.
    """
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
        elif device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
            name = "bf16"
        else:
            name = "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def choose_num_workers(number: int, device: torch.device) -> int:
    """-1 is none beside a CPU that computes (a cached sample takes 1 ms of its 500), else one a core, 8 at most.

    The processes that torchrun starts on a machine divide its cores among them.
    """
    if number >= 0:
        return number
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 0 if device.type == "cpu" else max(1, min(8, cores // distributed.LOCAL_WORLD_SIZE))


def tune(device: torch.device, precision: torch.dtype) -> None:
    """Switches of the whole process that make training on the device faster."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = precision != torch.float32  # fp32 is to mean fp32
        torch.backends.cudnn.benchmark = True  # tries convolution algorithms: all batches but the last have one shape
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc gives large tensors back to the system, and every step would fault all their pages in again: 8 % slower
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def should_compile(setting: str, device: torch.device, steps: int) -> bool:
    """Whether COMPILE means torch.compile in a run of so many steps; "auto": if one process takes 5,000 on CUDA.

    Compiling takes about a minute, in which a large GPU takes thousands of steps. The steps are those of the whole run,
    so that continuing computes alike.
    """
    return setting == "yes" or (
        setting == "auto" and device.type == "cuda" and distributed.WORLD_SIZE == 1 and steps >= 5000
    )


def compile_model(model: nn.Module, shape: tuple, device: torch.device, precision: torch.dtype) -> Callable:
    """torch.compile's version of the model after a trial on zeros of that shape; where that fails the model itself."""
    compiled = torch.compile(model)
    try:
        rehearse(compiled, model, shape, device, precision)
    except Exception as error:  # from a missing compiler to a bug in it
        print(f"torch.compile failed ({' '.join(str(error).split()[:30])}): going on without it.")
        return model
    return compiled


def rehearse(forward: Callable, model: nn.Module, shape: tuple, device: torch.device, precision: torch.dtype) -> None:
    """A forward and a backward pass on zeros of that shape; the model is as before."""
    before = copy.deepcopy(model.state_dict())  # BatchNorm's statistics will move
    try:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = forward(torch.zeros(shape, device=device).contiguous(memory_format=memory_format(device)))
        logits.float().sum().backward()
    finally:
        model.load_state_dict(before)
        model.zero_grad()


def memory_format(device: torch.device) -> torch.memory_format:
    """channels_last, in which CPU and CUDA convolve fastest; on MPS BatchNorm's backward pass is wrong with it.

    https://github.com/pytorch/pytorch/issues/175189
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def to_device(images: Tensor, masks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A loader's batch on the device: images (N, 3, H, W), and masks (N, 1, H, W) to compare with logits."""
    is_cuda = device.type == "cuda"  # only from pinned memory is it safe to go on before the copy is done
    images = images.to(device, non_blocking=is_cuda, memory_format=memory_format(device))
    return images, masks.to(device, non_blocking=is_cuda).unsqueeze(1)


progress = partial(tqdm, leave=False, disable=None if distributed.RANK == 0 else True)  # None: not without a terminal


# ---------------------------------------------------------------------------------------------------------------------
# Loaders


class Batches(Sampler):
    """Yields batches of (epoch, index), in an order that depends on (seed, epoch) alone, or as they are without a seed.

    Under torchrun: this process's share of them, filled up to the size of the others' with an image that is to count in
    BatchNorm only.

    Set `epoch`, and `start` to skip so many images.
    """

    def __init__(self, length: int, size: int, seed: int | None = None) -> None:
        self.length, self.size, self.seed, self.epoch, self.start = length, size, seed, 0, 0

    def __len__(self) -> int:
        return -(-(self.length - self.start) // self.size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for indices in self.batches():
            mine = indices[distributed.share(len(indices))]
            largest = -(-len(indices) // distributed.WORLD_SIZE)
            yield [(self.epoch, index) for index in mine + indices[:1] * (largest - len(mine))]

    def batches(self) -> list[list[int]]:
        """All processes' images that are left of this epoch."""
        order = list(range(self.length))
        if self.seed is not None:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length).tolist()
        return [order[start : start + self.size] for start in range(self.start, self.length, self.size)]


class Loader(DataLoader):
    """A DataLoader whose workers outlive the signals that stop a run, from their first moment: they are still needed.

    Ctrl-C, and often SIGTERM, reach every process of a run. Signals that come while a worker starts wait until it has
    its handlers.
    """

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options, worker_init_fn=_leave_signals_to_the_run)

    def __iter__(self) -> Iterator:
        if not hasattr(signal, "pthread_sigmask"):  # on Windows, where signals reach one process
            return super().__iter__()
        resource_tracker.ensure_running()  # it unblocks signals when it starts, which spawn and forkserver make it do
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # any start method hands this on to the workers
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_run(_: int) -> None:
    """A second SIGTERM ends a worker: it is PyTorch's, or multiprocessing's when the run is over."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def get_loaders(
    train_img_dir: Path,
    train_mask_dir: Path,
    val_img_dir: Path,
    val_mask_dir: Path,
    size: tuple[int, int],
    batch_size: int,
    train_transform: Callable,
    val_transform: Callable,
    num_workers: int = 0,
    pin_memory: bool = False,
    seed: int = 0,
    cache_dir: Path | None = None,
) -> tuple[DataLoader, DataLoader]:
    """Loaders for training and validation, of images float32 (N, 3, H, W) and masks float32 (N, H, W) in {0, 1}.

    Prints what was found. Batches do not depend on num_workers. Raises UserError for anything wrong with the files.
    """
    train_set = CarvanaDataset(train_img_dir, train_mask_dir, size, train_transform, seed)
    val_set = CarvanaDataset(val_img_dir, val_mask_dir, size, val_transform, seed)
    for data in (train_set, val_set):
        data.prepare(cache_dir)
    print(describe(train_set, val_set))
    options = {
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        "persistent_workers": num_workers > 0,
    }
    train_loader = Loader(train_set, batch_sampler=Batches(len(train_set), batch_size, seed), **options)
    return train_loader, Loader(val_set, batch_sampler=Batches(len(val_set), batch_size), **options)


def describe(train: CarvanaDataset, val: CarvanaDataset) -> str:
    """What two prepared sets hold, a line each, and a line for everything that smells of a mistake."""
    lines = ["set    pairs  photos                      foreground min, median, max     empty masks"]
    for name, data in (("train", train), ("val", val)):
        sizes = sorted({(width, height) for height, width in data.infos[["height", "width"]].tolist()})
        photos = " to ".join(f"{width} x {height}" for width, height in sizes[:: max(1, len(sizes) - 1)])
        foreground, border = data.infos["foreground"], data.infos["border"]
        shares = ", ".join(f"{100 * share:.1f} %" for share in np.quantile(foreground, (0, 0.5, 1)))
        lines.append(f"{name:5}  {len(data):5}  {photos:26}  {shares:30}  {(foreground == 0).sum():11}")
        if foreground.max() < 0.001:
            lines.append(f"WARNING: no mask in {data.mask_dir} covers 0.1 % of its photo: are these the right masks?")
        elif foreground.min() > 0.99:
            lines.append(f"WARNING: every mask in {data.mask_dir} covers over 99 % of its photo: are these right?")
        elif np.median(foreground) > 0.5 and np.median(border) > 0.5:
            lines.append(f"WARNING: masks in {data.mask_dir} look inverted: the object must be white, the rest black")

    cars = [{car_of(image) for image, _ in data.pairs} - {None} for data in (train, val)]
    if both := cars[0] & cars[1]:
        lines.append(
            f"WARNING: cars in both sets: {len(both)}, such as {min(both)}: scores will flatter (split_data.py)"
        )
    known = set(train.infos["checksum"].tolist())
    copies = [image for (image, _), info in zip(val.pairs, val.infos, strict=True) if int(info["checksum"]) in known]
    if copies:
        lines.append(f"WARNING: photos in both sets: {len(copies)}, such as {copies[0]}: scores will flatter")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@contextmanager
def saving(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """written_whole that raises UserError where `path` cannot be written."""
    try:
        with written_whole(path, previous) as temporary:
            yield temporary
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} could not be written ({reason}): make room, close what holds it, continue") from error


def sibling(path: Path, tag: str) -> Path:
    """A file that belongs to a checkpoint: my_checkpoint.pth.tar, "_best" -> my_checkpoint_best.pth.tar"""
    stem, dot, suffixes = path.name.partition(".")
    return path.with_name(f"{stem}{tag}{dot}{suffixes}")


def set_aside(path: Path) -> None:
    """Renames the checkpoints of an earlier run, so that a new one does not overwrite them, and prints a line."""
    if not any(sibling(path, tag).exists() for tag in ("", ".prev", "_best")):
        return
    number = 1
    while any(sibling(path, f"_{number}{tag}").exists() for tag in ("", ".prev", "_best")):
        number += 1
    kept = sibling(path, f"_{number}")
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
    """Writes checkpoints in a thread: training waits only until their tensors are copied to the host's memory."""

    def __enter__(self) -> "CheckpointWriter":
        self.thread, self.pending, self.saved_at = ThreadPoolExecutor(1), None, time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown()

    def save(self, files: list[tuple[dict, Path, Path | None]]) -> None:
        """Has save_checkpoint called with each of these, in order."""
        self.wait()
        self.pending = self.thread.submit(lambda copies: [save_checkpoint(*copy) for copy in copies], _copy(files, {}))
        self.saved_at = time.monotonic()

    def seconds_since_save(self) -> float:
        return time.monotonic() - self.saved_at

    def wait(self) -> None:
        """Until everything is written. Raises UserError where that failed."""
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
    try:
        with torch.device("meta"):
            wanted = UNet(**checkpoint["model"]).state_dict()
        itemgetter("height", "width", "mean", "std")(checkpoint["preprocessing"])
        fits = {name: weight.shape for name, weight in checkpoint["state_dict"].items()} == {
            name: weight.shape for name, weight in wanted.items()
        }
    except (KeyError, TypeError, AttributeError, RuntimeError):
        fits = False
    if not fits:
        raise UserError(f"{path} is not from this train.py: choose another, or train again")
    return checkpoint


def _damage(path: Path) -> str | None:
    """What is wrong with the zip file that torch.save has written: torch.load does not look at its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "is damaged" if archive.testzip() else None
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend that, or choose another") from error
    except Exception:  # zipfile raises many kinds on damaged files
        return "is damaged or no checkpoint"


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def confusion(predictions: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two bool (N, ...) -> true positives, false positives, false negatives, true negatives per image, int64 (N,)."""
    predictions, masks = predictions.flatten(1), masks.flatten(1)
    hits, predicted, wanted = (predictions & masks).sum(1), predictions.sum(1), masks.sum(1)
    return hits, predicted - hits, wanted - hits, masks.shape[1] - predicted - wanted + hits


def dice_scores(tp: Tensor, fp: Tensor, fn: Tensor) -> Tensor:
    """Dice of each image, 2|X∩Y| / (|X| + |Y|), and 1 where both are empty: the challenge's score is its mean.

    https://www.kaggle.com/c/carvana-image-masking-challenge/overview/evaluation
    """
    return torch.where(tp + fp + fn == 0, 1.0, 2 * tp / (2 * tp + fp + fn))


def iou_scores(tp: Tensor, fp: Tensor, fn: Tensor) -> Tensor:
    """Intersection over union of each image (Jaccard's index), and 1 where both are empty."""
    return torch.where(tp + fp + fn == 0, 1.0, tp / (tp + fp + fn))


def boundary_f1(prediction: np.ndarray, mask: np.ndarray) -> float:
    """F1 of two masks' boundaries, uint8 (H, W) that are foreground where they are not 0; 1 where both have none.

    Precision is the share of the predicted boundary that lies within 0.75 % of the diagonal (17 pixels of a Carvana
    photo) of the true one, recall the reverse: Csurka, Larlus, Perronnin and Meylan, "What is a good evaluation measure
    for semantic segmentation?", BMVC 2013.
    """
    tolerance = 0.0075 * np.hypot(*mask.shape)
    masks = ((pixels > 0).astype(np.uint8) for pixels in (prediction, mask))
    outlines = [pixels - cv2.erode(pixels, np.ones((3, 3), np.uint8)) for pixels in masks]
    if not all(outline.any() for outline in outlines):
        return float(not any(outline.any() for outline in outlines))
    x, y, width, height = cv2.boundingRect(outlines[0] | outlines[1])
    predicted, true = (outline[y : y + height, x : x + width] for outline in outlines)
    near_predicted, near_true = (
        cv2.distanceTransform(1 - outline, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= tolerance
        for outline in (predicted, true)
    )
    precision, recall = near_true[predicted > 0].mean(), near_predicted[true > 0].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def enlarge(logits: np.ndarray, image: np.ndarray, photo: np.ndarray) -> np.ndarray:
    """Probabilities at a photo's own size, float32 (H, W), whose edges follow the photo's.

    A fast guided filter (He and Sun 2015, https://arxiv.org/abs/1505.00996): over 5 x 5 pixels of the network each, the
    probabilities are fitted by a linear function of the brightness, which is enlarged, and applied to the photo. The
    quick start's mean Dice is 0.9852 with it, 0.9811 with logits enlarged linearly, 0.9800 with masks enlarged. Photos
    of less than twice the network's size would lose by it, and get their logits enlarged linearly.

    Args:
        logits, image: the network's output float32 (h, w), and its input uint8 (h, w, 3).
        photo: uint8 (H, W, 3).
    """
    if photo.size < 4 * image.size:
        enlarged = cv2.resize(logits, photo.shape[1::-1]) if image.shape != photo.shape else logits
        return torch.from_numpy(enlarged).sigmoid().numpy()
    probabilities = torch.from_numpy(logits).sigmoid().numpy()
    mean = partial(cv2.blur, ksize=(5, 5))
    brightness = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    variance = mean(brightness**2) - mean(brightness) ** 2
    covariance = mean(brightness * probabilities) - mean(brightness) * mean(probabilities)
    slope = covariance / (variance + 15)  # 15 is a standard deviation of 4 of 255: what varies less is no edge
    offset = mean(probabilities) - slope * mean(brightness)

    enlarged = cv2.resize(mean(slope), photo.shape[1::-1])
    brightness = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)
    enlarged *= cv2.GaussianBlur(brightness, (5, 5), 0)  # without its grain, which would fray the edges
    enlarged += cv2.resize(mean(offset), photo.shape[1::-1])
    return enlarged.clip(0, 1, out=enlarged)  # in place: a large photo has large arrays


@torch.inference_mode()
def full_size_dice(loader: Loader, model: nn.Module, device: torch.device, precision: torch.dtype) -> float:
    """The mean Dice over a loader's pairs at the photos' own size, as predict.py --mask-dir measures it."""
    model.eval()
    scores, data = [], loader.dataset
    with_progress = progress(loader, desc="at full size", unit="batch")
    for indices, (images, masks) in zip(loader.batch_sampler.batches(), with_progress, strict=True):
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = model(to_device(images, masks, device)[0])
        mine = indices[distributed.share(len(indices))]
        for index, photo_logits in zip(mine, logits[:, 0].float().cpu().numpy(), strict=False):
            image_path, mask_path = data.pairs[index]
            prediction = enlarge(photo_logits, data.sample(index)[0], read_image(image_path)) > 0.5
            truth = read_mask(mask_path) > 0
            tp, fp, fn, _ = confusion(torch.from_numpy(prediction)[None], torch.from_numpy(truth)[None])
            scores.append(dice_scores(tp, fp, fn).item())
    return distributed.sum_(torch.tensor(sum(scores), dtype=torch.float64)).item() / len(data)


@torch.inference_mode()
def check_accuracy(
    loader: Loader,
    model: nn.Module,
    device: torch.device,
    precision: torch.dtype,
    show: Callable[[Tensor, Tensor], None] | None = None,
) -> dict[str, float | list[float]]:
    """Validates: {"val_loss", "pixel_accuracy", "dice", "iou", "predicted", "photo_dice"}.

    All but the last are means over the loader's images. "predicted" is the share of pixels that are predicted as
    foreground, "photo_dice" each image's Dice. The model's weights and BatchNorm statistics stay as they are, and so
    does its mode. `show` gets every batch as it passes: logits and masks float32 (N, 1, H, W) on the device.
    """
    was_training = model.training
    model.eval()
    losses, counts = [], []  # stay on the device until the end
    with progress(total=len(loader.dataset), desc="validating", unit="img") as bar:
        for indices, (images, masks) in zip(loader.batch_sampler.batches(), loader, strict=True):
            stop_if_asked()
            images, masks = to_device(images, masks, device)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                logits = model(images)
            mine = len(indices[distributed.share(len(indices))])
            both = torch.cat((logits.float(), masks), dim=1)[:mine]
            logits, masks = distributed.gather(both, len(indices)).split(1, dim=1)
            losses.append(F.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean((1, 2, 3)))
            counts.append(torch.stack(confusion(logits > 0, masks > 0)))  # sigmoid(logits) > 0.5
            if show:
                show(logits, masks)
            if len(losses) % 10 == 1:
                bar.set_postfix(loss=f"{losses[-1].mean().item():.4f}", refresh=False)
            bar.update(len(masks))
    model.train(was_training)

    tp, fp, fn, tn = torch.cat(counts, dim=1).cpu().double()
    photo_dice = dice_scores(tp, fp, fn)
    return {
        "val_loss": torch.cat(losses).mean().item(),
        "pixel_accuracy": ((tp + tn) / (tp + fp + fn + tn)).mean().item(),
        "dice": photo_dice.mean().item(),
        "iou": iou_scores(tp, fp, fn).mean().item(),
        "predicted": ((tp + fp) / (tp + fp + fn + tn)).mean().item(),
        "photo_dice": photo_dice.tolist(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves to look at


def save_predictions_as_imgs(predictions: Tensor, masks: Tensor, number: int, folder: Path) -> None:
    """Saves a batch's predictions as pred_<number>.png and the truth as <number>.png, (N, 1, H, W) in 4 columns."""
    for name, batch in ((f"pred_{number}.png", predictions), (f"{number}.png", masks)):
        with saving(folder / name) as temporary:
            save_image(batch.float(), temporary, format="png", nrow=4, pad_value=0.5)


def save_metrics(history: list[dict], path: Path) -> None:
    """Writes metrics.csv, a row for each epoch, or scores.csv, a row for each photo."""
    with saving(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)

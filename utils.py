"""Loaders, checkpoints, pixel accuracy / Dice / IoU and saved masks, for training and prediction."""

import atexit
import multiprocessing
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dataset import Batches, CarvanaDataset
from machinery import checkpoints, processes
from machinery.decoding import VOID
from machinery.device import Device, choose_num_workers
from machinery.errors import UserError
from machinery.processes import progress
from machinery.report import pooled, save_grid
from model import build_network

# ---------------------------------------------------------------------------------------------------------------------
# Loaders


class Loader(DataLoader):
    """A DataLoader. A signal stops the run between two batches; workers ignore it, and close() ends them."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.num_workers and not self._iterator:
            loader = weakref.ref(self)
            atexit.register(lambda: loader() and loader().close())  # else Python would wait for its workers for ever
        with processes.signals_blocked() if self.num_workers else nullcontext():
            batches = self._started()
        for batch in batches:
            processes.stop_if_asked()
            yield batch

    def _started(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Start the workers. Raises UserError where the system starts no more processes."""
        try:
            return super().__iter__()
        except OSError as error:
            for worker in multiprocessing.active_children():  # those that it has started ignore milder signals
                worker.kill()
            advice = "set NUM_WORKERS lower, or to 0"
            raise UserError(f"{self.num_workers} workers cannot be started ({error.strerror}): {advice}") from error

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from the image at position `start` on.

        What a network draws for a batch (dropout) depends on (seed, epoch, position), as augmentation does: a run that
        continues draws the same.
        """
        self.batch_sampler.set_epoch(epoch, start)
        for number, batch in enumerate(self):
            position = start + number * self.batch_sampler.size
            torch.manual_seed(hash((self.batch_sampler.seed, epoch, position, processes.RANK)))
            yield batch

    def close(self) -> None:
        """End the workers, also where an error has left them in the middle of an epoch."""
        batches, self._iterator = self._iterator, None
        if batches:
            batches._shutdown_workers()  # asks them to end, and waits for a few seconds
            for worker in batches._workers:
                worker.kill()


def get_loaders(
    train_set: CarvanaDataset,
    val_set: CarvanaDataset,
    batch_size: int,
    num_workers: int = 0,
    device: Device | None = None,
    seed: int = 0,
) -> tuple[Loader, Loader]:
    """Return loaders for training and validation, of images uint8 (N, H, W, 3) and masks uint8 (N, H, W).

    Masks hold 0, 1 and VOID. num_workers does not change the batches; -1 chooses a number for the device. Validation
    photos of different sizes come one by one, and from this process: workers would queue large photos in shared memory.
    """
    if device:
        num_workers = choose_num_workers(num_workers, device)
    is_cuda = device is not None and device.device.type == "cuda"

    def loader(data: CarvanaDataset, batches: Batches, workers: int) -> Loader:
        options = {"num_workers": workers, "pin_memory": is_cuda, "persistent_workers": workers > 0}
        return Loader(data, batch_sampler=batches, worker_init_fn=processes.ignore_signals, **options)

    train_loader = loader(train_set, Batches(len(train_set), batch_size, seed), num_workers)
    if isinstance(val_set.size, float):
        return train_loader, loader(val_set, Batches(len(val_set), processes.WORLD_SIZE), 0)
    return train_loader, loader(val_set, Batches(len(val_set), batch_size), num_workers)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(state: dict, path: Path) -> None:
    """Write a checkpoint, which appears when it is complete. Raises UserError where it cannot be written."""
    checkpoints.save(state, Path(path))


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint of train.py onto the CPU: {"state_dict", "model", "preprocessing", "epoch", "history", ...}.

    build_network(checkpoint["model"]) takes its state_dict. Raises UserError if it is missing, damaged or something
    else.
    """
    return checkpoints.load(Path(path), build_network)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def confusion(predictions: Tensor, masks: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count the true positives, false positives, false negatives and true negatives of each image, int64 (N,).

    All three are bool (N, ...). Only pixels that are `known`, not void (ignored pixels), count.
    """
    predictions, masks, known = ((part & known).flatten(1) for part in (predictions, masks, known))
    hits, predicted, wanted = (predictions & masks).sum(1), predictions.sum(1), masks.sum(1)
    return hits, predicted - hits, wanted - hits, known.sum(1) - predicted - wanted + hits


def image_scores(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> dict[str, Tensor]:
    """Return the scores of each image, (N,), from its counts. A new metric is a line here.

    Their means appear on the console, in metrics.csv, in the curves, on the page and in predict.py's scores. A metric
    needs a value wherever its denominator is 0 (no foreground, no background): one nan makes the mean nan.
    """
    return {
        "pixel_accuracy": torch.where(tp + fp + fn + tn == 0, 1.0, (tp + tn) / (tp + fp + fn + tn)),
        "dice": dice_scores(tp, fp, fn),
        "iou": iou_scores(tp, fp, fn),
    }


def score_names() -> list[str]:
    """Return the names of image_scores, in their order."""
    return list(image_scores(*torch.zeros(4, 1)))


def dice_scores(tp: Tensor, fp: Tensor, fn: Tensor) -> Tensor:
    """Return each image's Dice, 2|X∩Y| / (|X| + |Y|), and 1 where both are empty: the challenge's score is its mean.

    https://www.kaggle.com/c/carvana-image-masking-challenge/overview/evaluation
    """
    return torch.where(tp + fp + fn == 0, 1.0, 2 * tp / (2 * tp + fp + fn))


def iou_scores(tp: Tensor, fp: Tensor, fn: Tensor) -> Tensor:
    """Return each image's intersection over union (Jaccard's index), and 1 where both are empty."""
    return torch.where(tp + fp + fn == 0, 1.0, tp / (tp + fp + fn))


def dice_at_thresholds(probabilities: np.ndarray, mask: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return Dice of probabilities, float32 (H, W), at the thresholds 0.05, 0.1, ..., 0.95: float64 (19,).

    The mask and what is `known` of it are bool (H, W).
    """
    counts = np.zeros((2, 21))  # of all pixels and of the foreground's, by the number of thresholds that they pass
    for start in range(0, len(mask), 256):  # because calcHist counts in float32, and floats of a large photo are large
        rows = slice(start, start + 256)
        levels = np.ceil(20 * probabilities[rows]).astype(np.uint8)
        for row, pixels in zip(counts, (known[rows], (mask & known)[rows]), strict=True):
            row += cv2.calcHist([levels], [0], pixels.view(np.uint8), [21], [0, 21]).ravel()
    at_least = counts[:, ::-1].cumsum(1)[:, ::-1]  # element k: how many pixels pass k thresholds or more
    predicted, hits = at_least[:, 2:]  # level 2 is above 0.05, level 20 above 0.95
    total = predicted + counts[1].sum()
    return np.where(total == 0, 1.0, 2 * hits / np.maximum(total, 1))


def boundary_f1(prediction: np.ndarray, mask: np.ndarray, known: np.ndarray) -> float:
    """Return F1 of two masks' boundaries, bool (H, W), as far as they are `known`, bool (H, W); 1 where both have none.

    Precision is the share of the predicted boundary that lies within 0.75 % of the diagonal (17 pixels of a Carvana
    photo) of the true one, recall the reverse: Csurka, Larlus, Perronnin and Meylan, "What is a good evaluation measure
    for semantic segmentation?", BMVC 2013.
    """
    tolerance = 0.0075 * np.hypot(*mask.shape)
    masks = (pixels.astype(np.uint8) for pixels in (prediction, np.where(known, mask, prediction)))
    outlines = [(pixels - cv2.erode(pixels, np.ones((3, 3), np.uint8))) * known for pixels in masks]
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


def check_losses(losses: Tensor, images: int) -> None:
    """Raise UserError unless train.py's image_losses gives a loss for each of so many images, (N,)."""
    if losses.shape != (images,):
        given = " x ".join(map(str, losses.shape)) or "a single number"
        raise UserError(f"image_losses (train.py) gives {given} for {images} images: return a loss for each of them")


@torch.inference_mode()
def check_accuracy(
    loader: Loader,
    model: nn.Module,
    device: Device,
    image_losses: Callable[[Tensor, Tensor], Tensor],
    show: Callable[[Tensor, Tensor], None] | None = None,
    show_size: tuple[int, int] | None = None,
) -> tuple[dict[str, float], list[float]]:
    """Validate: return the images' mean "val_loss" and image_scores, and each image's Dice.

    The model's weights and BatchNorm statistics stay as they are, and so does its mode.

    Args:
        image_losses: train.py's, logits and masks (N, 1, H, W) -> (N,).
        show: called with every batch's logits, float32 (N, 1, H, W) on the device, and with each image's Dice, (N,).
        show_size: (height, width) to which these logits are reduced, with crops; else None.
    """
    was_training = model.training
    model.eval()
    losses, counts = [], []  # stay on the device until the end
    with progress(total=loader.batch_sampler.length, desc="validating", unit="img") as bar:
        for indices, (images, masks) in zip(loader.batch_sampler.batches(), loader, strict=True):
            images, masks = device.to(images, masks)
            with device.autocast():
                logits = model(images)
            logits = logits.float()
            mine = slice(len(indices[processes.shard(len(indices))]))
            batch_losses = image_losses(logits, masks)
            check_losses(batch_losses, len(images))
            batch_counts = torch.stack(confusion(logits > 0, masks > 0, ~masks.isnan()), 1)  # sigmoid(logits) > 0.5
            losses.append(processes.all_gather(batch_losses[mine], len(indices)))
            counts.append(processes.all_gather(batch_counts[mine], len(indices)))
            if show or processes.WORLD_SIZE > 1:
                logits = pooled(logits, show_size) if show_size else logits
                logits = processes.all_gather(logits[mine], len(indices))
            if show:
                show(logits, dice_scores(*counts[-1].T[:3]))
            if len(losses) % 10 == 1:
                bar.set_postfix(loss=f"{losses[-1].mean().item():.4f}", refresh=False)
            bar.update(len(indices))
    model.train(was_training)

    tp, fp, fn, tn = torch.cat(counts).cpu().double().T
    scores = {"val_loss": torch.cat(losses).cpu().double()} | image_scores(tp, fp, fn, tn)
    return {name: score.mean().item() for name, score in scores.items()}, scores["dice"].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Saved masks


def save_predictions_as_imgs(predictions: np.ndarray, masks: np.ndarray, batch: int, folder: Path) -> None:
    """Save a batch's predictions, bool (N, H, W), as pred_<batch>.png, and its true masks as <batch>.png.

    True masks are uint8 (N, H, W) in {0, 1, VOID}; void (ignored) pixels become grey.
    """
    grey = np.where(masks == VOID, np.uint8(128), masks * np.uint8(255))
    save_grid(predictions[..., None] * np.uint8(255), folder / f"pred_{batch}.png")
    save_grid(grey[..., None], folder / f"{batch}.png")

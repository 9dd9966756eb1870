"""Counts of pixels, and the scores that they make."""

import torch
from torch import Tensor


def confusion(predictions: Tensor, masks: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three bool (N, ...) -> true positives, false positives, false negatives, true negatives per image, int64 (N,).

    Only pixels that are `known`, not void, count.
    """
    predictions, masks, known = ((part & known).flatten(1) for part in (predictions, masks, known))
    hits, predicted, wanted = (predictions & masks).sum(1), predictions.sum(1), masks.sum(1)
    return hits, predicted - hits, wanted - hits, known.sum(1) - predicted - wanted + hits


def dice_scores(tp: Tensor, fp: Tensor, fn: Tensor) -> Tensor:
    """Dice of each image, 2|X∩Y| / (|X| + |Y|), and 1 where both are empty: the challenge's score is its mean.

    https://www.kaggle.com/c/carvana-image-masking-challenge/overview/evaluation
    """
    return torch.where(tp + fp + fn == 0, 1.0, 2 * tp / (2 * tp + fp + fn))


def iou_scores(tp: Tensor, fp: Tensor, fn: Tensor) -> Tensor:
    """Intersection over union of each image (Jaccard's index), and 1 where both are empty."""
    return torch.where(tp + fp + fn == 0, 1.0, tp / (tp + fp + fn))


def image_scores(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> dict[str, Tensor]:
    """The scores of each image, (N,), whose means metrics.csv shows. A new metric is a line here.

    It needs a value for images without foreground, too: one nan makes the mean nan.
    """
    return {
        "pixel_accuracy": torch.where(tp + fp + fn + tn == 0, 1.0, (tp + tn) / (tp + fp + fn + tn)),
        "dice": dice_scores(tp, fp, fn),
        "iou": iou_scores(tp, fp, fn),
    }

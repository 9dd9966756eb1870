"""Counts of pixels, and the scores that they make."""

import cv2
import numpy as np
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


def soft_dice_losses(logits: Tensor, masks: Tensor, known: Tensor) -> Tensor:
    """1 - Dice of each image, (N,), with probabilities in place of a prediction, so that it can be differentiated.

    Of logits, masks and what is `known` of them, (N, 1, H, W). 1 is added to both sides of the fraction, for images
    without foreground. V-Net's loss squares the probabilities below the line: https://arxiv.org/abs/1606.04797
    """
    probabilities, masks, known = (part.flatten(1) for part in (logits.sigmoid(), masks, known))
    hits, predicted, wanted = ((part * known).sum(1) for part in (probabilities * masks, probabilities, masks))
    return 1 - (2 * hits + 1) / (predicted + wanted + 1)


def dice_at_thresholds(probabilities: np.ndarray, mask: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Dice of probabilities, float32 (H, W), at the thresholds 0.05, 0.1, ..., 0.95: float64 (19,).

    The mask and what is `known` of it are bool (H, W).
    """
    counts = np.zeros((2, 21))  # of all pixels and of the foreground's, by the number of thresholds that they pass
    for start in range(0, len(mask), 256):  # because calcHist counts in float32, and floats of a large photo are large
        rows = slice(start, start + 256)
        levels = np.ceil(20 * probabilities[rows]).astype(np.uint8)
        for row, pixels in zip(counts, (known[rows], (mask & known)[rows]), strict=True):
            row += cv2.calcHist([levels], [0], pixels.view(np.uint8), [21], [0, 21]).ravel()
    predicted, hits = counts[:, ::-1].cumsum(1)[:, -3::-1]
    total = predicted + counts[1].sum()
    return np.where(total == 0, 1.0, 2 * hits / np.maximum(total, 1))


def boundary_f1(prediction: np.ndarray, mask: np.ndarray, known: np.ndarray) -> float:
    """F1 of two masks' boundaries, bool (H, W), as far as they are `known`, bool (H, W); 1 where both have none.

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


def uncertain_share(probabilities: np.ndarray) -> float:
    """The share of what may be the object (above 0.2) that is not certain (below 0.8), of float32 (H, W); 0 of nothing.

    An object that the threshold loses altogether counts, too.
    """
    possible, certain = (np.count_nonzero(probabilities >= limit) for limit in (0.2, 0.8))
    return 1 - certain / possible if possible else 0.0

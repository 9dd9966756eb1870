"""Folds of a set for cross-validation, the doubt of its mean score, and where a mask is contradicted."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import NormalDist

import numpy as np

from machinery.errors import UserError
from machinery.objects import Objects
from machinery.samples import check_group, group_of

RESAMPLES = 10_000  # of the bootstrap
BOX = "left", "top", "width", "height"


def groups_of(images: list[Path], checksums: Iterable[int], pattern: re.Pattern | None = None) -> np.ndarray:
    """Return the number of each image's group, int (n,), from 0: its object by group_of, and all with equal pixels.

    Raises UserError where the pattern is in no name.
    """
    check_group(pattern, images)
    groups, first = np.arange(len(images)), {}
    for index, keys in enumerate(zip((group_of(image, pattern) for image in images), checksums, strict=True)):
        for key in keys:
            joined = groups[first.setdefault(key, index)], groups[index]
            groups[groups == max(joined)] = min(joined)
    return np.unique(groups, return_inverse=True)[1]


def deal(groups: np.ndarray, foreground: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each photo, int (n,), from 0: balanced by number, then by foreground, groups kept whole.

    Args:
        groups: the number of each photo's group, int (n,), from 0.
        foreground: its share in each photo, (n,).

    Raises UserError where there are fewer groups than folds.
    """
    sizes = np.bincount(groups)
    if len(sizes) < 2:
        raise UserError("all photos are of one object, or equal: cross-validation needs photos of a second one")
    if folds > len(sizes):
        raise UserError(f"--folds is {folds}, but the photos are of {len(sizes)} objects: set it to {len(sizes)}")
    random = np.random.default_rng(seed)
    counts, fold_of = np.zeros(folds, int), np.zeros(len(sizes), int)
    shuffled = random.permutation(len(sizes))
    for group in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:  # the largest first, each to the smallest fold
        fold_of[group] = counts.argmin()
        counts[fold_of[group]] += sizes[group]

    excess = np.bincount(groups, foreground - foreground.mean())  # of each group, and below of each fold
    sums = np.bincount(fold_of, excess, folds)
    for some, other in random.integers(len(sizes), size=(50 * len(sizes), 2)).tolist():
        difference = excess[some] - excess[other]
        surplus = sums[fold_of[some]] - sums[fold_of[other]]
        if sizes[some] == sizes[other] and difference * surplus > difference**2:  # to swap them brings the folds closer
            sums[fold_of[some]] -= difference
            sums[fold_of[other]] += difference
            fold_of[[some, other]] = fold_of[[other, some]]
    return fold_of[groups]


def interval(values: np.ndarray, groups: np.ndarray, quantile: float, seed: int = 0) -> tuple[float, float]:
    """Return between which values the mean of many photos lies with 95 %, by a bootstrap over groups.

    Its percentiles are those of Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, 4.4.2: they are
    further apart where groups are few, as Student's t is.

    Args:
        values, groups: of each photo, (n,); groups are numbers from 0.
        quantile: Student's t at 97.5 % for one degree of freedom less than there are groups.
    """
    counts, sums = np.bincount(groups), np.bincount(groups, values)
    number = len(counts)
    random = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for resample in range(RESAMPLES):  # one by one: all at once would not fit into memory
        chosen = random.integers(number, size=number)
        means[resample] = sums[chosen].sum() / counts[chosen].sum()
    tail = NormalDist().cdf(-quantile * math.sqrt(number / (number - 1)))
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


def contradiction(probabilities: np.ndarray, mask: np.ndarray, known: np.ndarray) -> dict[str, object]:
    """Return how much a network contradicts a mask, its "suspicion", and the region where it does so most.

    Suspicion is the Dice that the network expects of its own mask, less that of the given one: a photo that it finds
    hard is not suspicious. The region is a connected one in which the object is "missing" in the mask or is "extra",
    with its box, and the "confidence", 0.5 to 1, is the network's mean probability that the mask is wrong there.

    Args:
        probabilities: float32 (H, W), of a network that has not learned from the mask.
        mask: bool (H, W).
        known: bool (H, W): other pixels are void (ignored) and count nowhere.
    """
    probabilities, mask = probabilities * known, mask & known
    own = (probabilities > 0.5) & known
    found = {"suspicion": expected_dice(probabilities, own) - expected_dice(probabilities, mask)}
    found |= dict.fromkeys(("mask", *BOX, "area_px", "confidence"))  # None where they agree everywhere
    most = 0.0
    for kind, area in (("missing", own & ~mask), ("extra", mask & ~own)):
        regions = Objects(area, probabilities if kind == "missing" else 1 - probabilities)
        weights = regions.areas * regions.means()
        if len(regions) and weights.max() > most:
            region, most = weights.argmax(), weights.max()
            found |= {"mask": kind} | dict(zip(BOX, regions.boxes[region].tolist(), strict=True))
            found |= {"area_px": int(regions.areas[region]), "confidence": float(regions.means()[region])}
    return found


def expected_dice(probabilities: np.ndarray, mask: np.ndarray) -> float:
    """Return about the Dice that a mask, bool (H, W), would have if these probabilities, (H, W), were right."""
    total = float(probabilities.sum(dtype=np.float64)) + np.count_nonzero(mask)
    return 2 * float(probabilities[mask].sum(dtype=np.float64)) / total if total else 1.0

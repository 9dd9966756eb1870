"""Large images: through a network a tile at a time, and small enough to be shown."""

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TILES = 4  # that the network sees at once


def fades(length: int, tile: int, multiple: int) -> list[tuple[int, np.ndarray]]:
    """Where tiles begin along a side of `length` pixels, and the weight of each pixel in each, float32 (tile,).

    Neighbours overlap by a quarter or more. In the middle half of that one fades into the other: what lies nearer to a
    tile's edge knows too little of its surroundings, and counts for nothing. The weights of a pixel add up to 1. Tiles
    begin at multiples of `multiple`, as every stage of the network needs; the last one may end beyond the side.
    """
    last = max(0, -(-(length - tile) // multiple) * multiple)
    starts = [*range(0, last, max(multiple, tile * 3 // 4 // multiple * multiple)), last]
    weights = np.zeros((len(starts), last + tile), np.float32)
    position = np.arange(0.5, tile, dtype=np.float32)
    for number, start in enumerate(starts):
        before = position if start else np.inf
        after = position[::-1] if start < last else np.inf
        weights[number, start : start + tile] = np.clip(2 * np.minimum(before, after) / (tile // 4) - 0.5, 0, 1)
    weights /= weights.sum(0)
    return [(start, weights[number, start : start + tile]) for number, start in enumerate(starts)]


def slide(network: Callable[[Tensor], Tensor], images: Tensor, tile: tuple[int, int], multiple: int) -> Tensor:
    """The logits (N, 1, H, W) of images (N, C, H, W) of any size, of which the network sees a tile at a time.

    `multiple` is that to which the network pads height and width. Beyond the image its last pixels are repeated.
    """
    height, width = images.shape[-2:]
    tile = [min(-(-side // multiple) * multiple, -(-whole // multiple) * multiple)
            for side, whole in zip(tile, (height, width), strict=True)]  # fmt: skip
    places = list(product(fades(height, tile[0], multiple), fades(width, tile[1], multiple)))
    logits = images.new_zeros(len(images), 1, height, width, dtype=torch.float32)
    for first in range(0, len(places), TILES):
        some = places[first : first + TILES]
        parts = [images[..., top : top + tile[0], left : left + tile[1]] for (top, _), (left, _) in some]
        beyond = [(0, tile[1] - part.shape[-1], 0, tile[0] - part.shape[-2]) for part in parts]
        parts = torch.cat([F.pad(*both, mode="replicate") for both in zip(parts, beyond, strict=True)])
        for ((top, rows), (left, columns)), part in zip(some, network(parts).split(len(images)), strict=True):
            target = logits[..., top : top + tile[0], left : left + tile[1]]
            fade = torch.from_numpy(np.outer(rows, columns)).to(part.device)
            target += (part * fade)[..., : target.shape[-2], : target.shape[-1]]
    return logits


def pooled(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures (N, C, H, W) at `size` (height, width): each pixel is the largest of those that it stands for."""
    if pictures.is_mps:  # which has it for whole factors alone
        pictures = pictures.cpu()
    return F.adaptive_max_pool2d(pictures, size)

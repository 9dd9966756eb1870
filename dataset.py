"""Pairs of files -> augmented samples: CarvanaDataset, its crops, and the order of an epoch."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from torch.utils.data import Dataset, Sampler

from machinery import processes
from machinery.decoding import VOID, Rule
from machinery.errors import UserError
from machinery.files import MASK_SUFFIX
from machinery.samples import Samples
from machinery.transforms import augment, check_transforms

if TYPE_CHECKING:  # predict.py uses this module without it
    import albumentations as A

CROPS = 8  # crops of each photo in an epoch
MARGIN = 0.3  # of a crop's longer side is read around it, so that scaling and rotation find real surroundings
SMALL = 128  # pixels: a crop up to this height and width may be larger than every photo
VAL_PHOTOS = 32  # photos of a validation at most, with crops: one of 1918 x 1280 costs 64 of 160 x 240

Key = int | tuple[int, int, int]  # an index, or (epoch, position in the epoch, index)


class CarvanaDataset(Samples, Dataset):
    """Images with binary masks; the augmentation of a sample depends only on (seed, epoch, position).

    Args:
        image_dir, mask_dir: folders of the photos and of their masks.
        size: (height, width) of every sample; a float is the share to which each photo is reduced.
        mask_suffix: what a mask's name has after its photo's.
        augmentation: what changes each sample at random, of albumentations. What it leaves at another size is resized.
        seed: of the augmentation.
    """

    def __init__(
        self,
        image_dir: Path,
        mask_dir: Path,
        size: tuple[int, int] | float,
        augmentation: "A.Compose | None" = None,
        seed: int = 0,
        mask_suffix: str = MASK_SUFFIX,
    ) -> None:
        super().__init__(image_dir, mask_dir, size, mask_suffix)
        self.augmentation, self.seed = augmentation, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: Key) -> tuple[np.ndarray, np.ndarray]:
        """Return an augmented sample: image uint8 (H, W, 3), and mask uint8 (H, W) in {0, 1, VOID}.

        A sample that comes twice in an epoch is augmented differently: its position is another.
        """
        epoch, position, index = key if isinstance(key, tuple) else (0, key, key)
        image, mask = self.sample(index)
        if self.augmentation is None:
            return image, mask
        height, width = mask.shape
        image, mask = augment(self.augmentation, np.random.default_rng((self.seed, epoch, position)), image, mask)
        if mask.shape != (height, width):  # after a rotation by 90 degrees, say
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
            mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        return image, mask

    def prepare(self, cache_dir: Path | None, rule: Rule | None = None, foreground_values: tuple | None = None) -> None:
        """Check the augmentation, which is quick, and decode the pairs as Samples does."""
        if self.augmentation is not None:
            check_transforms(self.augmentation, self.window)
        super().prepare(cache_dir, rule, foreground_values)

    @property
    def window(self) -> tuple[int, int]:
        """Return the (height, width) of what is augmented, or a likely one where every photo has its own."""
        return (512, 512) if isinstance(self.size, float) else self.size

    def image_of(self, index: int) -> Path:
        """Return the photo that __getitem__ shows at an index."""
        return self.pairs[index][0]

    def part_to_validate(self, crop: tuple[int, int] | None) -> tuple["CarvanaDataset", tuple[int, int] | None]:
        """Return the photos for an epoch's validation, and their pictures' (height, width), or None for their own.

        Without crops: all photos. With crops: VAL_PHOTOS of them; their pictures have the median photo's shape, reduced
        until its longer side is a crop's.
        """
        if not crop:
            return self, None
        own = np.array([np.median(self.infos[name]) for name in ("height", "width")])
        shown = (own * min(1, max(crop) / own.max())).round().astype(int).clip(1)
        return self.part(VAL_PHOTOS), tuple(shown.tolist())


class CropDataset(CarvanaDataset):
    """Crops of images with binary masks; each depends only on (seed, epoch, photo, number of the crop).

    A third of them is centred on a pixel of the foreground, where there is any; the others lie anywhere. A crop is the
    middle of a larger window after augmentation. Beyond the photo, images are mirrored and masks are void (ignored).

    Args:
        crop: (height, width) of every sample.
        arguments: CarvanaDataset's.
    """

    def __init__(self, *arguments: object, crop: tuple[int, int], **more: object) -> None:
        super().__init__(*arguments, **more)
        self.crop, self.margin = crop, round(MARGIN * max(crop))

    def __len__(self) -> int:
        return CROPS * len(self.pairs)

    def __getitem__(self, key: Key) -> tuple[np.ndarray, np.ndarray]:
        epoch, _, index = key if isinstance(key, tuple) else (0, key, key)
        photo, number = divmod(index, CROPS)
        random = np.random.default_rng((self.seed, epoch, photo, number))
        image, mask = self.sample(photo)
        crop = np.array(self.crop)
        room = np.array(mask.shape) - crop
        start = np.floor(random.random(2) * (room + 1)).astype(int)
        place = random.choice(self.infos["places"][photo]) if random.random() < 1 / 3 else -1
        if place >= 0:  # the number of a foreground pixel; without any, all places are -1
            start = np.array(np.unravel_index(place, mask.shape)) - crop // 2
        start = np.where(room < 0, room // 2, start.clip(0, room.clip(0)))
        image, mask = cut(image, mask, start - self.margin, self.window)
        if self.augmentation is not None:
            image, mask = augment(self.augmentation, random, image, mask)
        return cut(image, mask, (np.array(mask.shape) - crop) // 2, self.crop)

    @property
    def window(self) -> tuple[int, int]:
        height, width = self.crop
        return height + 2 * self.margin, width + 2 * self.margin

    def prepare(self, cache_dir: Path | None, rule: Rule | None = None, foreground_values: tuple | None = None) -> None:
        """Prepare the photos, and check that a crop is no larger than the largest of them."""
        super().prepare(cache_dir, rule, foreground_values)
        height, width = np.max([self.size_of(photo) for photo in range(len(self.pairs))], 0)
        if self.crop[0] > max(height, SMALL) or self.crop[1] > max(width, SMALL):
            raise UserError(
                f"CROP is {self.crop}, but at SCALE {self.size:g} no photo in {self.image_dir} is higher than {height} "
                f"or wider than {width} pixels: set CROP to these at most"
            )

    def image_of(self, index: int) -> Path:
        return super().image_of(index // CROPS)


def cut(
    image: np.ndarray, mask: np.ndarray, start: tuple[int, int], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the part of `size` (height, width) from `start` (row, column) on, which may lie beyond the borders."""
    (top, left), (bottom, right) = start, np.add(start, size)
    height, width = mask.shape
    inside = np.s_[max(0, top) : bottom, max(0, left) : right]
    beyond = max(0, -top), max(0, bottom - height), max(0, -left), max(0, right - width)
    if not any(beyond):
        return image[inside].copy(), mask[inside].copy()  # views would keep whole photos in memory
    return (
        cv2.copyMakeBorder(image[inside], *beyond, cv2.BORDER_REFLECT_101),
        cv2.copyMakeBorder(mask[inside], *beyond, cv2.BORDER_CONSTANT, value=VOID),
    )


class Batches(Sampler):
    """Yields batches of (epoch, position, index): all images in their order, or with a seed shuffled by (seed, epoch).

    The last shuffled batch is filled with the order's first images; another last batch may be smaller. Under torchrun
    each process gets its shard. A short shard repeats an image, which is not counted.
    """

    def __init__(self, length: int, size: int, seed: int | None = None) -> None:
        self.length, self.size, self.seed = length, size, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration yields, and how many of its images to skip."""
        self._epoch, self._start = epoch, start

    def __len__(self) -> int:
        return math.ceil((self.length - self._start) / self.size)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        position = self._start
        for batch in self.batches(self._epoch, self._start):
            samples = [(self._epoch, position + number, index) for number, index in enumerate(batch)]
            position += len(batch)
            mine = samples[processes.shard(len(batch))]
            missing = math.ceil(len(batch) / processes.WORLD_SIZE) - len(mine)
            yield mine + samples[:1] * missing

    def batches(self, epoch: int = 0, start: int = 0) -> list[list[int]]:
        """Return the indices of all processes' batches of an epoch, from the image at position `start` on."""
        if self.seed is None:
            left = np.arange(start, self.length)
        else:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            end = start + math.ceil((self.length - start) / self.size) * self.size
            left = order[np.arange(start, end) % self.length]
        return [left[first : first + self.size].tolist() for first in range(0, len(left), self.size)]

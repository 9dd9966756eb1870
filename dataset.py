"""Training on crops of large photos at (nearly) their original size, instead of on whole photos that are reduced."""

from pathlib import Path

import cv2
import numpy as np

from augmentation import augment
from dataset import CarvanaDataset
from decoding import VOID, UserError

CROPS = 8  # of each photo in an epoch
MARGIN = 0.3  # of a crop's longer side that is read around it, so that scaling and rotation find real surroundings
SMALL = 128  # pixels: crops of this height and width may be larger than every photo
VAL_PHOTOS = 32  # that an epoch's validation takes at most: one of 1918 x 1280 pixels costs as much as 64 of 160 x 240


class CropDataset(CarvanaDataset):
    """Crops of images with binary masks; each depends on (seed, epoch, photo, number of the crop) alone.

    A third of them is centred on a pixel of the foreground, where there is any; the others lie anywhere. A crop is cut
    out of a larger window after augmentation. What lies beyond the photo is mirrored, and void in the mask.

    Args:
        crop: (height, width) of every sample.
        arguments: CarvanaDataset's.
    """

    def __init__(self, *arguments: object, crop: tuple[int, int], **more: object) -> None:
        super().__init__(*arguments, **more)
        self.crop = crop

    def __len__(self) -> int:
        return CROPS * len(self.pairs)

    def __getitem__(self, key: int | tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        epoch, _, index = key if isinstance(key, tuple) else (0, key, key)
        photo, number = divmod(index, CROPS)
        random = np.random.default_rng((self.seed, epoch, photo, number))
        image, mask = self.sample(photo)
        crop, margin = np.array(self.crop), round(MARGIN * max(self.crop))
        room = np.array(mask.shape) - crop
        start = np.floor(random.random(2) * (room + 1)).astype(int)
        if random.random() < 1 / 3 and (place := random.choice(self.infos["places"][photo])) >= 0:
            start = np.array(np.unravel_index(place, mask.shape)) - crop // 2
        start = np.where(room < 0, room // 2, start.clip(0, room.clip(0)))
        window = augment(self.augmentation, random, *cut(image, mask, start - margin, crop + 2 * margin))
        inner = np.s_[margin : margin + self.crop[0], margin : margin + self.crop[1]]
        return tuple(np.ascontiguousarray(part[inner]) for part in window)

    def prepare(self, *arguments: object) -> None:
        super().prepare(*arguments)
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
    """The part of `size` (height, width) from `start` (row, column) on, which may lie beyond the image's borders."""
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


def part_to_validate(val_set: CarvanaDataset, crop: tuple[int, int] | None) -> CarvanaDataset:
    """What an epoch validates on: all of a prepared set, or with crops VAL_PHOTOS of it.

    Pictures show these reduced until the median photo's longer side is a crop's.
    """
    if not crop:
        return val_set
    own = np.array([np.median(val_set.infos[name]) for name in ("height", "width")])
    part = val_set.part(VAL_PHOTOS)
    part.shown = tuple((own * min(1, max(crop) / own.max())).round().astype(int).clip(1).tolist())
    return part

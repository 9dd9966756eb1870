"""Draw the photos behind docs/crops.md, and docs/crops.jpg: faint lines 3 to 6 pixels wide.

python docs/draw_crops.py lines                      # 48 photos of 1024 x 1024 for training, 24 for validation
python docs/draw_crops.py lines whole crops          # the picture, with the masks in these folders
"""

import sys
from pathlib import Path

import cv2
import numpy as np

SIDE = 1024  # pixels of a photo
SHOWN = "005", np.s_[300:700, 300:700]  # of the validation photos


def draw_line(random: np.random.Generator, width: int) -> np.ndarray:
    """Return a curved line's share of each pixel, float32 (SIDE, SIDE), drawn at four times the size."""
    angle, place, turn = random.uniform(0, 2 * np.pi), random.uniform(50, SIDE - 50, 2), 0.0
    places = [place]
    for _ in range(int(random.uniform(60, 170))):
        turn = 0.9 * turn + random.normal(0, 0.03)
        angle += turn
        place = place + 8 * np.array((np.cos(angle), np.sin(angle)))
        places.append(place)
    large = np.zeros((4 * SIDE, 4 * SIDE), np.uint8)
    cv2.polylines(large, [np.round(4 * np.array(places)).astype(np.int32)], False, 255, 4 * width - 1)
    return cv2.resize(large, (SIDE, SIDE), interpolation=cv2.INTER_AREA) / np.float32(255)


def draw_photo(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a photo of a rough surface, uint8 (SIDE, SIDE), and its mask: lines, but not the thin, darker hairs."""
    random = np.random.default_rng(seed)
    photo = np.zeros((SIDE, SIDE), np.float32)
    for cells, height in ((4, 14), (16, 8), (64, 6), (256, 7), (512, 7), (1024, 8)):
        noise = random.normal(0, height, (cells, cells)).astype(np.float32)
        photo += cv2.resize(noise, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    photo += random.uniform(90, 170)
    contrast, mask = random.uniform(14, 22), np.zeros((SIDE, SIDE), bool)
    for _ in range(random.integers(5, 9)):
        line = draw_line(random, int(random.integers(3, 7)))
        mask |= line > 0.5
        photo -= contrast * line * random.uniform(0.8, 1.2)
    for _ in range(random.integers(5, 9)):
        photo -= 2.5 * contrast * draw_line(random, int(random.integers(1, 3)))
    return photo.clip(0, 255).astype(np.uint8), mask * np.uint8(255)


def draw_dataset(folder: Path) -> None:
    for part, first, count in (("train", 0, 48), ("val", 1000, 24)):
        for number in range(count):
            photo, mask = draw_photo(first + number)
            for kind, name, picture in (("images", "", photo), ("masks", "_mask", mask)):
                path = folder / f"{part}_{kind}" / f"{number:03}{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), picture)


def draw_picture(folder: Path, others: list[Path]) -> None:
    name, part = SHOWN
    files = [folder / "val_images" / f"{name}.png", folder / "val_masks" / f"{name}_mask.png"]
    files += [other / f"{name}_mask.png" for other in others]
    pictures = [cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)[part] for file in files]
    pictures = [cv2.copyMakeBorder(picture, 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=128) for picture in pictures]
    cv2.imwrite(str(Path(__file__).with_name("crops.jpg")), np.hstack(pictures), (cv2.IMWRITE_JPEG_QUALITY, 70))


if __name__ == "__main__":
    folder, *others = map(Path, sys.argv[1:] or ["lines"])
    draw_picture(folder, others) if others else draw_dataset(folder)

"""Kaggle's submission file, and the run lengths in it.

https://www.kaggle.com/c/carvana-image-masking-challenge/overview/evaluation
"""

import csv
import glob
import gzip
import json
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from decoding import UserError
from settings import check_writable
from utils import saving


def rle_encode(mask: np.ndarray) -> str:
    """Runs of a mask (H, W), which is foreground where it is not 0: "start length start length ...".

    Pixels count from 1, row by row from the top left; an empty mask gives "".
    https://www.kaggle.com/c/carvana-image-masking-challenge/overview/evaluation
    """
    pixels = np.zeros(mask.size + 2, bool)  # with background before the first and after the last
    pixels[1:-1] = mask.ravel() != 0
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    changes[1::2] -= changes[::2]
    return " ".join(map(str, changes.tolist()))


def rle_decode(runs: str, size: tuple[int, int]) -> np.ndarray:
    """The mask of that (height, width) that rle_encode has encoded: uint8 (H, W) in {0, 1}."""
    numbers = np.array(runs.split(), np.int64)
    mask = np.zeros(size, np.uint8)
    for start, length in zip(numbers[::2] - 1, numbers[1::2], strict=True):
        mask.ravel()[start : start + length] = 1
    return mask


class Submission:
    """Kaggle's file, a row for each photo. Rows gather beside it until all are there, so that a stopped run continues.

    Every process of every run adds to a file of its own, <path>.<key>-<random>.part. The key stands for what decides
    the masks: rows of another network or threshold are not taken over.
    """

    def __init__(self, path: Path, photos: list[Path], key: str) -> None:
        self.path, self.names = path, {photo.name for photo in photos}
        if len(self.names) < len(photos):
            raise UserError(f"{path} names photos by file name: give each name once")
        check_writable(path.parent, "--submission")
        check_table(path, "img,rle_mask")
        self.prefix = f"{path.name}.{key}-2-"  # 2 is the format of the rows
        self.done = {name for name, _ in self.rows()}
        self.part = tempfile.NamedTemporaryFile(  # noqa: SIM115
            "w", encoding="utf-8", dir=path.parent, prefix=self.prefix, suffix=".part", delete=False
        )

    def parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.prefix)}*.part"))

    def rows(self) -> Iterator[tuple[str, str]]:
        """(photo's name, runs) of every line that is whole, as that is not at which a process was killed."""
        for part in self.parts():
            with part.open(encoding="utf-8") as file:
                for line in file:
                    with suppress(ValueError):
                        name, runs = json.loads(line)
                        yield name, runs

    def add(self, photo: Path, runs: str) -> None:
        self.part.write(json.dumps((photo.name, runs)) + "\n")  # a name may hold commas, line ends, or be no text

    def write(self, is_complete: bool) -> None:
        """Writes the file of all rows that are there; until it is complete, the same command adds what is missing."""
        opener = gzip.open if self.path.suffix == ".gz" else open
        text = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
        with saving(self.path) as temporary, opener(temporary, "wt", **text) as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("img", "rle_mask"))
            missing = set(self.names)
            for name, runs in self.rows():
                if name in missing:  # once, should two runs have added it
                    missing.remove(name)
                    table.writerow((name, runs))
        for part in self.parts() if is_complete else ():
            part.unlink()


def check_table(path: Path, columns: str) -> None:
    """Raises UserError where a file with other columns is in the way: it is not ours to overwrite."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            if file.readline().strip() == columns:
                return
    except FileNotFoundError:
        return
    except (OSError, EOFError, ValueError, zlib.error):  # a folder, or no text
        pass
    raise UserError(f"{path} was not written by predict.py: move it away, or choose another name")

"""The files that predict.py writes: pictures, tables, outlines for LabelMe, and COCO's file."""

import argparse
import csv
import glob
import gzip
import hashlib
import heapq
import json
import os
import re
import secrets
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from machinery.decoding import bands, read_image, read_opacity, resize
from machinery.errors import UserError, reason_of
from machinery.files import check_writable, lock_of, locked, remove_leftovers, saving, temporary_name, write_errors
from machinery.objects import COLUMNS, Objects, remove_specks
from machinery.shapes import outlines

TINT, OUTLINE = (255, 0, 80), (255, 230, 0)  # of an overlay


class Prediction:
    """The source of all outputs: a photo, uint8 (H, W, 3), its probabilities, float32 (H, W), and the flags.

    `path` is the photo's. Objects of fewer than `min_area` pixels are removed, from the probabilities as well, and with
    `largest` all but the largest one.
    """

    def __init__(
        self,
        path: Path,
        photo: np.ndarray,
        probabilities: np.ndarray,
        args: argparse.Namespace,
        min_area: int = 0,
        largest: bool = False,
    ) -> None:
        self.path, self.photo, self.probabilities, self.args = path, photo, probabilities, args
        self.mask = (probabilities > args.threshold) * np.uint8(255)  # (H, W) in {0, 255}
        self.specks = None  # where objects were removed, bool (H, W)
        if min_area or largest:
            self.specks = remove_specks(self.mask, probabilities, min_area, largest)
        self.numbered: Objects | None = None  # whose numbers the overlay shows

    def overlay(self) -> Image.Image:
        """Return the photo with the foreground of its mask tinted and outlined."""
        picture, thickness = Image.fromarray(self.photo), 1 + 2 * (max(self.mask.shape) // 1000)
        picture.paste(TINT, mask=Image.fromarray(self.mask // 3))
        outline = cv2.morphologyEx(self.mask, cv2.MORPH_GRADIENT, np.ones((thickness + 2, thickness + 2), np.uint8))
        picture.paste(OUTLINE, mask=Image.fromarray(outline))
        if self.numbered:
            draw, size = ImageDraw.Draw(picture), 12 + max(self.mask.shape) // 80
            text = {"font": ImageFont.load_default(size), "anchor": "mm", "stroke_width": 1 + size // 12}
            for number, place in enumerate(self.numbered.places.tolist(), 1):
                draw.text(place, str(number), "white", stroke_fill="black", **text)
        return picture

    def sixteen_bits(self) -> Image.Image:
        """Return the probabilities, of which 65535 is 1."""
        picture = np.empty(self.probabilities.shape, np.uint16)
        for rows, _, _ in bands(len(picture), 0):
            picture[rows] = (self.probabilities[rows] * 65535).round()
        return Image.fromarray(picture)

    @cached_property
    def alpha(self) -> Image.Image:
        """Return the object's opacity, which is at most the photo's own, reduced to what is drawn."""
        alpha, opacity = soft_edge(self.probabilities, self.args.threshold), read_opacity(self.path)
        if self.specks is not None:  # their soft edges go with them
            alpha[cv2.dilate(self.mask, np.ones((7, 7), np.uint8)) == 0] = 0
        if opacity is not None:
            alpha = np.minimum(alpha, resize(Image.fromarray(opacity), alpha.shape))
        return Image.fromarray(alpha)

    @cached_property
    def object(self) -> Image.Image:
        """Return the photo, with the object's own colours along its edge."""
        return Image.fromarray(clean_edge(self.photo, np.asarray(self.alpha)))

    def on_background(self) -> Image.Image:
        """Return the object on a colour, or on a picture, which covers the photo's size and is cropped to it."""
        background, size = self.args.background, self.alpha.size
        is_colour = isinstance(background, tuple)
        canvas = Image.new("RGB", size, background) if is_colour else ImageOps.fit(background, size)
        canvas.paste(self.object, mask=self.alpha)
        return canvas

    def cutout(self) -> Image.Image:
        """Return the object on transparency."""
        return Image.merge("RGBA", (*self.object.split(), self.alpha))


# <name>_<kind>.png, or .json of a dictionary: what makes it, and its flag's help. A new output is an entry here.
OUTPUTS: dict[str, tuple[Callable[[Prediction], Image.Image | dict], str]] = {
    "mask": (lambda p: Image.fromarray(p.mask), "255 on the object, else 0; the default without --submission"),
    "overlay": (Prediction.overlay, "the photo with the mask tinted and outlined"),
    "probabilities": (Prediction.sixteen_bits, "16 bit, 65535 is 1"),
    "background": (Prediction.on_background, "the object on white, #rrggbb or image.jpg"),
    "cutout": (Prediction.cutout, "the object on transparency"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def load_background(text: str) -> tuple[int, ...] | Image.Image:
    """Return a colour by name or #rrggbb, or else the picture in a file. Raises UserError for anything else."""
    try:
        return ImageColor.getcolor(text, "RGB")
    except ValueError as error:
        if Path(text).is_file():
            return Image.fromarray(read_image(Path(text)))
        raise UserError(f"--background {text}: give a colour (white, #rrggbb), or the path of a picture") from error


def soft_edge(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """Return opacity, uint8 (H, W), which falls from 255 to 0 within 3 pixels around the contour of the threshold.

    (probability - threshold) / |gradient| is the distance to the contour to first order. The probabilities, float32
    (H, W), fall slowly themselves where photo or network show no clear edge, which would look like a halo.
    """
    alpha = np.empty(probabilities.shape, np.uint8)
    for rows, inner, kept in bands(len(alpha), 1):
        band = probabilities[rows]
        gradient = cv2.magnitude(cv2.Sobel(band, -1, 1, 0, scale=1 / 8), cv2.Sobel(band, -1, 0, 1, scale=1 / 8))
        alpha[kept] = np.clip(255 * ((band - threshold) / (3 * gradient + 1e-3) + 0.5), 0, 255)[inner]
    return alpha


def clean_edge(photo: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return a photo, uint8 (H, W, 3), with colours from the inside along the edge, where background has mixed in.

    A colour within 3 pixels of the edge becomes the mean of those further inside, in 13 x 13 pixels. Where there are
    none, as in things up to 6 pixels thin, it stays as it is. `alpha` is the object's opacity, uint8 (H, W).
    """
    clean = np.empty_like(photo)
    for rows, inner, kept in bands(len(photo), 8):
        inside = cv2.erode(alpha[rows], np.ones((5, 5), np.uint8)) == 255
        share = cv2.blur(inside.astype(np.float32), (13, 13))[..., None]
        total = cv2.blur(photo[rows] * inside[..., None].astype(np.float32), (13, 13))
        is_own = inside[..., None] | (share < 1 / 200)  # one pixel of 13 x 13 is 1 / 169
        clean[kept] = np.where(is_own, photo[rows], total / np.maximum(share, 1e-3) + 0.5)[inner]
    return clean


# ---------------------------------------------------------------------------------------------------------------------
# A photo's files

# Each says that it is ours, so that none is taken for a photo, and no other file is overwritten.
SOFTWARE = "predict.py (U-Net for Carvana)"


def write_output(folder: Path, name: str, kind: str, prediction: Prediction) -> None:
    """Write what OUTPUTS makes of a prediction. Raises UserError as write_png does."""
    made = OUTPUTS[kind][0](prediction)
    if isinstance(made, dict):
        write_json(folder / f"{name}_{kind}.json", made)
    else:
        write_png(folder / f"{name}_{kind}.png", made)


def is_written(folder: Path, name: str, kind: str) -> bool:
    """Return whether write_output has written that file, now or in an earlier run."""
    return any((folder / f"{name}_{kind}{ending}").exists() for ending in (".png", ".json"))


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture. Raises UserError where there is a file that is not ours, and where none can be written."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", SOFTWARE)
    with saving(path) as temporary:  # 3 is run lengths: 14 ms a mask instead of 23, 160 a cut-out of 370
        check_ours(path)
        picture.save(temporary, "PNG", compress_type=3, pnginfo=text)


def write_json(path: Path, content: dict) -> None:
    """Write a dictionary, in which numpy's numbers and arrays may be. Raises UserError as write_png does."""
    with saving(path) as temporary:
        check_ours(path)
        text = json.dumps({"software": SOFTWARE} | content, default=lambda value: value.tolist())
        temporary.write_text(text, encoding="utf-8")


def check_ours(path: Path) -> None:
    """Raise UserError where there is a file that write_png and write_json have not written."""
    if path.exists() and not is_ours(path):
        raise UserError(f"{path} was not written by predict.py: move it away, or choose another --output-dir")


def is_output(path: Path) -> bool:
    """Return whether an image is one that predict.py has made of a photo."""
    return path.stem.endswith(tuple(OUTPUTS)) and is_ours(path)


def is_ours(path: Path) -> bool:
    """Return whether write_png or write_json has written a file."""
    with suppress(Exception):  # files of others raise many kinds of errors
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))["software"] == SOFTWARE
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def check_table(path: Path, columns: str) -> None:
    """Raise UserError where a file is in the way that is not ours to overwrite.

    The first line of ours matches the regular expression `columns`.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            if re.fullmatch(columns, file.readline().strip()):
                return
    except FileNotFoundError:
        return
    except (OSError, EOFError, ValueError, zlib.error):  # a folder, or no text
        pass
    raise UserError(f"{path} was not written by predict.py: move it away, or choose another name")


class Submission:
    """Kaggle's file, a row for each photo. Rows gather beside it until all are there, so that a stopped run continues.

    Every process of a run adds to a file of its own, <path>.<key>-<random>.part. The key stands for what decides the
    masks, and each row has its photo's size and time: rows of another network, threshold or photo are not taken over.
    https://www.kaggle.com/c/carvana-image-masking-challenge/overview/evaluation
    """

    def __init__(self, path: Path, photos: list[Path], key: str) -> None:
        self.path, self.stamps = path, {photo.name: stamp_of(photo) for photo in photos}
        if len(self.stamps) < len(photos):
            raise UserError(f"{path} names photos by file name: give each name once")
        check_writable(path.parent, "--submission")
        check_table(path, "img,rle_mask")
        self.prefix = f"{path.name}.{key}-3-"  # 3 is the format of the rows
        self.done = {name for name, _ in self.rows()}
        with write_errors(path):
            self.part = path.with_name(f"{self.prefix}{secrets.token_hex(4)}.part").open("x", encoding="utf-8")

    def parts(self) -> list[Path]:
        """Return the files in which rows gather."""
        return sorted(self.path.parent.glob(f"{glob.escape(self.prefix)}*.part"))

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield (photo's name, runs) of every whole line; a process that was killed may have left part of one."""
        for part in self.parts():
            with part.open(encoding="utf-8") as file:
                for line in file:
                    with suppress(ValueError):
                        name, stamp, runs = json.loads(line)
                        if self.stamps.get(name) == stamp:
                            yield name, runs

    def add(self, photo: Path, runs: str) -> None:
        """Add a photo's row, with its mask as run lengths. Raises UserError where it cannot be written."""
        row = photo.name, self.stamps[photo.name], runs
        with write_errors(self.path):
            self.part.write(json.dumps(row) + "\n")  # a name may hold commas, line ends, or be no text
            self.part.flush()  # now: what is left for the end cannot be written then

    def write(self, is_complete: bool) -> None:
        """Write the file of all rows that are there; until it is complete, the same command adds what is missing."""
        opener = gzip.open if self.path.suffix == ".gz" else open
        text = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
        with saving(self.path) as temporary, opener(temporary, "wt", **text) as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("img", "rle_mask"))
            missing = set(self.stamps)
            for name, runs in self.rows():
                if name in missing:  # once, should two runs have added it
                    missing.remove(name)
                    table.writerow((name, runs))
            if is_complete and missing:  # another run has deleted them
                raise UserError(f"{self.path} lacks {len(missing)} rows, such as {min(missing)}'s: run it again")
        if is_complete:
            for part in self.parts():
                part.unlink()


def stamp_of(photo: Path) -> list[int] | None:
    """Return a photo's size and time; None for one that is gone, of which reading it will say more."""
    with suppress(OSError):
        status = photo.stat()
        return [status.st_size, status.st_mtime_ns]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Objects: a table, and COCO's file


class Found:
    """The objects that this process has found, a line of JSON for each photo, on the disk: memory may be too small.

    The file lies beside `path` until write_found has read it, and is removed after an error. The next run removes those
    of killed ones, whose locks nobody holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        remove_leftovers(path.parent, path.name)
        self.part = temporary_name(path)
        self.lock = locked(lock_of(self.part), str(self.part))
        self.lock.__enter__()  # as long as this object lives
        with write_errors(path):
            self.file = self.part.open("x", encoding="utf-8")

    def __enter__(self) -> "Found":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with suppress(OSError):  # of a full disk, which add has named
            self.file.close()
        if kind:
            remove_found(self.part)

    def add(self, content: dict) -> None:
        """Add a "photo" of the "size" (height, width), with its objects as "rows" and as COCO's "annotations".

        Raises UserError where they cannot be written.
        """
        with write_errors(self.path):
            self.file.write(json.dumps(content) + "\n")
            self.file.flush()


def write_found(parts: list[Path], photos: list[Path], table: Path | None, coco: Path | None, label: str) -> None:
    """Write objects.csv and COCO's file of what all processes have found, in the photos' order, and remove `parts`."""
    numbers = {str(photo): number for number, photo in enumerate(photos, 1)}

    def found() -> Iterator[dict]:
        with ExitStack() as files:
            lines = [map(json.loads, files.enter_context(part.open(encoding="utf-8"))) for part in parts]
            yield from heapq.merge(*lines, key=lambda content: numbers[content["photo"]])

    try:
        if table:
            write_objects(table, found())
        if coco:
            write_coco(coco, found, numbers, label)
    finally:
        for part in parts:
            remove_found(part)


def remove_found(part: Path) -> None:
    """Remove the file of a Found, and its lock."""
    part.unlink(missing_ok=True)
    with suppress(OSError):  # on Windows one that is held cannot be deleted
        lock_of(part).unlink()


def write_objects(path: Path, found: Iterable[dict]) -> None:
    """Write objects.csv, a row for each object."""
    text = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}  # a name may be no text
    with saving(path) as temporary, temporary.open("w", **text) as file:
        table = csv.DictWriter(file, ("photo", *COLUMNS))
        table.writeheader()
        for content in found:
            table.writerows({"photo": content["photo"]} | row for row in content["rows"])


COCO_HEAD = json.dumps({"info": {"description": SOFTWARE}})[:-1] + ","  # the first line of ours


def write_coco(path: Path, found: Callable[[], Iterator[dict]], numbers: dict[str, int], label: str) -> None:
    """Write COCO's file of all photos: https://cocodataset.org/#format-data

    A photo has its number as its id; `file_name` is its name, or its path where photos share their names.
    """
    names = Counter(Path(photo).name for photo in numbers)

    def image(content: dict) -> dict:
        photo, (height, width) = Path(content["photo"]), content["size"]
        name = photo.name if names[photo.name] == 1 else photo.as_posix()
        return {"id": numbers[content["photo"]], "file_name": name, "height": height, "width": width}

    entries = (
        {"image_id": numbers[c["photo"]], "category_id": 1} | entry for c in found() for entry in c["annotations"]
    )
    lists = {
        "categories": [{"id": 1, "name": label, "supercategory": ""}],
        "images": map(image, found()),
        "annotations": ({"id": number} | entry for number, entry in enumerate(entries, 1)),
    }
    with saving(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(COCO_HEAD)
        for count, (name, content) in enumerate(lists.items()):
            file.write(f'{"," if count else ""}\n"{name}": [')
            for number, entry in enumerate(content):
                file.write(("," if number else "") + "\n" + json.dumps(entry))
            file.write("\n]")
        file.write("}\n")


# ---------------------------------------------------------------------------------------------------------------------
# Outlines for LabelMe


def write_labelme(path: Path, mask: np.ndarray, photo: Path, label: str, min_area: int) -> None:
    """Write a mask, uint8 (H, W), in which 0 is background, as polygons that LabelMe opens.

    https://github.com/wkentaro/labelme/blob/main/labelme/_label_file.py
    """
    try:
        image_path = Path(os.path.relpath(photo, path.parent))
    except ValueError:  # on Windows, where it is on another disk
        image_path = photo.absolute()
    content = {
        "version": "5.5.0",
        "flags": {},
        "shapes": [
            {"label": label, "points": ring.tolist(), "group_id": None, "shape_type": "polygon", "flags": {}}
            for ring in outlines(mask, min_area)
        ],
        "imagePath": image_path.as_posix(),
        "imageData": None,
        "imageHeight": mask.shape[0],
        "imageWidth": mask.shape[1],
    }
    with saving(path) as temporary:
        temporary.write_text(json.dumps(content | {"predicted": digest(content)}), encoding="utf-8")


def made_by_hand(photo: Path, path: Path) -> Path | None:
    """Return the outlines that a person has made or saved: LabelMe's file beside the photo, or whatever is at `path`.

    Return None where there is none, or one that is as predict.py wrote it. Raises UserError if one cannot be read.
    """
    for file in filter(Path.exists, (photo.with_suffix(".json"), path)):
        content = None
        try:
            with suppress(ValueError, RecursionError):
                content = json.loads(file.read_text("utf-8-sig"))
        except OSError as error:
            raise UserError(f"{file} cannot be read ({reason_of(error)}): move it away") from error
        is_labelme = isinstance(content, dict) and "shapes" in content
        if not is_untouched(content) and (is_labelme or file == path):
            return file
    return None


def is_untouched(content: object) -> bool:
    """Return whether predict.py wrote it, and nobody has saved it since.

    LabelMe keeps the entry "predicted" and adds to the others, so that they no longer have its digest.
    """
    if not isinstance(content, dict):
        return False
    others = {name: value for name, value in content.items() if name != "predicted"}
    return content.get("predicted") == digest(others)


def digest(content: dict) -> str:
    """Return 16 hexadecimal digits that stand for a file's content."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

"""Annotation tools' files -> photos and the shapes on them. make_masks draws these; outputs.py writes LabelMe's files.

A new format is a function from a file to Annotations, and two lines in read_file; yolo is a short example. If its
ending tells the format, these lines come first.
"""

import base64
import binascii
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import yaml
from PIL import Image, UnidentifiedImageError

from machinery.decoding import opened
from machinery.errors import UserError, reason_of
from machinery.files import MASK_SUFFIX
from machinery.outputs import is_untouched
from machinery.shapes import box_ring, coco_mask, counts_mask, ellipse_ring, polygon_mask, ring_of, rle_decode, turned

STUMBLES = (  # of parsers, where a file does not hold what it should
    ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError, csv.Error,
    ElementTree.ParseError, Image.DecompressionBombError, cv2.error, yaml.YAMLError,
)  # fmt: skip


@dataclass
class Shape:
    """An object on a photo: `draw` makes its mask, bool (H, W), or is None where there is no area, as in a point."""

    label: str
    draw: Callable[[tuple[int, int]], np.ndarray] | None
    place: str  # in the file, for messages
    line: np.ndarray | None = None  # (n, 2), the corners of a line, which has no area without a width


@dataclass
class Annotation:
    """The objects that a file describes on a photo."""

    file: Path
    photo: str  # its name or path as the file gives it; else the file's own path without ending, or nothing
    size: tuple[int, int] | None  # (height, width) of the photo as the tool took it, where the file says so
    shapes: list[Shape] = field(default_factory=list)  # from the lowest to the one on top, where there is an order
    has_order: bool = False  # a shape covers those before it, whatever their labels
    has_photos_name: bool = False  # the tool gives the file the photo's name
    embedded: Callable[[], bytes] | None = None  # the photo, where the file holds it
    is_prediction: bool = False  # of predict.py, which nobody has saved since

    def add(self, label: object, draw: Callable | None, place: str, line: np.ndarray | None = None) -> None:
        if label is None:
            raise ValueError("its label is missing")
        self.shapes.append(Shape(" ".join(str(label).split()), draw, place, line))


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn what a parser stumbles over into a UserError that begins with `what`."""
    try:
        yield
    except STUMBLES as error:
        raise UserError(f"{what} cannot be read ({stumble_of(error)}): export it again, or remove it") from error


def stumble_of(error: Exception) -> str:
    """Return what a parser has stumbled over, as errors.reason_of says what other errors are about."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, yaml.MarkedYAMLError):
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    if isinstance(error, UnicodeError):
        return "it is no text in UTF-8"
    if isinstance(error, UnidentifiedImageError):
        return "it is no picture"
    if isinstance(error, (ArithmeticError, AttributeError, IndexError, RecursionError, TypeError, binascii.Error)):
        return "a value is missing, or of another kind than it should be"
    return reason_of(error)


def number(value: object, kind: type = int) -> int | float:
    """Return a number that a file holds, perhaps as text. Raises ValueError for anything else."""
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{value} is no {'whole ' if kind is int else ''}number") from error


def size_of(height: object, width: object) -> tuple[int, int] | None:
    """Return the size that a file gives its photo, or None where it gives none."""
    return (number(height), number(width)) if height and width else None


# ---------------------------------------------------------------------------------------------------------------------
# What shapes draw, bool (H, W)


def relative_polygon_mask(ring: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the mask of a ring whose coordinates are shares of the photo's width and height."""
    return polygon_mask([ring * size[::-1]], size)


def placed(part: Callable, own_size: tuple[int, int], left: int, top: int, size: tuple[int, int]) -> np.ndarray:
    """Return a photo's mask with a small one, part(own_size), at its place, cut at the border.

    Raises ValueError, before anything is allocated, for one that is larger than the photo.
    """
    height, width = own_size
    if not (0 < height <= size[0] and 0 < width <= size[1]):
        raise ValueError(f"its mask is {width} x {height}, but its photo {size[1]} x {size[0]}")
    mask, pixels = np.zeros(size, bool), part(own_size)[max(0, -top) :, max(0, -left) :]
    place = mask[max(0, top) :, max(0, left) :]
    height, width = np.minimum(place.shape, pixels.shape)
    place[:height, :width] = pixels[:height, :width]
    return mask


def placed_png(png: str, left: int, top: int, size: tuple[int, int]) -> np.ndarray:
    """Return a photo's mask with the one that LabelMe keeps in base64 at its place."""
    try:
        content = base64.b64decode(png)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            own_size = image.size[::-1]
    except (UnidentifiedImageError, binascii.Error) as error:
        raise ValueError("its mask is no PNG") from error
    return placed(partial(decode_png, content), own_size, left, top, size)


def decode_png(content: bytes, size: tuple[int, int]) -> np.ndarray:
    """Return the mask, bool, of a PNG of this size: (height, width)."""
    mask = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE)
    if mask is None or mask.shape != size:
        raise ValueError("its mask is no PNG")
    return mask > 0


def label_mask(file: Path, value: int, size: tuple[int, int]) -> np.ndarray:
    with opened(file) as image:
        return np.asarray(image) == value


# ---------------------------------------------------------------------------------------------------------------------
# Files -> annotations


def read_file(file: Path, has_photo: bool) -> list[Annotation] | None:
    """Return what a file that is no image says of photos, or None where it is no annotation. Raises UserError.

    A format with an ending of its own comes first; the content tells the others. `has_photo` says whether there is a
    photo of the file's stem: then an empty file is YOLO's, without an object.
    """
    with reading(file):
        with file.open("rb") as content:
            head = content.read(4096).removeprefix(b"\xef\xbb\xbf").strip()
        line = head.partition(b"\n")[0].decode("utf-8", "replace").strip().lower()
        if re.match(rb'\{\s*"', head) or file.suffix.lower() == ".json":
            content = json.loads(file.read_text("utf-8-sig"))
            if isinstance(content, dict) and {"shapes", "imagePath"} <= content.keys():
                return [labelme(file, content)]
            if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
                return coco(file, content)
        elif head.startswith((b"<?xml", b"<annotations")) or file.suffix.lower() == ".xml":
            root = ElementTree.parse(file).getroot()
            if root.tag == "annotations":
                return cvat(file, root)
        elif re.search(r"^[^,]*,.*(rle|encod|segmentation)", line):
            return run_length_table(file)
        elif re.match(r"\d+(\.0+)?(\s+(-?[\d.]+(e-?\d+)?|nan)){4}(\s|$)", line) or (not head and has_photo):
            return [yolo(file)]
    return None


def labelme(file: Path, content: dict) -> Annotation:
    """Read a file of LabelMe, or of X-AnyLabeling, whose are alike.

    https://github.com/wkentaro/labelme/blob/main/labelme/_label_file.py
    """
    size = size_of(content.get("imageHeight"), content.get("imageWidth"))
    annotation = Annotation(file, content["imagePath"] or "", size, has_order=True, has_photos_name=True)
    annotation.is_prediction = is_untouched(content)
    if content.get("imageData"):
        annotation.embedded = lambda: base64.b64decode(json.loads(file.read_text("utf-8-sig"))["imageData"])
    for count, shape in enumerate(content["shapes"], 1):
        place = f"shape {count} ({shape.get('label') or 'no label'})"
        with reading(f"{file}: {place}"):
            kind, ring = shape.get("shape_type") or "polygon", ring_of(shape["points"])
            line = ring if kind in ("line", "linestrip") else None
            annotation.add(shape["label"], labelme_shape(kind, ring, shape.get("mask")), place, line)
    return annotation


def labelme_shape(kind: str, ring: np.ndarray, png: str | None) -> Callable | None:
    """Return what draws a shape, or None where it has no area."""
    if kind == "mask":
        if not png:
            raise ValueError("its mask is missing")
        return partial(placed_png, png, *ring[0].astype(int).tolist())
    if kind == "circle":
        if len(ring) < 2:
            raise ValueError("a circle has two points, its centre and one on its edge")
        radius = np.hypot(*(ring[1] - ring[0]))
        return partial(polygon_mask, [ellipse_ring(*ring[0], radius, radius)])
    if kind == "rectangle" and len(ring) == 2:
        return partial(polygon_mask, [box_ring(ring)])
    if kind in ("polygon", "rectangle", "oriented_rectangle", "rotation", "quadrilateral") and len(ring) > 2:
        return partial(polygon_mask, [ring])
    return None


def coco(file: Path, content: dict) -> list[Annotation]:
    """Read a file of COCO: https://cocodataset.org/#format-data

    Some tools write ids as text in one place and as numbers in another, and leave out categories where there is one.
    """
    names = {id_of(category["id"]): category["name"] for category in content.get("categories") or ()}
    photos: dict[str, Annotation] = {}
    for image in content["images"]:
        with reading(f"{file}: image {image.get('id', 'without an id')}"):
            if id_of(image["id"]) in photos:
                raise ValueError("there are two of this id")
            size = size_of(image.get("height"), image.get("width"))
            photos[id_of(image["id"])] = Annotation(file, str(image["file_name"]), size)
    for entry in content["annotations"]:
        place = f"annotation {entry.get('id', 'without an id')}"
        with reading(f"{file}: {place}"):
            image = id_of(entry["image_id"])
            if image not in photos:
                raise ValueError(f"there is no image {image}")
            label = id_of(entry["category_id"] if names else entry.get("category_id", "object"))
            if names and label not in names:
                raise ValueError(f"there is no category {label}")
            photos[image].add(names.get(label, label), coco_shape(entry.get("segmentation")), place)
    return list(photos.values())


def id_of(value: object) -> str:
    """Return an id, which is a number or a text, as text."""
    if value is None:
        raise ValueError("an id is missing")
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def coco_shape(outline: list | dict | None) -> Callable | None:
    """Return what draws a segmentation: run lengths, rings (x, y, x, y, ...), or a single ring that is in no list.

    Return None for a box, which has none.
    """
    if isinstance(outline, dict):
        return partial(coco_mask, outline["counts"], outline["size"])
    outline = outline or []
    if not any(isinstance(part, list) and len(part) > 2 for part in outline):  # numbers, or pairs of them
        outline = [outline]
    rings = [ring for ring in map(ring_of, outline) if len(ring) > 2]
    return partial(polygon_mask, rings) if rings else None


def cvat(file: Path, root: ElementTree.Element) -> list[Annotation]:
    """Read "CVAT for images 1.1": https://docs.cvat.ai/docs/dataset_management/formats/format-cvat/"""
    if root.find("track") is not None:
        raise UserError(f"{file} is of a video: export it from CVAT as 'CVAT for images 1.1'")
    annotations = []
    for image in root.iter("image"):
        with reading(f"{file}: image {image.get('name')}"):
            size = size_of(image.get("height"), image.get("width"))
            annotation = Annotation(file, image.attrib["name"], size, has_order=True)
            shapes = list(enumerate((shape for shape in image if shape.tag != "tag"), 1))
            shapes.sort(key=lambda item: number(item[1].get("z_order", 0)))
        for count, shape in shapes:
            place = f"image {annotation.photo}, shape {count} ({shape.get('label', 'no label')})"
            with reading(f"{file}: {place}"):
                line = cvat_points(shape.attrib) if shape.tag == "polyline" else None
                annotation.add(shape.attrib["label"], cvat_shape(shape.tag, shape.attrib), place, line)
        annotations.append(annotation)
    return annotations


def cvat_points(shape: dict[str, str]) -> np.ndarray:
    return ring_of(point.split(",") for point in shape["points"].split(";"))


def cvat_shape(kind: str, shape: dict[str, str]) -> Callable | None:
    """Return what draws a shape, or None where it has no area."""

    def pairs(*names: str) -> np.ndarray:
        return ring_of([shape[name] for name in names])

    if kind == "mask":
        (left, top), (width, height) = pairs("left", "top", "width", "height").astype(int).tolist()
        counts = [number(count) for count in shape["rle"].split(",")]
        return partial(placed, partial(counts_mask, counts), (height, width), left, top)
    if kind == "box":
        ring = box_ring(pairs("xtl", "ytl", "xbr", "ybr"))
    elif kind == "ellipse":
        ring = ellipse_ring(*pairs("cx", "cy", "rx", "ry").ravel())
    elif kind == "polygon":
        ring = cvat_points(shape)
    else:
        return None
    return partial(polygon_mask, [turned(ring, number(shape.get("rotation", 0), float))]) if len(ring) > 2 else None


def yolo(file: Path) -> Annotation:
    """Read a file of YOLO, a row for each object: its class and the ring's corners.

    A row of five numbers is a box, which is no outline. https://docs.ultralytics.com/datasets/segment/
    """
    annotation = Annotation(file, file.with_suffix("").as_posix(), None)
    names = class_names(file.parent.absolute())
    for count, line in enumerate(file.read_text("utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        place = f"row {count}"
        with reading(f"{file}: {place}"):
            label, *coordinates = line.split()
            label = label.removesuffix(".0")
            if len(coordinates) % 2 or len(coordinates) < 4:
                raise ValueError(f"{len(coordinates)} coordinates are no pairs")
            if names and number(label) not in names:
                raise ValueError(f"there is no class {label} in the .yaml file")
            ring = ring_of([coordinates])
            if ring.max() > 1.5 or ring.min() < -0.5:
                raise ValueError("coordinates must be shares of the photo's width and height")
            draw = partial(relative_polygon_mask, ring) if len(ring) > 2 else None
            annotation.add(names.get(number(label), label), draw, place)
    return annotation


@cache
def class_names(folder: Path) -> dict[int, str]:
    """Return the names by number of the .yaml file with `names`, in this folder or one of the two above; {} for none.

    Names are a list or a mapping, {number: name}. Raises UserError for a file with `names` that is no YAML.
    """
    for above in (folder, *folder.parents[:2]):
        for file in sorted((*above.glob("*.yaml"), *above.glob("*.yml"))):
            text = file.read_text("utf-8-sig", "replace")
            if not re.search(r"\bnames\b", text):  # it may be of any other program, and need not be whole
                continue
            with reading(file):
                content = yaml.load(text, yaml.BaseLoader)  # the safe one that leaves `no` a name
                names = content.get("names") if isinstance(content, dict) else None
                if isinstance(names, list):
                    names = dict(enumerate(names))
                if names and isinstance(names, dict):
                    return {int(number): str(name) for number, name in names.items()}
    return {}


def run_length_table(file: Path) -> list[Annotation]:
    """Read one of Kaggle's tables: a row for each object, with the photo's name, run lengths, and perhaps a class.

    Runs are along the rows in those with a column `img` (Carvana's) or `segmentation`, down the columns in the others.
    """
    csv.field_size_limit(2**31 - 1)
    photos: dict[str, Annotation] = {}
    with file.open(encoding="utf-8-sig", newline="") as rows:
        table = csv.DictReader(rows)
        columns = table_columns(table.fieldnames)
        for row in table:
            place = f"line {table.line_num}"
            with reading(f"{file}: {place}"):
                name, label = row[columns.photo], row[columns.label] if columns.label else "object"
                if columns.photo == columns.label:
                    name, label = photo_and_label(name)
                photo = photos.setdefault(name, Annotation(file, name, None))
                if row[columns.runs] is None:
                    raise ValueError("it ends too early")
                if row[columns.runs].strip() not in ("", "-1", "nan"):
                    photo.add(label, partial(rle_decode, row[columns.runs], order=columns.order), place)
    return list(photos.values())


@dataclass
class Columns:
    """The meaning of a table's columns."""

    runs: str
    photo: str
    label: str | None  # the photo's again where one column holds both, as "a.jpg_1"
    order: str  # of the runs: "C" along the rows, "F" down the columns


def table_columns(names: list[str]) -> Columns:
    """Find a table's columns by their names."""

    def matching(pattern: str) -> list[str]:
        return [name for name in names if re.search(pattern, name, re.IGNORECASE)]

    runs = matching("rle|encod|segmentation")[0]
    labels = [name for name in matching("class|label") if name != runs]
    photos = [name for name in matching("im(g|age)|name|id$") if name not in (runs, *labels)]
    both = [name for name in matching("im(g|age)") if name in labels]  # ImageId_ClassId, Image_Label
    if both and not photos:
        photo = label = both[0]
    else:
        photo = (photos or names)[0]
        label = next((name for name in labels if name not in both), None)
    order = "C" if {"img", "segmentation"} & {name.lower() for name in names} else "F"
    return Columns(runs, photo, label, order)


def photo_and_label(text: str) -> tuple[str, str]:
    """Split what is a photo's name and a label: a.jpg_1. Raises ValueError for another text."""
    parts = re.fullmatch(r"(.+\.[a-zA-Z0-9]+|.+)_(.+)", text or "")
    if not parts:
        raise ValueError(f"{text} is no photo's name and a label, as in a.jpg_1")
    return parts[1], parts[2]


def label_image(file: Path) -> Annotation | None:
    """Read an image whose pixels are labels: lossless, of one channel, at most 64 values. Return None for others.

    It has its photo's name, or that with _mask; or those of Cityscapes, https://github.com/mcordts/cityscapesScripts
    """
    name = re.sub(rf"{MASK_SUFFIX}$|_gt(Fine|Coarse)(_label(Train)?Ids)?$", "", file.stem)
    if re.search(r"_gt(Fine|Coarse)_instance(Train)?Ids$|^task-\d+-annotation-", file.stem):  # the last: Label Studio
        return None
    with opened(file) as image:
        if image.mode not in ("1", "L", "P", "I", "I;16") or image.format not in ("PNG", "TIFF", "BMP", "GIF"):
            return None
        values, size = np.unique(np.asarray(image)).tolist(), image.size[::-1]
    if len(values) > 64:
        return None
    annotation = Annotation(file, file.with_name(name).as_posix(), size)
    for value in values:
        if value:
            annotation.add(int(value), partial(label_mask, file, value), f"label {int(value)}")
    return annotation

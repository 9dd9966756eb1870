"""Annotation tools' files -> photos and the shapes on them. make_masks draws these; outputs.py writes LabelMe's files.

A new format is a function from a file to Annotations, and two lines in read_file.
"""

import base64
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
from machinery.errors import UserError
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
    place: str = "a shape"  # in the file, for messages


@dataclass
class Annotation:
    """What a file says of a photo."""

    file: Path
    photo: str  # its name or path as the file gives it, or its stem
    size: tuple[int, int] | None  # (height, width) of the photo as the tool took it, where the file says so
    shapes: list[Shape] = field(default_factory=list)
    embedded: Callable[[], bytes] | None = None  # the photo, where the file holds it
    is_prediction: bool = False  # of predict.py, which nobody has saved since

    def add(self, label: object, draw: Callable | None, place: str) -> None:
        self.shapes.append(Shape(" ".join(str(label).split()), draw, place))


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn what a parser stumbles over into a UserError that begins with `what`."""
    try:
        yield
    except STUMBLES as error:
        if isinstance(error, KeyError):
            reason = f"{error} is missing"
        elif isinstance(error, yaml.MarkedYAMLError):
            reason = f"{error.problem} in line {error.problem_mark.line + 1}"
        else:
            reason = str(error).splitlines()[0]
        raise UserError(f"{what} cannot be read ({reason}): export it again, or remove it") from error


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
    content = base64.b64decode(png)
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            own_size = image.size[::-1]
    except UnidentifiedImageError as error:
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

    `has_photo` says whether there is a photo of the file's stem: then an empty file is YOLO's, without an object.
    """
    with reading(file):
        with file.open("rb") as content:
            head = content.read(4096).removeprefix(b"\xef\xbb\xbf").strip()
        line = head.partition(b"\n")[0].decode("utf-8", "replace").strip().lower()
        if re.match(rb'\{\s*"', head) or file.suffix.lower() == ".json":
            content = json.loads(file.read_text("utf-8-sig"))
            if isinstance(content, dict) and {"shapes", "imagePath"} <= content.keys():
                return [labelme(file, content)]
            if isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys():
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
    height, width = content.get("imageHeight"), content.get("imageWidth")
    annotation = Annotation(file, content["imagePath"], (int(height), int(width)) if height and width else None)
    annotation.is_prediction = is_untouched(content)
    if content.get("imageData"):
        annotation.embedded = lambda: base64.b64decode(json.loads(file.read_text("utf-8-sig"))["imageData"])
    for number, shape in enumerate(content["shapes"], 1):
        place = f"shape {number} ({shape.get('label')})"
        with reading(f"{file}: {place}"):
            kind, ring, draw = shape.get("shape_type") or "polygon", ring_of(shape["points"]), None
            if kind == "mask":
                draw = partial(placed_png, shape["mask"], *ring[0].astype(int).tolist())
            elif kind == "circle":
                radius = np.hypot(*(ring[1] - ring[0]))
                draw = partial(polygon_mask, [ellipse_ring(*ring[0], radius, radius)])
            elif kind == "rectangle" and len(ring) == 2:
                draw = partial(polygon_mask, [box_ring(ring)])
            elif kind in ("polygon", "rectangle", "oriented_rectangle", "rotation", "quadrilateral") and len(ring) > 2:
                draw = partial(polygon_mask, [ring])
            annotation.add(shape["label"], draw, place)
    return annotation


def coco(file: Path, content: dict) -> list[Annotation]:
    """Read a file of COCO: https://cocodataset.org/#format-data"""
    names = {category["id"]: category["name"] for category in content["categories"]}
    photos: dict[object, Annotation] = {}
    for image in content["images"]:
        with reading(f"{file}: image {image.get('id')}"):
            if image["id"] in photos:
                raise ValueError("there are two of this id")
            size = int(image.get("height") or 0), int(image.get("width") or 0)
            photos[image["id"]] = Annotation(file, str(image["file_name"]), size if all(size) else None)
    for entry in content["annotations"]:
        place = f"annotation {entry.get('id')}"
        with reading(f"{file}: {place}"):
            for key, known, name in (("category_id", names, "category"), ("image_id", photos, "image")):
                if entry[key] not in known:
                    raise ValueError(f"there is no {name} {entry[key]}")
            outline, draw = entry.get("segmentation"), None
            if isinstance(outline, dict):
                draw = partial(coco_mask, outline["counts"], outline["size"])
            elif rings := [ring for ring in map(ring_of, outline or ()) if len(ring) > 2]:
                draw = partial(polygon_mask, rings)
            photos[entry["image_id"]].add(names[entry["category_id"]], draw, place)
    return list(photos.values())


def cvat(file: Path, root: ElementTree.Element) -> list[Annotation]:
    """Read "CVAT for images 1.1": https://docs.cvat.ai/docs/dataset_management/formats/format-cvat/"""
    if root.find("track") is not None:
        raise UserError(f"{file} is of a video: export it from CVAT as 'CVAT for images 1.1'")
    annotations = []
    for image in root.iter("image"):
        with reading(f"{file}: image {image.get('name')}"):
            size = int(image.attrib["height"]), int(image.attrib["width"])
            annotations.append(Annotation(file, image.attrib["name"], size))
        for number, shape in enumerate((shape for shape in image if shape.tag != "tag"), 1):
            place = f"image {image.get('name')}, shape {number} ({shape.get('label')})"
            with reading(f"{file}: {place}"):
                annotations[-1].add(shape.attrib["label"], cvat_shape(shape.tag, shape.attrib), place)
    return annotations


def cvat_shape(kind: str, shape: dict[str, str]) -> Callable | None:
    def numbers(*names: str) -> list[float]:
        return [float(shape[name]) for name in names]

    rotation = float(shape.get("rotation", 0))
    if kind == "mask":
        corners = ring_of(numbers("left", "top", "width", "height"))
        (left, top), (width, height) = corners.astype(int).tolist()
        counts = [int(count) for count in shape["rle"].split(",")]
        return partial(placed, partial(counts_mask, counts), (height, width), left, top)
    if kind == "box":
        ring = box_ring(numbers("xtl", "ytl", "xbr", "ybr"))
    elif kind == "ellipse":
        ring = ellipse_ring(*numbers("cx", "cy", "rx", "ry"))
    elif kind == "polygon":
        ring = ring_of(point.split(",") for point in shape["points"].split(";"))
    else:
        return None
    return partial(polygon_mask, [turned(ring, rotation)]) if len(ring) > 2 else None


def yolo(file: Path) -> Annotation:
    """Read a file of YOLO, a row for each object: its class and the ring's corners.

    A row of five numbers is a box, which is no outline. https://docs.ultralytics.com/datasets/segment/
    """
    annotation = Annotation(file, file.with_suffix("").as_posix(), None)
    names = class_names(file.parent.absolute())
    for number, line in enumerate(file.read_text("utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        place = f"row {number}"
        with reading(f"{file}: {place}"):
            label, *coordinates = line.split()
            label = label.removesuffix(".0")
            if len(coordinates) % 2 or len(coordinates) < 4:
                raise ValueError(f"{len(coordinates)} coordinates")
            if names and int(label) not in names:
                raise ValueError(f"there is no class {label} in the .yaml file")
            ring = ring_of([coordinates])
            if ring.max() > 1.5 or ring.min() < -0.5:
                raise ValueError("coordinates must be shares of the photo's width and height")
            draw = partial(relative_polygon_mask, ring) if len(ring) > 2 else None
            annotation.add(names.get(int(label), label), draw, place)
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
        columns = {name.lower(): name for name in table.fieldnames}
        runs = next(columns[name] for name in columns if re.search("rle|encod|segmentation", name))
        label = next((columns[name] for name in columns if re.search("class|label", name)), None)
        order = "C" if {"img", "segmentation"} & columns.keys() else "F"
        named = (columns[name] for name in columns if name != runs.lower() and re.search("im(g|age)|name|id$", name))
        name = next(named, table.fieldnames[0])
        for row in table:
            place = f"line {table.line_num}"
            with reading(f"{file}: {place}"):
                photo = photos.setdefault(row[name], Annotation(file, row[name], None))
                if row[runs] is None:
                    raise ValueError("it ends too early")
                if row[runs].strip() not in ("", "-1", "nan"):
                    draw = partial(rle_decode, row[runs], order=order)
                    photo.add(row[label] if label else "object", draw, place)
    return list(photos.values())


def label_image(file: Path) -> Annotation | None:
    """Read an image whose pixels are labels: lossless, of one channel, at most 64 values. Return None for others."""
    with opened(file) as image:
        if image.mode not in ("1", "L", "P", "I", "I;16") or image.format not in ("PNG", "TIFF", "BMP", "GIF"):
            return None
        values, size = np.unique(np.asarray(image)).tolist(), image.size[::-1]
    if len(values) > 64:
        return None
    annotation = Annotation(file, file.with_name(file.stem.removesuffix(MASK_SUFFIX)).as_posix(), size)
    for value in values:
        if value:
            annotation.add(int(value), partial(label_mask, file, value), f"label {int(value)}")
    return annotation

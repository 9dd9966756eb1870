"""Image files before their pixels: how they are opened, how they lie, and what they say about themselves."""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from machinery.errors import UserError, reason_of

with suppress(ImportError):  # it is optional, and reads the photos of iPhones
    import pillow_heif

    pillow_heif.register_heif_opener()

Image.MAX_IMAGE_PIXELS = 300_000_000  # Pillow warns above, and refuses twice that; a telephone's photo may have 200
warnings.filterwarnings("ignore", module=r"PIL\.")  # of what it reads all the same

JPEG_START, JPEG_SCAN, JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
TIFF_HEADS = b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"  # the last two are those of BigTIFF


Source = Path | Image.Image  # of a picture: a file, or what somebody has opened or made


@contextmanager
def opened(source: Source) -> Iterator[Image.Image]:
    """Open an image with Pillow. Pillow raises many kinds of errors on broken files: each becomes a UserError.

    An image that Pillow has opened, but not read yet, is opened once more, and another is copied: the one that is given
    stays as it is. Raises UserError for a file of several pictures, too.
    """
    name = name_of(source)
    try:
        with ExitStack() as files:
            if isinstance(source, Path):
                file = files.enter_context(source.open("rb"))
            elif getattr(source, "tile", None) and source.fp and not source.tell():
                file = source.fp
            else:
                yield source.copy()
                return
            # As a file, not by its name: Pillow maps an uncompressed TIFF into memory by its turned size, so garbled
            image = files.enter_context(Image.open(_with_end_marker(file)))
            if (number := _number_of_pictures(image, file)) > 1:
                raise UserError(f"{name} holds {number} pictures: save the one that you mean as a file of its own")
            yield image
    except UserError:
        raise
    except Exception as error:
        reason, advice = reason_of(error), "replace it, or move it away"
        if isinstance(error, MemoryError) or re.search("out of memory|insufficient memory", reason, re.IGNORECASE):
            raise UserError(f"out of memory while {name} was read: end other programs, or reduce the photo") from error
        if isinstance(source, Path) and (isinstance(error, UnidentifiedImageError) or "unknown raw mode" in reason):
            reason, advice = _unknown_kind(source)
        raise UserError(f"{name} is no readable image ({reason}): {advice}") from error


def name_of(source: Source) -> str:
    """Return how an error names a picture."""
    return str(source) if isinstance(source, Path) else getattr(source, "filename", "") or "the image"


def _unknown_kind(path: Path) -> tuple[str, str]:
    """Return why Pillow does not know a file, and what to do. Phones name HEIC .jpg, too."""
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return "it is HEIC", "run pip install pillow-heif, which reads it, or save it as JPEG"
    if head[4:] == b"ftypavif":
        return "it is AVIF", "run pip install --upgrade pillow, which reads it, or save it as JPEG"
    if head[:4] in TIFF_HEADS:
        with suppress(Exception), path.open("rb") as file:  # of many kinds, where it is broken
            return _unknown_tiff(next(_tiff_pages(file)))
    return "it is of no known kind", "replace it, or move it away"


# ---------------------------------------------------------------------------------------------------------------------
# TIFF


def _tiff_pages(file: BinaryIO) -> Iterator[ImageFileDirectory_v2]:
    """Yield the tags of each page of a TIFF, also of one whose pixels Pillow cannot read."""
    file.seek(0)
    head = file.read(8)
    tags = ImageFileDirectory_v2(head if head[2] != 43 else head + file.read(8))
    known = {0}
    while tags.next not in known:
        known.add(tags.next)
        file.seek(tags.next)
        tags.load(file)
        yield tags


def _unknown_tiff(tags: ImageFileDirectory_v2) -> tuple[str, str]:
    """Return what a TIFF is that Pillow does not know, by its tags, and how to convert it."""
    bits, bands = tags.get(258, (1,))[0], tags.get(277, 1)
    number = {2: "signed", 3: "float", 5: "complex", 6: "complex"}.get(tags.get(339, (1,))[0], "unsigned")
    colours = {2: "RGB", 3: "a palette", 5: "CMYK", 6: "YCbCr", 8: "Lab"}.get(tags.get(262), "grey")
    many = "one band" if bands == 1 else f"{bands} bands"
    reason = f"it is a TIFF of {many} of {bits} bits, {number}, of which the colour is {colours}"
    if bands < 3:
        return reason, "save it as one band with 16 or 32 bits (gdal_translate -b 1 -ot Float32)"
    scale = " -ot UInt16 -scale MIN MAX 0 65535" if number != "unsigned" or bits not in (8, 16) else ""
    how = f"gdal_translate -b 1 -b 2 -b 3 -co PHOTOMETRIC=RGB{scale}"
    return reason, f"save it as RGB with 8 or 16 bits ({how})"


def _number_of_pictures(image: Image.Image, file: BinaryIO) -> int:
    """Return how many pictures a file holds, without a TIFF's and an MPO's previews."""
    if image.format not in ("TIFF", "GIF", "WEBP", "PNG", "AVIF") or not getattr(image, "is_animated", False):
        return 1
    if image.format != "TIFF":
        return image.n_frames
    # 254 holds 1 in a reduced picture and 4 in a mask of transparency: TIFF 6.0, page 36. 255 is its older form
    _, *others = (tags.get(254, 0) & 5 or tags.get(255) == 2 for tags in _tiff_pages(file))
    return 1 + others.count(False)


def has_opacity(image: Image.Image) -> bool:
    """Return whether an image may be transparent. Only what tag 338 calls opacity is it in a TIFF, not any 4th band."""
    if image.format == "TIFF":
        return image.has_transparency_data and image.tag_v2.get(338, (0,))[0] in (1, 2)
    return image.has_transparency_data


def no_data_value(image: Image.Image) -> float | None:
    """Return the value of a TIFF's pixels without data, by GDAL's tag."""
    with suppress(AttributeError, TypeError, ValueError):
        return float(image.tag_v2.get(42113).strip(" \0"))
    return None


# ---------------------------------------------------------------------------------------------------------------------
# JPEG


def _with_end_marker(file: BinaryIO) -> BinaryIO:
    """Return a JPEG that lacks nothing but its end marker with one, as viewers show it, and any other file as it is.

    Raises ValueError for a JPEG that is cut off: where zeros fill it up, Pillow takes them for its picture.
    """
    file.seek(0)
    is_jpeg = file.read(2) == JPEG_START
    has_end = is_jpeg and file.seek(-2, os.SEEK_END) >= 0 and file.read() == JPEG_END
    file.seek(0)
    if not is_jpeg or has_end:
        return file
    data = file.read()
    file.seek(0)
    place = 2  # of a segment; a preview lies within one
    while data[place : place + 1] == b"\xff" and data[place : place + 2] != JPEG_SCAN:
        is_filling = data[place + 1 : place + 2] == b"\xff"
        place += 1 if is_filling else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    if JPEG_END in data[place:]:  # something follows it, such as a film
        return file
    # Without half of the marker and without what fills it up; but 255 in the picture is written as 255, 0
    data = re.sub(rb"(?:(?<=\xff\0)|(?<!\xff))\0+\Z|\xff\Z", b"", data)
    if not _is_whole(data, place):
        raise ValueError("it is cut off")
    return BytesIO(data + JPEG_END)


def _is_whole(data: bytes, place: int) -> bool:
    """Return whether a JPEG without an end marker, whose scans begin at `place`, holds all of its picture.

    Its scans then give every coefficient of every channel to its last bit (ITU-T T.81, B.2), and bytes that follow
    change nothing.
    """
    frames = re.findall(rb"\xff[\xc0-\xc2]\0[\x0b\x11\x14]\x08....(.)", data[:place], re.DOTALL)
    known = 0
    for scan in re.finditer(rb"\xff\xda\0.(.)", data[place:], re.DOTALL):
        channels = scan[1][0]
        start = place + scan.end() + 2 * channels
        first, last, bits = data[start : start + 3].ljust(3, b"\1")
        known += channels * (last - first + 1) * (bits % 16 == 0)
    if not frames or known < 64 * frames[-1][0]:
        return False
    fillings = b"", 64 * b"\x55\x2a", 64 * b"\xaa\xd5"  # one alone decodes like nothing after 3 % of cuts
    return len({Image.open(BytesIO(data + more + JPEG_END)).tobytes() for more in fillings}) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Size and orientation


def orientation_of(image: Image.Image) -> int:
    """Return EXIF's orientation, from 1, which is upright, to 8; those from 5 on swap height and width."""
    orientation = image.getexif().get(0x0112, 1)
    return orientation if orientation in range(1, 9) else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the (height, width) of an image that is not loaded yet, as its orientation will turn it."""
    # Of a TIFF, Pillow's size is turned or not, by its version
    width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
    return (width, height) if orientation_of(image) >= 5 else (height, width)


def image_size(source: Source) -> tuple[int, int]:
    """Return the (height, width) of an image, upright, from its header. Raises UserError."""
    with opened(source) as image:
        return upright_size(image)

"""Image files -> arrays: how photos and masks are decoded, and what the values of a data set's files mean."""

import math
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from machinery.errors import UserError

with suppress(ImportError):  # it is optional, and reads the photos of iPhones
    import pillow_heif

    pillow_heif.register_heif_opener()

cv2.setNumThreads(0)  # several threads or workers call it on small samples: OpenCV's own threads would compete
Image.MAX_IMAGE_PIXELS = 300_000_000  # Pillow warns above, and refuses twice that; a telephone's photo may have 200
Image.core.set_blocks_max(16)  # Pillow keeps memory that it would give back: decoding in full takes half the time

PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # the colours of an ICC profile -> Pillow's mode

DARK = 32  # of 255: below it a mask's values are labels, or in a JPEG noise
VOID = 255  # in a decoded mask: nobody says what is there

Size = tuple[int, int] | float | None  # to which photos are resized: (height, width), a share of their own, or not


# ---------------------------------------------------------------------------------------------------------------------
# What values mean


@dataclass
class Note:
    """What the files of a pair hold, as far as the meaning of the set's values depends on it."""

    levels: list[float] | None  # of a photo with more than 8 bits a channel: 33 quantiles, from 0.1 to 99.9 %
    kind: str  # of the mask's values: "colours", "jpeg", or the name of their type
    values: list[list[float]] | None  # [value, share] of each; None where they are fractions, noise or more than 32
    brightest: float
    is_turned: bool = False  # by EXIF's orientation: the photo, and the mask not likewise


@dataclass(frozen=True)
class Rule:
    """What the values of a set's files mean, the same for all of them; made from notes of the training files.

    Photos with more than 8 bits a channel: `low` becomes 0 and `high` 255. They are the 0.1 and 99.9 % quantiles over
    all photos, or None where there was no such photo: then each has its own.

    Masks: in a set of at most 32 whole values (labels) all but 0 is foreground, or `chosen` values alone. In a set of
    more, or whose many values are the soft edges of white things, and in JPEGs, whose dark values are noise, it is what
    is brighter than half of the `brightest` in files of their kind. Where masks hold labels below 32 and 255, as those
    of Pascal VOC and Cityscapes, 255 is void.
    """

    low: float | None = None
    high: float | None = None
    is_labels: bool = True
    has_void: bool = False
    brightest: dict[str, float] = field(default_factory=dict)
    chosen: tuple[float, ...] | None = None

    @classmethod
    def of(cls, notes: list[Note], chosen: tuple[float, ...] | None = None) -> "Rule":
        levels = [note.levels for note in notes if note.levels]
        low, high = np.quantile(levels, (0.001, 0.999)).tolist() if levels else (None, None)
        brightest: dict[str, float] = {}
        for note in notes:
            brightest[note.kind] = max(note.brightest, brightest.get(note.kind, 0))

        grey = [note for note in notes if note.kind not in ("colours", "jpeg")]
        shares = value_shares(grey)
        white = max(shares, default=0)
        between = [share for value, share in shares.items() if 0 < value < white]
        has_soft_edges = white in (255, 65535) and len(between) > 2 and sum(between) < shares[white]
        has_void = holds_void(notes) and 255 not in (chosen or ())
        is_labels = all(note.values for note in grey) and len(shares) <= 32 and (has_void or not has_soft_edges)
        return cls(low, high, is_labels, has_void, brightest, chosen)

    def of_mask(self, values: np.ndarray, kind: str, is_listed: bool) -> np.ndarray:
        """Turn values of a mask into uint8 in {0, 1, VOID}; `is_listed` says whether a Note lists them."""
        if not self._are_labels(kind, is_listed):
            return (values > self._threshold(kind)).astype(np.uint8)
        mask = (values != 0 if self.chosen is None else np.isin(values, self.chosen)).astype(np.uint8)
        if self.has_void:
            mask[values == 255] = VOID
        return mask

    def _are_labels(self, kind: str, is_listed: bool) -> bool:
        chosen = self.chosen is not None and kind != "jpeg"
        return chosen or kind == "colours" or (self.is_labels and is_listed)

    def _threshold(self, kind: str) -> float:
        brightest = self.brightest.get(kind) or {"uint16": 65535}.get(kind, 1 if kind.startswith("float") else 255)
        return max(brightest // 2 if brightest > 2 else brightest / 2, DARK - 1 if kind == "jpeg" else 0)

    def meaning(self, note: Note) -> tuple:
        """Return what it makes of a pair's files: where two rules give the same, they decode alike."""
        if note.values:
            mask = tuple(self.of_mask(np.array([value for value, _ in note.values]), note.kind, True).tolist())
        elif self._are_labels(note.kind, False):
            mask = self.chosen, self.has_void
        else:
            mask = self._threshold(note.kind)
        return mask, (self.low, self.high) if note.levels else None


def holds_void(notes: list[Note]) -> bool:
    """Return whether 255 is void: at least half of the masks with 255 hold labels below 32, too, and no mask others.

    Labels are more than a hundredth of what is 255: not a few stray pixels.
    """
    masks = [dict(note.values) for note in notes if note.values]
    with_255 = [shares for shares in masks if 255 in shares]
    labels = [sum(share for value, share in shares.items() if 0 < value < DARK) for shares in with_255]
    are_labelled = [label > shares[255] / 100 for label, shares in zip(labels, with_255, strict=True)]
    others = any(DARK <= value != 255 for shares in masks for value in shares)
    return not others and any(are_labelled) and 2 * sum(are_labelled) >= len(with_255)


def value_shares(notes: list[Note]) -> dict[float, float]:
    """Return the mean share of each value that the notes list."""
    shares: dict[float, float] = {}
    for value, share in (pair for note in notes for pair in note.values or []):
        shares[value] = shares.get(value, 0) + share / len(notes)
    return shares


def rule_from(entries: dict | None) -> Rule | None:
    """Return a Rule from its dictionary, asdict(rule), as caches and checkpoints hold it."""
    return entries and Rule(**entries | {"chosen": entries["chosen"] and tuple(entries["chosen"])})


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open an image with Pillow. Pillow raises many kinds of errors on broken files: each becomes a UserError."""
    try:
        # As a file, not by its name: Pillow maps an uncompressed TIFF into memory by its turned size, so garbled
        with path.open("rb") as file, Image.open(file) as image:
            yield image
    except Exception as error:
        reason = re.sub(rf" <_io.*>| {re.escape(repr(str(path)))}", "", str(error)).removesuffix(":")
        advice = "replace or remove it"
        if isinstance(error, MemoryError) or re.search("out of memory|insufficient memory", reason, re.IGNORECASE):
            raise UserError(f"out of memory while {path} was read: end other programs, or reduce the photo") from error
        if isinstance(error, UnidentifiedImageError):
            reason, advice = _unknown_kind(path)
        raise UserError(f"{path} is no readable image ({reason}): {advice}") from error


def _unknown_kind(path: Path) -> tuple[str, str]:
    """Return why Pillow does not know a file, and what to do. Phones name HEIC .jpg, too."""
    with path.open("rb") as file:
        kind = file.read(12)[4:]
    if kind in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return "it is HEIC", "run pip install pillow-heif, which reads it, or save it as JPEG"
    if kind == b"ftypavif":
        return "it is AVIF", "run pip install --upgrade pillow, which reads it, or save it as JPEG"
    return "it is of no known kind", "replace or remove it"


def orientation_of(image: Image.Image) -> int:
    """Return EXIF's orientation, from 1, which is upright, to 8; those from 5 on swap height and width."""
    orientation = image.getexif().get(0x0112, 1)
    return orientation if orientation in range(1, 9) else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the (height, width) of an image that is not loaded yet, as its orientation will turn it."""
    # Of a TIFF, Pillow's size is turned or not, by its version
    width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
    return (width, height) if orientation_of(image) >= 5 else (height, width)


def image_size(path: Path) -> tuple[int, int]:
    """Return the (height, width) of an image, upright, from its header. Raises UserError."""
    with opened(path) as image:
        return upright_size(image)


def resized(own_size: tuple[int, int], size: Size) -> tuple[int, int]:
    """Return the (height, width) of an image of `own_size` that is resized to `size`."""
    if isinstance(size, float):
        return tuple(max(1, round(size * side)) for side in own_size)
    return tuple(size or own_size)


def _is_deep(image: Image.Image) -> bool:
    """Return whether an image that Pillow has just opened, and not loaded, has more than 8 bits a channel."""
    return image.mode[0] in "IF" or any(re.search(";16[BLNS]", str(tile[3])) for tile in image.tile)


def _deep_values(image: Image.Image, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Return a deep image's values of its own type, (H, W) or RGB (H, W, 3), and its opacity, float (H, W), 0 to 1.

    Raises ValueError for nan.
    """
    opacity = None
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if "transparency" in image.info:
            opacity = (values != image.info["transparency"]).astype(np.float32)
    else:  # Pillow would cut 16 bits a channel down to 8
        values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        if values is None:
            raise ValueError("OpenCV cannot decode its 16 bits a channel")
        if values.ndim == 3:
            opacity = values[..., 3] / np.float32(65535) if values.shape[2] == 4 else None
            values = values[..., 2::-1]
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("it holds nan or infinity")
    if image.format == "TIFF" and image.tag_v2.get(262) == 0:  # 0 is white; Pillow knows that for 8 bits and less
        bits = image.tag_v2.get(258, (16,))[0]
        values = 2**bits - 1 - values if values.dtype.kind == "u" else -values
    return values, opacity


def _levels(values: np.ndarray) -> list[float]:
    """Return a Note's levels, from at most 20,000 of a photo's values."""
    places = np.linspace(0, values.size - 1, min(values.size, 20_000)).astype(np.int64)
    return np.quantile(values.reshape(-1)[places], np.linspace(0.001, 0.999, 33)).tolist()


def upright(pixels: np.ndarray, image: Image.Image) -> Image.Image:
    """Turn an array uint8 as the orientation says of the image that it was decoded from; return it as an image."""
    turned, orientation = Image.fromarray(pixels), orientation_of(image)
    if orientation != 1 and image.format != "TIFF":  # which Pillow and OpenCV have turned
        turned.getexif()[0x0112] = orientation
        ImageOps.exif_transpose(turned, in_place=True)
    return turned


def _in_eight_bits(image: Image.Image, path: Path, rule: Rule | None) -> tuple[Image.Image, list[float]]:
    """Return a deep image scaled by the rule, or by its own range, and a Note's levels."""
    values, opacity = _deep_values(image, path)
    levels = _levels(values)
    if rule is None or rule.low is None:
        rule = Rule.of([Note(levels, "", None, 0)])
    values = (values.astype(np.float32) - rule.low) * (255 / max(rule.high - rule.low, 1e-30))
    pixels = values.round(out=values).clip(0, 255, out=values).astype(np.uint8)
    if opacity is not None:
        pixels = np.dstack((pixels, (255 * opacity).round().astype(np.uint8)))
    return upright(pixels, image), levels


def _opacity(image: Image.Image) -> Image.Image | None:
    """Return a grey image, 255 where nothing is transparent; None for none, as for a channel that is 0 everywhere."""
    if not image.has_transparency_data:
        return None
    opacity = (image if "A" in image.mode else image.convert("RGBA")).getchannel("A")
    return None if opacity.getextrema() in ((255, 255), (0, 0)) else opacity


def read_opacity(path: Path) -> np.ndarray | None:
    """Return an image's opacity, upright uint8 (H, W), or None where nothing is transparent. Raises like read_image."""
    with opened(path) as image:
        if not image.has_transparency_data:
            return None
        if _is_deep(image):
            image, _ = _in_eight_bits(image, path, None)
        ImageOps.exif_transpose(image, in_place=True)
        opacity = _opacity(image)
        return None if opacity is None else np.array(opacity)


def _on_white(image: Image.Image) -> Image.Image:
    """Return the image with white where it is transparent, in a mode that resizing mixes: RGB, grey or CMYK."""
    mode = {"1": "L", "LA": "L"}.get(image.mode, image.mode if image.mode in ("L", "CMYK") else "RGB")
    opacity = _opacity(image)
    if image.has_transparency_data and image.mode not in ("RGBA", "LA"):
        image = image.convert("RGBA")
    if image.mode != mode:  # converting would copy it
        image = image.convert(mode)
    if opacity is None:
        return image
    canvas = Image.new(mode, image.size, "white")
    canvas.paste(image, mask=opacity)
    return canvas


@lru_cache
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return what turns colours of an ICC profile into sRGB's; None for sRGB's own, and for one of another mode."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if PROFILE_MODES.get(source.profile.xcolor_space) != mode:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):  # it is broken: other programs show such photos, too
        return None
    levels = np.indices((9, 9, 9), np.uint8).reshape(3, 27, 27).T.copy() * 31
    colours = Image.fromarray(levels).convert(mode)
    change = np.subtract(ImageCms.applyTransform(colours, transform), colours.convert("RGB"), dtype=np.int16)
    return transform if abs(change).max() > 2 else None


def read_image(path: Path, size: Size = None, rule: Rule | None = None) -> np.ndarray:
    """Decode an image of any kind to upright RGB, uint8 (H, W, 3), resized to `size` if that is given.

    Transparent pixels are laid on white, unless all of them are transparent, and colours of an ICC profile become
    sRGB's. What has more than 8 bits a channel is scaled by the rule, or without one by its own range. A JPEG is
    decoded at 1/2, 1/4 or 1/8 where that is not smaller than `size`: 1.7 ms instead of 11 for 1918 x 1280. Raises
    UserError if the file cannot be decoded to its end.
    """
    return decode_image(path, size, rule)[0]


def decode_image(
    path: Path, size: Size, rule: Rule | None = None
) -> tuple[np.ndarray, tuple[int, int], list[float] | None, bool]:
    """Return read_image's image, its own (height, width), a Note's `levels`, and whether EXIF turned it."""
    with opened(path) as image:
        is_deep = _is_deep(image)  # first: reading a PNG's orientation loads it
        own_size, is_turned, levels = upright_size(image), orientation_of(image) > 1, None
        size = resized(own_size, size)
        profile = image.info.get("icc_profile")
        if is_deep:
            image, levels = _in_eight_bits(image, path, rule)
        else:
            for scale in (8, 4, 2):
                if all(math.ceil(own / scale) >= wanted for own, wanted in zip(own_size, size, strict=True)):
                    less = [max(1, side // scale) for side in image.size]
                    image.draft(None, less)  # does nothing unless it is a JPEG
                    break
        ImageOps.exif_transpose(image, in_place=True)
        image = resize(_on_white(image), size)
        transform = profile and _to_srgb(profile, image.mode)
        if transform and image.mode == "RGB":  # after resizing: 0.4 ms instead of 26
            transform.apply_in_place(image)
        elif transform:
            image = ImageCms.applyTransform(image, transform)
        return np.array(image if image.mode == "RGB" else image.convert("RGB")), own_size, levels, is_turned


def read_mask(path: Path, size: Size = None, rule: Rule | None = None) -> np.ndarray:
    """Decode a mask of any kind to uint8 (H, W) in {0, 1}, resized to `size` if that is given.

    Its values mean what the rule says, or without one what they would in a set of this mask alone. Transparent pixels
    count as black, void as background, any colour as 1, and those of a palette that begins with black as labels.

    Resizing takes a pixel as foreground if at least half of its area was. Raises UserError like read_image.
    """
    return (decode_mask(path, size, rule)[0] == 1).astype(np.uint8)


def decode_mask(path: Path, size: Size, rule: Rule | None = None) -> tuple[np.ndarray, tuple[int, int], Note]:
    """Return read_mask's mask, but uint8 (H, W) in {0, 1, VOID}, its own (height, width), and a Note of it."""
    with opened(path) as image:
        is_deep, own_size = _is_deep(image), upright_size(image)
        coded = _deep_codes(*_deep_values(image, path)) if is_deep else _codes(image, _is_lossy(image, path))
        codes, values, counts, kind = coded
        used = counts > 0
        note = _note(values[used], counts[used], kind)
        rule = rule or Rule.of([note])
        meaning = np.zeros(len(values), np.uint8)
        meaning[used] = rule.of_mask(values[used], kind, note.values is not None)
        note.is_turned = orientation_of(image) > 1
        mask = upright(cv2.LUT(codes, meaning) if codes.dtype == np.uint8 else meaning[codes], image)
    return _resize_mask(np.asarray(mask), resized(own_size, size), rule.has_void), own_size, note


def _is_lossy(image: Image.Image, path: Path) -> bool:
    """Return whether compression has changed the values: in a JPEG, or in a WebP or JPEG 2000 that is not lossless."""
    if image.format == "WEBP":
        return b"VP8L" not in path.read_bytes()
    if image.format == "JPEG2000":  # in its coding style, 1 is the reversible wavelet: ISO/IEC 15444-1, table A.20
        _, _, style = path.read_bytes().partition(b"\xff\x52")
        return style[11:12] != b"\1"
    return image.format in ("JPEG", "MPO", "AVIF", "HEIF")


# Codes (H, W), the value that each of them stands for, how often each occurs, and a Note's kind
Codes = tuple[np.ndarray, np.ndarray, np.ndarray, str]


def _deep_codes(values: np.ndarray, opacity: np.ndarray | None) -> Codes:
    """Return the codes of a mask with more than 8 bits a channel."""
    if values.ndim == 3:
        values = values.max(2)
    if opacity is not None:
        values = values * (opacity > 0.5)
    if values.dtype == np.uint16:  # without the sorting of np.unique
        return values, np.arange(65536), np.bincount(values.ravel(), minlength=65536), "uint16"
    found, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    return codes.reshape(values.shape), found, counts, values.dtype.name


def _codes(image: Image.Image, is_lossy: bool) -> Codes:
    """Return the codes of a mask with at most 8 bits a channel."""
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    kind, values = "jpeg" if is_lossy else "uint8", np.arange(256)
    if image.mode == "P":
        codes = np.asarray(image)
        counts = _histogram(codes)
        colours = np.zeros((256, 3), np.uint8)
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        colours[: len(palette)] = palette
        brightest, used = colours.max(1), counts > 0
        if (brightest - colours.min(1))[used].max() < DARK:
            return codes, brightest, counts, kind
        are_labels = not (used[0] and brightest[0]) and used.sum() <= 32
        return codes, np.where(brightest > 0, values if are_labels else 1, 0), counts, "colours"
    if image.mode in ("L", "1"):
        codes = np.asarray(image.convert("L"))
    else:
        pixels = np.asarray(image.convert("RGB"))
        codes = pixels.max(2)
        if (codes - pixels.min(2)).max() >= DARK:
            kind, codes = "colours", (codes > (DARK - 1 if is_lossy else 0)).astype(np.uint8)
    return codes, values, _histogram(codes), kind


def _histogram(codes: np.ndarray) -> np.ndarray:
    """Count how often each of 256 codes, uint8 (H, W), occurs. Most masks hold two: in 1 ms instead of 5."""
    largest, others = int(codes.max()), cv2.countNonZero(codes)
    if others == 0 or others == np.count_nonzero(codes == largest):
        return np.bincount((0, largest), (codes.size - others, others), 256)
    return cv2.calcHist([codes], [0], None, [256], [0, 256]).ravel()


def _note(values: np.ndarray, counts: np.ndarray, kind: str) -> Note:
    """Return a Note of a mask that holds these values so often."""
    is_listed = len(values) <= 32 and kind != "jpeg" and (values == np.round(values)).all()
    shares = [[float(value), float(share)] for value, share in zip(values, counts / counts.sum(), strict=True)]
    return Note(None, kind, shares if is_listed else None, float(values.max()))


def _resize_mask(mask: np.ndarray, size: tuple[int, int], may_have_void: bool) -> np.ndarray:
    """Resize a mask in {0, 1, VOID}: void where most of the area is, else foreground by the share of what is known."""
    if mask.shape == size:
        return mask.copy()  # which can be written to, unlike what Pillow gives
    if not may_have_void or not (is_void := mask == VOID).any():
        return (np.asarray(resize(Image.fromarray(mask * np.uint8(255)), size)) > 127).astype(np.uint8)
    foreground, known = (
        np.asarray(resize(Image.fromarray(part.astype(np.float32)), size)) for part in (mask == 1, ~is_void)
    )
    return np.where(known < 0.5, VOID, foreground >= known / 2).astype(np.uint8)


def resize(image: Image.Image, size: Size) -> Image.Image:
    """Resize to `size`: the mean over each new pixel's area, or linear interpolation where it is enlarged."""
    size = resized(image.size[::-1], size)
    if image.size == size[::-1]:
        return image
    if size[0] > image.height or size[1] > image.width:
        return image.resize(size[::-1], Image.Resampling.BILINEAR)
    return image.resize(size[::-1], Image.Resampling.BOX, reducing_gap=2)  # whole factors first: faster


# ---------------------------------------------------------------------------------------------------------------------
# Pairs, and many of them side by side


NUM_THREADS = os.cpu_count() or 1  # that decode and draw side by side: Pillow and OpenCV release the GIL
LARGE = 25_000_000  # pixels; of the photos above, one at a time is worked on at original size, which bounds the memory
ONE_AT_A_TIME = threading.Lock()


def in_threads(pool: ThreadPoolExecutor, depth: int, function: Callable, items: Iterable[tuple]) -> Iterator[Future]:
    """Call function(*item) in the pool, `depth` calls ahead of the caller. Yield their results' futures, in order."""
    items, running = iter(items), deque()
    while True:
        running.extend(pool.submit(function, *item) for item in islice(items, depth - len(running)))
        if not running:
            return
        yield running.popleft()


def large_ones_wait(path: Path) -> AbstractContextManager:
    """Let one large photo at a time be worked on."""
    return ONE_AT_A_TIME if math.prod(image_size(path)) > LARGE else nullcontext()


def bands(height: int, margin: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield portions of 512 rows, because floats of a whole large photo take too much memory.

    Each is the rows with a margin, those without it among them, and those without it in the whole.
    """
    for top in range(0, height, 512):
        start = max(0, top - margin)
        yield slice(start, top + 512 + margin), slice(top - start, top - start + 512), slice(top, top + 512)


def read_sample(
    image_path: Path, mask_path: Path, size: Size, rule: Rule | None = None
) -> tuple[np.ndarray, np.ndarray, tuple[int, int], Note]:
    """Decode a pair by a rule, or by what its files alone suggest.

    Return the image, uint8 (H, W, 3), and the mask, uint8 (H, W) in {0, 1, VOID}, both of `size`, the photo's own
    (height, width), and a Note. Raises UserError if image and mask differ in size, or cannot be decoded.
    """
    image, own_size, levels, is_turned = decode_image(image_path, size, rule)
    mask, mask_size, note = decode_mask(mask_path, size, rule)
    note.levels, note.is_turned = levels, is_turned and not note.is_turned
    if own_size != mask_size:
        raise UserError(
            f"{mask_path} is {mask_size[1]} x {mask_size[0]} pixels, but its image {image_path.name} is "
            f"{own_size[1]} x {own_size[0]}: "
            + ("turn the mask upright, as EXIF turns the image" if note.is_turned else "make it again at that size")
        )
    return image, mask, own_size, note

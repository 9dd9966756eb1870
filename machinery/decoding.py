"""Image files -> arrays: how photos and masks are decoded, and what the values of a data set's files mean."""

import math
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageOps

from machinery.errors import UserError
from machinery.formats import (
    Source,
    has_opacity,
    image_size,
    name_of,
    no_data_value,
    opened,
    orientation_of,
    upright_size,
)

cv2.setNumThreads(0)  # several threads or workers call it on small samples: OpenCV's own threads would compete
Image.core.set_blocks_max(16)  # Pillow keeps memory that it would give back: decoding in full takes half the time

PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # the colours of an ICC profile -> Pillow's mode

DARK = 32  # of 255: below it a mask's values are labels, or in a JPEG noise
SOFT = 0.5  # the softness from which a mask is soft: labels have up to 0.2, soft edges and noise 0.7 and more
READINGS = {("labels",): True, ("brightness",): False}  # words instead of FOREGROUND_VALUES -> Rule.is_labels
WHITES = 1, 255, 65535  # the brightest values of soft masks, where nothing else is known of a type
VOID = 255  # in a decoded mask: nobody says what is there

Size = tuple[int, int] | float | None  # to which photos are resized: (height, width), a share of their own, or not


# ---------------------------------------------------------------------------------------------------------------------
# What values mean


@dataclass
class Note:
    """Notes of the values in a pair's files, as far as the meaning of the set's values depends on it."""

    levels: list[float] | None  # of a photo with more than 8 bits a channel: 33 quantiles, from 0.1 to 99.9 %
    kind: str  # of the mask's values: "colours", "jpeg", or the name of their type
    values: list[list[float]] | None  # [value, share] of each; None where they are fractions, noise or more than 32
    brightest: float
    softness: float | None = None  # of the mask's edges, 0 to 1, as softness_of says
    not_black: float = 0  # the share of the mask's pixels that are not 0
    bright: float = 0  # the share of those above half of its brightest
    is_turned: bool = False  # by EXIF's orientation: the photo, and the mask not likewise

    @property
    def is_zeros_and_ones(self) -> bool:
        return self.brightest == 1 and self.values is not None and self.kind != "colours"


@dataclass(frozen=True)
class Rule:
    """The meaning of the values in a set's files, the same for all of them; made from notes of the training files.

    Photos with more than 8 bits a channel: `low` becomes 0 and `high` 255. They are the 0.1 and 99.9 % quantiles over
    all photos, or None where there was no such photo: then each has its own.

    Masks hold labels or brightness. Of labels (`is_labels`), all but 0 are foreground, or the `chosen` ones alone.
    Masks of brightness have soft edges: foreground is above half of the `brightest` value in files of their kind. Where
    is_labels is None, no file of the set had enough values to tell: each later file is read by its own values. JPEGs
    always hold brightness, and their dark values are noise. Beside soft masks, 1 is foreground in files of 0 and 1
    (`ones`), unless it covers too little. Where masks hold labels below 32, and 255 as well, 255 is void.
    """

    low: float | None = None
    high: float | None = None
    is_labels: bool | None = None
    has_void: bool = False
    brightest: dict[str, float] = field(default_factory=dict)
    chosen: tuple[float, ...] | None = None
    ones: bool = True

    @classmethod
    def of(cls, notes: list[Note], chosen: tuple | None = None) -> "Rule":
        """Make the rule of these files. `chosen` are the foreground's labels, or a word of READINGS."""
        levels = [note.levels for note in notes if note.levels]
        low, high = np.quantile(levels, (0.001, 0.999)).tolist() if levels else (None, None)
        brightest: dict[str, float] = {}
        for note in notes:
            brightest[note.kind] = max(note.brightest, brightest.get(note.kind, 0))

        is_labels = READINGS.get(chosen)
        chosen = chosen if is_labels is None else None
        has_void = holds_void(notes) and 255 not in (chosen or ())
        known = [note for note in notes if note.softness is not None]
        if is_labels is None and (known or has_void):
            is_soft = bool(known) and np.mean([note.softness for note in known]) >= SOFT
            are_listed = all(note.values for note in notes if note.kind not in ("colours", "jpeg"))
            is_labels = bool((has_void and are_listed) or not is_soft)
        has_void = has_void and is_labels is not False
        ones = [note.not_black for note in notes if note.is_zeros_and_ones]
        soft = [note.bright for note in known if note.softness >= SOFT]
        are_foreground = not ones or not soft or bool(np.mean(ones) > np.mean(soft) / 4)
        return cls(low, high, is_labels, has_void, brightest, chosen, are_foreground)

    def of_mask(self, values: np.ndarray, note: Note) -> np.ndarray:
        """Turn values of a mask into uint8 in {0, 1, VOID}."""
        if not self._are_labels(note):
            return (values > self._threshold(note)).astype(np.uint8)
        mask = (values != 0 if self.chosen is None else np.isin(values, self.chosen)).astype(np.uint8)
        if self.has_void:
            mask[values == 255] = VOID
        return mask

    def _are_labels(self, note: Note) -> bool:
        if note.kind == "jpeg":
            return False
        if note.kind == "colours" or self.chosen is not None:
            return True
        if note.is_zeros_and_ones:
            return self.ones
        return (note.softness or 0) < SOFT if self.is_labels is None else self.is_labels

    def _threshold(self, note: Note) -> float:
        brightest = self.brightest.get(note.kind, 0)
        if brightest in (0, 1):  # training had no soft file of the kind, or none of it
            whites = (255,) if note.kind == "jpeg" else WHITES
            brightest = next((white for white in whites if note.brightest <= white), note.brightest)
        return max(brightest / 2, DARK - 1 if note.kind == "jpeg" else 0)

    def meaning(self, note: Note) -> tuple:
        """Return what it makes of a pair's files: where two rules give the same, they decode alike."""
        if note.values:
            mask = tuple(self.of_mask(np.array([value for value, _ in note.values]), note).tolist())
        elif self._are_labels(note):
            mask = self.chosen, self.has_void
        else:
            mask = self._threshold(note)
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
    if not entries:
        return None
    if "ones" not in entries and entries["is_labels"]:  # an older one, which said so of masks of two values, too
        entries = entries | {"is_labels": entries["has_void"] or None}
    return Rule(**entries | {"chosen": entries["chosen"] and tuple(entries["chosen"])})


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


def resized(own_size: tuple[int, int], size: Size) -> tuple[int, int]:
    """Return the (height, width) of an image of `own_size` that is resized to `size`."""
    if isinstance(size, float):
        return tuple(max(1, round(size * side)) for side in own_size)
    return tuple(size or own_size)


def _is_deep(image: Image.Image) -> bool:
    """Return whether an image that Pillow has just opened, and not loaded, has more than uint8 holds in a channel."""
    if image.format == "TIFF" and image.mode != "CMYK":
        return max(image.tag_v2.get(258, (1,))) > 8 or image.tag_v2.get(339, (1,))[0] == 2
    return image.mode[0] in "IF" or any(re.search(";16[BLNS]", str(tile[3])) for tile in getattr(image, "tile", ()))


def _deep_values(image: Image.Image, path: Path) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Return a deep image's values of its own type, (H, W) or RGB (H, W, 3), its opacity, and where it has data.

    Opacity is float (H, W), 0 to 1, or None; the last is bool of the values' shape. Raises UserError for nan.
    """
    opacity, tags = None, image.tag_v2 if image.format == "TIFF" else {}
    if tags.get(284) == 2 and tags.get(277, 1) > 1:  # Pillow and OpenCV garble them
        raise UserError(
            f"{path} holds each of its colours in a plane of its own (PlanarConfiguration 2): save it with "
            "interleaved colours (gdal_translate -co INTERLEAVE=PIXEL)"
        )
    if image.mode in ("L", "I", "F") or image.mode.startswith("I;"):
        values = np.asarray(image)
        if image.mode == "L":  # a signed TIFF's, of which Pillow knows nothing
            values = values.view(np.int8).astype(np.int16)
        if "transparency" in image.info:
            opacity = (values != image.info["transparency"]).astype(np.float32)
    else:  # Pillow would cut 16 bits a channel down to 8
        values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        if values is None:
            raise ValueError("OpenCV cannot decode its 16 bits a channel")
        if values.ndim == 3:
            is_opacity = values.shape[2] == 4 and has_opacity(image)
            opacity = values[..., 3] / np.float32(65535) if is_opacity else None
            values = values[..., 2::-1]
            if is_opacity and tags.get(338) == (1,):  # the colours are multiplied with it
                values = (values / opacity.clip(1e-5)[..., None]).clip(0, 65535).astype(np.uint16)
    no_data, known = no_data_value(image), np.isfinite(values)
    if no_data is not None:
        known &= values != no_data
    elif not known.all():
        raise UserError(
            f"{path} holds nan or infinity, which are no numbers: if they mean that there are no data, say so in the "
            "file (gdal_edit.py -a_nodata nan), or write the smallest value there"
        )
    if values.dtype.kind == "f":
        known &= abs(values) < 1e38  # others write their own "smallest float" where there are no data
    if tags.get(262) == 0:  # 0 is white; Pillow knows that for 8 bits and less
        values = 2 ** tags.get(258, (16,))[0] - 1 - values if values.dtype.kind == "u" else -values
    return values, opacity, known


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


def _in_eight_bits(image: Image.Image, path: Path, rule: Rule | None) -> tuple[Image.Image, list[float] | None]:
    """Return a deep image scaled by the rule, or by its own range, black where it has no data, and a Note's levels."""
    values, opacity, known = _deep_values(image, path)
    levels = _levels(values[known]) if known.any() else None
    if rule is None or rule.low is None:
        rule = Rule.of([Note(levels or [0, 0], "", None, 0)])
    values = np.where(known, values, rule.low).astype(np.float32)
    values = (values - rule.low) * (255 / max(rule.high - rule.low, 1e-30))
    pixels = values.round(out=values).clip(0, 255, out=values).astype(np.uint8)
    if opacity is not None:
        pixels = np.dstack((pixels, (255 * opacity).round().astype(np.uint8)))
    return upright(pixels, image), levels


def _opacity(image: Image.Image) -> Image.Image | None:
    """Return a grey image, 255 where nothing is transparent; None for none, as for a channel that is 0 everywhere."""
    if not has_opacity(image):
        return None
    opacity = (image if "A" in image.mode else image.convert("RGBA")).getchannel("A")
    return None if opacity.getextrema() in ((255, 255), (0, 0)) else opacity


def read_opacity(path: Path) -> np.ndarray | None:
    """Return an image's opacity, upright uint8 (H, W), or None where nothing is transparent. Raises like read_image."""
    with opened(path) as image:
        if not has_opacity(image):
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
    if opacity is not None and image.mode not in ("RGBA", "LA"):
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


def read_image(source: Source, size: Size = None, rule: Rule | None = None) -> np.ndarray:
    """Decode an image of any kind to upright RGB, uint8 (H, W, 3), resized to `size` if that is given.

    Transparent pixels are laid on white, unless all of them are transparent, and colours of an ICC profile become
    sRGB's. What has more than 8 bits a channel is scaled by the rule, or without one by its own range. A JPEG is
    decoded at 1/2, 1/4 or 1/8 where that is not smaller than `size`: 1.7 ms instead of 11 for 1918 x 1280. Raises
    UserError if the file cannot be decoded to its end.
    """
    return decode_image(source, size, rule)[0]


def source_of(image: str | os.PathLike | Image.Image | np.ndarray) -> Source:
    """Return what read_image takes: an array becomes a PIL image. Raises UserError for what is no image."""
    if isinstance(image, str | os.PathLike):
        return Path(image)
    if isinstance(image, np.ndarray):
        is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))
        if image.dtype != np.uint8 or not is_image or not image.size:
            raise UserError(
                f"an array {image.dtype} of the shape {image.shape} is no image: give uint8, 0 to 255, of the shape "
                "(H, W), (H, W, 3) for RGB or (H, W, 4) for RGBA"
            )
        return Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    if not isinstance(image, Image.Image):
        raise UserError(f"a {type(image).__name__} is no image: give a path, a PIL image or an array of numpy")
    if not all(image.size):
        raise UserError(f"the image has {image.width} x {image.height} pixels: give one that is not empty")
    return image


def decode_image(
    source: Source, size: Size, rule: Rule | None = None
) -> tuple[np.ndarray, tuple[int, int], list[float] | None, bool]:
    """Return read_image's image, its own (height, width), a Note's `levels`, and whether EXIF turned it."""
    with opened(source) as image:
        is_deep = _is_deep(image)  # first: reading a PNG's orientation loads it
        own_size, is_turned, levels = upright_size(image), orientation_of(image) > 1, None
        size = resized(own_size, size)
        profile = image.info.get("icc_profile")
        if is_deep:
            is_file, is_scaled = isinstance(source, Path), rule is not None and rule.low is not None
            if not is_file and (not is_scaled or len(image.getbands()) > 1):  # of colours, Pillow keeps 8 bits alone
                raise UserError(
                    f"{name_of(source)} has more than 8 bits a channel, and nothing says which value is white: "
                    "give the path of its file, or scale it to uint8"
                )
            image, levels = _in_eight_bits(image, source, rule)
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

    Its values mean what the rule says, or without one what they would in a set of this mask alone. Where opacity
    varies it is the mask; void counts as background, any colour as 1, and those of a palette that begins with black as
    labels. Pixels without data are black.

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
        if kind not in ("colours", "jpeg"):
            note.softness = softness_of(codes, values, values[used])
        rule = rule or Rule.of([note])
        meaning = np.zeros(len(values), np.uint8)
        meaning[used] = rule.of_mask(values[used], note)
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


def _deep_codes(values: np.ndarray, opacity: np.ndarray | None, known: np.ndarray) -> Codes:
    """Return the codes of a mask with more than 8 bits a channel."""
    values = np.where(known, values, 0).astype(values.dtype)
    if opacity is not None and np.ptp(opacity):
        values = (65535 * opacity).round().astype(np.uint16)
    elif values.ndim == 3:
        values = values.max(2)
    if values.dtype == np.uint16:  # without the sorting of np.unique
        return values, np.arange(65536), np.bincount(values.ravel(), minlength=65536), "uint16"
    found, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    return codes.reshape(values.shape), found, counts, values.dtype.name


def _codes(image: Image.Image, is_lossy: bool) -> Codes:
    """Return the codes of a mask with at most 8 bits a channel."""
    opacity = _opacity(image)
    if opacity is not None and len(set(opacity.getextrema())) > 1:
        image = opacity
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
    shares, brightest = counts / counts.sum(), float(values.max())
    is_listed = len(values) <= 32 and kind != "jpeg" and (values == np.round(values)).all()
    listed = [[float(value), float(share)] for value, share in zip(values, shares, strict=True)] if is_listed else None
    not_black, bright = (float(shares[part].sum()) for part in (values != 0, values > brightest / 2))
    return Note(None, kind, listed, brightest, None, not_black, bright)


def softness_of(codes: np.ndarray, values: np.ndarray, used: np.ndarray) -> float | None:
    """Return which share of a mask's steps from, to and between middle values belong to soft edges.

    Labels step from one flat region to another. At soft edges one step follows another, upwards or downwards; in noise
    small ones follow in any direction, and in wide gradients steps are tiny. None for less than three middle values,
    which tell nothing; 1 for fractions, which are no labels.

    Args:
        codes, values: (H, W), and the value of each code; at most 50 rows and 50 columns are looked at, which takes
            3 ms for 1918 x 1280 pixels.
        used: the values that occur.
    """
    if (used != np.round(used)).any():
        return 1.0
    if len(used) < 5:
        return None
    low, high = float(used.min()), float(used.max())
    soft = total = 0
    for lines in (codes[:: math.ceil(codes.shape[0] / 50)], codes[:, :: math.ceil(codes.shape[1] / 50)].T):
        lines = values.astype(np.float32)[lines]
        steps, is_middle = np.diff(lines), (lines > low) & (lines < high)
        counted = (steps != 0) & (is_middle[:, 1:] | is_middle[:, :-1])
        following, is_small = steps[:, 1:] * steps[:, :-1], abs(steps) < high * DARK / 255
        is_followed = (following > 0) | ((following < 0) & is_small[:, 1:] & is_small[:, :-1])
        is_soft = abs(steps) <= (high - low) / 128
        is_soft[:, 1:] |= is_followed
        is_soft[:, :-1] |= is_followed
        soft, total = soft + int((is_soft & counted).sum()), total + int(counted.sum())
    return soft / total if total else None


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

"""Each file is read to the same picture, whatever its format, mode, orientation, depth and colour profile."""

import re
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from machinery.decoding import Rule, decode_image, read_image, read_mask, read_opacity, read_sample
from machinery.errors import UserError
from machinery.files import SUFFIXES

WHOLE_RANGE = Rule(low=0, high=65535)
HEIGHT, WIDTH, BLOCK = 64, 96, 16  # blocks, so that chroma subsampling changes little


def blocks(colours: list) -> np.ndarray:
    """An asymmetrical picture in blocks of these colours: uint8 (H, W), or (H, W, channels)."""
    chosen = np.random.default_rng(3).integers(0, len(colours), (HEIGHT // BLOCK, WIDTH // BLOCK))
    return np.array(colours, np.uint8)[chosen].repeat(BLOCK, 0).repeat(BLOCK, 1)


INSIDE = np.flatnonzero(np.isin(np.arange(WIDTH) % BLOCK, range(4, BLOCK - 4)))  # rows and columns away from edges
COLOURS = blocks([(230, 60, 30), (20, 200, 90), (40, 50, 220), (250, 240, 200)])
GREYS = blocks([0, 90, 160, 255])
OPACITY = blocks([255, 0, 128])


def on_white(picture: np.ndarray) -> np.ndarray:
    opacity = OPACITY[..., None] / 255
    return (picture * opacity + 255 * (1 - opacity)).round().astype(np.uint8)


def palette_with_transparency() -> Image.Image:
    """COLOURS and a fifth colour, which is transparent, where OPACITY is 0."""
    image = Image.fromarray(COLOURS).quantize(255)
    indices = np.asarray(image).copy()
    indices[OPACITY == 0] = 255
    palette = image.getpalette("RGB")
    image = Image.fromarray(indices)
    image.putpalette(palette + [0] * (768 - len(palette)))
    image.info["transparency"] = 255
    return image


RGB = Image.fromarray(COLOURS)
GREY = np.dstack([GREYS] * 3)
# mode: the image that is stored, the picture that is to be read, and whether it is lossy by itself
MODES: dict[str, tuple[Callable[[], Image.Image], np.ndarray]] = {
    "RGB": (lambda: RGB, COLOURS),
    "L": (lambda: Image.fromarray(GREYS), GREY),
    "1": (lambda: Image.fromarray(GREYS > 127), (GREY > 127) * np.uint8(255)),
    "P": (lambda: RGB.quantize(256), COLOURS),
    "P, transparent": (palette_with_transparency, np.where(OPACITY[..., None] == 0, 255, COLOURS).astype(np.uint8)),
    "RGBA": (lambda: Image.fromarray(np.dstack((COLOURS, OPACITY))), on_white(COLOURS)),
    "LA": (lambda: Image.fromarray(np.dstack((GREYS, OPACITY))), on_white(GREY)),
    "RGBA, 0 everywhere": (lambda: Image.fromarray(np.dstack((COLOURS, 0 * OPACITY))), COLOURS),
    "CMYK": (lambda: RGB.convert("CMYK"), COLOURS),
    "I;16": (lambda: Image.fromarray(GREYS.astype(np.uint16) * 257), GREY),
    "I": (lambda: Image.fromarray(GREYS.astype(np.int32) * 257), GREY),
    "F": (lambda: Image.fromarray(GREYS.astype(np.float32) * 257), GREY),
}
LOSSLESS = ["RGB", "L", "1", "P", "P, transparent", "RGBA", "LA", "RGBA, 0 everywhere"]
# name of the file: the modes that it can hold, what Pillow needs to write it, and whether it has an orientation
FORMATS: dict[str, tuple[list[str], dict, bool]] = {
    "a.png": ([*LOSSLESS, "I;16"], {}, True),
    "raw.tif": (["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F"], {}, True),
    "lzw.tiff": (["RGB", "L", "P", "RGBA", "I;16", "F"], {"compression": "tiff_lzw"}, True),
    "jpeg.tif": (["RGB"], {"compression": "jpeg", "quality": 98}, True),
    "a.webp": (["RGB", "RGBA"], {"lossless": True, "exact": True}, True),
    "lossy.webp": (["RGB"], {"quality": 98}, True),
    "a.jpg": (["RGB", "L", "CMYK"], {"quality": 98}, True),
    "a.jfif": (["RGB", "L"], {"format": "JPEG", "quality": 98}, True),
    "a.jpe": (["RGB"], {"format": "JPEG", "quality": 98, "progressive": True}, True),
    "a.mpo": (["RGB"], {"format": "MPO", "quality": 98}, True),
    "a.avif": (["RGB", "RGBA"], {"quality": 98, "subsampling": "4:4:4"}, True),
    "a.bmp": (["RGB", "L", "1", "P"], {}, False),
    "a.gif": (["L", "P", "P, transparent", "1"], {}, False),
    "a.jp2": (["RGB", "L", "RGBA", "LA", "I;16"], {"irreversible": False}, False),
    "a.ppm": (["RGB"], {}, False),
    "a.pgm": (["L", "I;16"], {}, False),
    "a.tga": (["RGB", "L", "RGBA", "LA", "P", "RGBA, 0 everywhere"], {}, False),
}
LOSSY = {"jpeg.tif": 10, "lossy.webp": 16, "a.jpg": 10, "a.jfif": 10, "a.jpe": 10, "a.mpo": 10, "a.avif": 10}
UNTURNED = {  # of each orientation: how an upright picture is stored
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip
CASES = [
    (name, mode, orientation)
    for name, (modes, _, has_orientation) in FORMATS.items()
    for mode in modes
    for orientation in (range(1, 9) if has_orientation else (1,))
]


def save(image: Image.Image, name: str, orientation: int = 1, **options: object) -> Path:
    """Writes an upright picture as a camera does that was held otherwise."""
    options = FORMATS.get(name, ([], {}, False))[1] | options
    if orientation > 1:
        transparency = image.info.get("transparency")
        image = image.transpose(UNTURNED[orientation])
        if transparency is not None:
            image.info["transparency"] = transparency
        exif = Image.Exif()
        exif[0x0112] = orientation
        options |= {"tiffinfo": {274: orientation}} if Path(name).suffix in (".tif", ".tiff") else {"exif": exif}
    try:
        image.save(name, **options)
    except (OSError, ValueError, KeyError) as error:
        pytest.skip(f"this Pillow does not write it ({error!r})")
    return Path(name)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("name", "mode", "orientation"), CASES)
def test_each_file_is_read_to_the_same_picture(name, mode, orientation):
    draw, wanted = MODES[mode]
    path = save(draw(), name, orientation)
    tolerance = LOSSY.get(name, 0) + 2 * (mode in ("RGBA", "LA", "P, transparent")) + 2 * (mode == "CMYK")
    found, own_size, _, is_turned = decode_image(path, None, WHOLE_RANGE)
    assert own_size == (HEIGHT, WIDTH) and is_turned == (orientation > 1)
    assert found.shape == wanted.shape and found.dtype == np.uint8
    seen = (
        np.s_[:] if name not in LOSSY else np.ix_(INSIDE[INSIDE < HEIGHT], INSIDE)
    )  # of a JPEG colours bleed at edges
    assert abs(found.astype(int) - wanted)[seen].max() <= tolerance
    small = read_image(path, (HEIGHT // BLOCK, WIDTH // BLOCK), WHOLE_RANGE)
    assert abs(small.astype(int) - wanted[BLOCK // 2 :: BLOCK, BLOCK // 2 :: BLOCK]).max() <= tolerance + 1
    opacity = read_opacity(path)
    if mode in ("RGBA", "LA"):
        assert abs(opacity.astype(int) - OPACITY).max() <= LOSSY.get(name, 0)
    elif mode == "P, transparent":
        np.testing.assert_array_equal(opacity == 0, OPACITY == 0)
    else:
        assert opacity is None


MASKS = [case for case in CASES if case[0] not in LOSSY and case[1] in ("L", "1", "I;16", "I", "F")]


@pytest.mark.parametrize(("name", "mode", "orientation"), MASKS)
def test_each_mask_is_read_upright(name, mode, orientation):
    mask = GREYS > 127
    path = save(Image.fromarray(mask * np.uint8(255)).convert("1" if mode == "1" else "L"), name, orientation)
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        path = save(Image.fromarray(mask * kind(1000)), name, orientation)
    np.testing.assert_array_equal(read_mask(path), mask)


def deep_colours(name: str, channels: int, orientation: int) -> Path:
    """COLOURS with 16 bits a channel, and OPACITY, which Pillow does not write."""
    picture = np.dstack((COLOURS, OPACITY))[..., :channels].astype(np.uint16) * 257
    if orientation > 1:  # of each channel alone: Pillow knows none of them together
        turned = [Image.fromarray(np.ascontiguousarray(channel)) for channel in np.moveaxis(picture, 2, 0)]
        picture = np.dstack([np.asarray(channel.transpose(UNTURNED[orientation])) for channel in turned])
    cv2.imwrite(name, picture[..., [2, 1, 0, 3][:channels]])
    data = Path(name).read_bytes()
    if name.endswith(".png"):
        exif = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 274, 3, 1, orientation, 0) + bytes(4)
        chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
        Path(name).write_bytes(data[:33] + chunk + data[33:])
    else:  # the directory, with another entry, moves to the end
        (start,) = struct.unpack_from("<I", data, 4)
        (count,) = struct.unpack_from("<H", data, start)
        entries = [data[start + 2 + 12 * k : start + 14 + 12 * k] for k in range(count)]
        entries = [entry for entry in entries if entry[:2] != struct.pack("<H", 274)]
        entries.append(struct.pack("<HHIHH", 274, 3, 1, orientation, 0))
        if channels == 4:  # which OpenCV does not call opacity
            entries.append(struct.pack("<HHIHH", 338, 3, 1, 2, 0))
        entries = sorted(entries, key=lambda e: e[1::-1])
        directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
        Path(name).write_bytes(data[:4] + struct.pack("<I", len(data)) + data[8:] + directory)
    return Path(name)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_colours_of_16_bits_are_read_to_the_same_picture(name, channels, orientation):
    path = deep_colours(name, channels, orientation)
    found, own_size, levels, is_turned = decode_image(path, None, WHOLE_RANGE)
    assert own_size == (HEIGHT, WIDTH) and levels and is_turned == (orientation > 1)
    wanted = COLOURS if channels == 3 else on_white(COLOURS)
    assert found.shape == wanted.shape and abs(found.astype(int) - wanted).max() <= 1
    if channels == 4:
        np.testing.assert_array_equal(read_opacity(path), OPACITY)


def test_a_transparent_level_of_16_bits_is_white():
    path = save(Image.fromarray(GREYS.astype(np.uint16) * 257), "key.png")
    data, key = path.read_bytes(), struct.pack(">H", 90 * 257)
    chunk = struct.pack(">I", 2) + b"tRNS" + key + struct.pack(">I", zlib.crc32(b"tRNS" + key))
    path.write_bytes(data[:33] + chunk + data[33:])
    np.testing.assert_array_equal(read_image(path, None, WHOLE_RANGE)[..., 0], np.where(GREYS == 90, 255, GREYS))
    np.testing.assert_array_equal(read_opacity(path), np.where(GREYS == 90, 0, 255))


# ---------------------------------------------------------------------------------------------------------------------
# Colour profiles


def profile(red: tuple, green: tuple, blue: tuple, gamma: float, space: bytes = b"RGB ") -> bytes:
    """A small ICC profile, version 2, of a display with these primaries in XYZ for D50: ICC.1:2001-04, section 6."""

    def xyz(values: tuple) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(65536 * value)) for value in values)

    white = (0.9642, 1.0, 0.8249)
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(256 * gamma), 0)
    name = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79)
    tags = {b"desc": name, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": xyz(white)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {b"rXYZ": xyz(red), b"gXYZ": xyz(green), b"bXYZ": xyz(blue)}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    directory, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, value in tags.items():
        value += bytes(-len(value) % 4)
        directory += tag + struct.pack(">II", start + len(data), len(value))
        data += value
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"none", 0x02400000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + xyz(white)[8:] + bytes(48)
    return head + directory + data


# Primaries: Display P3 as in Apple's profile, and ProPhoto (ROMM RGB, ISO 22028-2)
P3 = profile((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841), 2.2)
PROPHOTO = profile((0.7977, 0.2880, 0), (0.1352, 0.7119, 0), (0.0313, 0.0001, 0.8249), 1.8)
LINEAR_GREY = profile((), (), (), 1.0, b"GRAY")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
MUTED = blocks([(200, 90, 70), (60, 150, 90), (70, 80, 180), (235, 230, 200)])  # within all of these gamuts


@pytest.mark.parametrize(("name", "tolerance"), [("a.png", 2), ("raw.tif", 2), ("a.webp", 2), ("a.jpg", 12)])
@pytest.mark.parametrize("icc", [P3, PROPHOTO], ids=["P3", "ProPhoto"])
def test_colours_of_a_profile_become_srgb(name, tolerance, icc):
    source = ImageCms.ImageCmsProfile(BytesIO(icc))
    stored = ImageCms.profileToProfile(Image.fromarray(MUTED), SRGB, source)
    assert abs(np.asarray(stored).astype(int) - MUTED).max() > 12
    path = save(stored, name, icc_profile=icc)
    assert abs(read_image(path).astype(int) - MUTED)[4::16, 4::16].max() <= tolerance
    small = read_image(path, (HEIGHT // BLOCK, WIDTH // BLOCK))
    assert abs(small.astype(int) - MUTED[BLOCK // 2 :: BLOCK, BLOCK // 2 :: BLOCK]).max() <= tolerance


def test_a_grey_profile_and_a_transparent_photo_with_one_are_read():
    linear = 255 * np.where(GREYS <= 10, GREYS / 255 / 12.92, ((GREYS / 255 + 0.055) / 1.055) ** 2.4)  # IEC 61966-2-1
    stored = linear.round().astype(np.uint8)
    path = save(Image.fromarray(stored), "grey.png", icc_profile=LINEAR_GREY)
    assert abs(read_image(path).astype(int) - GREY).max() <= 2
    path = save(Image.fromarray(np.dstack((stored, OPACITY))), "clear.png", icc_profile=LINEAR_GREY)
    found = read_image(path)
    assert abs(found.astype(int) - GREY)[OPACITY == 255].max() <= 2 and (found[OPACITY == 0] == 255).all()


@pytest.mark.parametrize("icc", [SRGB.tobytes(), LINEAR_GREY, b"no profile", P3[:200]], ids=["sRGB", "grey", "", "cut"])
def test_profiles_of_srgb_of_other_modes_and_broken_ones_change_nothing(icc):
    path = save(Image.fromarray(COLOURS), "photo.png", icc_profile=icc)
    np.testing.assert_array_equal(read_image(path), COLOURS)


def test_a_profile_with_any_bytes_wrong_leaves_a_photo_readable():
    random = np.random.default_rng(0)
    for _ in range(200):
        broken = np.frombuffer(P3, np.uint8).copy()
        broken[random.integers(0, 128, 3)] = random.integers(0, 256, 3)
        assert read_image(save(RGB, "photo.png", icc_profile=broken.tobytes())).shape == COLOURS.shape


def test_masks_are_values_whatever_their_profile_says():
    path = save(Image.fromarray(GREYS), "mask.png", icc_profile=LINEAR_GREY)
    np.testing.assert_array_equal(read_mask(path), read_mask(save(Image.fromarray(GREYS), "plain.png")))


# ---------------------------------------------------------------------------------------------------------------------
# Orientation of pairs, and endings


@pytest.mark.parametrize("name", ["raw.tif", "a.jpg", "a.png"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_that_lies_as_a_turned_photo_is_stored_is_refused(name, orientation):
    photo = save(RGB, name, orientation)
    mask = save(Image.fromarray(GREYS).transpose(UNTURNED[orientation]), "mask.png")
    with pytest.raises(UserError, match="is 96 x 64: turn the mask upright, as EXIF turns the image"):
        read_sample(photo, mask, (HEIGHT, WIDTH))


@pytest.mark.parametrize("orientation", [0, 9, 1000])
def test_an_orientation_that_there_is_not_turns_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    RGB.save("odd.png", exif=exif)
    found, own_size, _, is_turned = decode_image(Path("odd.png"), None)
    assert own_size == (HEIGHT, WIDTH) and not is_turned
    np.testing.assert_array_equal(found, COLOURS)


def test_a_telephones_heic_is_named_with_what_reads_it():
    assert ".heic" in SUFFIXES
    for name in ("photo.heic", "named.jpg"):
        Path(name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
        with pytest.raises(
            UserError, match=rf"{name} .*\(it is HEIC\): run pip install pillow-heif, which reads it, or"
        ):
            read_image(Path(name))


@pytest.mark.parametrize("quality", [50, 75, 90])
@pytest.mark.parametrize("top", [200, 254])
@pytest.mark.parametrize("name", ["m.avif", "m.webp", "m.jpg", "m.jp2"])
def test_the_noise_of_lossy_masks_is_no_label(name, top, quality):
    rows, columns = np.mgrid[:200, :300]
    mask = ((rows - 100) / 70) ** 2 + ((columns - 150) / 110) ** 2 < 1
    lossy = {"irreversible": True, "quality_mode": "dB", "quality_layers": [30 + quality / 10]}
    save(Image.fromarray(mask * np.uint8(top)), name, **(lossy if name == "m.jp2" else {"quality": quality}))
    assert (read_mask(Path(name)) != mask).mean() < 0.001


def test_labels_in_a_lossless_jpeg_2000_are_labels():
    save(Image.fromarray(GREYS // 90), "labels.jp2", irreversible=False)
    np.testing.assert_array_equal(read_mask(Path("labels.jp2")), GREYS >= 90)


# ---------------------------------------------------------------------------------------------------------------------
# TIFF's many kinds, stacks, and JPEGs without an end


def tiff(name: str, pixels: np.ndarray, tags: dict[int, int]) -> Path:
    """Writes a TIFF without compression, as GIS and science do; `tags` are added to the plainest, or replace them."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    tags = {
        256: pixels.shape[1], 257: pixels.shape[0], 258: 8 * pixels.itemsize, 259: 1, 262: 2 if channels > 2 else 1,
        273: 8, 277: channels, 278: pixels.shape[0], 279: pixels.nbytes, 339: " uif".index(pixels.dtype.kind),
    } | tags  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    end = struct.pack("<H", len(tags)) + entries + bytes(4)
    Path(name).write_bytes(b"II*\0" + struct.pack("<I", 8 + pixels.nbytes) + pixels.tobytes() + end)
    return Path(name)


@pytest.mark.parametrize("extra", [None, 0, 1, 2])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_fourth_band_is_opacity_where_the_tiff_says_so(kind, extra):
    scale = 257 if kind == np.uint16 else 1
    pixels = np.dstack((COLOURS, OPACITY)).astype(kind) * kind(scale)
    if extra == 1:  # the colours are multiplied with it
        pixels[..., :3] = (pixels[..., :3] * (OPACITY[..., None] / 255)).round()
    path = tiff("bands.tif", pixels, {} if extra is None else {338: extra})
    found = read_image(path, None, WHOLE_RANGE)
    if extra in (1, 2):
        assert abs(found.astype(int) - on_white(COLOURS)).max() <= 2
        np.testing.assert_array_equal(read_opacity(path), OPACITY)
    else:
        assert abs(found.astype(int) - COLOURS).max() <= 1
        assert read_opacity(path) is None


def test_signed_bytes_are_signed():
    levels = np.linspace(-100, 120, HEIGHT * WIDTH).astype(np.int8).reshape(HEIGHT, WIDTH)
    found = read_image(tiff("signed.tif", levels, {}))[..., 0].astype(int)
    assert abs(found - np.linspace(0, 255, levels.size).reshape(levels.shape)).max() <= 3
    np.testing.assert_array_equal(
        read_mask(tiff("mask.tif", (GREYS > 90).astype(np.int8) * np.int8(-1), {})), GREYS > 90
    )


DEEP = np.dstack((GREYS, GREYS, GREYS)).astype(np.uint16)


@pytest.mark.parametrize(
    ("pixels", "tags", "words"),
    [
        (GREYS.astype(np.int64), {}, "one band of 64 bits, signed"),
        (GREYS.astype(np.float64), {}, "one band of 64 bits, float"),
        (GREYS.astype(np.uint64), {}, "one band of 64 bits, unsigned"),
        (DEEP, {262: 1, 338: 0}, "3 bands of 16 bits, unsigned, of which the colour is grey"),
        (DEEP[..., :2].copy(), {338: 0}, "2 bands of 16 bits"),
        (DEEP.astype(np.float32), {}, "3 bands of 32 bits, float, of which the colour is RGB"),
        (np.dstack((DEEP, DEEP)), {}, "6 bands of 16 bits"),
        (DEEP, {284: 2}, "each of its colours in a plane of its own"),
    ],
)
def test_tiffs_that_are_not_read_are_named_with_what_they_are(pixels, tags, words):
    path = tiff("odd.tif", pixels, tags)
    for read in (read_image, read_mask):
        with pytest.raises(UserError, match=rf"odd\.tif .*{words}.*: save it .*\(gdal_translate"):
            read(path)


@pytest.mark.parametrize("name", ["stack.tif", "many.gif", "many.webp", "many.png"])
def test_a_file_of_several_pictures_is_refused(name):
    pages = [Image.fromarray(np.roll(COLOURS, BLOCK * k, 1)) for k in range(3)]
    pages[0].save(name, save_all=True, append_images=pages[1:])
    for read in (read_image, read_mask):
        with pytest.raises(
            UserError, match=rf"{re.escape(name)} holds 3 pictures: save the one that you mean as a file"
        ):
            read(Path(name))
    pages[0].save(name, save_all=True)
    assert abs(read_image(Path(name)).astype(int) - COLOURS).mean() < 12


def test_previews_are_no_further_pictures():
    RGB.save("photo.mpo", save_all=True, append_images=[RGB.resize((24, 16))], quality=98)
    assert abs(read_image(Path("photo.mpo")).astype(int) - COLOURS).mean() < 4
    with TiffImagePlugin.AppendingTiffWriter("overviews.tif", True) as file:
        for scale, kind in ((1, 0), (2, 1), (4, 1), (1, 4)):  # reduced pictures, and a mask of transparency
            RGB.resize((WIDTH // scale, HEIGHT // scale)).save(file, "TIFF", tiffinfo={254: kind})
            file.newFrame()
    np.testing.assert_array_equal(read_image(Path("overviews.tif")), COLOURS)


JPEGS = {"plain": {}, "progressive": {"progressive": True}, "optimized": {"optimize": True, "quality": 95}}


def photo_of_many_colours() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), np.uint8))


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("with_preview", [False, True])
def test_a_jpeg_that_lacks_its_end_marker_is_whole(kind, mode, with_preview):
    path, exif = Path("photo.jpg"), Image.Exif()
    if with_preview:  # a JPEG with both markers before the photo's own
        preview = BytesIO()
        RGB.resize((24, 16)).save(preview, "JPEG")
        exif[0x927C] = preview.getvalue()
    photo_of_many_colours().convert(mode).save(path, exif=exif, **JPEGS[kind])
    wanted, data = read_image(path), path.read_bytes()
    assert data.endswith(b"\xff\xd9")
    for cut in (1, 2):
        path.write_bytes(data[:-cut])
        np.testing.assert_array_equal(read_image(path), wanted)


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_whose_picture_is_cut_off_is_refused(kind):
    path = Path("photo.jpg")
    photo_of_many_colours().save(path, **JPEGS[kind])
    wanted, data = read_image(path), path.read_bytes()
    for length in range(len(data) - 4, 0, -1):
        path.write_bytes(data[:length] if length % 5 else data[:length] + bytes(len(data) - length))
        try:
            found = read_image(path)
        except UserError:
            continue
        np.testing.assert_array_equal(found, wanted)  # bits were missing that fill up the last byte
        assert length > len(data) - 8


@pytest.mark.parametrize("content", [b"\xff\xd8\xff no photo", b"\xff\xd8", b"\xff\xd8\xff\xda"])
def test_what_only_begins_as_a_jpeg_is_named_as_no_image(content, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jpg is no readable image \((it is of no known kind|it is cut off)"):
        read_image(tmp_path / "a.jpg")

"""Broken files are named, or read as if they were whole; they are never trained on silently, and nothing hangs."""

import io
import os
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset import CarvanaDataset
from machinery.decoding import read_image, read_mask
from machinery.errors import UserError
from machinery.files import find_pairs

FORMATS = ("jpg", "progressive.jpg", "png", "gif", "bmp", "tif", "webp")
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@cache
def whole(kind: str, seed: int = 0) -> bytes:
    """A small noisy picture, so that every byte of the file counts."""
    noise = np.random.default_rng(seed).integers(0, 256, (24, 40, 3), np.uint8)
    image, file = Image.fromarray(noise), io.BytesIO()
    if kind == "gif":
        image = image.quantize(64)
    options = {"progressive": True} if kind.startswith("progressive") else {}
    image.save(file, {"jpg": "jpeg", "tif": "tiff"}.get(kind.split(".")[-1], kind.split(".")[-1]), **options)
    return file.getvalue()


def read_both(path: Path) -> tuple[np.ndarray, np.ndarray]:
    return read_image(path), read_mask(path)


@pytest.mark.parametrize("kind", FORMATS)
@EXAMPLES
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_named_or_was_complete(kind, share, tmp_path):
    path = tmp_path / f"broken.{kind}"
    path.write_bytes(whole(kind))
    image, mask = read_both(path)
    path.write_bytes(whole(kind)[: int(share * len(whole(kind)))])
    try:
        found = read_both(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:  # what is missing lies after the pixels
        np.testing.assert_array_equal(found[0], image)
        np.testing.assert_array_equal(found[1], mask)


@pytest.mark.parametrize("kind", ["jpg", "progressive.jpg"])
def test_a_jpeg_that_lacks_its_last_bytes_is_named(kind, tmp_path):
    path, named = tmp_path / "broken.jpg", 0
    for seed in range(12):
        content = whole(kind, seed)
        path.write_bytes(content)
        image = read_image(path)
        for lacking in range(3, 10):  # two are the end marker
            path.write_bytes(content[:-lacking])
            try:
                np.testing.assert_array_equal(read_image(path), image)
            except UserError:
                named += 1
    assert named > 70  # of 84; in others only the bits that fill up the last byte were lost


@pytest.mark.parametrize("kind", FORMATS)
@EXAMPLES
@given(data=st.data())
def test_a_corrupted_file_is_named_or_decodes_to_an_image(kind, data, tmp_path):
    content = bytearray(whole(kind))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[position] = data.draw(st.integers(0, 255))
    path = tmp_path / f"broken.{kind}"
    path.write_bytes(content)
    try:
        image, mask = read_both(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert mask.dtype == np.uint8 and mask.shape == image.shape[:2] and mask.max() <= 1


@EXAMPLES
@given(content=st.binary(max_size=200), ending=st.sampled_from(("jpg", "png", "gif", "tif", "webp")))
def test_any_bytes_are_named(content, ending, tmp_path):
    path = tmp_path / f"noise.{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="noise"):
        read_image(path)


def huge_png(width: int, height: int) -> bytes:
    """A decompression bomb: a tiny file that claims to be huge."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"not an image at all",
        b"<html><body>404</body></html>",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        b"BM",
        b"RIFF\x00\x00\x00\x00WEBP",
        b"II*\x00",
        b"PK\x03\x04",
        b"%PDF-1.7",
        bytes(5000),
        huge_png(60000, 60000),
        huge_png(2**31 - 1, 2**31 - 1),
        huge_png(0, 10),
    ],
    ids=lambda content: f"{len(content)}-{content[:6]!r}",
)
def test_files_that_are_no_images_are_named(content, tmp_path):
    path = tmp_path / "strange.png"
    path.write_bytes(content)
    for read in (read_image, read_mask):
        with pytest.raises(UserError, match=r"strange\.png"):
            read(path)


@pytest.fixture
def one_pair(tmp_path) -> Path:
    for folder, name, colour in (("images", "a.png", (9, 9, 9)), ("masks", "a_mask.png", (255, 255, 255))):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (20, 20), colour).save(tmp_path / folder / name)
    Image.new("1", (20, 20)).save(tmp_path / "masks" / "a_mask.png")
    return tmp_path


def break_with_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def break_with_a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def break_with_a_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.png")


def break_the_rights(path: Path) -> None:
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root may read everything")


@pytest.mark.parametrize("which", ["images/a.png", "masks/a_mask.png"])
@pytest.mark.parametrize(
    "break_it", [break_with_a_folder, break_with_a_loop, break_with_a_dangling_link, break_the_rights]
)
def test_entries_that_cannot_be_read_are_named(break_it, which, one_pair):
    break_it(one_pair / which)
    with pytest.raises(UserError, match=Path(which).name) as caught:
        CarvanaDataset(one_pair / "images", one_pair / "masks", (16, 16)).prepare(one_pair / "cache")
    assert "\n" not in str(caught.value)


def test_a_loop_instead_of_a_folder_is_named(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="loop"):
        find_pairs(tmp_path / "loop", tmp_path)

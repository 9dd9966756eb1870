"""What the values of files mean is settled once for a data set: ranges of photos, labels and void of masks."""

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, rows
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, jaccard_score

import predict
import train
import utils
from dataset import CarvanaDataset
from machinery.decoding import VOID, Rule, decode_mask, read_image, read_mask, rule_from
from machinery.device import Device
from machinery.errors import UserError
from machinery.samples import describe

LEARN = [*SMALL, "--num-epochs", "40", "--cache-dir", "none"]


def scene(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright ellipse on a textured ground, float (64, 96) in 0 to 1, and its mask, bool."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[:64, :96]
    centre, radius = random.uniform(0.35, 0.65, 2), random.uniform(0.16, 0.3, 2)
    mask = ((y / 64 - centre[0]) / radius[0]) ** 2 + ((x / 96 - centre[1]) / radius[1]) ** 2 <= 1
    ground = 0.2 + 0.1 * x / 96 + random.normal(0, 0.02, mask.shape)
    return np.where(mask, 0.65 + random.normal(0, 0.02, mask.shape), ground).clip(0, 1), mask


def draw(save_photo: Callable, save_mask: Callable, number: int = 12) -> None:
    """Writes 12 pairs for training and 4 for validation: save_photo(values, stem, i), save_mask(mask, stem, i)."""
    for i in range(number + 4):
        photo, mask = scene(i)
        kind = "train" if i < number else "val"
        for what in ("images", "masks"):
            Path(f"data/{kind}_{what}").mkdir(parents=True, exist_ok=True)
        save_photo(photo, f"data/{kind}_images/p{i:02d}", i)
        save_mask(mask, f"data/{kind}_masks/p{i:02d}_mask", i)


def jpg(photo: np.ndarray, stem: str, _: int) -> None:
    Image.fromarray((255 * photo).astype(np.uint8)).save(f"{stem}.jpg", quality=95)


def png(mask: np.ndarray, stem: str, _: int) -> None:
    Image.fromarray(255 * mask.astype(np.uint8)).save(f"{stem}.png")


def best_dice() -> float:
    return max(float(row["dice"]) for row in rows())


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Ranges of photos


def png_with_16_bits(pixels: np.ndarray, path: str) -> None:
    """Pillow writes none in colour."""
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    written = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))


def colours(photo: np.ndarray, top: float) -> np.ndarray:
    return np.stack((photo, 0.5 * photo, 0.1 + 0.3 * photo), axis=-1) * top


PHOTOS = {
    "12 bits in 16, TIFF": lambda p, s, _: Image.fromarray((p * 4095).astype(np.uint16)).save(f"{s}.tif"),
    "12 bits in 16, PNG": lambda p, s, _: Image.fromarray((p * 4095).astype(np.uint16)).save(f"{s}.png"),
    "10 bits in 16": lambda p, s, _: Image.fromarray((p * 1023).astype(np.uint16)).save(f"{s}.tif"),
    "8 bits in 32": lambda p, s, _: Image.fromarray((p * 255).astype(np.int32)).save(f"{s}.tif"),
    "0 to 1": lambda p, s, _: Image.fromarray(p.astype(np.float32)).save(f"{s}.tif"),
    "-1 to 1": lambda p, s, _: Image.fromarray((2 * p - 1).astype(np.float32)).save(f"{s}.tif"),
    "0 to 65535, float": lambda p, s, _: Image.fromarray((p * 65535).astype(np.float32)).save(f"{s}.tif"),
    "reflectance 0 to 10000": lambda p, s, _: Image.fromarray((p * 10000).astype(np.int32)).save(f"{s}.tif"),
    "colours with 12 bits in 16, PNG": lambda p, s, _: png_with_16_bits(colours(p, 4095), f"{s}.png"),
    "colours with 16 bits, TIFF": lambda p, s, _: cv2.imwrite(f"{s}.tif", colours(p, 65535).astype(np.uint16)),
    "0 is white": lambda p, s, _: Image.fromarray((65535 - p * 4095).astype(np.uint16)).save(
        f"{s}.tif", tiffinfo={262: 0}
    ),
}


@pytest.mark.parametrize("kind", PHOTOS)
def test_photos_of_every_range_look_alike(kind):
    draw(PHOTOS[kind], png)
    data = CarvanaDataset("data/train_images", "data/train_masks", (64, 96))
    data.prepare(None)
    for index in range(len(data)):
        wanted, _ = scene(index)
        if kind.startswith("colours"):
            wanted = colours(wanted, 1)[..., :: -1 if "TIFF" in kind else 1]
        else:
            wanted = np.repeat(wanted[..., None], 3, axis=2)
        found = data.sample(index)[0].astype(float)
        slope = np.polyfit(wanted.ravel(), found.ravel(), 1)[0]
        assert 255 < slope < 500  # the range that they use is spread, and never turned round
        assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.995
    assert sum("more than 8 bits" in line for line in describe(data, data).splitlines()) == 1


def test_dark_photos_stay_dark_beside_bright_ones():
    draw(lambda p, s, i: Image.fromarray((p * 4095 * (1 + i) / 16).astype(np.uint16)).save(f"{s}.tif"), png)
    data = CarvanaDataset("data/train_images", "data/train_masks", (64, 96))
    data.prepare(None)
    brightness = [data.sample(index)[0].mean() for index in range(len(data))]
    assert brightness[11] > 6 * brightness[0]


def test_few_levels_of_many_are_learned_and_a_photo_alone_gives_the_same_mask():
    def faint(photo: np.ndarray, stem: str, i: int) -> None:
        mask, random = scene(i)[1], np.random.default_rng(i)
        levels = 1500 + 192 * np.mgrid[:64, :96][1] / 95 + 8 * mask + random.normal(0, 1, mask.shape)
        Image.fromarray(levels.round().astype(np.uint16)).save(f"{stem}.tif")

    draw(faint, png, number=24)
    train.main([*LEARN, "--num-epochs", "30"])
    assert best_dice() > 0.9
    predict.main(["data/val_images", "--output-dir", "all"])
    predict.main(["data/val_images/p25.tif", "--output-dir", "one"])
    one, same = (np.asarray(Image.open(f"{folder}/p25_mask.png")) for folder in ("one", "all"))
    assert np.array_equal(one, same) and 0 < (one > 0).mean() < 0.5


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_photos_that_are_no_numbers_are_named(value):
    def save(photo: np.ndarray, stem: str, i: int) -> None:
        photo = np.where((photo > 0.5) & (i == 3), value, photo)
        Image.fromarray(photo.astype(np.float32)).save(f"{stem}.tif")

    draw(save, png)
    with pytest.raises(UserError, match=r"p03\.tif holds nan or infinity, which are no numbers: .*-a_nodata nan"):
        train.main(LEARN)


@pytest.mark.parametrize(
    ("kind", "scale", "value"),
    [
        (np.float32, 1, -9999), (np.float32, 1, float(np.finfo(np.float32).min)), (np.float32, 1, np.nan),
        (np.uint16, 3000, 65535), (np.uint16, 3000, 0), (np.int32, 500, -32768), (np.uint16, 3000, -9999),
    ],
)  # fmt: skip
def test_pixels_without_data_are_black_and_no_part_of_the_range(kind, scale, value):
    def save(photo: np.ndarray, stem: str, _: int, tags: tuple = ()) -> None:
        Image.fromarray((photo * scale).astype(kind)).save(f"{stem}.tif", tiffinfo=dict(tags))

    def with_gaps(photo: np.ndarray, stem: str, i: int) -> None:
        if np.can_cast(np.min_scalar_type(value), kind) or kind == np.float32:
            photo = photo.copy()
            photo[:3] = value / scale
        save(photo, stem, i, ((42113, f"{value:.17g}"),))

    draw(save, png)
    plain = prepared()
    draw(with_gaps, png)
    data = prepared()
    assert (data.rule.low, data.rule.high) == pytest.approx((plain.rule.low, plain.rule.high), rel=0.02)
    for index in range(3):
        difference = data.sample(index)[0].astype(int) - plain.sample(index)[0]
        assert abs(difference[3:]).max() <= 6
        assert (value == -9999 and kind == np.uint16) or (data.sample(index)[0][:3] == 0).all()


def test_a_photo_or_mask_without_any_data_is_black():
    for value, tags in ((-9999, {42113: "-9999"}), (np.nan, {42113: "nan"}), (-3.4e38, {})):
        Image.fromarray(np.full((8, 12), value, np.float32)).save("none.tif", tiffinfo=tags)
        assert not read_image(Path("none.tif")).any() and not read_mask(Path("none.tif")).any()


def test_a_masks_pixels_without_data_are_background():
    mask = scene(0)[1]
    for kind, value in ((np.float32, -9999), (np.float32, np.nan), (np.int32, -1), (np.uint16, 65535)):
        Image.fromarray(np.where(mask, 1, value).astype(kind)).save("mask.tif", tiffinfo={42113: str(value)})
        np.testing.assert_array_equal(read_mask(Path("mask.tif")), mask)


def test_photos_of_one_value_are_named():
    draw(lambda p, s, _: Image.fromarray(np.full((64, 96), 7, np.uint16)).save(f"{s}.tif"), png)
    with pytest.raises(UserError, match=r"data/train_images: its photos .* hold nothing but 7"):
        train.main(LEARN)


def test_photos_of_8_bits_stay_as_they_are_beside_others(tmp_path):
    draw(lambda p, s, i: (PHOTOS["0 to 1"] if i % 2 else jpg)(p, s, i), png)
    data = CarvanaDataset("data/train_images", "data/train_masks", (64, 96))
    data.prepare(None)
    np.testing.assert_array_equal(data.sample(0)[0], read_image(Path("data/train_images/p00.jpg")))


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def grey(*classes: int) -> Callable:
    """Masks whose object has one of the classes, and every second one a thing of the last class."""

    def save(mask: np.ndarray, stem: str, i: int) -> None:
        values = mask * np.uint8(classes[i % len(classes)])
        if i % 2:
            values[2:8, 2:12] = classes[-1]
        Image.fromarray(values).save(f"{stem}.png")

    return save


def prepared(kind: str = "train", rule: Rule | None = None, chosen: tuple | None = None) -> CarvanaDataset:
    data = CarvanaDataset(f"data/{kind}_images", f"data/{kind}_masks", (64, 96))
    data.prepare(None, rule, chosen)
    return data


@pytest.mark.parametrize("classes", [(100, 200), (80, 170), (1, 2), (255, 128), (7,), (255,), (31, 40)])
def test_a_grey_value_means_the_same_in_every_file(classes):
    draw(jpg, grey(*classes))
    data = prepared()
    for index in range(len(data)):
        wanted = scene(index)[1].astype(np.uint8)
        if index % 2:
            wanted[2:8, 2:12] = 1
        np.testing.assert_array_equal(data.sample(index)[1], wanted)
    lines = [line for line in describe(data, data).splitlines() if line.startswith("values of the masks")]
    assert len(lines) == (len(classes) > 1)


def test_one_of_several_labels_may_be_chosen(capsys):
    draw(jpg, grey(80, 170))
    train.main([*LEARN, "--foreground-values", "170", "--num-epochs", "2"])
    assert "80 (" in (out := capsys.readouterr().out) and "foreground is 170" in out
    assert utils.load_checkpoint(Path("my_checkpoint.pth.tar"))["rule"]["chosen"] == (170,)
    data = prepared(chosen=(170,))
    np.testing.assert_array_equal(data.sample(1)[1][20:], scene(1)[1][20:])
    assert data.sample(0)[1].sum() == 0  # an object of 80
    with pytest.raises(UserError, match=r"FOREGROUND_VALUES: 171 is in no mask of .*: choose from 80, 170"):
        train.main([*LEARN, "--foreground-values", "171"])
    with pytest.raises(UserError, match="was trained with FOREGROUND_VALUES"):
        train.main([*LEARN, "--load-model"])


def soft(mask: np.ndarray) -> np.ndarray:
    """Falls from 1 to 0 over some 12 pixels."""
    return cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 3)


SOFT = {
    "8 bits": lambda m, s, _: Image.fromarray((soft(m) * 255).round().astype(np.uint8)).save(f"{s}.png"),
    "16 bits": lambda m, s, _: Image.fromarray((soft(m) * 65535).round().astype(np.uint16)).save(f"{s}.png"),
    "0 to 1": lambda m, s, _: Image.fromarray(soft(m)).save(f"{s}.tif"),
    "0 to 255": lambda m, s, _: Image.fromarray(soft(m) * 255).save(f"{s}.tif"),
    "anti-aliased": lambda m, s, _: Image.fromarray(
        cv2.resize(cv2.resize(m * np.uint8(255), (384, 256)), (96, 64), interpolation=cv2.INTER_AREA)
    ).save(f"{s}.png"),
}


@pytest.mark.parametrize("kind", SOFT)
def test_soft_masks_are_foreground_above_one_half(kind):
    draw(jpg, SOFT[kind])
    data = prepared()
    for index in range(len(data)):
        mask = scene(index)[1]
        wanted = soft(mask) > 0.5 if kind != "anti-aliased" else mask
        assert (data.sample(index)[1] != wanted).mean() < 0.005


def discs(number: int, shape: tuple[int, int] = (96, 144), radius: tuple = (2, 6)) -> Callable:
    """Label images in which each object has a number of its own; the numbering follows no order."""

    def labels(i: int) -> np.ndarray:
        random, (y, x) = np.random.default_rng(i), np.mgrid[: shape[0], : shape[1]]
        values = np.zeros(shape, np.int32)
        for label in range(1, number + 1):
            row, column = random.uniform(0, shape[0]), random.uniform(0, shape[1])
            values[(y - row) ** 2 + (x - column) ** 2 <= random.uniform(*radius) ** 2] = label
        return values

    return labels


def cells(i: int) -> np.ndarray:
    """60 cells that touch one another, numbered from the top, around a gap."""
    random, (y, x) = np.random.default_rng(i), np.mgrid[:96, :144]
    centres = random.uniform((0, 0), (96, 144), (60, 2))
    centres = centres[centres[:, 0].argsort()]
    values = 1 + np.argmin((y[..., None] - centres[:, 0]) ** 2 + (x[..., None] - centres[:, 1]) ** 2, -1)
    return np.where(abs(x - 72) < 20, 0, values)


def lines(i: int) -> np.ndarray:
    """40 thin lines, each with a number."""
    values, random = np.zeros((96, 144), np.uint8), np.random.default_rng(i)
    for label in range(1, 41):
        ends = random.integers((0, 0), (144, 96), (2, 2)).tolist()
        cv2.line(values, *ends, label, 1 + label % 2)
    return values.astype(np.int32)


def classes(i: int) -> np.ndarray:
    values, (y, x) = np.array([0, 64, 128, 191, 255]), np.mgrid[:96, :144]
    return values[np.random.default_rng(i).integers(0, 5, (6, 9))][y // 16, x // 16].astype(np.int32)


def outlined(i: int) -> np.ndarray:
    """Classes with a white line of one pixel between them."""
    values = classes(i) * 3 // 4
    values[::16], values[:, ::16] = 255, 255
    return values


def layers(_: int) -> np.ndarray:
    return np.mgrid[:96, :144][0] // 2


LABELS = {
    "60 objects": discs(60), "300 objects": discs(300), "dots": discs(60, radius=(0.5, 1.5)), "cells": cells,
    "lines": lines, "classes": classes, "outlined": outlined, "layers": layers,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "ending"), [(np.uint8, "png"), (np.uint16, "png"), (np.int32, "tif")])
@pytest.mark.parametrize("labels", LABELS)
def test_flat_regions_are_labels_however_many(labels, kind, ending):
    if labels == "300 objects" and kind == np.uint8:
        pytest.skip("more than 8 bits hold")
    wanted = [LABELS[labels](i) for i in range(4)]
    for i, values in enumerate(wanted):
        Image.fromarray(values.astype(kind)).save(f"mask{i}.{ending}")
        np.testing.assert_array_equal(read_mask(Path(f"mask{i}.{ending}")), values > 0)


def set_of(masks: list[np.ndarray], **options) -> CarvanaDataset:
    """A prepared set with these masks."""
    for folder in ("photos", "masks"):
        Path(folder).mkdir(exist_ok=True)
    for i, mask in enumerate(masks):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, mask.shape, np.uint8)).save(f"photos/{i:02d}.png")
        Image.fromarray(mask).save(f"masks/{i:02d}.{'tif' if mask.dtype.kind == 'f' else 'png'}")
    data = CarvanaDataset("photos", "masks", masks[0].shape)
    data.prepare(None, None, options.get("chosen"))
    return data


def values_line(data: CarvanaDataset) -> str:
    return next(line for line in describe(data, data).splitlines() if line.startswith("values of the masks"))


def test_the_other_reading_is_said_with_its_share_and_its_flag_takes_it():
    masks = [discs(60)(i).astype(np.uint8) for i in range(4)]
    data = set_of(masks)
    drops = 1 - np.mean([(mask > 30).mean() for mask in masks]) / np.mean([(mask > 0).mean() for mask in masks])
    assert "labels up to 60: all are foreground" in values_line(data)
    assert f"--foreground-values brightness leaves out {100 * drops:.0f} % of them" in values_line(data)
    other = set_of(masks, chosen=("brightness",))
    assert all(np.array_equal(other.sample(i)[1], masks[i] > 30) for i in range(4))
    assert "--foreground" not in values_line(other).partition("(")[0]

    masks = [(255 * soft(scene(i)[1])).round().astype(np.uint8) for i in range(4)]
    data = set_of(masks)
    more = np.mean([(mask > 0).mean() for mask in masks]) / np.mean([(mask > 127).mean() for mask in masks]) - 1
    assert f"--foreground-values labels takes all but 0, which is {100 * more:.0f} % more" in values_line(data)
    other = set_of(masks, chosen=("labels",))
    assert all(np.array_equal(other.sample(i)[1], masks[i] > 0) for i in range(4))


def test_a_word_instead_of_foreground_values_is_trained_with():
    draw(jpg, SOFT["8 bits"])
    train.main([*LEARN, "--num-epochs", "1", "--foreground-values", "labels"])
    assert utils.load_checkpoint(Path("my_checkpoint.pth.tar"))["rule"]["is_labels"] is True
    with pytest.raises(
        UserError, match=r"FOREGROUND_VALUES is \('colours',\): set it to labels .*\"labels\", \"brightness\""
    ):
        train.main([*LEARN, "--foreground-values", "colours"])


def test_classes_of_many_files_are_chosen_from():
    """In all 40 classes, of which each file holds few; and 40 in every file."""
    masks = [np.repeat(np.arange(i, i + 8, dtype=np.uint8), 12)[None].repeat(40, 0) for i in range(33)]
    data = set_of(masks, chosen=(39,))
    assert all(np.array_equal(data.sample(i)[1], masks[i] == 39) for i in range(33))
    masks = [lines(i).astype(np.uint8) for i in range(3)]
    data = set_of(masks, chosen=(7, 9))
    assert all(np.array_equal(data.sample(i)[1], np.isin(masks[i], (7, 9))) for i in range(3))
    with pytest.raises(UserError, match="FOREGROUND_VALUES: 41 is in no mask"):
        set_of(masks, chosen=(41,))


def noisy(mask: np.ndarray) -> np.ndarray:
    """A JPEG's noise around black and white, in a format without loss."""
    return cv2.imdecode(cv2.imencode(".jpg", 255 * mask.astype(np.uint8), (cv2.IMWRITE_JPEG_QUALITY, 90))[1], 0)


def enlarged(mask: np.ndarray) -> np.ndarray:
    small = cv2.resize(255 * mask.astype(np.uint8), (24, 16), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, mask.shape[::-1], interpolation=cv2.INTER_LINEAR)


BRIGHTNESS = {
    "noise": noisy,
    "enlarged": enlarged,
    "up to 2.5": lambda mask: 2.5 * soft(mask),
    "fractions": lambda mask: np.where(mask, 1, np.where(np.roll(mask, 1), 0.25, 0)).astype(np.float32),
    "gradient": lambda _: np.tile(np.linspace(0, 255, 900).round().astype(np.uint8), (16, 1)),
    "few levels": lambda mask: (25 * soft(mask)).round().astype(np.uint8),
    "wide": lambda mask: (255 * cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 8)).round().astype(np.uint8),
}


@pytest.mark.parametrize("kind", BRIGHTNESS)
def test_soft_edges_and_noise_are_brightness(kind):
    masks = [BRIGHTNESS[kind](scene(i)[1]) for i in range(6)]
    data = set_of(masks)
    most = max(mask.max() for mask in masks)
    assert all(np.array_equal(data.sample(i)[1], masks[i] > most / 2) for i in range(6))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_files_of_0_and_1_beside_soft_ones_keep_their_object(kind):
    white = {np.uint8: 255, np.uint16: 65535, np.float32: 255}[kind]
    masks = []
    for i in range(9):
        mask = scene(i)[1]
        masks.append((mask if i % 3 == 0 else white * soft(mask)).round().astype(kind))
    data = set_of(masks)
    for i in range(9):
        wanted = masks[i] > (0 if i % 3 == 0 else white // 2)
        assert (data.sample(i)[1] != wanted).mean() < 0.005
    assert "masks of 0 and 1 beside them: 3, in which 1 is foreground" in describe(data, data)


def test_remains_of_soft_masks_without_an_object_are_none():
    """What a network says of photos without one, in 8 bits: here and there 1 of 255."""
    masks = [(255 * soft(scene(i)[1])).round().astype(np.uint8) for i in range(6)]
    masks += [np.zeros((64, 96), np.uint8) for _ in range(3)]
    for mask in masks[6:]:
        mask[30:33, 40:50] = 1
    data = set_of(masks)
    assert not any(data.sample(i)[1].any() for i in range(6, 9))
    assert "masks of 0 and 1 beside them: 3, in which 1 is background" in describe(data, data)


@pytest.mark.parametrize(("trained", "scored"), [("8 bits", 1), (1, "8 bits"), ("0 to 1", 1), ("8 bits", "0 to 255")])
def test_scores_do_not_depend_on_whether_masks_are_soft_or_of_0_and_1(trained, scored):
    def save(kind: str | int) -> Callable:
        hard = lambda mask, stem, _: Image.fromarray(mask.astype(np.uint8)).save(f"{stem}.png")  # noqa: E731
        return hard if kind == 1 else SOFT[kind]

    draw(jpg, save(trained))
    rule = prepared().rule
    for i in range(12, 16):
        save(scored)(scene(i)[1], "true_mask", i)
        (path,) = Path().glob("true_mask.*")
        wanted = scene(i)[1] if scored == 1 else soft(scene(i)[1]) > 0.5
        assert (read_mask(path, None, rule) != wanted).mean() < 0.005
        path.unlink()


def test_a_rule_of_an_older_cache_or_checkpoint_is_read():
    entries = {"low": None, "high": None, "is_labels": True, "has_void": False, "brightest": {"uint8": 1.0}}
    rule = rule_from(entries | {"chosen": None})
    SOFT["8 bits"](scene(0)[1], "mask", 0)
    assert (read_mask(Path("mask.png"), None, rule) != (soft(scene(0)[1]) > 0.5)).mean() < 0.005
    Image.fromarray(7 * scene(0)[1].astype(np.uint8)).save("mask.png")
    np.testing.assert_array_equal(read_mask(Path("mask.png"), None, rule), scene(0)[1])
    assert rule_from(entries | {"chosen": [7.0], "has_void": True}) == Rule(
        None, None, True, True, {"uint8": 1.0}, (7.0,)
    )


@pytest.mark.parametrize(("ground", "value"), [(2, 1), (1, 2), (1, 255), (10, 255), (100, 200)])
def test_masks_whose_ground_is_not_0_are_listed_with_the_flag_that_chooses(ground, value):
    masks = [np.where(scene(i)[1], value, ground).astype(np.uint8) for i in range(4)]
    share = 100 * np.mean([scene(i)[1].mean() for i in range(4)])
    shares = {value: f"{value} ({share:.1f} %)", ground: f"{ground} ({100 - share:.1f} %)"}
    with pytest.raises(UserError) as caught:
        set_of(masks)
    assert ", ".join(shares[key] for key in sorted(shares)) in str(caught.value)
    assert str(caught.value).endswith(f"--foreground-values {value}")
    data = set_of(masks, chosen=(value,))
    assert all(np.array_equal(data.sample(i)[1], scene(i)[1]) for i in range(4))


def test_masks_of_whole_floats_are_labels():
    draw(jpg, lambda m, s, i: Image.fromarray(m.astype(np.float32) * (1 + i % 3)).save(f"{s}.tif"))
    data = prepared()
    assert all(np.array_equal(data.sample(index)[1], scene(index)[1]) for index in range(len(data)))


def test_a_mask_of_nan_is_named():
    draw(jpg, lambda m, s, _: Image.fromarray(np.where(m, 1, np.nan).astype(np.float32)).save(f"{s}.tif"))
    with pytest.raises(UserError, match=r"p00_mask\.tif holds nan or infinity"):
        prepared()


@pytest.mark.parametrize("value", [1, 255])
def test_a_lossless_webp_holds_no_noise(value):
    draw(jpg, lambda m, s, _: Image.fromarray(m * np.uint8(value)).save(f"{s}.webp", lossless=True))
    assert all(np.array_equal(prepared().sample(index)[1], scene(index)[1]) for index in range(3))


def test_a_stray_pixel_makes_no_void():
    def save(mask: np.ndarray, stem: str, i: int) -> None:
        values = mask * np.uint8(255)
        values[0, 0] = 3 if i == 5 else 0
        Image.fromarray(values).save(f"{stem}.png")

    draw(jpg, save)
    data = prepared()
    assert not data.rule.has_void and (data.sample(5)[1] == 1).sum() == scene(5)[1].sum() + 1
    assert not (decode_mask(Path("data/train_masks/p05_mask.png"), None)[0] == VOID).any()


def test_colours_of_a_palette_are_never_brightness():
    """An object in 40 shades of red, as an indexed PNG, beside masks with soft edges."""

    def save(mask: np.ndarray, stem: str, i: int) -> None:
        if i % 2:
            return SOFT["8 bits"](mask, stem, i)
        indices = np.where(mask, 1 + np.mgrid[:64, :96][1] % 40, 0).astype(np.uint8)
        image = Image.fromarray(indices, "P")
        image.putpalette([0, 0, 0, *(part for shade in range(40) for part in (100 + 3 * shade, 0, 0))])
        image.save(f"{stem}.png")

    draw(jpg, save)
    data = prepared()
    for index in range(0, len(data), 2):
        np.testing.assert_array_equal(data.sample(index)[1], scene(index)[1])


def test_soft_masks_of_several_types_share_a_set():
    draw(jpg, lambda m, s, i: SOFT[("8 bits", "16 bits", "0 to 1")[i % 3]](m, s, i))
    data = prepared()
    for index in range(len(data)):
        assert (data.sample(index)[1] != (soft(scene(index)[1]) > 0.5)).mean() < 0.005


def test_soft_masks_are_read_as_such_where_training_had_hard_ones():
    draw(jpg, png)
    SOFT["8 bits"](scene(12)[1], "data/val_masks/p12_mask", 12)
    found = prepared("val", prepared().rule).sample(0)[1]
    assert (found != (soft(scene(12)[1]) > 0.5)).mean() < 0.005


@pytest.mark.parametrize("colour", [0, 20, 110, 255])
@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "16 bits", "WebP"])
def test_of_a_cut_out_opacity_is_the_mask(kind, colour):
    photo, mask = scene(0)
    pixels = (photo / photo.max() * colour).astype(np.uint8)
    cut_out = np.dstack((pixels, pixels // 2, pixels, 255 * mask.astype(np.uint8)))
    path = Path("mask.webp" if kind == "WebP" else "mask.png")
    if kind == "16 bits":
        cv2.imwrite(str(path), cut_out.astype(np.uint16) * 257)
    elif kind == "palette":
        image = Image.fromarray(np.where(mask, 1 + pixels // 8, 0).astype(np.uint8))
        image.putpalette([0, 0, 0, *(part for shade in range(40) for part in (6 * shade, 3 * shade, 6 * shade))])
        image.save(path, transparency=0)
    else:
        Image.fromarray(cut_out).convert("RGBA" if kind == "WebP" else kind).save(path)
    np.testing.assert_array_equal(read_mask(path), mask)


@pytest.mark.parametrize("opacity", [0, 128, 255])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_opacity_that_is_the_same_everywhere_says_nothing_of_a_mask(opacity, kind):
    mask = scene(0)[1]
    white = (np.dstack([255 * mask.astype(np.uint8)] * 3 + [np.full(mask.shape, opacity, np.uint8)])).astype(kind)
    cv2.imwrite("mask.png", white * kind(257 if kind == np.uint16 else 1))
    np.testing.assert_array_equal(read_mask(Path("mask.png")), mask)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("ending", ["tif", "png"])
def test_deep_colours_are_turned_once(orientation, ending):
    stored = colours(scene(0)[0], 65535).astype(np.uint16)
    cv2.imwrite("plain.png", stored[..., ::-1])
    upright = read_image(Path("plain.png"))
    turns = {1: upright, 3: upright[::-1, ::-1], 6: np.rot90(upright, -1), 8: np.rot90(upright)}
    if ending == "tif":
        tags = {
            256: 96,
            257: 64,
            258: 16,
            259: 1,
            262: 2,
            273: 8,
            274: orientation,
            277: 3,
            278: 64,
            279: stored.nbytes,
        }
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        end = struct.pack("<H", len(tags)) + entries + bytes(4)
        Path("turned.tif").write_bytes(b"II*\0" + struct.pack("<I", 8 + stored.nbytes) + stored.tobytes() + end)
    else:
        data = Path("plain.png").read_bytes()
        exif = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 274, 3, 1, orientation, 0) + bytes(4)
        chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
        Path("turned.png").write_bytes(data[:33] + chunk + data[33:])
    np.testing.assert_array_equal(read_image(Path(f"turned.{ending}")), turns[orientation])


def test_the_range_of_colours_is_that_of_all_channels():
    photo = np.zeros((1280, 1918, 3), np.uint16)
    photo[:] = 60000, 30000, 1000  # blue first, as OpenCV writes
    photo += np.random.default_rng(0).integers(0, 500, photo.shape, np.uint16)
    cv2.imwrite("photo.png", photo)
    red, green, blue = read_image(Path("photo.png"), (16, 24)).reshape(-1, 3).mean(0)
    assert red < 10 and 100 < green < 150 and blue > 245


def test_jpegs_that_differ_a_little_are_read_alike_and_once():
    draw(jpg, lambda m, s, i: Image.fromarray(m * np.uint8(250 + i % 6)).save(f"{s}.jpg"))
    data = prepared()
    for index in range(len(data)):
        assert (data.sample(index)[1] != scene(index)[1]).mean() < 0.005


@pytest.mark.parametrize("kind", ["I;16", "8 bits", "1 bit"])
def test_tiffs_in_which_0_is_white_are_turned_round(kind, tmp_path):
    mask = scene(0)[1]
    pixels = {
        "I;16": (65535 - mask * 65535).astype(np.uint16), "8 bits": 255 * mask.astype(np.uint8), "1 bit": mask
    }[kind]  # fmt: skip
    Image.fromarray(pixels).save("mask.tif", tiffinfo={262: 0})
    np.testing.assert_array_equal(read_mask(Path("mask.tif")), mask)


# ---------------------------------------------------------------------------------------------------------------------
# Void


def with_void(mask: np.ndarray) -> np.ndarray:
    """Labels 0 and 1, with 255 along the object's edge."""
    edge = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) - cv2.erode(
        mask.astype(np.uint8), np.ones((3, 3), np.uint8)
    )
    return np.where(edge > 0, VOID, mask).astype(np.uint8)


def void_png(mask: np.ndarray, stem: str, _: int) -> None:
    Image.fromarray(with_void(mask)).save(f"{stem}.png")


def test_void_is_kept_apart_and_said():
    draw(jpg, void_png)
    data = prepared()
    assert data.rule.has_void
    for index in range(len(data)):
        np.testing.assert_array_equal(data.sample(index)[1], with_void(scene(index)[1]))
        known = data.sample(index)[1] != VOID
        assert data.infos["foreground"][index] == pytest.approx((data.sample(index)[1] == 1)[known].mean())
        assert data.infos["void"][index] == pytest.approx(1 - known.mean())
    assert f"{100 * data.infos['void'].mean():.1f} %, ignored in the loss and in all scores" in describe(data, data)


def test_255_is_foreground_where_no_mask_holds_small_labels_beside_it():
    draw(jpg, lambda m, s, i: Image.fromarray(m * np.uint8(1 if i % 2 else 255)).save(f"{s}.png"))
    assert all(np.array_equal(prepared().sample(index)[1], scene(index)[1]) for index in range(4))


def test_void_of_one_pixel_between_labels_is_no_soft_edge():
    masks = [np.where(outlined(i) == 255, 255, outlined(i) // 32).astype(np.uint8) for i in range(4)]
    data = set_of(masks)
    assert all(np.array_equal(data.sample(i)[1] == VOID, masks[i] == 255) for i in range(4))
    assert all(np.array_equal(data.sample(i)[1] == 1, (masks[i] > 0) & (masks[i] < 255)) for i in range(4))


def test_stray_dark_pixels_in_soft_masks_are_no_labels_beside_void():
    masks = [(255 * soft(scene(i)[1])).round().astype(np.uint8) for i in range(6)]
    masks += [np.where(np.indices((64, 96)).sum(0) % 40 == 0, 3, 255 * scene(i)[1]).astype(np.uint8) for i in (6, 7)]
    data = set_of(masks)
    assert not data.rule.has_void
    assert all(np.array_equal(data.sample(i)[1], masks[i] > 127) for i in range(8))


def test_void_may_be_chosen_as_foreground():
    draw(jpg, void_png)
    data = prepared(chosen=(255,))
    np.testing.assert_array_equal(data.sample(0)[1], with_void(scene(0)[1]) == VOID)
    assert "foreground is 255" in describe(data, data) and "void (255)" not in describe(data, data)
    with pytest.raises(UserError, match=r"9 is in no mask of .*_masks: choose from 1$"):
        prepared(chosen=(9,))


def test_soft_masks_have_no_labels_to_choose():
    draw(jpg, SOFT["0 to 1"])
    assert "foreground is above half of the brightest" in describe(prepared(), prepared())
    with pytest.raises(UserError, match="they hold no labels, so set it to None"):
        prepared(chosen=(1,))


def test_validation_means_what_training_means():
    """No validation mask holds a small label beside 255, but those of training do."""
    draw(jpg, void_png)
    for index, path in enumerate(sorted(Path("data/val_masks").iterdir())):
        Image.fromarray(scene(0)[1] * np.uint8(255 if index else 1)).save(path)
    assert (prepared("val").sample(1)[1] == 1).any()
    found = prepared("val", prepared().rule)
    assert (found.sample(1)[1] == VOID).any() and (found.sample(0)[1] == 1).any()


def test_a_reduced_pixel_is_void_where_most_of_it_was():
    mask = np.zeros((40, 60), np.uint8)
    mask[:, 30:] = 1
    mask[:20, 27:31] = VOID  # of a reduced pixel from 25 to 30 three of five columns, of the next one of five
    Image.fromarray(mask).save("mask.png")
    found, _, note = decode_mask(Path("mask.png"), (8, 12))
    assert (found[:4, 5] == VOID).all() and (found[4:, 5] == 0).all()
    assert (found[:, 6:] == 1).all() and (found[:, :5] == 0).all()
    assert [value for value, _ in note.values] == [0, 1, 255]


def test_the_loss_is_that_of_the_known_pixels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, 8, 12, generator=generator, requires_grad=True)
    masks = (torch.rand(3, 1, 8, 12, generator=generator) < 0.5).float()
    known = torch.rand(3, 1, 8, 12, generator=generator) < 0.7
    known[2] = False
    losses = train.image_losses(logits, torch.where(known, masks, torch.nan))
    for index in range(2):
        some = F.binary_cross_entropy_with_logits(logits[index][known[index]], masks[index][known[index]])
        assert losses[index].item() == pytest.approx(some.item())
    assert losses[2] == 0
    losses.sum().backward()
    assert (logits.grad[~known] == 0).all() and (logits.grad[known] != 0).all()


def test_training_with_void_is_training_with_a_loss_that_is_cut_out_by_hand(monkeypatch):
    draw(jpg, void_png)
    flags = [*LEARN, "--num-epochs", "2"]
    train.main([*flags, "--checkpoint", "void.pth.tar"])

    def to(self: Device, images: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        known.append((masks != VOID).unsqueeze(1))
        return self.normalised(images), (masks == 1).float().unsqueeze(1)

    def image_losses(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        part = known.pop() if len(known) == 1 else known.pop(0)
        losses = F.binary_cross_entropy_with_logits(logits, masks, reduction="none") * part
        return losses.flatten(1).sum(1) / part.flatten(1).sum(1)

    known = []
    monkeypatch.setattr(Device, "to", to)
    monkeypatch.setattr(train, "image_losses", image_losses)
    train.main([*flags, "--checkpoint", "cut.pth.tar"])
    states = [utils.load_checkpoint(Path(f"{name}.pth.tar"))["state_dict"] for name in ("void", "cut")]
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())


def test_scores_are_those_of_scikit_learn_on_the_known_pixels():
    draw(jpg, void_png)
    train.main([*LEARN, "--num-epochs", "20"])
    predict.main(["data/val_images", "--mask-dir", "data/val_masks"])
    table = dict(line.split(",", 1) for line in Path("predictions/scores.csv").read_text().splitlines()[1:])
    dice = []
    for path in sorted(Path("data/val_images").iterdir()):
        truth = np.asarray(Image.open(f"data/val_masks/{path.stem}_mask.png"))
        known = truth != VOID
        found = np.asarray(Image.open(f"predictions/{path.stem}_mask.png")) > 0
        pair = truth[known] == 1, found[known]
        dice.append(f1_score(*pair, zero_division=1))
        values = dice[-1], jaccard_score(*pair, zero_division=1), accuracy_score(*pair)
        assert [float(value) for value in table[str(path)].split(",")][:3] == pytest.approx(values)
    assert max(dice) > 0.3


def test_validation_counts_the_known_pixels_alone():
    draw(jpg, void_png)
    data = prepared()
    loader = utils.get_loaders(data, data, 5)[1]
    network, cpu = torch.nn.Conv2d(3, 1, 1), Device(torch.device("cpu"), torch.float32, (0.4,) * 3, (0.1,) * 3)
    torch.nn.init.constant_(network.weight, 1.0)
    torch.nn.init.constant_(network.bias, 0.0)
    found, photo_dice = utils.check_accuracy(loader, network, cpu, train.image_losses)
    pairs = []
    for index in range(len(data)):
        image, mask = data.sample(index)
        logits = network(cpu.normalised(torch.from_numpy(image)[None]))[0, 0]
        pairs.append((mask[mask != VOID], (logits > 0).numpy()[mask != VOID]))
    assert photo_dice == pytest.approx([f1_score(*pair, zero_division=1) for pair in pairs])
    assert found["pixel_accuracy"] == pytest.approx(np.mean([accuracy_score(*pair) for pair in pairs]))
    assert found["iou"] == pytest.approx(np.mean([jaccard_score(*pair, zero_division=1) for pair in pairs]))


def test_a_set_with_void_is_learned_and_its_void_hatched():
    draw(jpg, void_png)
    train.main(LEARN)
    assert best_dice() > 0.98
    assert 128 in np.unique(np.asarray(Image.open("saved_images/0.png"))[4:30, 4:40])


def test_boundaries_in_void_count_for_nothing():
    mask = np.zeros((100, 150), bool)
    mask[30:70, 40:100] = True
    known = np.ones_like(mask)
    known[25:75, 35:60] = False  # covers the left side and more
    wrong_in_void, wrong = mask.copy(), mask.copy()
    wrong_in_void[30:70, 37:50] = False
    wrong[30:70, 80:100] = False
    assert utils.boundary_f1(wrong_in_void, mask, known) == 1
    assert utils.boundary_f1(wrong, mask, known) < 0.9


# ---------------------------------------------------------------------------------------------------------------------
# Where the rule is kept


def test_a_cache_keeps_the_rule_and_reads_again_what_newer_files_contradict():
    draw(jpg, grey(255, 128))
    for path in sorted(Path("data/train_masks").iterdir())[6:]:
        path.rename(path.name)
    for path in sorted(Path("data/train_images").iterdir())[6:]:
        path.rename(path.name)
    folders = Path("data/train_images"), Path("data/train_masks")

    def cached(**options) -> CarvanaDataset:
        data = CarvanaDataset(*folders, (64, 96))
        data.prepare("cache", **options)
        return data

    first = cached()
    assert cached().rule == first.rule and cached().notes == first.notes
    for path in Path().glob("p*"):
        path.rename(folders[path.stem.endswith("_mask")] / path.name)
    for index in range(6):  # these hold small labels beside 255, so that 255 becomes void everywhere
        Image.fromarray(with_void(scene(6 + index)[1])).save(folders[1] / f"p{6 + index:02d}_mask.png")
    for path in sorted(folders[1].iterdir())[1:6:2]:
        Image.fromarray(np.where(np.asarray(Image.open(path)) > 0, 1, 0).astype(np.uint8)).save(path)
    data, plain = cached(), prepared()
    assert data.rule == plain.rule != first.rule and data.rule.has_void
    for index in range(len(data)):
        np.testing.assert_array_equal(data.sample(index)[1], plain.sample(index)[1])
    assert (first.sample(0)[1] == 1).any() and (data.sample(0)[1] == VOID).any()  # p00 itself did not change
    assert not np.array_equal(cached(rule=first.rule).sample(0)[1], data.sample(0)[1])


def test_a_checkpoint_keeps_the_rule_and_continuing_uses_it():
    draw(PHOTOS["12 bits in 16, TIFF"], png)
    train.main([*LEARN, "--num-epochs", "1"])
    rule = utils.load_checkpoint(Path("my_checkpoint.pth.tar"))["rule"]
    assert json.loads(json.dumps(rule)) == asdict(prepared().rule)
    Image.fromarray(np.full((64, 96), 60000, np.uint16)).save("data/train_images/p03.tif")
    train.main([*LEARN, "--num-epochs", "2", "--load-model"])
    assert utils.load_checkpoint(Path("my_checkpoint.pth.tar"))["rule"] == rule != asdict(prepared().rule)


def test_a_tile_at_another_scale_than_trainings_is_refused():
    draw(jpg, png)
    train.main([*LEARN, "--num-epochs", "1", "--image-height", "16", "--image-width", "24"])
    message = "4 times as high and 4 times as wide as in training: give --size 16 24"
    with pytest.raises(UserError, match=message):
        predict.main(["data/val_images", "--tile", "32"])
    predict.main(["data/val_images", "--tile", "32", "--size", "16", "24"])
    train.main([*LEARN, "--num-epochs", "1", "--image-height", "64", "--image-width", "96"])
    predict.main(["data/val_images", "--tile", "32"])

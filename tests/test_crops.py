"""Training on crops: what is cut out, what validation and predict.py make of it, and that it continues like any run."""

import re
import time
from itertools import pairwise
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from conftest import PREPROCESSING, rows
from PIL import Image

import dataset
import model
import predict
import train
import utils
from dataset import CROPS, CarvanaDataset, CropDataset, cut
from machinery import decoding, report, samples
from machinery.decoding import VOID, decode_mask, read_image
from machinery.device import Device
from machinery.errors import UserError
from model import UNet

CROP = ["--crop", "64", "64"]


@pytest.fixture
def scattered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photos of many sizes, one of them smaller than a crop, whose red and green say where each pixel lies.

    Each has a square of 4 pixels in the mask, but the last one.
    """
    monkeypatch.chdir(tmp_path)
    for folder in ("data/train_images", "data/train_masks", "data/val_images", "data/val_masks"):
        Path(folder).mkdir(parents=True)
    for number, (height, width) in enumerate([(200, 150), (90, 260), (40, 50), (130, 130)]):
        image = np.zeros((height, width, 3), np.uint8)
        image[..., 0], image[..., 1], image[..., 2] = *np.indices((height, width)), 10 * number
        mask = np.zeros((height, width), np.uint8)
        if number < 3:
            mask[20:24, 30:34] = 255
        for part in ("train", "val"):
            Image.fromarray(image).save(f"data/{part}_images/{number}.png")
            Image.fromarray(mask).save(f"data/{part}_masks/{number}_mask.png")
    return tmp_path


def cropped(cache: str | None = "data/cache", scale: float = 1.0, **more: object) -> CropDataset:
    data = CropDataset("data/train_images", "data/train_masks", scale, **{"crop": (64, 64)} | more)
    data.prepare(cache)
    return data


# ---------------------------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.37])
def test_the_cache_holds_each_photo_at_its_own_size(scattered, scale):
    data, decoded = cropped(scale=scale), cropped(None, scale)
    for index, (image_path, mask_path) in enumerate(data.pairs):
        image, mask = data.sample(index)
        assert np.array_equal(image, read_image(image_path, scale)) and image.shape[:2] == data.size_of(index)
        assert np.array_equal(mask, decode_mask(mask_path, scale)[0])
        assert all(map(np.array_equal, decoded.sample(index), (image, mask)))
    assert data.cache_file.stat().st_size == sum(4 * np.prod(data.size_of(index)) for index in range(4))


def test_only_what_changed_is_decoded_again(scattered, monkeypatch):
    before = [tuple(map(np.array, cropped().sample(index))) for index in range(4)]
    Image.fromarray(np.full((77, 66, 3), 9, np.uint8)).save("data/train_images/1.png")
    Image.fromarray(np.eye(77, 66, dtype=np.uint8)).save("data/train_masks/1_mask.png")
    read, reading = [], decoding.read_sample
    monkeypatch.setattr(
        samples, "read_sample", lambda image, *rest: (read.append(image.name), reading(image, *rest))[1]
    )
    data = cropped()
    assert read == ["1.png"]
    assert data.sample(1)[0].shape == (77, 66, 3)
    assert all(all(map(np.array_equal, data.sample(index), before[index])) for index in (0, 2, 3))


def test_its_size_is_said_before_and_must_be_free(scattered, monkeypatch, capsys):
    monkeypatch.setattr(samples.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100_000}))
    data = cropped()
    needed = 4 * sum(height * width for height, width in [(200, 150), (90, 260), (40, 50), (130, 130)]) / 1e6
    assert f"it needs {needed:.0f} MB" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(scattered)
    cropped()
    assert f"Caching 4 pairs of data/train_images in data/cache: {needed:.1f} MB." in capsys.readouterr().out
    assert data.cache_file is None and data.sample(1)[0].shape == (90, 260, 3)


def test_large_photos_are_decoded_one_at_a_time(scattered, monkeypatch):
    running, most, reading = [], [], decoding.read_sample

    def slow(*arguments):
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return reading(*arguments)

    monkeypatch.setattr(samples, "read_sample", slow)
    monkeypatch.setattr(samples, "NUM_THREADS", 4)
    cropped("data/small")
    assert max(most) > 1
    most.clear()
    monkeypatch.setattr(decoding, "LARGE", 1000)
    cropped("data/large")
    assert max(most) == 1


def test_places_are_foreground(scattered):
    data = cropped()
    for index, places in enumerate(data.infos["places"]):
        mask = data.sample(index)[1]
        assert (places == -1).all() if index == 3 else (mask.ravel()[places] == 1).all() and len(set(places)) == 16


def test_places_do_not_change_the_fingerprint(scattered):
    data = cropped()
    before = data.fingerprint()
    data.infos["places"] = 0
    assert data.fingerprint() == before


# ---------------------------------------------------------------------------------------------------------------------
# Crops


@pytest.mark.parametrize("cache", ["data/cache", None])
def test_a_crop_is_a_part_of_its_photo_and_void_beyond(scattered, cache):
    data = cropped(cache, crop=(64, 80))
    assert len(data) == 4 * CROPS
    for index in range(len(data)):
        image, mask = data[0, 0, index]
        truth = data.sample(index // CROPS)[1]
        assert image.shape == (64, 80, 3) and mask.shape == (64, 80) and image.flags.c_contiguous
        assert (image[..., 2] == 10 * (index // CROPS)).all()
        known = mask != VOID
        row, column = image[..., 0][known], image[..., 1][known]
        assert np.array_equal(mask[known], truth[row, column])
        assert known.sum() == min(64, len(truth)) * min(80, truth.shape[1])  # a photo is void where it is too small
        assert data.image_of(index) == data.pairs[index // CROPS][0]


def test_a_third_of_the_crops_shows_foreground(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("data/train_images", "data/train_masks"):
        Path(folder).mkdir(parents=True)
    mask = np.zeros((1000, 1000), np.uint8)
    mask[500:502, 500:502] = 255  # a crop that lies anywhere hits it in 1 of 200 cases
    Image.fromarray(np.zeros((1000, 1000, 3), np.uint8)).save("data/train_images/a.png")
    Image.fromarray(mask).save("data/train_masks/a_mask.png")
    data = cropped()
    crops = [data[epoch, 0, index][1] for epoch in range(60) for index in range(CROPS)]
    hits = [mask for mask in crops if (mask == 1).any()]
    assert 0.27 < len(hits) / len(crops) < 0.41
    assert np.mean([(mask[31:34, 31:34] == 1).any() for mask in hits]) > 0.95


def test_crops_depend_on_seed_epoch_photo_and_number_alone(scattered):
    make = train.make_augmentation
    data, other = cropped(augmentation=make()), cropped(None, augmentation=make())
    for index in (0, 5, 9, 30):
        first = data[3, 0, index]
        assert all(map(np.array_equal, first, data[3, 77, index]))  # wherever it comes in the epoch
        assert all(map(np.array_equal, first, other[3, 0, index]))
        assert not np.array_equal(first[0], data[4, 0, index][0])
        assert not np.array_equal(first[0], data[3, 0, index ^ 1][0])
        assert not np.array_equal(first[0], cropped(augmentation=make(), seed=1)[3, 0, index][0])


def test_borders_come_in_only_where_the_photo_ends(tmp_path, monkeypatch):
    """Rotated and scaled as far as the recipe allows, a crop of the middle of a photo has no void."""
    monkeypatch.chdir(tmp_path)
    for folder in ("data/train_images", "data/train_masks"):
        Path(folder).mkdir(parents=True)
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save("data/train_images/a.png")
    Image.fromarray(np.eye(64, 96, dtype=np.uint8)).save("data/train_masks/a_mask.png")
    furthest = {"scale": (0.85, 0.85), "translate_percent": (0.06, 0.06), "rotate": (8, 8)}
    for size, has_void in (((64, 96), True), ((164, 196), False)):
        image, mask = np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8)
        augmentation = A.Compose([A.Affine(**furthest, border_mode=cv2.BORDER_REFLECT_101, p=1)])
        data = cropped(None, crop=(64, 96), augmentation=augmentation)
        data.sample = lambda _, image=image, mask=mask: (image, mask)
        monkeypatch.setattr(dataset.np.random, "default_rng", lambda _: Middle())
        assert (data[0][1] == VOID).any() == has_void
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)


class Middle(np.random.Generator):
    """Puts a crop into the middle."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def random(self, size: int | None = None) -> object:
        return np.full(size, 0.5) if size else 0.5


@pytest.mark.parametrize(
    ("start", "size"), [((-5, 3), (20, 9)), ((8, -2), (40, 60)), ((0, 0), (10, 12)), ((-30, -40), (99, 99))]
)
def test_what_lies_beyond_is_mirrored_and_void(start, size):
    random = np.random.default_rng(0)
    image, mask = random.integers(0, 256, (10, 12, 3), np.uint8), random.integers(0, 2, (10, 12), np.uint8)
    part, truth = cut(image, mask, start, size)
    assert part.shape == (*size, 3) and truth.shape == size
    for row, column in np.ndindex(size):
        y, x = start[0] + row, start[1] + column
        if 0 <= y < 10 and 0 <= x < 12:
            assert (part[row, column] == image[y, x]).all() and truth[row, column] == mask[y, x]
        else:
            assert truth[row, column] == VOID


# ---------------------------------------------------------------------------------------------------------------------
# Tiles


@pytest.mark.parametrize("length", [16, 63, 64, 65, 100, 128, 333, 1000])
def test_weights_of_tiles_add_up_to_one(length):
    parts = model.fades(length, 64, 16)
    total = np.zeros(parts[-1][0] + 64)
    for start, fade in parts:
        assert start % 16 == 0 and (fade >= 0).all()
        total[start : start + 64] += fade
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert len(total) >= length and parts[-1][0] < max(length, 1)
    for (start, _), (following, _) in pairwise(parts):
        assert start + 64 - following >= 16  # a quarter


@pytest.mark.parametrize("tile", [(64, 96), (100, 70), (400, 400)])
def test_a_network_of_single_pixels_gives_the_same_in_tiles(tile):
    images = torch.randn(2, 3, 150, 211)
    logits = model.slide(lambda part: part.sum(1, keepdim=True), images, tile, 16)
    torch.testing.assert_close(logits, images.sum(1, keepdim=True))


def test_several_tiles_are_seen_at_once_and_all_have_one_shape():
    shapes = []
    model.slide(
        lambda part: (shapes.append(tuple(part.shape)), part[:, :1])[1], torch.zeros(1, 3, 300, 300), (64, 64), 16
    )
    assert shapes[:-1] == [(model.TILES, 3, 64, 64)] * (len(shapes) - 1) and shapes[-1][1:] == (3, 64, 64)


def test_a_network_with_a_tile_slides_in_eval_mode_alone():
    model, seen = UNet(3, 1, (8, 16), tile=(64, 64)), []
    model.downs[0].register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[-2:])))
    images = torch.zeros(1, 3, 100, 64)
    model.train()(images)
    model.eval()(images)
    assert seen == [(100, 64), (64, 64)]
    assert UNet(**model.config).tile == [64, 64] and "tile" not in UNet(3, 1, (8,)).config


def test_an_encoder_slides_by_its_own_multiple():
    pytest.importorskip("timm")
    model = UNet(3, 1, encoder="resnet18", tile=(64, 96)).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 100, 250)).shape == (1, 1, 100, 250)
    assert model.multiple == 32


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_a_run_validates_on_a_part_and_ends_with_all(scattered, run_train, monkeypatch, capsys):
    monkeypatch.setattr(dataset, "VAL_PHOTOS", 2)
    seen, enlarge = [], predict.enlarge
    monkeypatch.setattr(
        predict, "enlarge", lambda *arguments: (seen.append(arguments[2].shape), enlarge(*arguments))[1]
    )
    run_train(*CROP, "--num-epochs", "1")
    out = capsys.readouterr().out
    checkpoint = utils.load_checkpoint(Path("my_checkpoint_best.pth.tar"))
    assert checkpoint["preprocessing"]["scale"] == 1 and tuple(checkpoint["model"]["tile"]) == (64, 64)
    assert [len(photos) for photos in utils.load_checkpoint(Path("my_checkpoint.pth.tar"))["photo_dice"]] == [2]
    assert sorted(seen) == [(40, 50, 3), (90, 260, 3), (130, 130, 3), (200, 150, 3)]
    assert "train      4  " in out  # photos
    assert {path.name for path in Path("saved_images").glob("pred_*")} == {"pred_0.png", "pred_1.png"}
    sizes = {Image.open(f"saved_images/pred_{number}.png").size for number in (0, 1)}
    assert sizes == {(64, 50)}  # the median photo's, 140 x 110; torchvision draws no lines around one picture


def test_predict_follows_without_flags(scattered, run_train, capsys):
    run_train(*CROP, "--num-epochs", "1", "--scale", "0.5")
    last = capsys.readouterr().out
    predict.main(["data/val_images", "--mask-dir", "data/val_masks"])
    out = capsys.readouterr().out
    dice = float(last.split("at training size, ")[1].split()[0])
    assert float(next(line for line in out.splitlines() if "mean of 4" in line).split()[0]) == pytest.approx(
        dice, abs=2e-4
    )
    for photo in Path("data/val_images").iterdir():
        assert Image.open(f"predictions/{photo.stem}_mask.png").size == Image.open(photo).size
    model = predict.load_model("my_checkpoint_best.pth.tar")
    image = read_image(Path("data/val_images/0.png"))
    assert predict.predict(model, image).shape == image.shape[:2] and model.window == (64, 64)


def test_a_process_without_photos_adds_nothing(scattered, monkeypatch):
    data = CarvanaDataset("data/val_images", "data/val_masks", 1.0)
    data.prepare(None)
    network = UNet(3, 1, (8, 16), tile=(64, 64))
    model.set_first_prediction(network, 0.1)
    preprocessing = PREPROCESSING | {"scale": 1.0}
    state = {"model": network.config, "preprocessing": preprocessing, "state_dict": network.state_dict()}
    utils.save_checkpoint(state, "network.pth.tar")
    work = Path("network.pth.tar"), data, Device(torch.device("cpu"), torch.float32), 4
    assert predict.full_size_dice(*work)[0] == 0.25  # all background, which is right for one of four
    monkeypatch.setattr(predict, "RANK", 4)
    monkeypatch.setattr(predict, "WORLD_SIZE", 5)
    assert predict.full_size_dice(*work)[0] == 0


@pytest.mark.parametrize("flags", [["--tile", "128"], ["--size", "100", "160"], ["--tta"], ["--batch-size", "3"]])
def test_predicts_flags_work_with_it(scattered, run_train, flags):
    run_train(*CROP, "--num-epochs", "1")
    predict.main(["data/val_images", *flags])
    for photo in Path("data/val_images").iterdir():
        assert Image.open(f"predictions/{photo.stem}_mask.png").size == Image.open(photo).size


def test_a_checkpoint_of_crops_is_not_continued_with_other_ones(scattered, run_train):
    run_train(*CROP, "--num-epochs", "1")
    for flags, wanted in (
        ([], r"CROP = \(64, 64\)"),
        (["--crop", "64", "80"], r"CROP = \(64, 64\)"),
        ([*CROP, "--scale", "0.5"], "SCALE = 1.0"),
    ):
        with pytest.raises(UserError, match=f"was trained with {wanted}: set that again"):
            run_train(*flags, "--load-model")
    run_train(*CROP, "--num-epochs", "2", "--load-model", "--image-height", "64")  # which crops do not use
    assert len(rows()) == 2
    run_train("--crop", "None", "--num-epochs", "1")
    with pytest.raises(UserError, match="was trained with CROP = None: set that again"):
        run_train(*CROP, "--load-model")


def test_whole_photos_weights_start_a_run_of_crops(scattered, run_train, capsys):
    run_train("--num-epochs", "1", "--checkpoint", "whole.pth.tar")
    run_train(*CROP, "--num-epochs", "1", "--start-from", "whole_best.pth.tar")
    assert "Starting from whole_best.pth.tar (epoch 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crop", "64"], "CROP is (64,): set it to height and width, at least 64 and at most 65535, such as"),
        (["--crop", "48", "64"], "CROP is (48, 64): set it to height and width, at least 64"),
        ([*CROP, "--scale", "0"], "SCALE is 0.0: set it to a share of the photos' own size, above 0 and at most 1"),
        (["--scale", "0.5"], "SCALE is 0.5, but CROP is None: set CROP, such as (256, 256), or SCALE to 1"),
        (
            ["--crop", "200", "300"],
            "CROP is (200, 300), but at SCALE 1 no photo in data/train_images is higher than 200 or "
            "wider than 260 pixels: set CROP to these at most",
        ),
        ([*CROP, "--scale", "0.01"], "every mask in data/train_masks is empty at SCALE 0.01: masks must be white"),
    ],
)
def test_a_mistake_is_named(scattered, run_train, flags, message):
    with pytest.raises(UserError) as error:
        run_train(*flags)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("crop", [(128.0, 128.0), ("128", "128"), (128, None), (True, 128), (128,), ()])
def test_an_edited_crop_of_another_kind_is_named(scattered, monkeypatch, crop):
    monkeypatch.setattr(train, "CROP", crop)
    with pytest.raises(UserError, match=r"CROP is \(.*: set it to height and width"):
        train.main(["--features", "8", "16"])


def test_predicts_size_must_be_near_trainings(scattered, run_train):
    run_train(*CROP, "--num-epochs", "1")
    message = (
        "--size shows the network photos 0.58 times as high and 0.46 times as wide as in training: give --size 110 "
    )
    with pytest.raises(UserError, match=f"{message}140$"):
        predict.main(["data/val_images", "--size", "64", "64"])


def test_validation_photos_are_loaded_one_by_one_and_without_workers(scattered):
    """Workers would queue whole large photos in shared memory."""
    val = CarvanaDataset("data/val_images", "data/val_masks", 1.0)
    val.prepare(None)
    train_loader, val_loader = utils.get_loaders(cropped(), val, batch_size=4, num_workers=2)
    assert (train_loader.num_workers, val_loader.num_workers, val_loader.batch_sampler.size) == (2, 0, 1)


def test_without_a_cache_nothing_is_said_of_arrays(scattered, run_train, recwarn):
    run_train(*CROP, "--num-epochs", "1", "--cache-dir", "none")
    assert not recwarn.list


def test_diverging_names_the_photos_of_the_crops(scattered, run_train):
    with pytest.raises(UserError, match=r"training diverged .* with (?:\d.png, )*\d.png: look at") as error:
        run_train(*CROP, "--learning-rate", "1e6", "--batch-size", "16")
    named = re.findall(r"\d.png", str(error.value))
    assert len(named) == len(set(named))  # of 16 crops many are of one photo


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_pictures_keep_thin_things():
    image, mask = np.zeros((300, 200, 3), np.uint8), np.zeros((300, 200), np.uint8)
    mask[150], mask[:30] = 1, VOID
    small, truth = report.reduced(image, mask, (30, 20))
    assert small.shape == (30, 20, 3)
    assert (truth[:3] == VOID).all() and (truth[3:15] == 0).all() and (truth[15] == 1).all() and (truth[16:] == 0).all()


@pytest.mark.parametrize(("own", "wanted"), [(129, 128), (1000, 300), (60, 20), (50, 64)])
def test_no_pixel_is_lost_in_a_picture(own, wanted):
    rows = torch.arange(own, dtype=torch.float32)[None, None, :, None].expand(1, 1, own, 2)
    highest = np.ceil((np.arange(wanted) + 1) * own / wanted) - 1  # the last row that each of the picture's covers
    np.testing.assert_array_equal(report.pooled(rows, (wanted, 1))[0, 0, :, 0], highest)


def test_what_is_void_is_hatched_in_the_first_batch(tmp_path):
    masks = torch.zeros(1, 40, 40, dtype=torch.uint8)
    masks[:, :, 20:] = VOID
    report.save_train_batch(torch.zeros(1, 40, 40, 3, dtype=torch.uint8), masks, tmp_path / "batch.png")
    white = (np.asarray(Image.open(tmp_path / "batch.png")) == 255).all(-1)
    assert not white[:, :20].any() and 0.2 < white[:, 20:].mean() < 0.5


def test_pictures_show_the_dice_of_the_photo_itself(scattered, run_train, monkeypatch):
    labels, label = [], report.label
    monkeypatch.setattr(report, "label", lambda tile, text: (labels.append(text), label(tile, text))[1])
    run_train(*CROP, "--num-epochs", "1")
    dice = utils.load_checkpoint(Path("my_checkpoint.pth.tar"))["photo_dice"][0]
    assert sorted(labels) == sorted(f"{value:.4f}" for value in dice)

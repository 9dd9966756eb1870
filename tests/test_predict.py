"""From photos to masks: what predict.py writes, scores and submits, and what it does with bad input."""

import csv
import gzip
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import PREPROCESSING, save_network
from forked import Script, start_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import predict
import utils
from machinery import decoding, errors, outputs, shapes
from machinery.decoding import read_mask
from machinery.device import Device
from machinery.errors import UserError
from machinery.files import lock_of, locked
from model import UNet

SCRIPT = Path(predict.__file__)


def names(folder: str = "predictions") -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def pixels(name: str) -> np.ndarray:
    return np.asarray(Image.open(Path("predictions", name)))


def run(*args: object) -> None:
    predict.main([str(arg) for arg in args])


def error_of(*args: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        errors.run(lambda: run(*args))
    message = exit_.value.code  # a text: Python prints it and exits with status 1
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def test_every_photo_gets_a_mask_of_its_own_size(photos):
    Image.open(photos[0]).resize((301, 200)).save(photos[0])
    run("data/val_images")
    assert names() == {f"{photo.stem}_mask.png" for photo in photos}
    with Image.open(f"predictions/{photos[0].stem}_mask.png") as mask:
        assert mask.size == (301, 200) and mask.mode == "L"
        assert set(np.unique(np.asarray(mask))) == {0, 255}


def test_files_folders_and_patterns_are_photos_each_once(photos):
    Path("more/below").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "below/c.png", ".hidden.png"):
        Image.new("RGB", (60, 40), "red").save(Path("more", name))
    Path("more/notes.txt").write_text("mine")
    run(photos[0], "more/*.png", "more/a.png", "more")
    assert names() == {f"{photos[0].stem}_mask.png", "a_mask.png", "b_mask.png", "c_mask.png"}


def test_photos_of_one_stem_do_not_overwrite_one_another(photos):
    for folder, colour in (("x", "black"), ("y", "white")):
        Path(folder).mkdir()
        for name in ("a.png", "a.jpg", "A.png"):
            Image.new("RGB", (60, 40), colour).save(Path(folder, name))
    run("x", "y")
    assert len(names()) == 6


def test_the_output_folder_is_no_input(photos):
    run("data/val_images", "--output-dir", "data/val_images/predictions")
    run("data/val_images", "--output-dir", "data/val_images", "--overlay")
    first = names("data/val_images/predictions")
    run("data/val_images", "--output-dir", "data/val_images/predictions")
    assert names("data/val_images/predictions") == first == {f"{photo.stem}_mask.png" for photo in photos}


def test_files_of_the_user_are_never_overwritten(photos):
    mine = Path("predictions", f"{photos[0].stem}_mask.png")
    mine.parent.mkdir()
    Image.new("L", (96, 64)).save(mine)
    before = mine.read_bytes()
    assert "1 of 8" in error_of("data/val_images")
    assert mine.read_bytes() == before and len(names()) == 8  # the others are there
    run(*photos[1:])  # our own are written anew


def test_a_photo_that_lies_on_its_side_gets_an_upright_mask(photos):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photos[0]).save("turned.png", exif=exif)
    Image.open(photos[0]).transpose(Image.Transpose.ROTATE_270).save("upright.png")
    run("turned.png", "upright.png")
    np.testing.assert_array_equal(pixels("turned_mask.png"), pixels("upright_mask.png"))
    assert pixels("turned_mask.png").shape == (96, 64)


def test_the_threshold_is_one_of_probabilities(photos):
    run(photos[0], "--probabilities", "--threshold", "0.6")
    probabilities, mask = (pixels(f"{photos[0].stem}_{kind}.png") for kind in ("probabilities", "mask"))
    assert probabilities.dtype == np.uint16 and 0 < mask.mean() < 255
    clear = np.abs(probabilities / 65535 - 0.6) > 1e-4
    np.testing.assert_array_equal((probabilities / 65535 > 0.6)[clear], (mask > 0)[clear])


def test_enlarging_finds_the_edges_of_the_photo():
    y, x = np.mgrid[:320, :480]
    truth = ((x - 240) / 150) ** 2 + ((y - 160) / 90) ** 2 < 1
    photo = np.where(truth, 60, 180) + np.random.default_rng(0).normal(0, 4, truth.shape)  # with grain
    photo = np.repeat(photo.astype(np.uint8)[..., None], 3, 2)
    small = np.asarray(Image.fromarray(photo).resize((60, 40), Image.Resampling.BOX))
    mask = small[..., 0] < 120
    found = predict.enlarge(np.where(mask, 8, -8).astype(np.float32), small, photo) > 0.5
    nearest = np.kron(mask, np.ones((8, 8), bool))
    assert (found != truth).sum() < 0.3 * (nearest != truth).sum()


def test_photos_smaller_than_the_networks_size_lose_nothing():
    logits = np.where(np.arange(400) % 40 < 4, np.float32(8), np.float32(-8))[:, None].repeat(100, 1)
    probabilities = predict.enlarge(logits, np.zeros((400, 100, 3), np.uint8), np.zeros((128, 32, 3), np.uint8))
    column = probabilities[:, 16] > 0.5
    assert column[0] and (column[1:] & ~column[:-1]).sum() == 9


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (300, 1)])
def test_photos_of_a_pixel_are_predicted_and_scored(photos, size):
    Image.new("RGB", size, "red").save(photos[0])
    Image.new("L", size, "white").save(f"data/val_masks/{photos[0].stem}_mask.gif")
    run("data/val_images", "--mask-dir", "data/val_masks", "--cutout", "--overlay", "--labelme")
    assert pixels(f"{photos[0].stem}_mask.png").shape == size[::-1]


def test_the_same_from_python_in_three_lines(photos):
    Image.open(photos[0]).save("photo.png")
    run("photo.png", "--probabilities")
    model = predict.load_model("my_checkpoint_best.pth.tar")
    probabilities = predict.predict(model, np.array(Image.open("photo.png")))
    assert probabilities.dtype == np.float32 and probabilities.shape == (64, 96)
    np.testing.assert_allclose(probabilities, pixels("photo_probabilities.png") / 65535, atol=1e-4)


def test_folding_batchnorm_into_convolutions_changes_nothing(photos):
    checkpoint = utils.load_checkpoint(Path("my_checkpoint_best.pth.tar"))
    for name, value in checkpoint["state_dict"].items():
        if "running" in name:
            value.uniform_(0.5, 2)
    network = UNet(**checkpoint["model"]).eval()
    network.load_state_dict(checkpoint["state_dict"])
    model = predict.Predictor(checkpoint, Device(torch.device("cpu"), torch.float32))
    image = decoding.read_image(photos[0], (32, 48))
    mean, std = (np.array(PREPROCESSING[name], np.float32) for name in ("mean", "std"))
    with torch.inference_mode():
        wanted = network(torch.from_numpy((image / np.float32(255) - mean) / std).permute(2, 0, 1)[None])[0, 0]
    np.testing.assert_allclose(model(image[None])[0], wanted, rtol=1e-3, atol=1e-4)


def test_tta_does_not_care_which_side_is_left(photos):
    model = predict.load_model("my_checkpoint_best.pth.tar", precision="fp32")
    image = decoding.read_image(photos[0], (32, 48))[None]
    logits = model(image, tta=True)
    np.testing.assert_allclose(logits, model(image[:, :, ::-1].copy(), tta=True)[:, :, ::-1], atol=1e-4)
    np.testing.assert_allclose(logits, (model(image) + model(image[:, :, ::-1].copy())[:, :, ::-1]) / 2, atol=1e-4)


def test_tiles_give_the_logits_of_the_whole(photos):
    model = predict.load_model("my_checkpoint_best.pth.tar", precision="fp32")
    image = np.random.default_rng(0).integers(0, 256, (300, 520, 3), np.uint8)
    whole = model(image[None])[0]
    model.network.tile = 384, 384
    np.testing.assert_allclose(model(image[None])[0], whole, atol=1e-4)  # it sees 22 pixels around, and 24 do not count
    model.network.tile = 96, 128
    np.testing.assert_allclose(model(image[None])[0], whole, atol=0.05 * np.abs(whole).max())


@pytest.mark.parametrize("flags", [["--tile", "64"], ["--tile", "32", "--size", "90", "130"], ["--size", "64", "96"]])
def test_size_and_tile_give_masks_of_the_photos_size(photos, flags):
    run(*photos[:2], *flags, "--tta")
    assert pixels(f"{photos[0].stem}_mask.png").shape == (64, 96)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.fixture
def red_square(photos) -> None:
    """square.png: red on white with a mixed edge; a network that finds what is not green."""
    model = UNet(3, 1, (8, 16))
    save_network(model)
    picture = Image.new("RGB", (960, 640), "white")
    picture.paste("red", (300, 200, 660, 440))
    picture.resize((480, 320), Image.Resampling.BOX).save("square.png")


class FindsRed(predict.Predictor):
    def forward(self, images: np.ndarray, tta: bool = False) -> np.ndarray:
        return 8 - images[..., 1] * np.float32(16 / 255)


def test_cut_outs_have_a_soft_edge_without_halo_or_stairs(red_square, monkeypatch):
    monkeypatch.setattr(predict, "Predictor", FindsRed)
    run("square.png", "--cutout", "--background", "#0000ff")
    cutout, background = pixels("square_cutout.png"), pixels("square_background.png")
    assert cutout.shape == (320, 480, 4) and background.shape == (320, 480, 3)
    alpha, row = cutout[..., 3], cutout[160]
    assert alpha[160, 240] == 255 and alpha[10, 10] == 0
    soft = (alpha[160] > 0) & (alpha[160] < 255)
    assert 2 <= soft.sum() <= 8  # both edges
    assert row[row[:, 3] > 0, 1].max() <= 5  # red alone: no white has stayed in the edge
    np.testing.assert_array_equal(background[160, 240], (255, 0, 0))
    np.testing.assert_array_equal(background[10, 10], (0, 0, 255))
    assert background[..., 1].max() <= 5


def test_a_background_may_be_a_picture_of_any_shape(photos):
    Image.new("RGB", (50, 300), "lime").save("wall.png")
    run(photos[0], "--background", "wall.png")
    assert pixels(f"{photos[0].stem}_background.png").shape == (64, 96, 3)


def test_a_true_mask_of_another_size_costs_its_score_not_the_mask(photos):
    Image.new("1", (10, 10), 1).save(f"data/val_masks/{photos[0].stem}_mask.gif")
    error_of("data/val_images", "--mask-dir", "data/val_masks")
    assert f"{photos[0].stem}_mask.png" in names()
    assert len(Path("predictions/scores.csv").read_text().splitlines()) == 8  # a heading and seven photos


def test_scores_beside_a_submission_that_continues_are_of_all_photos(photos):
    flags = ["data/val_images", "--mask-dir", "data/val_masks", "--submission", "s.csv"]
    good = photos[7].read_bytes()
    photos[7].write_bytes(good[:500])
    error_of(*flags)
    photos[7].write_bytes(good)
    run(*flags)
    assert len(Path("s.csv").read_text().splitlines()) == 9
    assert len(Path("predictions/scores.csv").read_text().splitlines()) == 9


def test_a_network_that_gives_no_numbers_is_named(photos):
    checkpoint = utils.load_checkpoint(Path("my_checkpoint_best.pth.tar"))
    checkpoint["state_dict"]["head.weight"].fill_(float("nan"))
    utils.save_checkpoint(checkpoint, Path("my_checkpoint_best.pth.tar"))
    with pytest.raises(UserError, match="the network gives nan or infinity, which are no numbers: choose another"):
        predict.main([str(photos[0])])
    assert not list(Path("predictions").glob("*.png"))


def test_a_new_output_is_one_entry(photos, monkeypatch):
    grey = lambda prediction: Image.fromarray(prediction.photo).convert("L")  # noqa: E731
    monkeypatch.setitem(predict.OUTPUTS, "all-grey", (grey, "100 % grey"))
    run(photos[0], "--all-grey")
    assert names() == {f"{photos[0].stem}_mask.png", f"{photos[0].stem}_all-grey.png"}
    assert pixels(f"{photos[0].stem}_all-grey.png").ndim == 2
    run("predictions/..", "--output-dir", "again")  # neither is taken for a photo
    assert not [name for name in names("again") if "grey" in name]


def test_a_new_output_that_is_a_dictionary_is_a_json_file(photos, monkeypatch):
    area = lambda prediction: {"pixels": (prediction.mask > 0).sum()}  # noqa: E731
    monkeypatch.setitem(predict.OUTPUTS, "area", (area, "how much is foreground"))
    file = Path(f"predictions/{photos[0].stem}_area.json")
    for _ in range(2):  # its own are replaced
        run(photos[0], "--area")
        assert json.loads(file.read_text())["pixels"] == (pixels(f"{photos[0].stem}_mask.png") > 0).sum()
    file.write_text('{"pixels": 1}')
    assert "1 of 1 photo" in error_of(photos[0], "--area")  # it is a user's own
    assert file.read_text() == '{"pixels": 1}'


def test_an_overlay_shows_the_photo_and_the_outline(photos):
    Image.open(photos[0]).save("photo.png")
    run("photo.png", "--overlay")
    overlay, mask, photo = pixels("photo_overlay.png"), pixels("photo_mask.png"), np.asarray(Image.open("photo.png"))
    changed = (overlay != photo).any(2)
    assert changed[mask > 0].mean() > 0.9
    assert (overlay == outputs.OUTLINE).all(2).any()
    far = ~np.asarray(Image.fromarray(mask).resize((96, 64))).astype(bool)
    assert changed[far].mean() < changed[mask > 0].mean()


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def scores() -> list[dict[str, str]]:
    with Path("predictions/scores.csv").open() as file:
        return list(csv.DictReader(file))


def test_scores_are_of_the_masks_that_are_written(photos, capsys):
    run("data/val_images", "--mask-dir", "data/val_masks")
    rows = scores()
    assert [float(row["dice"]) for row in rows] == sorted(float(row["dice"]) for row in rows) and len(rows) == 8
    for row in (rows[0], rows[-1]):
        stem = Path(row["photo"]).stem
        found, wanted = pixels(f"{stem}_mask.png") > 0, read_mask(Path(f"data/val_masks/{stem}_mask.gif")) > 0
        both = (found & wanted).sum()
        assert float(row["dice"]) == pytest.approx(2 * both / (found.sum() + wanted.sum()))
        assert float(row["iou"]) == pytest.approx(both / (found | wanted).sum())
        assert float(row["pixel_accuracy"]) == pytest.approx((found == wanted).mean())
    shown = capsys.readouterr().out
    assert all(row["photo"] in shown for row in rows[:5]) and rows[5]["photo"] not in shown
    assert f"{np.mean([float(row['dice']) for row in rows]):.4f}" in shown.splitlines()[-1]


def test_a_new_metric_is_a_score_too(photos, capsys, monkeypatch):
    run("data/val_images", "--mask-dir", "data/val_masks")
    old, image_scores = scores(), utils.image_scores
    assert list(old[0]) == ["photo", "dice", "iou", "pixel_accuracy", "boundary_f1"]

    def more_scores(tp, fp, fn, tn):
        return image_scores(tp, fp, fn, tn) | {"share_of_false_positives": fp / (tp + fp + fn + tn)}

    monkeypatch.setattr(utils, "image_scores", more_scores)
    capsys.readouterr()
    run("data/val_images", "--mask-dir", "data/val_masks")  # over the scores.csv of before
    assert list(scores()[0]) == ["photo", "dice", "iou", "pixel_accuracy", "share_of_false_positives", "boundary_f1"]
    for row in (scores()[0], scores()[-1]):
        stem = Path(row["photo"]).stem
        wanted = read_mask(Path(f"data/val_masks/{stem}_mask.gif"))
        false_positives = (pixels(f"{stem}_mask.png") > 0) & (wanted == 0)
        assert float(row["share_of_false_positives"]) == pytest.approx(false_positives.mean())
    shown = capsys.readouterr().out.splitlines()
    names = "dice iou pixel_accuracy share_of_false_positives boundary_f1"
    (heading,) = (number for number, line in enumerate(shown) if line.split() == names.split())
    mean = np.mean([float(row["share_of_false_positives"]) for row in scores()])
    assert shown[-1].split()[3] == f"{mean:.4f}" and len(shown) == heading + 7

    def fewer_scores(*counts):
        return {"dice": image_scores(*counts)["dice"]}

    monkeypatch.setattr(utils, "image_scores", fewer_scores)
    run("data/val_images", "--mask-dir", "data/val_masks")
    assert list(scores()[0]) == ["photo", "dice", "boundary_f1"]
    monkeypatch.setattr(utils, "image_scores", image_scores)
    run("data/val_images", "--mask-dir", "data/val_masks")
    assert scores() == old


@pytest.mark.parametrize("line", ["photo,dice", "photo,dice,owner", "photo,size,boundary_f1", "my,dice,boundary_f1"])
def test_a_table_of_scores_that_is_not_ours_is_kept(photos, line):
    Path("predictions").mkdir()
    Path("predictions/scores.csv").write_text(f"{line}\n1,2,3,4\n")
    assert "predictions/scores.csv was not written by predict.py" in error_of(
        "data/val_images", "--mask-dir", "data/val_masks"
    )
    assert Path("predictions/scores.csv").read_text() == f"{line}\n1,2,3,4\n"


def test_training_ends_with_the_dice_that_predict_measures(project, run_train, capsys):
    run_train("--num-epochs", "1", "--learning-rate", "1e-2", "--precision", "fp32")
    last = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Dice of the best"))
    run("data/val_images", "--mask-dir", "data/val_masks")
    assert float(last.split()[-6]) == pytest.approx(np.mean([float(row["dice"]) for row in scores()]), abs=0.003), last


def square(*box: int) -> np.ndarray:
    mask = np.zeros((300, 400), np.uint8)
    mask[box[0] : box[2], box[1] : box[3]] = 1
    return mask


def test_boundary_f1_by_hand():
    def f1(prediction: np.ndarray, mask: np.ndarray) -> float:
        return utils.boundary_f1(prediction > 0, mask > 0, np.ones(mask.shape, bool))

    nothing, some = square(0, 0, 0, 0), square(100, 100, 200, 200)
    assert f1(some, some) == f1(nothing, nothing) == 1
    assert f1(some, nothing) == f1(nothing, some) == 0
    assert f1(square(103, 100, 203, 200), some) == 1  # 3 pixels off: 0.75 % of the diagonal is 3.75
    assert f1(square(0, 300, 50, 399), some) == 0
    assert 0.4 < f1(square(100, 100, 200, 210), some) < 1


def test_a_mask_without_photo_and_a_photo_without_mask_are_named(photos, capsys):
    photos[0].unlink()
    Path("data/val_masks", f"{photos[1].stem}_mask.gif").unlink()
    run("data/val_images", "--mask-dir", "data/val_masks")
    shown = capsys.readouterr().out
    assert f"{photos[0].stem}_mask.gif" in shown and str(photos[1]) in shown
    assert len(scores()) == 6 and len(names()) == 8


# ---------------------------------------------------------------------------------------------------------------------
# Submissions


@settings(deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 1)))
def test_run_lengths_decode_to_what_was_encoded(mask):
    np.testing.assert_array_equal(shapes.rle_decode(shapes.rle_encode(mask), mask.shape), mask)
    np.testing.assert_array_equal(shapes.rle_decode(shapes.rle_encode(mask * 255), mask.shape), mask)


@pytest.mark.parametrize(
    ("mask", "runs"),
    [
        ([[0, 0], [0, 0]], ""),
        ([[1, 1], [1, 1]], "1 4"),
        ([[1, 0], [0, 0]], "1 1"),
        ([[0, 0], [0, 1]], "4 1"),
        ([[0, 1, 0], [0, 0, 0]], "2 1"),  # row by row; column by column it would be the third
        ([[0, 1, 1], [1, 0, 1]], "2 3 6 1"),  # a run continues in the next row
    ],
)
def test_run_lengths_by_hand(mask, runs):
    assert shapes.rle_encode(np.array(mask)) == runs
    np.testing.assert_array_equal(shapes.rle_decode(runs, np.shape(mask)), mask)


def rows_of(path: str) -> dict[str, str]:
    with (gzip.open if path.endswith(".gz") else open)(path, "rt") as file:
        header, *lines = file.read().splitlines()
    assert header == "img,rle_mask"
    rows = dict(line.split(",") for line in lines)
    assert len(rows) == len(lines)
    return rows


@pytest.mark.parametrize("name", ["submission.csv", "submission.csv.gz"])
def test_a_submission_holds_the_masks_and_nothing_else_is_written(photos, name):
    run("data/val_images", "--submission", name)
    assert not Path("predictions").exists() and not list(Path().glob("*.part"))
    rows = rows_of(name)
    assert list(rows) == [photo.name for photo in photos]
    run(photos[5])
    np.testing.assert_array_equal(
        shapes.rle_decode(rows[photos[5].name], (64, 96)) * 255, pixels(f"{photos[5].stem}_mask.png")
    )


def test_a_killed_run_goes_on_where_it_was(photos, monkeypatch):
    run("data/val_images", "--submission", "whole.csv")
    many = photos.copy()
    for number in range(30):
        for photo in photos:
            many.append(photo.with_name(f"{number}_{photo.name}"))
            os.link(photo, many[-1])
    process = Script(SCRIPT, *map(str, many), "--submission", "submission.csv.gz")
    deadline = time.monotonic() + 120
    while not any(part.stat().st_size for part in Path().glob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.status() == -signal.SIGKILL
    assert not Path("submission.csv.gz").exists()
    (part,) = Path().glob("*.part")
    kept = part.read_text().count("\n")
    assert 0 < kept < len(many)

    predicted = []
    finish = predict.finish
    monkeypatch.setattr(predict, "finish", lambda *args, **more: predicted.append(args[0]) or finish(*args, **more))
    run(*many, "--submission", "submission.csv.gz")
    assert len(predicted) == len(many) - kept
    rows = rows_of("submission.csv.gz")
    assert rows.keys() == {photo.name for photo in many} and not list(Path().glob("*.part"))
    assert rows_of("whole.csv").items() <= rows.items()


def test_rows_of_another_threshold_are_not_taken_over(photos):
    photos[3].write_bytes(b"")
    error_of("data/val_images", "--submission", "submission.csv")
    before = rows_of("submission.csv")
    photos[3].unlink()
    run("data/val_images", "--submission", "submission.csv", "--threshold", "0.2")
    assert any(rows_of("submission.csv")[name] != before[name] for name in before)


def test_rows_of_photos_of_the_same_names_in_another_folder_are_not_taken_over(photos):
    Path("other").mkdir()
    for photo, other in zip(photos, reversed(photos), strict=True):
        Path("other", photo.name).write_bytes(other.read_bytes())
    whole = photos[3].read_bytes()
    photos[3].write_bytes(b"")
    error_of("data/val_images", "--submission", "submission.csv")
    photos[3].write_bytes(whole)
    run("other", "--submission", "submission.csv")
    mixed = rows_of("submission.csv")
    run("other", "--submission", "other.csv")
    assert mixed == rows_of("other.csv")


def test_a_submission_goes_on_when_a_broken_photo_is_mended(photos):
    whole = photos[3].read_bytes()
    photos[3].write_bytes(b"")
    assert "1 of 8" in error_of("data/val_images", "--submission", "submission.csv")
    assert len(rows_of("submission.csv")) == 7
    photos[3].write_bytes(whole)
    run("data/val_images", "--submission", "submission.csv")
    assert len(rows_of("submission.csv")) == 8


def test_a_submission_that_goes_on_with_another_output_writes_it_for_all_photos(photos):
    whole = photos[3].read_bytes()
    photos[3].write_bytes(b"")
    error_of("data/val_images", "--submission", "submission.csv", "--mask")
    photos[3].write_bytes(whole)
    run("data/val_images", "--submission", "submission.csv", "--mask", "--overlay")
    assert len(names()) == 16 and len(rows_of("submission.csv")) == 8


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def test_several_processes_share_the_photos(photos):
    flags = ["data/val_images", "--mask-dir", "data/val_masks", "--submission"]
    run(*flags, "one.csv")
    alone = scores()
    processes = start_processes(2, SCRIPT, *flags, "two.csv", "--overlay")
    assert [process.status() for process in processes] == [0, 0], processes[0].output()
    assert rows_of("two.csv") == rows_of("one.csv")
    assert scores() == alone
    assert len(names()) == 9 and "".join(process.output() for process in processes).count("mean of 8") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_broken_photos_are_named_and_the_others_predicted(photos, capsys):
    photos[0].write_bytes(photos[0].read_bytes()[:700])
    photos[6].write_text("no image")
    assert "2 of 8 photos" in error_of("data/val_images", "--batch-size", "5")
    shown = capsys.readouterr().err
    assert str(photos[0]) in shown and str(photos[6]) in shown
    assert names() == {f"{photo.stem}_mask.png" for photo in photos if photo not in (photos[0], photos[6])}


def test_a_mask_of_another_size_is_named(photos, capsys):
    mask = Path("data/val_masks", f"{photos[0].stem}_mask.gif")
    Image.new("1", (50, 50)).save(mask)
    error_of("data/val_images", "--mask-dir", "data/val_masks")
    assert str(mask) in capsys.readouterr().err
    assert len(scores()) == 7


MISTAKES = {
    "no checkpoint": (["--checkpoint", "none.pth.tar"], "none.pth.tar"),
    "a checkpoint of another program": (["--checkpoint", "other.pth.tar"], "other.pth.tar"),
    "a folder without photos": (["empty"], "empty"),
    "a path that is not there": (["nowhere/*.jpg"], "nowhere/*.jpg"),
    "a folder that cannot be written": (["--output-dir", "notes.txt/out"], "notes.txt/out"),
    "a submission that cannot be written": (["--submission", "notes.txt/submission.csv"], "notes.txt"),
    "a submission that is something else": (["--submission", "notes.txt"], "notes.txt"),
    "a submission that is a photo": (["--submission", "data/val_images/x.gz"], "x.gz"),
    "photos of one name in a submission": (["twin", "--submission", "submission.csv"], "submission.csv"),
    "scores over something else": (["--output-dir", "mine", "--mask-dir", "data/val_masks"], "scores.csv"),
    "a threshold out of range": (["--threshold", "1"], "--threshold"),
    "a size too small": (["--size", "8", "8"], "--size"),
    "no tile": (["--tile", "0"], "--tile"),
    "a label without a name": (["--labelme", "--label", ""], "--label"),
    "batches of none": (["--batch-size", "0"], "--batch-size"),
    "an unknown colour": (["--background", "blurple"], "blurple"),
    "a broken background": (["--background", "notes.txt"], "notes.txt"),
    "an unknown device": (["--device", "toaster"], "toaster"),
    "no folder of masks": (["--mask-dir", "nowhere"], "nowhere"),
    "an unknown flag": (["--cut-out"], "--cut-out"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_one_sentence(mistake, photos):
    flags, named = MISTAKES[mistake]
    Path("notes.txt").write_text("mine")
    torch.save({"weights": torch.zeros(3)}, "other.pth.tar")
    for folder in ("empty", "twin", "mine"):
        Path(folder).mkdir()
    Path("mine/scores.csv").write_text("my,own\n")
    Path("data/val_images/x.gz").write_bytes(b"no gzip")
    Image.new("RGB", (30, 30)).save(Path("twin", photos[0].name))
    assert named in error_of("data/val_images", *flags)
    assert Path("notes.txt").read_text() == "mine" and Path("mine/scores.csv").read_text() == "my,own\n"
    assert not list(Path().rglob("*.tmp")) and not list(Path().rglob("*_mask.png"))


def test_there_is_no_traceback_and_the_exit_status_is_1(photos):
    photos[0].write_bytes(b"")
    process = Script(SCRIPT, "data/val_images")
    assert process.status() == 1
    said = process.printed[1].read_text()
    assert "Traceback" not in said and said.splitlines()[-1].startswith("error: 1 of 8 photos")


# ---------------------------------------------------------------------------------------------------------------------
# Transparency, thin things, names


def prediction(photo: np.ndarray, probabilities: np.ndarray, **flags: object) -> predict.Prediction:
    path = Path("photo.png")
    Image.fromarray(photo).save(path)
    args = SimpleNamespace(threshold=0.5, **flags)
    return predict.Prediction(path, decoding.read_image(path), probabilities.astype(np.float32), args)


@pytest.mark.parametrize("width", range(1, 9))
def test_thin_things_keep_their_colour_in_a_cutout(width, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = np.full((60, 40, 3), (40, 70, 60), np.uint8)
    photo[10:50, 20 : 20 + width] = 225, 160, 80
    cut = prediction(photo, photo[..., 0] > 200, background=(255, 255, 255))
    inside = np.asarray(cut.alpha) > 127
    assert inside[10:50, 20 : 20 + width].all()
    colours = np.asarray(cut.cutout())[..., :3][inside]
    assert (abs(colours.astype(int) - (225, 160, 80)) <= 1).all()
    assert np.asarray(cut.on_background())[30, 20 + width // 2].min() >= 80


def test_the_tip_of_a_larger_thing_keeps_its_colour(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = np.full((80, 120, 3), (40, 70, 60), np.uint8)
    mask = cv2.fillPoly(np.zeros((80, 120), np.uint8), [np.array([(5, 40), (60, 10), (60, 70)])], 1)
    photo[mask > 0] = 225, 160, 80
    cut = prediction(photo, mask, background=None)
    colours = np.asarray(cut.cutout())[..., :3][np.asarray(cut.alpha) > 200]
    assert colours.max(1).min() > 150  # nothing black


def test_a_cutout_is_no_more_opaque_than_its_photo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = np.full((40, 60, 4), 200, np.uint8)
    photo[..., 3] = np.linspace(0, 255, 60)
    cut = np.asarray(prediction(photo, np.ones((40, 60))).cutout())
    np.testing.assert_array_equal(cut[..., 3], photo[..., 3])


def test_colours_under_transparency_change_nothing(photos):
    opacity = np.zeros((64, 96), np.uint8)
    opacity[10:50, 20:70] = 255
    for name, hidden in (("dark", 0), ("white", 255), ("noise", None)):
        photo = decoding.read_image(photos[0])
        noise = np.random.default_rng(0).integers(0, 256, photo.shape)
        photo[opacity == 0] = (noise if hidden is None else np.full_like(photo, hidden))[opacity == 0]
        Image.fromarray(np.dstack((photo, opacity))).save(f"{name}.png")
    run("dark.png", "white.png", "noise.png", "--cutout")
    for name in ("dark", "noise"):
        np.testing.assert_array_equal(pixels(f"{name}_mask.png"), pixels("white_mask.png"))
    assert not pixels("noise_cutout.png")[..., 3][opacity == 0].any()


def test_photos_whose_names_are_too_long_are_named_and_the_others_are_done(photos):
    Path("many").mkdir()
    for length in (246, 247, 251):
        shutil.copy(photos[0], f"many/{'n' * length}.jpg")
    shutil.copy(photos[1], "many/short.jpg")
    assert "2 of 4 photos" in error_of("many")
    assert names() == {"short_mask.png", f"{'n' * 246}_mask.png"}


@pytest.mark.skipif(sys.platform != "linux", reason="names there are text")
def test_any_name_is_predicted_and_in_the_tables(photos):
    Path("many").mkdir()
    Path("true").mkdir()
    odd = ["caf\udce9.jpg", "new\nline.jpg", 'a,"b".jpg', "名前.jpg", " spaces .jpg", "100% #1?.jpg", "-dash.jpg"]
    for name in odd:
        shutil.copy(photos[0], Path("many", name))
        shutil.copy(f"data/val_masks/{photos[0].stem}_mask.gif", Path("true", f"{Path(name).stem}_mask.gif"))
    run("many", "--mask-dir", "true", "--submission", "s.csv", "--mask")
    assert names() == {f"{Path(name).stem}_mask.png" for name in odd} | {"scores.csv"}
    with Path("s.csv").open(newline="", encoding="utf-8") as file:
        found = {name for name, _ in csv.reader(file)} - {"img"}
    assert found == {name.replace("\udce9", "\\udce9") for name in odd}
    with Path("predictions/scores.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(odd)


def test_masks_of_another_suffix_are_named(photos):
    for mask in Path("data/val_masks").iterdir():
        mask.rename(mask.with_name(mask.name.replace("_mask", "_seg")))
    message = error_of("data/val_images", "--mask-dir", "data/val_masks")
    assert "no photo has a mask in data/val_masks: found" in message and "is it --mask-suffix _seg?" in message


def test_a_submissions_damaged_line_is_predicted_again(photos):
    photos[1].write_bytes(b"broken")
    error_of("data/val_images", "--submission", "s.csv")
    (part,) = Path().glob("*.part")
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([bytes(40) + b"\n", *lines[1:]]))
    photos[1].unlink()
    run("data/val_images", "--submission", "s.csv")
    with Path("s.csv").open() as file:
        assert len(list(csv.reader(file))) == 8


def test_one_mask_is_not_that_of_two_photos(photos):
    for folder in ("a", "b"):
        Path(folder).mkdir()
        shutil.copy(photos[0], folder)
    message = error_of("a", "b", "--mask-dir", "data/val_masks")
    assert f"is the mask of both a/{photos[0].name} and b/{photos[0].name}" in message
    assert not Path("predictions/scores.csv").exists()
    run("a", "b")  # without masks two photos of one name are no trouble


def test_masks_of_another_suffix_are_found(photos):
    for mask in Path("data/val_masks").iterdir():
        mask.rename(mask.with_name(mask.name.replace("_mask", "_seg")))
    run("data/val_images", "--mask-dir", "data/val_masks", "--mask-suffix", "_seg")
    assert Path("predictions/scores.csv").exists()


def test_what_is_passed_over_is_counted_and_heic_is_named(photos, capsys):
    for name in ("notes.txt", "raw.dng", "x.heic", ".hidden"):
        Path("data/val_images", name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    assert "1 of 9 photos" in error_of("data/val_images")
    printed = capsys.readouterr()
    assert "passed over in data/val_images, no photos by their endings: 2, such as notes.txt" in printed.out
    assert "x.heic is no readable image" in printed.err and "pip install pillow-heif" in printed.err


# ---------------------------------------------------------------------------------------------------------------------
# Submissions that something disturbs


def test_a_second_run_that_writes_a_submission_is_refused(photos):
    with locked(lock_of(Path("s.csv")), "it"):  # as the first run does
        assert "--submission s.csv is in use by another run" in error_of("data/val_images", "--submission", "s.csv")
    run("data/val_images", "--submission", "s.csv")
    assert len(rows_of("s.csv")) == 8


def test_the_first_run_locks_its_submission_until_it_is_written(photos, monkeypatch):
    write, held = outputs.Submission.write, []

    def write_and_look(submission: outputs.Submission, is_complete: bool) -> None:
        held.append(error_of("data/val_images", "--submission", "s.csv"))
        write(submission, is_complete)

    monkeypatch.setattr(outputs.Submission, "write", write_and_look)
    run("data/val_images", "--submission", "s.csv")
    assert "in use by another run" in held[0] and len(rows_of("s.csv")) == 8


def test_a_full_disk_ends_a_submission_with_a_sentence_and_it_continues(photos):
    run("data/val_images", "--submission", "whole.csv")
    before, size = resource.getrlimit(resource.RLIMIT_FSIZE), Path("whole.csv").stat().st_size
    for share in (0.01, 0.7, 0.7, 0.7):  # first there is no room for a row, and at last for the file of all rows alone
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), before[1]))
        try:
            message = error_of("data/val_images", "--submission", "s.csv")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "error: s.csv could not be written" in message and "make room" in message
    assert not Path("s.csv").exists()
    run("data/val_images", "--submission", "s.csv")
    assert rows_of("s.csv") == rows_of("whole.csv")


def test_the_row_of_a_photo_that_was_replaced_is_predicted_again(photos):
    photos[3].write_bytes(b"")
    error_of("data/val_images", "--submission", "s.csv")
    photos[3].unlink()
    shutil.copy(photos[1], photos[0])
    run("data/val_images", "--submission", "s.csv")
    assert rows_of("s.csv")[photos[0].name] == rows_of("s.csv")[photos[1].name]


@pytest.mark.parametrize("error", [MemoryError(), cv2.error("error: (-4:Insufficient memory) Failed to allocate")])
def test_lack_of_memory_is_not_the_photos_fault(photos, monkeypatch, capsys, error):
    def no_memory(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(decoding, "_on_white", no_memory)
        error_of(photos[0])
        message = capsys.readouterr().err
        assert f"out of memory while {photos[0]} was read" in message and "replace" not in message
    monkeypatch.setattr(predict, "enlarge", no_memory)
    assert "error: out of memory at --batch-size" in error_of(photos[0])

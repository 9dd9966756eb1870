"""Folds: each photo is measured by a network that has not learned from it, and the command given again goes on."""

import csv
import json
import os
import random
import re
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, same, weights
from killed import is_killed
from PIL import Image

import predict
import train
import utils
from machinery import errors, folds
from machinery.errors import UserError
from machinery.settings import regex
from tools import cross_validate

FLAGS = [*SMALL, "--folds", "2", "--num-epochs", "1"]


@pytest.fixture
def project(project: Path) -> Path:
    """Twelve photos, two of each car: 8 for training and 4 for validation."""
    for photo in [*Path("data/train_images").iterdir(), *Path("data/val_images").iterdir()]:
        if not photo.stem.endswith(("_01", "_02")):
            photo.unlink()
            Path(str(photo.parent).replace("images", "masks"), f"{photo.stem}_mask.gif").unlink()
    return project


def photos_of(*folders: str) -> set[str]:
    return {str(path) for folder in folders for path in Path(folder).iterdir()}


def checksum(path: str) -> int:
    return zlib.crc32(Path(path).read_bytes())


def best(fold: int, folder: str = "runs") -> str:
    return f"{folder}/fold_{fold}/my_checkpoint_best.pth.tar"


def learned(fold: int) -> set[int]:
    """Checksums of the photos' files from which a fold's network has learned."""
    return set(utils.load_checkpoint(Path(best(fold)))["learned"])


def fold_of(folder: str = "runs") -> dict[str, int]:
    kept = json.loads(Path(folder, "folds.json").read_text())
    return dict(zip(kept["photos"], kept["fold_of"], strict=True))


def error_of(*flags: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        errors.run(lambda: cross_validate.main([*FLAGS, *flags]))
    return str(exit_.value.code)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_each_photo_is_measured_by_the_network_that_has_not_learned_from_it(project, capsys):
    cross_validate.main([*FLAGS, "--num-epochs", "12", "--batch-size", "2"])
    out = capsys.readouterr().out
    held_out = fold_of()
    assert held_out.keys() == photos_of("data/train_images", "data/val_images")
    dice = {}
    for fold in (1, 2):
        mine = [photo for photo in held_out if held_out[photo] == fold]
        assert learned(fold) == {checksum(photo) for photo in held_out if held_out[photo] != fold}
        for side in ("train", "val"):
            if some := [photo for photo in mine if f"{side}_images" in photo]:
                command = ["--checkpoint", best(fold), "--mask-dir", f"data/{side}_masks", "--output-dir", "scores"]
                predict.main([*some, *command])
                with Path("scores/scores.csv").open() as file:
                    dice |= {row["photo"]: float(row["dice"]) for row in csv.DictReader(file)}
    small, low, high, full = map(float, re.search(
        r"Mean Dice of all 12 photos, held out: (\S+) \(95 %: (\S+) to (\S+)\) at training size, (\S+) \(95 %", out
    ).groups())  # fmt: skip
    assert dice.keys() == held_out.keys() and full == pytest.approx(np.mean(list(dice.values())), abs=1e-4)
    assert 0 <= low <= small <= high <= 1
    assert "12 photos of 6 objects in data/train_images and data/val_images." in out
    assert f"python predict.py --checkpoint {best(1).replace('1', '*')} photo.jpg" in out

    page = Path("runs/index.html").read_text()
    assert set(re.findall(r'data-name="(.*?)"', page)) == held_out.keys() and f"Dice {full:.4f} of 12 photos" in page
    worst_first = [float(value) for value in re.findall(r'data-dice="(.*?)"', page)]
    assert worst_first == sorted(worst_first) == pytest.approx(sorted(dice.values()), abs=1e-5)
    with Path("runs/suspects.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["photo"]: int(row["fold"]) for row in rows} == held_out
    assert {row["photo"]: float(row["dice"]) for row in rows} == pytest.approx(dice, abs=1e-5)
    suspicions = [float(row["suspicion"]) for row in rows]
    assert suspicions == sorted(suspicions, reverse=True) and rows[0]["left"].isdigit()
    assert len(list(Path("data/cache").glob("*.samples"))) == 1


def test_cars_stay_together_and_the_same_seed_gives_the_same_folds(project, monkeypatch):
    monkeypatch.setattr(cross_validate, "train_fold", lambda *_: None)
    monkeypatch.setattr(cross_validate, "conclude", lambda *_: None)
    for folder in ("a", "b"):
        cross_validate.main([*FLAGS, "--folds", "3", "--output-dir", folder])
    found = fold_of("a")
    assert found == fold_of("b") and sorted(found.values()) == [1] * 4 + [2] * 4 + [3] * 4
    assert len({(Path(photo).stem[:12], fold) for photo, fold in found.items()}) == 6
    others = set()
    for seed in range(1, 6):
        cross_validate.main([*FLAGS, "--folds", "3", "--output-dir", f"seed {seed}", "--seed", str(seed)])
        others.add(str(fold_of(f"seed {seed}")))
    assert len(others) > 1


@pytest.mark.parametrize(("flags", "sides"), [
    ([], ("train", "val")),
    (["--train-img-dir", "data/train_images", "--train-mask-dir=data/train_masks"], ("train",)),
    (["--train-img-dir", "data/val_images", "--train-mask-dir", "data/val_masks"], ("val",)),
    (["--val-img-dir", "data/val_images"], ("train", "val")),
    (["--val-img-dir", "data/train_images", "--val-mask-dir", "data/train_masks"], ("train",)),
])  # fmt: skip
def test_photos_of_all_four_folders_or_of_those_that_flags_name(project, monkeypatch, flags, sides):
    monkeypatch.setattr(cross_validate, "train_fold", lambda *_: None)
    monkeypatch.setattr(cross_validate, "conclude", lambda *_: None)
    cross_validate.main([*FLAGS, *flags])
    assert fold_of().keys() == photos_of(*(f"data/{side}_images" for side in sides))


@pytest.mark.parametrize("state", ["missing", "empty"])
def test_without_validation_photos_those_for_training_are_taken(project, monkeypatch, state):
    monkeypatch.setattr(cross_validate, "train_fold", lambda *_: None)
    monkeypatch.setattr(cross_validate, "conclude", lambda *_: None)
    for folder in ("data/val_images", "data/val_masks"):
        shutil.rmtree(folder)
        if state == "empty":
            Path(folder).mkdir()
    cross_validate.main(FLAGS)
    assert fold_of().keys() == photos_of("data/train_images")
    assert "data/val_images" in error_of("--val-img-dir", "data/val_images", "--output-dir", "other")


def test_photos_of_one_name_in_two_folders_are_two_photos(project, monkeypatch):
    monkeypatch.setattr(cross_validate, "train_fold", lambda *_: None)
    monkeypatch.setattr(cross_validate, "conclude", lambda *_: None)
    some, other = (sorted(Path(f"data/{side}_images").iterdir())[0] for side in ("train", "val"))
    other.rename(other.with_name(some.name))
    Path(f"data/val_masks/{other.stem}_mask.gif").rename(f"data/val_masks/{some.stem}_mask.gif")
    cross_validate.main(FLAGS)
    found = fold_of()
    assert len(found) == 12 and found[str(some)] == found[f"data/val_images/{some.name}"]


def test_the_augmentation_follows_the_flags(project, monkeypatch):
    """A constant that make_augmentation reads; afterwards it is the default again."""
    seen, make_augmentation = [], train.make_augmentation
    monkeypatch.setattr(cross_validate, "train_fold", lambda *_: None)
    monkeypatch.setattr(cross_validate, "conclude", lambda *_: None)
    monkeypatch.setattr(train, "make_augmentation", lambda: seen.append(train.BATCH_SIZE) or make_augmentation())
    cross_validate.main([*FLAGS, "--batch-size", "2"])
    assert set(seen) == {2} and train.BATCH_SIZE == 4


def test_few_photos(project):
    """Folds of one photo, of sets smaller than a batch; one of them has no object."""
    flags = ["--train-img-dir", "data/val_images", "--train-mask-dir", "data/val_masks", "--folds", "4"]
    flags += ["--group", "(.*)"]
    mask = sorted(Path("data/val_masks").iterdir())[0]
    Image.new("L", Image.open(mask).size).save(mask)
    cross_validate.main([*FLAGS, *flags])
    networks = list(Path("runs").glob("fold_*/my_checkpoint_best.pth.tar"))
    assert sorted(fold_of().values()) == [1, 2, 3, 4] and len(networks) == 4


def test_errors_are_one_sentence(project, monkeypatch):
    monkeypatch.setattr(train, "image_losses", lambda logits, *_: logits.flatten(1).sum(1) * float("nan"))
    assert error_of().startswith("error: fold 1 of 2: training diverged (loss nan) with ")
    shutil.rmtree("runs")
    assert error_of("--folds", "7") == "error: --folds is 7, but the photos are of 6 objects: set it to 6"
    assert error_of("--folds", "1").startswith("error: --folds is 1: set it to at least 2")
    assert error_of("--group", "_") == (
        "error: all photos are of one object, or equal: cross-validation needs photos of a second one"
    )
    assert error_of("--group", "zebra").startswith("error: --group zebra finds nothing in any photo's name, such as ")
    assert "--group: ( is no regular expression" in error_of("--group", "(")
    assert error_of("--checkpoint", "x").startswith("error: --checkpoint is each fold's own: leave it out")
    monkeypatch.setattr(cross_validate.processes, "WORLD_SIZE", 2)
    assert "start it without torchrun" in error_of()
    monkeypatch.setattr(cross_validate.processes, "WORLD_SIZE", 1)
    assert error_of("--batch-size", "0").startswith("error: BATCH_SIZE is 0")
    assert "--zebra" in error_of("--zebra")
    for mask in sorted(Path("data/train_masks").iterdir()) + sorted(Path("data/val_masks").iterdir())[2:]:
        Image.new("L", Image.open(mask).size).save(mask)
    assert re.fullmatch(r"error: without fold \d of 6 every mask is empty: add photos, or give fewer --folds",
                        error_of("--folds", "6"))  # fmt: skip
    assert not list(Path("runs").glob("fold_*"))


# ---------------------------------------------------------------------------------------------------------------------
# Stopped, and given again


def test_killed_anywhere_and_given_again_it_ends_with_the_same_weights(project):
    flags = [*FLAGS, "--checkpoint-minutes", "0", "--batch-size", "2"]
    cross_validate.main([*flags, "--output-dir", "whole"])
    moments, kills = random.Random(0), 0
    while is_killed(lambda: cross_validate.main(flags), moments.randint(30, 80), among="fold_"):
        kills += 1
    assert kills >= 2 and fold_of() == fold_of("whole")
    for fold in (1, 2):
        for name in ("my_checkpoint.pth.tar", "my_checkpoint_best.pth.tar"):
            assert same(weights(f"runs/fold_{fold}/{name}"), weights(f"whole/fold_{fold}/{name}"))
    assert Path("runs/suspects.csv").read_text() == Path("whole/suspects.csv").read_text()
    assert not list(Path("runs").rglob("*.tmp"))


def test_a_signal_stops_it_and_ended_folds_are_not_trained_again(project, monkeypatch, capsys):
    flags = [*FLAGS, "--batch-size", "2", "--num-epochs", "2"]
    cross_validate.main([*flags, "--output-dir", "whole"])
    steps, step = [], train.train_step

    def stop_in_the_second_fold(*args):
        steps.append(1)
        if len(steps) == 6 + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(train, "train_step", stop_in_the_second_fold)
    with pytest.raises(SystemExit) as exit_:
        errors.run(lambda: cross_validate.main(flags))
    assert exit_.value.code == 128 + signal.SIGTERM
    assert "That was fold 2 of 2: the same command continues it." in capsys.readouterr().out
    first = Path(best(1)).stat().st_mtime_ns
    cross_validate.main(flags)
    out = capsys.readouterr().out
    assert "Fold 1 of 2" not in out and "Continuing after 0 epochs and 4 images of the next." in out
    assert Path(best(1)).stat().st_mtime_ns == first and len(steps) == 12
    assert all(same(weights(best(fold)), weights(best(fold, "whole"))) for fold in (1, 2))


def test_other_settings_and_photos_at_the_second_call_are_one_sentence(project, monkeypatch):
    monkeypatch.setattr(cross_validate, "train_fold", lambda *_: None)
    monkeypatch.setattr(cross_validate, "conclude", lambda *_: None)
    cross_validate.main(FLAGS)
    advice = "choose another --output-dir"
    assert error_of("--num-epochs", "2") == f"error: runs was begun with NUM_EPOCHS = 1: set that again, or {advice}"
    assert error_of("--folds", "3") == f"error: runs was begun with --folds = 2: set that again, or {advice}"
    assert "begun with --group = None" in error_of("--group", "^......")
    cross_validate.main([*FLAGS, "--cache-dir", "other", "--num-workers", "1"])  # these change no weights
    mask = sorted(Path("data/val_masks").iterdir())[1]
    Image.open(mask).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mask)  # as much foreground as before
    photo = f"data/val_images/{mask.stem.removesuffix('_mask')}.jpg"
    changed = "or its mask was added, changed or removed since runs was begun"
    assert error_of() == f"error: {photo} {changed}: {advice}"
    Path("runs/folds.json").write_text("{}")
    assert error_of() == f"error: runs/folds.json is damaged: {advice}"
    Path("runs/folds.json").unlink()
    Path("runs/fold_2").mkdir()
    Path("runs/fold_2/my_checkpoint.pth.tar").touch()
    assert error_of().startswith("error: runs/fold_2/my_checkpoint.pth.tar is of other folds, and runs/folds.json is")


# ---------------------------------------------------------------------------------------------------------------------
# Folds


@pytest.mark.parametrize("seed", range(5))
def test_folds_keep_groups_whole_and_are_balanced(seed):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(30), rng.integers(1, 6, 30))
    foreground = rng.random(len(groups)) ** 3
    found = folds.deal(groups, foreground, 5, seed)
    assert all(len(np.unique(found[groups == group])) == 1 for group in range(30))
    counts = np.bincount(found)
    means = np.bincount(found, foreground) / counts
    assert np.ptp(counts) <= 1 and np.ptp(means) < 0.1 * foreground.std()
    assert np.array_equal(found, folds.deal(groups, foreground, 5, seed))


def test_a_group_larger_than_a_fold_has_one_of_its_own():
    groups = np.array([0] * 12 + [1, 2, 3, 4, 5, 6, 7, 8])
    found = folds.deal(groups, np.linspace(0, 1, 20), 5, 0)
    assert sorted(np.bincount(found)) == [2, 2, 2, 2, 12] and len(set(found[:12])) == 1


def test_photos_of_one_object_are_known_by_name_and_by_pixels():
    images = [Path(name) for name in ("a_1.jpg", "a_2.jpg", "b_1.jpg", "b_2.jpg", "c.jpg", "0123456789ab_01.png",
                                      "0123456789ab_02.png")]  # fmt: skip
    assert folds.groups_of(images, range(7)).tolist() == [0, 1, 2, 3, 4, 5, 5]
    assert folds.groups_of(images, range(7), regex("^(.)_")).tolist() == [0, 0, 1, 1, 2, 3, 4]
    assert folds.groups_of(images, [1, 2, 2, 3, 4, 3, 5], regex("^._")).tolist() == [0, 0, 0, 0, 1, 0, 2]
    with pytest.raises(UserError, match="--group zebra finds nothing"):
        folds.groups_of(images, range(7), regex("zebra"))


def test_the_interval_covers_the_mean_of_many_groups_and_is_wider_for_groups_than_for_photos(monkeypatch):
    monkeypatch.setattr(folds, "RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(10), 4)
    covered, widths = [], []
    for _ in range(60):
        values = (0.9 + 0.05 * rng.standard_normal(10)).repeat(4) + 0.01 * rng.standard_normal(40)
        low, high = folds.interval(values, groups, 2.262)
        covered.append(low <= 0.9 <= high)
        widths.append(high - low)
    assert np.mean(covered) > 0.85
    low, high = folds.interval(values, np.arange(40), 2.023)
    assert high - low < 0.7 * np.mean(widths)


# ---------------------------------------------------------------------------------------------------------------------
# Suspects


def test_a_wrong_mask_is_suspected_with_its_place_and_a_hard_photo_is_not():
    truth = np.zeros((40, 60), bool)
    truth[10:30, 20:50] = True
    sure, known = np.where(truth, np.float32(0.97), np.float32(0.03)), np.ones_like(truth)
    unsure = np.where(truth, np.float32(0.6), np.float32(0.4))
    lacking, added = truth.copy(), truth.copy()
    lacking[15:25, 30:40] = added[2:6, 3:9] = False
    added[2:6, 3:9] = True
    agreed, missing, extra = (folds.contradiction(sure, mask, known) for mask in (truth, lacking, added))
    assert agreed["suspicion"] == 0 and agreed["left"] is None
    place = ("mask", "left", "top", "width", "height", "area_px")
    assert [missing[name] for name in place] == ["missing", 30, 15, 10, 10, 100]
    assert [extra[name] for name in place] == ["extra", 3, 2, 6, 4, 24]
    assert missing["suspicion"] > extra["suspicion"] > 0 and missing["confidence"] == pytest.approx(0.97)
    assert folds.contradiction(sure, ~truth, known)["suspicion"] > missing["suspicion"]
    assert folds.contradiction(unsure, lacking, known)["suspicion"] < missing["suspicion"]
    assert folds.contradiction(sure, added, added == truth)["suspicion"] == 0  # void

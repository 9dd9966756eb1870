"""The constants at the top of train.py are the settings, and each is a flag."""

from pathlib import Path

import pytest
import torch

import train
from machinery.errors import UserError
from machinery.settings import parse_settings


def test_every_constant_is_a_flag_and_the_only_default():
    settings = vars(parse_settings(vars(train), []))
    constants = {name: value for name, value in vars(train).items() if name.isupper() and name != "A"}
    assert settings == {name.lower(): value for name, value in constants.items()}
    promised = {"TRAIN_IMG_DIR", "TRAIN_MASK_DIR", "VAL_IMG_DIR", "VAL_MASK_DIR", "IMAGE_HEIGHT", "IMAGE_WIDTH"}
    promised |= {"BATCH_SIZE", "NUM_EPOCHS", "LOAD_MODEL", "LEARNING_RATE", "NUM_WORKERS", "DEVICE", "SEED"}
    assert promised <= constants.keys()
    assert (train.IMAGE_HEIGHT, train.IMAGE_WIDTH, train.NUM_EPOCHS) == (160, 240, 3)


def test_flags_change_settings():
    flags = ["--image-height", "99", "--learning-rate", "1e-5", "--load-model", "--features", "4", "8", "16"]
    flags += ["--cache-dir", "none", "--device", "cpu"]
    settings = parse_settings(vars(train), flags)
    assert settings.image_height == 99 and settings.learning_rate == 1e-5 and settings.load_model is True
    assert settings.features == (4, 8, 16) and settings.cache_dir is None and settings.device == "cpu"
    assert parse_settings(vars(train), ["--no-load-model"]).load_model is False
    assert parse_settings(vars(train), ["--cache-dir", "None"]).cache_dir is None


def test_constants_may_be_edited_to_lists_and_paths(monkeypatch):
    monkeypatch.setattr(train, "FEATURES", [8, 16])
    monkeypatch.setattr(train, "TRAIN_IMG_DIR", Path("photos"))
    settings = parse_settings(vars(train), [])
    assert settings.features == (8, 16) and settings.train_img_dir == "photos"


@pytest.mark.parametrize(
    ("name", "value"),
    [("IMAGE_HEIGHT", "32"), ("BATCH_SIZE", 4.0), ("NUM_EPOCHS", True), ("FEATURES", 16), ("FEATURES", ()),
     ("FEATURES", (8, 0)), ("LEARNING_RATE", "1e-3"), ("DEVICE", torch.device("cpu")), ("MEAN", (0.5,)),
     ("STD", (0, 0, 0)), ("CHECKPOINT", ""), ("SEED", 0.5)],
)  # fmt: skip
def test_constants_edited_to_something_else_are_named(name, value, project, monkeypatch):
    monkeypatch.setattr(train, name, value)
    with pytest.raises(UserError, match=name):
        train.main([])


def test_help_shows_every_constant_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_settings(vars(train), ["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--batch-size SIZE images in a step, of all processes together; smaller if memory runs out [4]" in text
    for name in parse_settings(vars(train), []).__dict__:
        assert "--" + name.replace("_", "-") in text


@pytest.mark.parametrize(
    ("photos", "epochs", "said"),
    [
        (20, 3, "20 photos: 3 epochs are 15 steps; --num-epochs 60 takes about 4 min.\n"),
        (50, 3, "50 photos: 3 epochs are 39 steps; --num-epochs 30 takes about 2 min.\n"),
        (1, 3, "1 photos: 3 epochs are 3 steps; --num-epochs 300 takes about 20 min.\n"),
        (20, 60, ""),
        (128, 3, ""),  # the quick start
    ],
)
def test_a_run_of_few_steps_says_what_more_would_take(photos, epochs, said, capsys):
    settings = parse_settings(vars(train), ["--num-epochs", str(epochs)])
    advise_on_epochs(settings, photos, seconds=4.0)
    assert capsys.readouterr().out == said

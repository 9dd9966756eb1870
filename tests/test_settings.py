"""The constants at the top of train.py are the settings, and each is a flag."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, leave_photos, rows

import train
from machinery.errors import UserError
from machinery.settings import Constant, constants_of, parse_settings
from utils import load_checkpoint


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


def test_comments_and_annotations_are_read_whatever_the_spacing():
    found = constants_of(
        'A:str|None="#1"#of A\n'
        "B :  tuple[ int,... ] | None   =   None     #   of B\n"
        "C = (  # not of C as a whole\n    1,\n    2,\n)  # of C\n"
        "D, E = 1, 2\n"
        "lower = 1  # no constant\n"
        "F = 1\n"
        "# of nothing\n"
    )
    assert found == {
        "A": Constant(may_be_none=True, is_tuple=False, comment="of A"),
        "B": Constant(may_be_none=True, is_tuple=True, comment="of B"),
        "C": Constant(may_be_none=False, is_tuple=False, comment="of C"),
        "F": Constant(may_be_none=False, is_tuple=False, comment=""),
    }


# ---------------------------------------------------------------------------------------------------------------------
# In a run


FACTOR = """
from torch.optim import SGD
FACTOR = 2.0  # of the loss
WEIGHT = nn.BCEWithLogitsLoss()  # no number: a checkpoint must not hold it
plain_losses = image_losses


def image_losses(logits, masks):
    return FACTOR * plain_losses(logits, masks)
"""


def test_a_constant_that_a_user_adds_follows_its_flag_wherever_it_is_read(project):
    path = Path("edited.py")
    path.write_text(Path(train.__file__).read_text() + FACTOR)
    spec = importlib.util.spec_from_file_location("edited", path)
    edited = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(edited)

    leave_photos(8, 4)

    def first_loss(*flags: str) -> float:
        edited.main([*SMALL, "--num-epochs", "1", "--batch-size", "8", *flags])
        return float(rows()[0]["train_loss"])

    doubled = first_loss()
    assert first_loss("--factor", "0.5") == pytest.approx(doubled / 4)
    assert edited.FACTOR == 2
    assert first_loss() == doubled  # the flag of a run before is forgotten
    settings = load_checkpoint(Path("my_checkpoint.pth.tar"))["settings"]
    assert settings["factor"] == 2 and settings["weight"] == "BCEWithLogitsLoss()" and "sgd" not in settings
    with pytest.raises(UserError, match="nowhere"):
        first_loss("--factor", "3", "--train-img-dir", "nowhere")
    assert edited.FACTOR == 2


@pytest.mark.parametrize("flags", [["--crop", "64", "64"], ["--start-from", "before.pth.tar"]])
def test_settings_are_settled_before_training_and_never_written_afterwards(project, run_train, monkeypatch, flags):
    class Settled(SimpleNamespace):
        def __setattr__(self, name: str, value: object) -> None:
            raise AssertionError(f"{name} was set")

    def train_settled(s: SimpleNamespace, *given: object) -> None:
        before = vars(s).copy()
        train_(Settled(**before), *given)
        assert vars(s) == before

    leave_photos(8, 4)
    run_train("--num-epochs", "1", "--checkpoint", "before.pth.tar")
    train_ = train.train
    monkeypatch.setattr(train, "train", train_settled)
    for more in (["--num-epochs", "1"], ["--num-epochs", "2", "--load-model"]):
        run_train("--batch-size", "16", *flags, *more)
    assert len(rows()) == 2

"""Everything that a user can get wrong ends with one sentence, exit status 1, no traceback, and nothing overwritten."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, leave_photos
from forked import Script
from PIL import Image

import train
from machinery import errors


@pytest.fixture
def project(project: Path) -> Path:
    leave_photos(16, 8)
    return project


def first(folder: str) -> Path:
    return sorted(path for path in Path("data", folder).iterdir() if path.suffix != ".gitkeep")[0]


def empty(folder: str) -> None:
    for path in Path("data", folder).iterdir():
        path.unlink()


def truncate(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def fill_masks(folder: str, value: int) -> None:
    for path in Path("data", folder).iterdir():
        Image.new("1", (96, 64), value).save(path)


def save_other_network() -> None:
    train.main([*SMALL, "--features", "4", "8", "--num-epochs", "1"])


def save_finished_run() -> None:
    train.main([*SMALL, "--num-epochs", "1"])


# what the user did, the flags, and what the sentence must name
MISTAKES = {
    "a folder is missing": (lambda: shutil.rmtree("data/val_masks"), [], "data/val_masks"),
    "a folder is empty": (lambda: empty("train_masks"), [], "data/train_masks"),
    "all folders but one are empty": (
        lambda: [empty(folder) for folder in ("train_images", "train_masks", "val_images")], [], "data/train_images"),
    "a folder is a file": (lambda: None, ["--train-img-dir", "notes.txt"], "notes.txt"),
    "a flag's folder is empty": (lambda: Path("none").mkdir(), ["--val-img-dir", "none"], "none"),
    "images and masks in one folder": (lambda: None, ["--val-mask-dir", "data/val_images"], "data/val_images"),
    "an image without a mask": (lambda: first("train_masks").unlink(), [], "_01.jpg"),
    "a mask without an image": (lambda: first("val_images").unlink(), [], "_01_mask.gif"),
    "two images with one stem": (
        lambda: Image.new("RGB", (96, 64)).save(first("train_images").with_suffix(".png")), [], "_01.png"),
    "an image is truncated": (lambda: truncate(first("train_images"), 0.7), [], "_01.jpg"),
    "an image lost its last bytes": (lambda: truncate(first("train_images"), 0.99), [], "_01.jpg"),
    "a mask is truncated": (lambda: truncate(first("train_masks"), 0.5), [], "_01_mask.gif"),
    "an image is empty": (lambda: first("val_images").write_bytes(b""), [], "_01.jpg"),
    "a mask is empty": (lambda: first("val_masks").write_bytes(b""), [], "_01_mask.gif"),
    "an image is text": (lambda: first("train_images").write_text("not an image"), [], "_01.jpg"),
    "a mask is a folder": (
        lambda: (first("train_masks").rename("data/moved"), Path("data/moved").unlink(),
                 Path("data/train_masks", first("train_images").stem + "_mask.gif").mkdir()), [], "_01_mask.gif"),
    "a mask has another size": (lambda: Image.new("1", (64, 96)).save(first("train_masks")), [], "_01_mask.gif"),
    "every mask is empty": (lambda: fill_masks("train_masks", 0), [], "data/train_masks"),
    "every mask is full": (lambda: fill_masks("val_masks", 1), [], "data/val_masks"),
    "a broken image without a cache": (
        lambda: truncate(first("train_images"), 0.7), ["--cache-dir", "none"], "_01.jpg"),
    "an unknown flag": (lambda: None, ["--bath-size", "3"], "--bath-size"),
    "half a flag": (lambda: None, ["--batch", "3"], "--batch"),
    "a word for a number": (lambda: None, ["--image-height", "tall"], "--image-height"),
    "a fraction for a count": (lambda: None, ["--num-epochs", "1.5"], "--num-epochs"),
    "no value": (lambda: None, ["--image-height"], "--image-height"),
    "height 0": (lambda: None, ["--image-height", "0"], "IMAGE_HEIGHT"),
    "a width too small": (lambda: None, ["--image-width", "15"], "IMAGE_WIDTH"),
    "a batch that has no equal parts": (lambda: None, ["--batch-size", "6", "--accumulation", "4"], "ACCUMULATION"),
    "batch size 0": (lambda: None, ["--batch-size", "0"], "BATCH_SIZE"),
    "a negative learning rate": (lambda: None, ["--learning-rate", "-0.001"], "LEARNING_RATE"),
    "a learning rate that is no number": (lambda: None, ["--learning-rate", "nan"], "LEARNING_RATE"),
    "no epochs": (lambda: None, ["--num-epochs", "0"], "NUM_EPOCHS"),
    "negative workers": (lambda: None, ["--num-workers", "-2"], "NUM_WORKERS"),
    "a negative seed": (lambda: None, ["--seed", "-1"], "SEED"),
    "features of 0": (lambda: None, ["--features", "0"], "FEATURES"),
    **{
        f"{name} {' '.join(values)}": (lambda: None, [f"--{name.replace('_', '-')}", *values], name.upper())
        for name, *values in (
            ("seed", "18446744073709551616"), ("foreground_values", "1", "none"), ("foreground_values", "9" * 400),
            ("learning_rate", "1e39"), ("learning_rate", "inf"), ("weight_decay", "1e300"), ("weight_decay", "nan"),
            ("dice_weight", "1e300"), ("clip_norm", "1e300"), ("mean", "nan", "0", "0"), ("std", "1", "1", "1e-300"),
            ("batch_size", "9" * 30), ("num_workers", "9" * 30), ("num_epochs", "9" * 400), ("features", "9" * 12),
            ("image_height", "9" * 30), ("crop", "64", "9" * 30), ("scale", "nan"), ("checkpoint_minutes", "nan"),
            ("checkpoint", "c" * 251),
        )
    },
    "an unknown precision": (lambda: None, ["--precision", "fp8"], "PRECISION"),
    "an unknown device": (lambda: None, ["--device", "toaster"], "DEVICE"),
    "a device that is not there": (lambda: None, ["--device", "cuda:77"], "DEVICE"),
    "nothing to continue from": (lambda: None, ["--load-model"], "my_checkpoint.pth.tar"),
    "a checkpoint of another size": (
        save_finished_run, ["--load-model", "--num-epochs", "2", "--image-height", "48"], "IMAGE_HEIGHT"),
    "a checkpoint of other colours": (
        save_finished_run, ["--load-model", "--num-epochs", "2", "--mean", "0", "0", "0"], "MEAN"),
    "a checkpoint that is a folder": (lambda: Path("models").mkdir(), ["--checkpoint", "models"], "CHECKPOINT"),
    "a device of another kind": (lambda: None, ["--device", "meta"], "DEVICE"),
    "one image for a step": (
        lambda: None, ["--image-height", "16", "--image-width", "16", "--features", "4", "4", "4", "4",
                       "--batch-size", "1"], "BATCH_SIZE"),
    "a checkpoint of another network": (save_other_network, ["--load-model", "--num-epochs", "2"], "FEATURES"),
    "a checkpoint that is text": (
        lambda: Path("my_checkpoint.pth.tar").write_text("hello"), ["--load-model"], "my_checkpoint.pth.tar"),
    "a checkpoint that is truncated": (
        lambda: (save_finished_run(), truncate(Path("my_checkpoint.pth.tar"), 0.8)), ["--load-model"],
        "my_checkpoint.pth.tar"),
    "a checkpoint of something else": (
        lambda: torch.save({"weights": torch.zeros(3)}, "my_checkpoint.pth.tar"), ["--load-model"],
        "my_checkpoint.pth.tar"),
    "a checkpoint with code in it": (
        lambda: torch.save({"state_dict": np.dtype, "model": print}, "my_checkpoint.pth.tar"), ["--load-model"],
        "my_checkpoint.pth.tar"),
    "weights without a state": (
        save_finished_run, ["--load-model", "--checkpoint", "my_checkpoint_best.pth.tar"], "weights only"),
    "pictures into a file": (lambda: None, ["--saved-images-dir", "notes.txt/pictures"], "SAVED_IMAGES_DIR"),
    "a checkpoint into a file": (lambda: None, ["--checkpoint", "notes.txt/checkpoint.pth.tar"], "CHECKPOINT"),
}  # fmt: skip


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_one_sentence(mistake, project, capsys):
    prepare, flags, named = MISTAKES[mistake]
    Path("notes.txt").write_text("mine")
    prepare()
    before = files_below(project)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        errors.run(lambda: train.main([*SMALL, *flags]))
    message = exit_.value.code  # a text here is what Python prints before it exits with status 1
    assert isinstance(message, str) and message.startswith("error: ")
    assert "\n" not in message and named in message and ": " in message.removeprefix("error: ")
    after = files_below(project)
    assert {path: after.get(path) for path in before} == before
    assert not list(project.rglob("*.tmp"))


def test_the_exit_status_is_1_and_there_is_no_traceback(project):
    first("train_images").write_bytes(b"")
    process = Script(Path(train.__file__), *SMALL)
    assert process.status() == 1
    said = process.printed[1].read_text()
    assert "Traceback" not in said and said.splitlines()[-1].startswith("error: data/train_images/")


def test_a_photo_that_breaks_while_workers_read_it_is_named(project, monkeypatch):
    """Without a cache photos are read in every epoch; the worker's traceback is cut off the sentence."""
    prepare = train.CarvanaDataset.prepare

    def break_afterwards(dataset, *args):
        prepare(dataset, *args)
        truncate(dataset.pairs[3][0], 0.5)

    monkeypatch.setattr(train.CarvanaDataset, "prepare", break_afterwards)
    with pytest.raises(SystemExit) as exit_:
        errors.run(lambda: train.main([*SMALL, "--cache-dir", "none", "--num-workers", "2"]))
    assert exit_.value.code.startswith("error: data/train_images/") and "\n" not in exit_.value.code

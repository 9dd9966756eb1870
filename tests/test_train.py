import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import leave_photos, rows, same, weights
from PIL import Image

import train
import utils
from machinery import sample_data
from machinery.decoding import read_mask
from machinery.errors import UserError
from model import UNet

ROOT = Path(train.__file__).parent


# ---------------------------------------------------------------------------------------------------------------------
# A run


def test_a_run_learns_and_leaves_what_is_promised(project, run_train, capsys):
    run_train("--num-epochs", "4")
    found = rows()
    header = "epoch,train_loss,val_loss,pixel_accuracy,dice,iou,learning_rate,seconds,images_per_second"
    assert ",".join(found[0]) == header
    assert [row["epoch"] for row in found] == ["1", "2", "3", "4"]
    assert float(found[-1]["dice"]) > max(0.7, float(found[0]["dice"]))
    assert float(found[-1]["train_loss"]) < float(found[0]["train_loss"])

    table = capsys.readouterr().out
    assert (
        len(re.findall(r"^ +\d  +0\.\d{4}  +\d+\.\d{4}  +0\.\d{4}  0\.\d{4}  0\.\d{4} +\d+\.\d", table, re.MULTILINE))
        == 4
    )

    best = max(found, key=lambda row: float(row["dice"]))
    checkpoint = utils.load_checkpoint(Path("my_checkpoint_best.pth.tar"))
    assert checkpoint["epoch"] == int(best["epoch"])
    assert checkpoint["preprocessing"] == {"height": 32, "width": 48, "mean": train.MEAN, "std": train.STD}
    UNet(**checkpoint["model"]).load_state_dict(checkpoint["state_dict"])


def test_saved_pictures_show_each_validation_batch(project, run_train):
    leave_photos(14, 32)
    run_train("--num-epochs", "1", "--batch-size", "14")  # 32 photos: 14, 14 and 4
    pictures = [f"{kind}{n}.png" for kind in ("", "pred_", "overlay_") for n in range(3)]
    others = [".lock", "curves.png", "index.html", "metrics.csv", "train_batch.png"]
    assert sorted(path.name for path in Path("saved_images").iterdir()) == sorted(pictures + others)
    truth = np.asarray(Image.open("saved_images/0.png").convert("L"))
    assert truth.shape == (4 * 34 + 2, 4 * 50 + 2)  # 4 columns, 2 pixels between photos
    first = read_mask(sorted(Path("data/val_masks").glob("*.gif"))[0], (32, 48))
    np.testing.assert_array_equal(truth[2:34, 2:50], first * 255)
    assert set(np.unique(np.asarray(Image.open("saved_images/pred_0.png"))[2:34, 2:50])) <= {0, 255}


def test_pictures_of_an_earlier_run_with_more_batches_are_removed(project, run_train):
    leave_photos(4, 32)
    run_train("--num-epochs", "1", "--batch-size", "4")
    Path("saved_images/77.png").touch()  # no prediction beside it: not ours
    run_train("--num-epochs", "1", "--batch-size", "16")
    assert {path.name for path in Path("saved_images").glob("*[0-9].png")} == {
        "0.png", "1.png", "pred_0.png", "pred_1.png", "overlay_0.png", "overlay_1.png", "77.png"
    }  # fmt: skip


def test_a_seed_gives_the_same_weights_for_any_number_of_workers(project, run_train):
    leave_photos(16, 4)
    run_train("--num-epochs", "1")
    first = weights()
    run_train("--num-epochs", "1", "--num-workers", "2")
    assert same(first, weights())
    run_train("--num-epochs", "1", "--seed", "1")
    assert not same(first, weights())


def test_the_cache_changes_nothing_but_time(project, run_train):
    leave_photos(16, 4)
    run_train("--num-epochs", "1")
    first = weights()
    run_train("--num-epochs", "1", "--cache-dir", "none")
    assert same(first, weights())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_precision_of_the_cpu_trains(project, run_train, precision):
    leave_photos(16, 4)
    run_train("--num-epochs", "1", "--precision", precision)
    assert all(value.isfinite().all() and value.dtype != torch.bfloat16 for value in weights().values())


def test_the_schedule_warms_up_and_ends_at_zero():
    rates = [train.schedule(progress) for progress in np.linspace(0, 1, 1001)]
    assert 0 < rates[0] < 0.1 and max(rates) == pytest.approx(1.0) and rates[-1] == pytest.approx(0)
    assert np.abs(np.diff(rates)).max() < 0.03  # no jumps
    assert int(np.argmax(rates)) == 100


# ---------------------------------------------------------------------------------------------------------------------
# A fresh clone


@pytest.fixture
def fresh_clone(tmp_path, monkeypatch) -> Path:
    for folder in ("train_images", "train_masks", "val_images", "val_masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "data" / folder / ".gitkeep").touch()
    monkeypatch.chdir(tmp_path)
    draw = sample_data.draw_dataset
    calls = []
    monkeypatch.setattr(sample_data, "draw_dataset", lambda folder: calls.append(folder) or draw(folder, 1, 1, 64, 96))
    return calls


def test_a_fresh_clone_trains_on_cars_that_it_draws_once(fresh_clone, run_train, capsys):
    run_train("--num-epochs", "1")
    assert len(rows()) == 1
    assert "data/sample" in capsys.readouterr().out.splitlines()[0]
    run_train("--num-epochs", "1")
    assert fresh_clone == [Path("data/sample")]
    assert len(list(Path("data/sample/train_images").iterdir())) == 16
    assert [path.name for path in Path("data/train_images").iterdir()] == [".gitkeep"]


def test_some_photos_are_never_mixed_with_drawn_ones(fresh_clone, run_train):
    Image.new("RGB", (96, 64)).save("data/train_images/mine.jpg")
    with pytest.raises(UserError, match=r"data/train_masks"):
        run_train()
    assert not fresh_clone

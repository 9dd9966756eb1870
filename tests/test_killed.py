"""Kills between any two changes of files: each file is old or new, whole, and belongs to what lies beside it."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
from conftest import leave_photos, same, weights
from killed import kills
from PIL import Image

import predict
from dataset import CarvanaDataset
from machinery import checkpoints
from model import build_network

NEWEST, BEST = Path("my_checkpoint.pth.tar"), Path("my_checkpoint_best.pth.tar")


def runs_of(folder: Path) -> dict[str, str]:
    """Return the run of each whole checkpoint; those that a kill cut off have names of their own."""
    return {path.name: checkpoints.load(path, build_network)["run"] for path in folder.glob("*.pth.tar")}


def check_pictures() -> None:
    """Check that whatever is in saved_images/ is whole."""
    folder = Path("saved_images")
    for picture in folder.glob("*.png"):
        if picture.stem != "curves":  # tests leave it empty
            Image.open(picture).load()
    for page in folder.glob("index.html"):
        assert page.read_text().rstrip().endswith("</html>")
    for table in folder.glob("metrics.csv"):
        header, *rows = csv.reader(table.open())
        assert rows and all(len(row) == len(header) for row in rows)


def test_a_run_killed_before_any_change_continues_to_the_same_weights(project, run_train, tmp_path, monkeypatch):
    leave_photos(4, 2)
    run_train("--num-epochs", "1", "--seed", "1")  # of an older run, which is set aside
    (older,) = set(runs_of(Path()).values())
    shutil.copytree(project, tmp_path / "before")
    flags = ["--num-epochs", "1", "--batch-size", "2", "--checkpoint-minutes", "0", "--cache-dir", "cache"]
    run_train(*flags)
    wanted, best = weights(), weights(str(BEST))
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "before", again)
    monkeypatch.chdir(again)
    among = "" if "KILL_ROUNDS" in os.environ else "checkpoint"  # a thorough look takes two minutes
    for number in kills(lambda: run_train(*flags), fewest=15, among=among):
        found = runs_of(again)
        of = {run: {name for name in found if found[name] == run} for run in found.values()}
        assert {"my_checkpoint.pth.tar", "my_checkpoint_1.pth.tar"} & of[older], number
        own = [run for run in of if run != older]
        check_pictures()
        run_train(*flags, *["--load-model"] * (found.get(NEWEST.name) in own))
        assert same(weights(), wanted) and same(weights(str(BEST)), best), number
        assert older in runs_of(again).values()
        shutil.rmtree(again)
        shutil.copytree(tmp_path / "before", again)
        monkeypatch.chdir(again)


def test_a_submission_killed_before_any_change_is_whole_or_not_there(photos):
    command = ["data/val_images", "--submission", "submission.csv"]
    predict.main(command)
    submission = Path("submission.csv")
    wanted, files = submission.read_bytes(), set(Path().iterdir())
    submission.unlink()
    for _ in kills(lambda: predict.main(command), fewest=5):
        assert not submission.exists() or submission.read_bytes() == wanted
        predict.main(command)
        assert submission.read_bytes() == wanted and set(Path().iterdir()) == files
        submission.unlink()


def test_a_cache_killed_before_any_change_has_the_masks_of_its_rule(tmp_path):
    """The same files are read by another rule, so that the old cache stays until the new one is known."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    labels = np.repeat(np.arange(3, dtype=np.uint8), 8)[None].repeat(16, 0)  # 0, 1 and 2, (16, 24)
    for number in range(3):
        Image.fromarray(80 * np.roll(labels, number)).save(tmp_path / f"images/{number}.png")
        Image.fromarray(np.roll(labels, number)).save(tmp_path / f"masks/{number}.png")

    def masks_of(value: int) -> list[list]:
        data = CarvanaDataset(tmp_path / "images", tmp_path / "masks", (16, 24))
        data.prepare(tmp_path / "cache", foreground_values=(value,))
        return [data[index][1].tolist() for index in range(3)]

    wanted = {value: [(np.roll(labels, number) == value).tolist() for number in range(3)] for value in (1, 2)}
    assert masks_of(1) == wanted[1]
    for number in kills(lambda: masks_of(2), fewest=5):
        for value in (1, 2) if number % 2 else (2, 1):
            assert masks_of(value) == wanted[value]
        masks_of(1)
        assert len(list((tmp_path / "cache").glob("*.samples"))) == 1

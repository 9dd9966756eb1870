import csv
import os
import shutil
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # in child processes, too: tiny networks' threads wait for one another
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # for a process that runs no script of this folder
import pytest
import torch

import train
import utils
from sample_data import draw_dataset

SMALL = ["--image-height", "32", "--image-width", "48", "--features", "8", "16", "--num-workers", "0"]


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn cars, small: 4 for training and 2 for validation, 16 photos each. Not to be changed."""
    folder = tmp_path_factory.mktemp("drawn") / "data"
    draw_dataset(folder, train_cars=4, val_cars=2, height=64, width=96)
    return folder


@pytest.fixture
def project(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose data/ holds a copy of the drawn cars."""
    shutil.copytree(drawn, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_train():
    """Runs train.py with a tiny network at a tiny size."""
    return lambda *flags: train.main([*SMALL, *flags])


def rows() -> list[dict[str, str]]:
    """metrics.csv of the run in the working directory."""
    with Path("saved_images/metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(path: str = "my_checkpoint.pth.tar") -> dict[str, torch.Tensor]:
    return utils.load_checkpoint(Path(path))["state_dict"]


def same(some: dict, others: dict) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)

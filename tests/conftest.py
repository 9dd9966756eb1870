import shutil
from pathlib import Path

import pytest

import train
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

import csv
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # in child processes, too: tiny networks' threads wait for one another
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, Path(__file__).parents[:2]))  # for processes without a script
import numpy as np
import pytest
import torch

import predict
import train
import utils
from machinery.decoding import read_image
from machinery.sample_data import draw_dataset
from model import UNet

PREPROCESSING = {"height": 32, "width": 48, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# Before the first test starts the server, such as one with workers: it imports these once, for all whom it forks.
multiprocessing.set_forkserver_preload(["forked", "torch._dynamo", "torchvision", "timm"])  # a run imports the last 3
SMALL = ["--image-height", "32", "--image-width", "48", "--features", "8", "16", "--num-workers", "0"]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Run what is chosen by name, by -k or by -m (a GPU's tests) in this process: others take seconds to start."""
    is_chosen = config.option.keyword or config.option.markexpr or any("::" in name for name in config.args)
    return 0 if is_chosen else None


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


@pytest.fixture(autouse=True)
def few_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the last epoch alone, and no curves, where no test looks at them: they take a small run most of its time."""
    if "report" not in request.module.__name__:
        draw_few_pictures(monkeypatch.setattr)


def draw_few_pictures(setattr: Callable[[object, str, object], None] = setattr) -> None:
    from machinery import report  # again: forked.Script imports the project anew

    begin = report.Report.begin

    def begin_the_last(self: report.Report, epoch: int, is_last: bool) -> object:
        self.is_drawing = is_last
        return begin(self, epoch, is_last) if is_last else None

    setattr(report.Report, "begin", begin_the_last)
    setattr(report, "draw_curves", lambda history, path: path.touch())


def leave_photos(train: int, val: int) -> None:
    """Leave so many of a project's 64 photos for training and of its 32 for validation."""
    for folder, number in (("train", train), ("val", val)):
        for photo in sorted(Path(f"data/{folder}_images").iterdir())[number:]:
            photo.unlink()
            Path(f"data/{folder}_masks/{photo.stem}_mask.gif").unlink()


@pytest.fixture
def photos(project) -> list[Path]:
    """Eight photos in data/val_images, and a random network that takes half of the first one for foreground."""
    found = sorted(Path("data/val_images").iterdir())
    for photo in found[8:]:
        photo.unlink()
        Path("data/val_masks", f"{photo.stem}_mask.gif").unlink()
    torch.manual_seed(0)
    model = UNet(3, 1, (8, 16))
    torch.nn.init.normal_(model.head.weight)
    save_network(model)
    logits = predict.load_model("my_checkpoint_best.pth.tar")(read_image(found[0], (32, 48))[None])
    torch.nn.init.constant_(model.head.bias, -np.median(logits))
    save_network(model)
    return found[:8]


def save_network(model: UNet) -> None:
    state = {"model": model.config}
    state |= {"state_dict": model.state_dict(), "preprocessing": PREPROCESSING}
    utils.save_checkpoint(state, Path("my_checkpoint_best.pth.tar"))


def rows() -> list[dict[str, str]]:
    """metrics.csv of the run in the working directory."""
    with Path("saved_images/metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(path: str = "my_checkpoint.pth.tar") -> dict[str, torch.Tensor]:
    return utils.load_checkpoint(Path(path))["state_dict"]


def same(some: dict, others: dict) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)

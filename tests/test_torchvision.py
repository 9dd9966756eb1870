"""A torchvision that was built for another torch, as `pip install --upgrade torch` alone leaves it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL

import predict
import train


@pytest.fixture
def run_mismatched(tmp_path):
    """Run a script of the repository beside a stand-in that fails like such a torchvision."""
    package = tmp_path / "packages/torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    environment = os.environ | {"PYTHONPATH": f"{package.parent}{os.pathsep}{os.environ['PYTHONPATH']}"}

    def run(script: str, *flags: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, script, *map(str, flags)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def test_training_ends_with_one_sentence(project, run_mismatched):
    done = run_mismatched(train.__file__, *SMALL, "--num-epochs", "1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: torchvision ") and " does not match torch " in last
    assert last.endswith(": pip install --upgrade torch torchvision")


def test_a_pretrained_encoder_ends_with_one_sentence(project, run_mismatched):
    pytest.importorskip("timm")
    done = run_mismatched(
        train.__file__, *SMALL, "--image-height", "64", "--image-width", "64", "--encoder", "resnet18"
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: timm cannot be imported (operator torchvision::nms does not exist): pip install")


def test_prediction_does_without_torchvision(photos, run_mismatched):
    done = run_mismatched(predict.__file__, photos[0])
    assert done.returncode == 0, done.stderr
    assert Path("predictions", f"{photos[0].stem}_mask.png").exists()

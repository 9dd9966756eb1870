"""Older CPUs, as this one computes when their instruction sets are all that it may use, learn the same."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL, rows

import train

TRAIN = Path(train.__file__)
FLAGS = [*SMALL, "--num-epochs", "6"]


@pytest.fixture(scope="module")
def wanted(drawn, tmp_path_factory) -> float:
    """Dice with all that this CPU has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        shutil.copytree(drawn, "data")
        train.main(FLAGS)
        return float(rows()[-1]["dice"])


@pytest.mark.parametrize(
    ("variables", "precision"),
    [
        ({"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, "fp32"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "fp32"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "bf16"),
    ],
)
def test_every_instruction_set_learns_the_same(project, wanted, variables, precision):
    environment = os.environ | variables
    subprocess.run([sys.executable, TRAIN, *FLAGS, "--precision", precision], env=environment, check=True)
    assert wanted > 0.8 and float(rows()[-1]["dice"]) == pytest.approx(wanted, abs=0.02)

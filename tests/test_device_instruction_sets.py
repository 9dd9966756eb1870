"""Older CPUs, as this one computes when their instruction sets are all that it may use, learn the same."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import SMALL, rows

import train

TRAIN = "import conftest, sys, train; conftest.draw_few_pictures(); train.main(sys.argv[1:])"
HAS_AVX512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
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
        pytest.param(
            {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
            "fp32",
            marks=pytest.mark.skipif(not HAS_AVX512, reason="this CPU would compute as without that variable"),
        ),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "bf16"),
    ],
)
def test_every_instruction_set_learns_the_same(project, wanted, variables, precision):
    environment = os.environ | variables
    subprocess.run([sys.executable, "-c", TRAIN, *FLAGS, "--precision", precision], env=environment, check=True)
    assert wanted > 0.8 and float(rows()[-1]["dice"]) == pytest.approx(wanted, abs=0.02)

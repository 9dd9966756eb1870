"""Workers start by fork, by forkserver (Linux from Python 3.14 on) and by spawn (Windows, macOS): all give the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL, same, weights

import train

SCRIPT = Path(__file__).with_name("train_with.py")
FLAGS = [*SMALL, "--num-epochs", "2"]


def start(method: str, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-u", SCRIPT, method, *FLAGS, "--num-workers", "2", *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_signals_reach_workers_at_any_moment_and_the_weights_are_the_same(method, project):
    train.main(FLAGS)  # without workers
    wanted = weights()
    Path("my_checkpoint.pth.tar").unlink()

    process = start(method)
    while not (line := process.stdout.readline()).startswith("epoch  train_loss"):
        assert line, "it ended early"
    time.sleep(0.3)  # spawned workers are importing now
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "Traceback" not in out, out

    has_begun = Path("my_checkpoint.pth.tar").exists()
    assert has_begun or "nothing was saved" in out
    process = start(method, *["--load-model"] * has_begun)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0, out
    assert same(wanted, weights())

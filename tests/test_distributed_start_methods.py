"""Workers start by fork, by forkserver (Linux from Python 3.14 on) and by spawn (Windows, macOS): all give the same."""

import os
import signal
import time
from pathlib import Path

import pytest
from conftest import SMALL, leave_photos, same, weights
from forked import Script

SCRIPT = Path(__file__).with_name("train_with.py")
FLAGS = [*SMALL, "--num-epochs", "2"]


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_signals_reach_workers_at_any_moment_and_the_weights_are_the_same(method, project, run_train):
    leave_photos(24, 4)
    run_train("--num-epochs", "2")  # without workers
    wanted = weights()
    Path("my_checkpoint.pth.tar").unlink()

    flags = [method, *FLAGS, "--num-workers", "2" if method == "fork" else "1"]  # the others import for seconds
    process = Script(SCRIPT, *flags)
    process.wait_for("epoch  train_loss")
    time.sleep(0.3)  # spawned workers are importing now
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.status(120) == 130 and "Traceback" not in process.output(), process.output()

    has_begun = Path("my_checkpoint.pth.tar").exists()
    assert has_begun or "nothing was saved" in process.output()
    process = Script(SCRIPT, *flags, *["--load-model"] * has_begun)
    assert process.status(120) == 0, process.output()
    assert same(wanted, weights())

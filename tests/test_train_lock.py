"""Two runs do not write to one place."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
from conftest import SMALL, leave_photos, rows
from forked import Training

import train
from machinery import checkpoints, errors


def error_of(*flags: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        errors.run(lambda: train.main([*SMALL, *flags]))
    return str(exit_.value.code)


@pytest.fixture
def project(project: Path) -> Path:
    leave_photos(8, 4)
    return project


@pytest.fixture
def other_run(project):
    """A run that goes on, with a worker, until the test ends."""
    process = Training("--num-epochs", "10000", "--num-workers", "1")
    process.wait_for("best")
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def test_a_second_run_is_refused_before_it_touches_anything(other_run, monkeypatch):
    monkeypatch.setattr(checkpoints, "LOCK_SECONDS", 0.2)
    message = "is in use by another run: wait for its end, or choose another"
    assert error_of() == f"error: CHECKPOINT my_checkpoint.pth.tar {message}"
    assert error_of("--load-model") == f"error: CHECKPOINT my_checkpoint.pth.tar {message}"
    assert error_of("--checkpoint", "other.pth.tar") == f"error: SAVED_IMAGES_DIR saved_images {message}"
    assert not list(Path().glob("*_1*")) and not list(Path().glob("other*")) and other_run.is_alive()
    train.main([*SMALL, "--num-epochs", "1", "--checkpoint", "other.pth.tar", "--saved-images-dir", "other"])
    assert Path("other/metrics.csv").exists()


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(2)
"""


def test_the_workers_of_a_killed_run_are_waited_for(project, run_train):
    """They inherit its locks, and end some seconds after it; a process that holds one stands for them."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, ".my_checkpoint.pth.tar.lock"], stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout.readline() == "held\n"
        run_train("--num-epochs", "1")
        assert worker.wait() == 0 and len(rows()) == 1


def test_a_run_goes_on_where_one_was_killed_with_its_workers_alive(other_run):
    os.kill(other_run.pid, signal.SIGKILL)
    other_run.join()
    train.main([*SMALL, "--num-epochs", "1"])
    assert len(rows()) == 1


def test_a_disk_without_locks_trains_and_says_so(project, run_train, monkeypatch, capsys):
    def no_locks(lock: filelock.FileLock) -> None:
        if Path(lock.lock_file).name.startswith("."):
            raise OSError(95, "Operation not supported")
        lock._context.lock_file_fd = 0

    monkeypatch.setattr(filelock.FileLock, "_acquire", no_locks)
    monkeypatch.setattr(filelock.FileLock, "_release", lambda lock: setattr(lock._context, "lock_file_fd", None))
    run_train("--num-epochs", "1")
    assert "cannot be locked on this disk" in capsys.readouterr().out and len(rows()) == 1


def test_pictures_do_not_go_where_photos_are(project):
    kept = sorted(Path("data/val_masks").iterdir())
    assert "SAVED_IMAGES_DIR is VAL_MASK_DIR" in error_of("--saved-images-dir", "data/../data/val_masks")
    assert sorted(Path("data/val_masks").iterdir()) == kept

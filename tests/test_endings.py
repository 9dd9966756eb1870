"""How a run ends: by an error with workers under way, by any number of signals, beside other runs, started again."""

import builtins
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL, leave_photos, rows, weights
from test_train_continue import Training

import train
from machinery import checkpoints, errors, processes, runs
from machinery.errors import UserError
from machinery.files import lock_of, remove_leftovers, temporary_name, written_whole

CHECKPOINT = Path("my_checkpoint.pth.tar")


def full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def a_folder_in_the_way(*_: object) -> None:
    Path("saved_images/index.html").mkdir(exist_ok=True)


def bug(*_: object) -> None:
    raise ZeroDivisionError("a bug")


END_EPOCH = runs.Run.end_epoch


def break_a_photo(*args: object) -> None:
    END_EPOCH(*args)
    sorted(Path("data/train_images").iterdir())[0].write_bytes(b"broken")


START = multiprocessing.process.BaseProcess.start


def no_second_process(process: multiprocessing.Process) -> None:
    if multiprocessing.active_children():
        raise BlockingIOError(11, "Resource temporarily unavailable")
    START(process)


ERRORS = {  # what breaks, how, and what the run says
    "checkpoint": (checkpoints.torch, "save", full_disk, "error: my_checkpoint_best.pth.tar could not be written"),
    "page": (runs, "save_train_batch", a_folder_in_the_way, "error: saved_images/index.html could not be written"),
    "photo": (runs.Run, "end_epoch", break_a_photo, "error: data/train_images/"),
    "bug": (runs.Run, "add", bug, "ZeroDivisionError: a bug"),
    "process": (multiprocessing.process.BaseProcess, "start", no_second_process, "error: 2 workers cannot be started"),
}


class Failing(Training):
    """A training process in which something breaks, with workers of a start method."""

    def __init__(self, kind: str, method: str, *flags: str) -> None:
        self.kind, self.method = kind, method
        super().__init__(*flags)

    def run(self) -> None:
        place, name, break_, _ = ERRORS[self.kind]
        setattr(place, name, break_)
        start_method, multiprocessing.set_start_method = multiprocessing.set_start_method, lambda *_, **__: None
        start_method(self.method, force=True)
        super().run()


@pytest.mark.parametrize(
    ("kind", "method", "workers"),
    [
        *((kind, "fork", "0") for kind in ERRORS if kind != "process"),
        *((kind, "fork", "2") for kind in ERRORS),
        ("bug", "spawn", "2"),
        ("photo", "forkserver", "2"),
    ],
)
def test_a_run_that_has_said_its_error_ends(project, kind, method, workers):
    process = Failing(kind, method, "--num-workers", workers, "--cache-dir", "none", "--num-epochs", "3")
    process.wait_for(ERRORS[kind][3])
    assert process.status(timeout=30) == 1, process.output()
    said = process.output().partition("Exception ignored")[0]  # PyTorch's half-built loader complains when it is freed
    assert ("Traceback" in said) == (kind == "bug") or kind == "process"


def test_any_number_of_signals_to_all_processes_saves(project):
    """Slurm and systemd signal every process, and torchrun its group once more."""
    process = Training("--num-epochs", "1000", "--num-workers", "2")
    process.wait_for("best")
    for _ in range(5):
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.001)  # all of them before the run has saved, which takes some 50 ms
    assert process.status() == 143, process.output()
    assert "Traceback" not in process.output() and "continue with the same flags" in process.output()
    assert len(rows()) >= 1 and weights()


def test_names_that_a_run_may_write_are_reserved(project, run_train, monkeypatch):
    monkeypatch.setattr(checkpoints, "LOCK_SECONDS", 0.1)
    run_train("--num-epochs", "1")
    other = Training("--num-epochs", "1000", "--checkpoint", "my_checkpoint_1.pth.tar", "--saved-images-dir", "other")
    other.wait_for("train_loss")  # it may not have written anything yet
    run_train("--num-epochs", "1")
    assert Path("my_checkpoint_2.pth.tar").exists() and Path("my_checkpoint_2_best.pth.tar").exists()
    with pytest.raises(UserError, match=r"CHECKPOINT my_checkpoint_1_best.* is in use by another run"):
        run_train("--checkpoint", "my_checkpoint_1_best.pth.tar", "--saved-images-dir", "third")
    os.killpg(other.pid, signal.SIGKILL)
    other.join()


def test_a_restart_continues_its_own_run_alone(project, run_train, monkeypatch, capsys):
    run_train("--num-epochs", "1")
    monkeypatch.setattr(processes, "RESTARTS", 1)  # of a new run, whose process died before its first checkpoint
    run_train("--num-epochs", "1")
    out = capsys.readouterr().out
    assert "of an earlier run is now my_checkpoint_1.pth.tar" in out and "Continuing" not in out

    own = checkpoints.torch.load(CHECKPOINT)["run"]
    monkeypatch.setattr(processes, "run_id", lambda: own)
    run_train("--num-epochs", "2")
    assert "Continuing after 1 epoch and" in capsys.readouterr().out and len(rows()) == 2


def test_all_processes_and_restarts_of_torchrun_have_one_run_id(tmp_path):
    """A process that dies in the first start is started again, and prints the same name as before."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom machinery import processes\n"
        "with processes.process_group():\n"
        f"    Path('{tmp_path}', f'{{processes.RANK}}{{processes.RESTARTS}}.id').write_text(processes.run_id())\n"
        "    processes.all_reduce_max(0)\n    assert processes.RESTARTS\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1", "--standalone"]
    done = subprocess.run([*command, script], capture_output=True, text=True, timeout=120)
    names = [path.read_text() for path in tmp_path.glob("*.id")]
    assert done.returncode == 0 and len(names) == 4 and len(set(names)) == 1, done.stdout + done.stderr


def test_a_temporary_file_is_nobody_elses(tmp_path):
    """Neither a user's own file nor what a link points to is overwritten, and links are not followed."""
    (tmp_path / "a.png.tmp").write_text("mine")
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "a.png").symlink_to(tmp_path / "secret")
    with written_whole(tmp_path / "a.png") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a.png").read_text() == "new" and (tmp_path / "secret").read_text() == "mine"
    assert (tmp_path / "a.png.tmp").read_text() == "mine"


def test_what_killed_runs_have_left_is_removed_and_nothing_else(project, run_train):
    def left_by_a_kill(path: Path) -> Path:
        with written_whole(path) as temporary:
            shutil.copyfile(__file__, temporary)
            os.link(temporary, temporary.with_name("kept"))
        path.unlink()
        return temporary.with_name("kept").rename(temporary)

    leftovers = [left_by_a_kill(Path(name)) for name in ("my_checkpoint.pth.tar", "my_checkpoint_best.pth.tar")]
    Path("saved_images").mkdir()
    leftovers.append(left_by_a_kill(Path("saved_images/index.html")))
    leftovers.append(left_by_a_kill(temporary_name(Path("my_checkpoint.pth.tar"))))  # a rehearsal's
    others = [left_by_a_kill(Path(name)) for name in ("other.pth.tar", "my_checkpoint.pth.tar_2")]
    owned = [Path("my_checkpoint.pth.tar.tmp"), Path(".my_checkpoint.pth.tmp")]
    for path in owned:
        path.write_text("a user's own")
    run_train("--num-epochs", "1")
    assert not any(path.exists() for path in leftovers) and all(path.exists() for path in (*others, *owned))
    remove_leftovers(Path(), "other.pth.tar")
    assert not others[0].exists()
    assert lock_of(CHECKPOINT).exists()


def test_a_users_error_in_a_worker_is_one_line(project):
    flags = [*SMALL[:-1], "1", "--num-epochs", "2", "--cache-dir", "none"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(runs.Run, "end_epoch", break_a_photo)
        errors.run(lambda: train.main(flags))
    assert str(exit_.value.code).startswith("error: data/train_images/") and "\n" not in str(exit_.value.code)


# ---------------------------------------------------------------------------------------------------------------------
# Where nobody reads, and where no script is run


def end_of(code: str, redirected: str = "", *options: str) -> subprocess.CompletedProcess:
    """What becomes of a script whose main has this code, started by a shell that redirects its streams."""
    script = f"import sys\nfrom tqdm import tqdm\nfrom machinery.errors import *\ndef main():\n    {code}\nrun(main)\n"
    command = f"{shlex.join([sys.executable, *options, '-c', script])} {redirected}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)


PRINTS = "[print(x) for x in range(99_999)]; tqdm.write('a line'); list(tqdm(range(3), file=sys.stderr))"


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-"])
def test_closed_streams_are_no_error(closed):
    """As those of pythonw are."""
    done = end_of(PRINTS, closed)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert end_of("raise UserError('x: y')", closed).returncode == 1


@pytest.mark.parametrize("piped", ["| head -1", "2>&1 | head -1"])
def test_a_reader_that_has_seen_enough_ends_the_run_without_a_word(piped):
    done = end_of(f"{PRINTS}; sys.stderr.write('more ' * 99_999)", f"{piped}; exit ${{PIPESTATUS[0]}}")
    assert (done.stdout, done.stderr, done.returncode) == ("0\n", "", 141)


def test_another_broken_pipe_keeps_its_traceback():
    done = end_of("raise BrokenPipeError(32, 'of a worker')", "| cat; exit ${PIPESTATUS[0]}")
    assert done.returncode == 1 and "BrokenPipeError: [Errno 32] of a worker" in done.stderr


def test_without_docstrings_commands_have_a_help():
    done = subprocess.run([sys.executable, "-OO", "-m", "tools.split_data", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--mask-suffix" in done.stdout


def signals_during(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list:
    """Handlers while a step is trained."""
    seen, step = [], train.train_step

    def look(*args: object) -> object:
        seen.extend(signal.getsignal(signum) for signum in processes.STOPPING)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", look)
        main()
    return seen


def test_a_run_in_a_thread_leaves_signals_alone_and_says_an_error_in_one_line(project, monkeypatch, capsys):
    leave_photos(4, 2)

    def in_a_thread(*flags: str) -> None:
        thread = threading.Thread(target=train.main, args=([*SMALL, "--num-epochs", "1", *flags],))
        thread.start()
        thread.join()

    handlers = [signal.getsignal(signum) for signum in processes.STOPPING]
    assert signals_during(in_a_thread, monkeypatch) == handlers
    assert len(rows()) == 1
    capsys.readouterr()
    monkeypatch.setattr(threading, "excepthook", errors.one_line)  # as it is outside of pytest
    in_a_thread("--val-img-dir", "nowhere")
    assert re.fullmatch(r"error: nowhere cannot be read .*\n", capsys.readouterr().err)


def test_a_run_in_a_notebook_leaves_signals_alone_and_says_an_error_in_one_line(project, run_train, monkeypatch):
    leave_photos(4, 2)
    handlers = [signal.getsignal(signum) for signum in processes.STOPPING]
    assert signals_during(lambda: run_train("--num-epochs", "1"), monkeypatch) != handlers
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)  # as IPython and Jupyter do
    assert signals_during(lambda: run_train("--num-epochs", "1"), monkeypatch) == handlers
    with pytest.raises(UserError) as caught:
        run_train("--val-img-dir", "nowhere")
    assert caught.value._render_traceback_() == [f"error: {caught.value}"]  # which they show instead of a traceback


@pytest.mark.parametrize("gone", ["images", "masks"])
def test_a_run_whose_validation_photos_vanish_ends_well(project, monkeypatch, run_train, capsys, gone):
    leave_photos(4, 2)
    measure = train.full_size_dice

    def vanish(*args: object, **options: object) -> tuple:
        shutil.rmtree(f"data/val_{gone}")
        return measure(*args, **options)

    monkeypatch.setattr(train, "full_size_dice", vanish)
    run_train("--num-epochs", "1")
    out = capsys.readouterr().out
    assert re.search(rf"No Dice at the photos' original size: data/val_{gone}/\S+ is no readable image", out)
    assert re.search(
        r"Dice of the best weights: \d\.\d{4} at training size, unknown at the photos' original size\.", out
    )
    assert "On these photos" not in out and "The best weights are in my_checkpoint_best.pth.tar" in out

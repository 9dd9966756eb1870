"""One run in several processes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import SMALL, leave_photos, rows, same
from forked import Script, start_processes
from torch.distributed import TCPStore

import train

TRAIN, PLAIN = Path(train.__file__), Path(__file__).with_name("train_plainly.py")
CHECKPOINT = Path("my_checkpoint.pth.tar")


def wait_for_checkpoint(is_alive: Callable[[], bool]) -> None:
    while not CHECKPOINT.exists():
        assert is_alive()
        time.sleep(0.02)


def weights(path: Path | str = CHECKPOINT) -> dict[str, torch.Tensor]:
    return torch.load(path)["state_dict"]  # utils.load_checkpoint would refuse a network without BatchNorm


def without_torchrun(processes: int, script: Path, *flags: str) -> str:
    """What so many processes print when nothing starts them again or stops them, which saves torchrun's own start."""
    started = start_processes(processes, script, *SMALL, "--precision", "fp32", *flags)
    assert [process.status(120) for process in started] == [0] * processes, started[0].output()
    return "".join(process.output() for process in started)


def alone(*flags: str) -> None:
    without_torchrun(1, PLAIN, *flags)


def close(some: dict, others: dict) -> bool:
    return all(torch.allclose(some[name], others[name], rtol=1e-4, atol=1e-6) for name in some)


def printed() -> list[str]:
    """The scores of metrics.csv to the last digit that is printed."""
    return [f"{float(row[name]):.4f}" for row in rows() for name in ("val_loss", "pixel_accuracy", "dice", "iou")]


@pytest.mark.parametrize(("processes", "crop", "batches"), [(2, [], 3), (3, [], 3), (3, ["--crop", "64", "64"], 11)])
def test_several_processes_learn_what_one_learns(project, processes, crop, batches):
    leave_photos(61, 32)  # the last batch begins again
    flags = ["--num-epochs", "1", "--batch-size", "12", "--accumulation", "2", *crop]
    alone(*flags, "--checkpoint", "alone.pth.tar")
    wanted = printed()
    out = without_torchrun(processes, PLAIN, *flags)
    assert out.count("epoch  train_loss") == out.count("Dice of the best weights") == 1
    assert close(weights("alone.pth.tar"), weights())
    assert printed() == wanted
    assert len(list(Path("saved_images").glob("overlay_*.png"))) == batches  # 12, 12 and 8 photos; of crops 3 at a time


def test_another_number_of_processes_goes_on_at_the_same_image(project):
    leave_photos(32, 8)
    flags = ["--num-epochs", "2", "--checkpoint-minutes", "0", "--weight-decay", "0"]
    alone(*flags, "--checkpoint", "alone.pth.tar")
    wanted = printed()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", PLAIN, *SMALL]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    torchrun = subprocess.Popen([*command, "--precision", "fp32", *flags], **options)
    wait_for_checkpoint(lambda: torchrun.poll() is None)
    torchrun.terminate()
    out, _ = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 1  # its own status
    images = int(re.search(r"Stopped by SIGTERM after \d epochs? and (\d+) images?", out)[1])
    assert images % 4 == 0
    assert 'train.py", line' not in out and 'utils.py", line' not in out
    alone(*flags, "--load-model")
    assert close(weights("alone.pth.tar"), weights())
    assert printed() == wanted


def test_a_killed_process_is_started_again_and_the_weights_are_the_same(project):
    leave_photos(32, 8)
    flags = ["--num-epochs", "3", "--checkpoint-minutes", "0"]
    without_torchrun(2, TRAIN, *flags, "--checkpoint", "whole.pth.tar")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's own
    killed = start_processes(2, TRAIN, *SMALL, "--precision", "fp32", *flags, store=store)
    killed[0].wait_for("  best")
    killed[1].kill()
    assert killed[1].status() == -signal.SIGKILL
    killed[0].wait_for("has lost another one")
    killed[0].kill()  # as torchrun does
    again = start_processes(2, TRAIN, *SMALL, "--precision", "fp32", *flags, store=store, start=1)
    assert [process.status(120) for process in again] == [0, 0], again[0].output()
    assert "Continuing after" in again[0].output()
    assert same(weights("whole.pth.tar"), weights())
    assert len(rows()) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--batch-size", "3"],
            "error: BATCH_SIZE is 3: set it to a whole number, a multiple of 2, the processes",
        ),
        (["--train-img-dir", "nowhere"], "error: nowhere"),
    ],
)
def test_a_mistake_is_named_once(project, flags, message):
    first, other = start_processes(2, TRAIN, *SMALL, *flags)
    assert first.status() == 1
    other.terminate()  # as torchrun does when one has ended
    other.join()
    out = first.output() + other.output()
    assert out.count("error: ") == out.count(message) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Two machines


SPACES = [f"unet{os.getpid()}-{number}" for number in (0, 1)]  # two runs of the tests do not meet


@pytest.fixture
def two_machines(drawn, tmp_path, monkeypatch):
    """Two network namespaces with a virtual wire between them, and a folder of its own for each."""
    commands = f"""
        ip netns add {SPACES[0]}; ip netns add {SPACES[1]}
        ip link add wire0 netns {SPACES[0]} type veth peer name wire1 netns {SPACES[1]}
        ip -n {SPACES[0]} addr add 10.77.0.1/24 dev wire0; ip -n {SPACES[1]} addr add 10.77.0.2/24 dev wire1
        ip -n {SPACES[0]} link set wire0 up; ip -n {SPACES[1]} link set wire1 up
        ip -n {SPACES[0]} link set lo up; ip -n {SPACES[1]} link set lo up
    """
    made = subprocess.run(["sh", "-ec", commands], capture_output=True, text=True)
    try:
        if made.returncode:
            pytest.skip(f"network namespaces are not to be had here: {made.stderr.strip()}")
        for number in (0, 1):
            shutil.copytree(drawn, tmp_path / str(number) / "data")
            monkeypatch.chdir(tmp_path / str(number))
            leave_photos(32, 8)
        yield tmp_path
    finally:
        end_machines()
        for space in SPACES:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def end_machines() -> None:
    """Ends every process of the two, those that a killed torchrun has left among them."""
    for space in SPACES:
        pids = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout
        for pid in map(int, pids.split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def start_machines(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> list[Script]:
    """Start a process on each machine, in its folder, as a torchrun on each would; this one is then in the first's."""
    started = []
    for rank in (1, 0):
        monkeypatch.chdir(folder / str(rank))
        environment = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": 29400, "GLOO_SOCKET_IFNAME": f"wire{rank}"}
        environment |= {"RANK": rank, "WORLD_SIZE": 2, "TIMEOUT_MINUTES": 0.2}
        options = {"environment": environment, "namespace": SPACES[rank], "rank": rank}
        started.append(Script(TRAIN, *SMALL, "--precision", "fp32", *flags, **options))
    return started[::-1]


@pytest.mark.skipif(not shutil.which("ip"), reason="needs the command ip: apt-get install iproute2")
def test_two_machines_learn_what_one_learns_and_a_cut_wire_loses_nothing(two_machines, monkeypatch):
    shutil.copytree(two_machines / "0", two_machines / "one")
    monkeypatch.chdir(two_machines / "one")
    without_torchrun(2, TRAIN, "--num-epochs", "3")
    wanted = weights()

    flags = ["--num-epochs", "3", "--checkpoint-minutes", "0"]
    machines = start_machines(two_machines, monkeypatch, *flags)
    wait_for_checkpoint(machines[0].is_alive)
    os.kill(machines[1].pid, signal.SIGSTOP)  # neither gets to the end of the run before the wire is cut
    subprocess.run(["ip", "-n", SPACES[1], "link", "set", "wire1", "down"], check=True)
    os.kill(machines[1].pid, signal.SIGCONT)
    for machine in machines:
        machine.wait_for("has lost another one")
        machine.kill()  # it would wait for what the other says
        machine.join()
    subprocess.run(["ip", "-n", SPACES[1], "link", "set", "wire1", "up"], check=True)

    machines = start_machines(two_machines, monkeypatch, *flags, "--load-model")
    assert [machine.status(120) for machine in machines] == [0, 0]
    assert "Continuing after" in machines[0].output()
    assert same(wanted, weights())
    assert not (two_machines / "1" / CHECKPOINT).exists()

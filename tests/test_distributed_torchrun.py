"""One run in several processes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import SMALL, leave_photos, rows, same
from forked import start_processes

import train

TRAIN, PLAIN = Path(train.__file__), Path(__file__).with_name("train_plainly.py")
CHECKPOINT = Path("my_checkpoint.pth.tar")


def torchrun(*flags: str, processes: int = 2, script: Path = TRAIN, **options) -> subprocess.Popen:
    """Starts so many processes on this machine; `flags` are the script's, a dictionary in options torchrun's."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher += [f"--{name}={value}" for name, value in options.items()]
    return subprocess.Popen(
        [*launcher, script, *SMALL, "--precision", "fp32", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def done(process: subprocess.Popen, status: int = 0) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, out + err
    return out + err


def wait_for(text: str, process: subprocess.Popen, stream: str = "stdout") -> None:
    seen = []
    while text not in (line := getattr(process, stream).readline()):
        seen.append(line)
        assert line, "".join([f"no {text!r}\n", *seen, *process.communicate(timeout=60)])


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for_checkpoint(process: subprocess.Popen) -> None:
    while not CHECKPOINT.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


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
    process = torchrun(*flags, script=PLAIN)
    wait_for_checkpoint(process)
    process.send_signal(signal.SIGTERM)
    out = done(process, 1)  # torchrun's own status
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
    process = torchrun(*flags, max_restarts=3)
    wait_for("  best", process)
    os.kill(children(process)[-1], signal.SIGKILL)
    assert "Continuing after" in done(process)
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
    out = done(torchrun(*flags), 1)
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


def start_machine(folder: Path, number: int, *flags: str) -> subprocess.Popen:
    command = ["ip", "netns", "exec", SPACES[number], sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
    command += [
        "--nproc_per_node=1",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=10.77.0.1:29400",
        f"--rdzv-conf=is_host={1 - number}",
    ]
    command += [f"--local-addr=10.77.0.{number + 1}", TRAIN, *SMALL, "--precision", "fp32", *flags]
    return subprocess.Popen(
        command, cwd=folder / str(number), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"GLOO_SOCKET_IFNAME": f"wire{number}", "PYTHONUNBUFFERED": "1", "TIMEOUT_MINUTES": "0.2"},
    )  # fmt: skip


@pytest.mark.skipif(not shutil.which("ip"), reason="needs the command ip: apt-get install iproute2")
def test_two_machines_learn_what_one_learns_and_a_cut_wire_loses_nothing(two_machines, monkeypatch):
    shutil.copytree(two_machines / "0", two_machines / "one")
    monkeypatch.chdir(two_machines / "one")
    without_torchrun(2, TRAIN, "--num-epochs", "3")
    wanted = weights()

    flags = ["--num-epochs", "3", "--checkpoint-minutes", "0"]
    machines = [start_machine(two_machines, number, *flags) for number in (0, 1)]
    monkeypatch.chdir(two_machines / "0")
    wait_for_checkpoint(machines[0])
    workers = children(machines[1])
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # neither gets to the end of the run before the wire is cut
    subprocess.run(["ip", "-n", SPACES[1], "link", "set", "wire1", "down"], check=True)
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    at_last = threading.Timer(120, end_machines)  # a process that hangs fails the test
    at_last.start()
    try:
        for machine in machines:
            wait_for("has lost another one", machine, "stderr")
            machine.kill()  # torchrun waits for minutes to find out for itself
            machine.wait()
    finally:
        at_last.cancel()
    subprocess.run(["ip", "-n", SPACES[1], "link", "set", "wire1", "up"], check=True)

    machines = [start_machine(two_machines, number, *flags, "--load-model") for number in (0, 1)]
    assert "Continuing after" in done(machines[0])
    done(machines[1])
    assert same(wanted, weights())
    assert not (two_machines / "1" / CHECKPOINT).exists()

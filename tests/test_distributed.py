"""What a process says when something goes wrong between the processes, or within it."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist

import utils
from machinery import errors, processes
from machinery.errors import UserError


@pytest.fixture
def group(monkeypatch):
    """Pretends to be one of two processes with a group; lists what was done with it."""
    done = []
    monkeypatch.setattr(processes, "WORLD_SIZE", 2)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(None, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *args: done.append("init"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroy"))
    return done


def test_the_group_is_never_destroyed(group):
    """It may wait for ever: with NCCL for a process that is gone, with PyTorch 2.6's gloo at any time."""
    with processes.process_group(1):
        pass
    for error in (ValueError, UserError, dist.DistBackendError):
        with pytest.raises((ValueError, UserError)), processes.process_group(1):
            raise error("nccl")
    assert group == ["init"] * 4


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (dist.DistBackendError("NCCL communicator was aborted on rank 0"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:525] Read error: Connection reset by peer"), True),
        (RuntimeError("Application timeout caused pair closure"), True),  # gloo's, if another operation gave up first
        (dist.DistBackendError("NCCL error in ...: ncclUnhandledCudaError\nCuda failure 2 'out of memory'"), False),
        (dist.DistBackendError("NCCL error in ...\nFailed to CUDA calloc async 608 bytes"), False),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_only_lost_processes_are_called_lost(group, error, is_lost):
    with pytest.raises(errors.Lost if is_lost else type(error)) as raised, processes.process_group(1):
        raise error
    assert is_lost == ("has lost another one, which has ended or was silent for 1 minute:" in str(raised.value))


def test_an_error_in_a_group_ends_the_process_at_once():
    code = (
        "import atexit, time, torch.distributed as dist\n"
        "from machinery import errors\n"
        "def main():\n"
        "    dist.init_process_group('gloo', store=dist.HashStore(), world_size=1, rank=0)\n"
        "    atexit.register(time.sleep, 60)  # as NCCL may wait for the others\n"
        "    raise errors.UserError('no photos: add some')\n"
        "errors.run(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1 and done.stderr.endswith("error: no photos: add some\n"), done.stderr


@pytest.mark.parametrize(
    ("signal_of_worker", "named"), [(signal.SIGBUS, "/dev/shm.*NUM_WORKERS = 0"), (signal.SIGKILL, "NUM_WORKERS")]
)
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="signals of Linux and macOS")
def test_a_worker_that_the_system_ends_gets_a_sentence(project, run_train, monkeypatch, signal_of_worker, named):
    getitem, parent = utils.CarvanaDataset.__getitem__, os.getpid()

    def killed(self, key):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal_of_worker)
        return getitem(self, key)

    monkeypatch.setattr(utils.CarvanaDataset, "__getitem__", killed)
    with pytest.raises(UserError, match=named):
        run_train("--num-workers", "1")

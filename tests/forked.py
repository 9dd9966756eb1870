"""Processes that start at once: a server forks them, which has imported all that takes 5 to 10 s (conftest.py)."""

import ctypes
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

from conftest import SMALL, draw_few_pictures
from torch.distributed import TCPStore

import train
from machinery import errors, processes

ROOT = Path(train.__file__).parent
CONTEXT = multiprocessing.get_context("forkserver")


class Forked(CONTEXT.Process):
    """A process in the working directory, of a group of its own as if a terminal had started it; it calls `main`.

    What it prints goes to the files out.txt and err.txt, with `rank` in their names.
    """

    def __init__(self, *flags: str, largest_file: int = resource.RLIM_INFINITY, rank: int | str = "") -> None:
        super().__init__()
        self.flags, self.largest_file = flags, largest_file
        self.printed = Path(f"out{rank}.txt").absolute(), Path(f"err{rank}.txt").absolute()
        for path in self.printed:
            path.write_text("")
        self.start()

    def run(self) -> None:
        os.setsid()
        multiprocessing.set_start_method("fork", force=True)  # of its workers: the server would have to import again
        for number, path in enumerate(self.printed, start=1):
            os.dup2(os.open(path, os.O_WRONLY), number)
        sys.stdout.reconfigure(line_buffering=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, processes.STOPPING)  # if it was a run that started the server
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest_file, self.largest_file))
        self.main()

    def output(self) -> str:
        return "".join(path.read_text() for path in self.printed)

    def wait_for(self, text: str) -> None:
        while text not in self.output():
            assert self.is_alive() or text in self.output(), self.output()
            time.sleep(0.01)

    def status(self, timeout: float = 60) -> int | None:
        """The exit status, minus the signal's number if one has ended it; None while it lives."""
        self.join(timeout)
        return self.exitcode


class Training(Forked):
    """A run of a tiny network at a tiny size, with few pictures."""

    def main(self) -> None:
        draw_few_pictures()
        errors.run(lambda: train.main([*SMALL, *self.flags]))


class Script(Forked):
    """What `python script flags` does, with few pictures.

    It has more variables in its environment, and may be in a network namespace.
    """

    def __init__(
        self,
        script: Path,
        *flags: str,
        environment: dict[str, object] | None = None,
        namespace: str = "",
        rank: int | str = "",
    ) -> None:
        self.script, self.environment, self.namespace = str(script), environment or {}, namespace
        super().__init__(*flags, rank=rank)

    def main(self) -> None:
        if self.namespace:
            with Path("/var/run/netns", self.namespace).open() as file:  # as `ip netns exec` does
                assert ctypes.CDLL(None).setns(file.fileno(), 0) == 0
        os.environ |= {name: str(value) for name, value in self.environment.items()}
        for name, module in list(sys.modules.items()):  # the project's modules look at it when they are imported
            folders = Path(getattr(module, "__file__", None) or "").parents
            if ROOT in folders and ROOT / ".venv" not in folders and name != "__main__":
                del sys.modules[name]
        draw_few_pictures()
        sys.argv = [self.script, *self.flags]
        runpy.run_path(self.script, run_name="__main__")


def start_processes(
    count: int, script: Path, *flags: str, store: TCPStore | None = None, start: int = 0
) -> list[Script]:
    """Start the processes that torchrun would start on this machine, without it.

    They use its `store`, if there is one, and this is their `start`, from 0: torchrun starts them again if one dies.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    if store:
        shared |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": start}
    return [
        Script(script, *flags, environment=shared | {"RANK": rank, "LOCAL_RANK": rank}, rank=rank)
        for rank in range(count)
    ]

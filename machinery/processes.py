"""Processes: what those of one run exchange under torchrun, and how signals stop them.

A run in one process calls the same functions, which then do nothing.
"""

import builtins
import math
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from machinery.errors import Lost, Stopped, counted

# torchrun's names: this process and how many there are, the same on its machine, and how often torchrun restarted it.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK, LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
TIMEOUT_MINUTES = float(os.environ.get("TIMEOUT_MINUTES", 10))  # until a process that is silent counts as lost


def age() -> float:
    """Return the seconds since this process started, in which it has imported what takes longest."""
    if not Path("/proc/self/stat").exists():
        return time.process_time()  # in which importing has computed
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # its start


progress = partial(tqdm, leave=False, disable=None if RANK == 0 else True)  # None: not without a terminal

# Part of every message about another process. When gloo has waited too long for one, it tells its other operations
# "Application timeout caused pair closure", and any of them may be the first that train.py hears of.
ABOUT_OTHERS = re.compile("gloo|nccl|pair closure", re.IGNORECASE)


@contextmanager
def process_group(minutes: float = TIMEOUT_MINUTES) -> Iterator[None]:
    """Connect the processes: NCCL for CUDA's tensors, gloo for the CPU's. All but the first print nothing.

    Raises Lost where another process has ended, or has not been heard of for so many minutes.
    """
    if WORLD_SIZE == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere) if RANK else nullcontext():
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=timedelta(minutes=minutes)))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # torchrun keeps this store when it starts processes again: they must not find those before in it
                store = dist.PrefixStore(f"start {RESTARTS}", store)
            dist.init_process_group(backend, None, timedelta(minutes=minutes), WORLD_SIZE, RANK, store)
            yield  # errors.run ends the process and its group: gloo's destructor may wait for ever (PyTorch 2.6)
        except RuntimeError as error:
            is_about_others = isinstance(error, dist.DistError) or ABOUT_OTHERS.search(str(error))
            if not is_about_others or is_out_of_memory(error):
                raise
            raise Lost(
                f"process {RANK} has lost another one, which has ended or was silent for {counted(minutes, 'minute')}: "
                "see what that one says, and start again (training with --load-model) "
                f"({str(error).splitlines()[0]})"
            ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of OpenCV, or a RuntimeError of the CPU, CUDA, cuBLAS, cuDNN, NCCL or MPS says so."""
    said = r"out of memory|(not enough|Insufficient|can't allocate) memory|ALLOC(ATION)?_FAILED|CUDA [cm]alloc"
    return bool(re.search(said, str(error)))


# ---------------------------------------------------------------------------------------------------------------------
# What processes exchange


def shard(count: int, rank: int = RANK) -> slice:
    """Return a process's images of a batch of `count`; shards differ by one image at most."""
    size, larger = divmod(count, WORLD_SIZE)
    start = rank * size + min(rank, larger)
    return slice(start, start + size + (rank < larger))


def all_gather(mine: Tensor, count: int) -> Tensor:
    """Return a batch of `count` images, the same in all processes, from their shards (n, ...)."""
    if WORLD_SIZE == 1:
        return mine
    padded = mine.new_zeros(math.ceil(count / WORLD_SIZE), *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, padded)
    sizes = [len(range(count)[shard(count, rank)]) for rank in range(WORLD_SIZE)]
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Add up all processes' tensors in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(value: int) -> int:
    """Return the largest of all processes' values."""
    if WORLD_SIZE == 1:
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def broadcast_object(make: Callable, *args: object) -> object:
    """Return what make(*args) gives in the first process, where alone it is called; its tensors are the CPU's."""
    objects = [make(*args) if RANK == 0 else None]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(objects)
    return objects[0]


def all_gather_object(mine: object) -> list:
    """Return what each process has, in a list."""
    objects = [mine] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(objects, mine)
    return objects


def run_id() -> str:
    """Return a name that all processes of a run share, also when torchrun starts them again, and no other run has."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return broadcast_object(lambda: uuid.uuid4().hex)
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=False)  # torchrun's, which outlives its processes
    store.compare_set("train.py's run", "", uuid.uuid4().hex)  # the first process sets it
    return store.get("train.py's run").decode()


def no_sync(model: nn.Module, is_last: bool) -> AbstractContextManager:
    """Return a context in which backward exchanges gradients only for the last part of a batch."""
    return nullcontext() if is_last or WORLD_SIZE == 1 else model.no_sync()


# ---------------------------------------------------------------------------------------------------------------------
# Signals


STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_pending: list[int] = []  # signals that have arrived and wait for stop_if_asked


@contextmanager
def signals_wait() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGUSR1 (Slurm's warning) wait for stop_if_asked; a second Ctrl-C ends at once.

    Signals are left alone in a notebook, which interrupts cells by them, and in a thread, which may not handle any.
    """
    is_notebook = hasattr(builtins, "__IPYTHON__")
    if is_notebook or threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(signum: int, _: object) -> None:
        if _pending and signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        _pending.append(signum)
        os.write(2, b"\nStopping after this step; Ctrl-C again ends at once.\n")  # print is not safe in a handler

    handlers = {signum: signal.signal(signum, note) for signum in STOPPING}
    try:
        yield
    finally:
        _pending.clear()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def stop_if_asked() -> None:
    """Raise Stopped if a signal is waiting in any process. Called between two batches, where the state is whole."""
    if signum := all_reduce_max(_pending[0] if _pending else 0):
        raise Stopped(signum)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block the signals that stop a run while workers start, so that each gets its handlers before the first signal.

    Workers inherit the block, whichever way they start, and end it in ignore_signals.
    """
    if not hasattr(signal, "pthread_sigmask"):  # on Windows, where signals reach one process
        yield
        return
    resource_tracker.ensure_running()  # spawn and forkserver start it, and it unblocks signals when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(_: int) -> None:
    """Make a worker outlive all signals that stop a run, however often they come: it is needed until the run has saved.

    So neither does the SIGTERM of PyTorch or multiprocessing end it, but the loader's close().
    """
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

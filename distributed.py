"""One run in several processes, as torchrun --nproc_per_node=4 train.py starts them; alone, all of it does nothing."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dataset import UserError

# What torchrun tells a process: which it is, of how many, and which on its machine; and how often it started it again.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK, LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


class Lost(UserError):
    """Another process cannot be reached; that one may know why."""


@contextmanager
def process_group(minutes: float) -> Iterator[None]:
    """Connects the processes: NCCL for CUDA's tensors, gloo for the CPU's. All but the first print nothing.

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
            yield
            dist.destroy_process_group()  # after an error it might wait for ever for a process that is gone
        except RuntimeError as error:
            is_about_others = isinstance(error, dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE)
            if not is_about_others or is_out_of_memory(error):
                raise
            raise Lost(
                f"process {RANK} has lost another one, which has ended or was silent for {minutes:g} minutes: see what "
                f"that one says, and start again; training goes on with --load-model ({str(error).splitlines()[0]})"
            ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a RuntimeError of the CPU, CUDA, cuBLAS, cuDNN, NCCL or MPS says so."""
    return bool(re.search(r"out of memory|can't allocate memory|ALLOC(ATION)?_FAILED|CUDA [cm]alloc", str(error)))


def exit_(status: int) -> None:
    """Ends the process; at once where a group is left, because NCCL may wait for ever for a process that is gone."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@contextmanager
def first_on_machine() -> Iterator[None]:
    """Within it the first process of each machine is done before the others begin."""
    if WORLD_SIZE > 1 and LOCAL_RANK > 0:
        dist.barrier()
    yield
    if WORLD_SIZE > 1 and LOCAL_RANK == 0:
        dist.barrier()


def share(count: int, rank: int = RANK) -> slice:
    """A process's images of a batch of so many; shares differ by one image at most."""
    size, larger = divmod(count, WORLD_SIZE)
    start = rank * size + min(rank, larger)
    return slice(start, start + size + (rank < larger))


def gather(mine: Tensor, count: int) -> Tensor:
    """A batch of `count` images, the same on all processes, from their shares (n, ...)."""
    if WORLD_SIZE == 1:
        return mine
    padded = mine.new_zeros(-(-count // WORLD_SIZE), *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, padded)
    sizes = [len(range(count)[share(count, rank)]) for rank in range(WORLD_SIZE)]
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def sum_(tensor: Tensor) -> Tensor:
    """Adds up all processes' tensors in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def highest(number: int) -> int:
    """The highest of all processes' numbers."""
    if WORLD_SIZE == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def from_first(work: Callable, *args: object) -> object:
    """What work returns in the first process, where alone it is called; tensors in it are the CPU's."""
    found = [work(*args) if RANK == 0 else None]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(found)
    return found[0]


def everyones(mine: object) -> list:
    """What each process has, in a list."""
    found = [mine] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(found, mine)
    return found


def parallel(model: nn.Module) -> nn.Module:
    """The model, whose gradients become the mean of all processes' while backward is still going on."""
    return DistributedDataParallel(model)


def without_exchange(model: nn.Module, is_so: bool) -> object:
    """A context in which backward does not exchange gradients yet."""
    return model.no_sync() if is_so and WORLD_SIZE > 1 else nullcontext()

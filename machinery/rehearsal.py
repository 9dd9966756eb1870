"""The rehearsal before a run of MINUTES: how long training, validation and the end take here."""

import io
import math
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from machinery import checkpoints, processes
from machinery.checkpoints import CheckpointWriter, State
from machinery.samples import Samples


class Steps:
    """What train_epoch trains on in place of a Run: so many real batches, at the beginning of the schedule."""

    progress = 0.0

    def __init__(self, state: State, loader: DataLoader, steps: int) -> None:
        self.state, self.loader, self.steps = state, loader, steps

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from islice(chain.from_iterable(map(self.loader.epoch, count())), self.steps)

    def add(self, loss: Tensor) -> None:
        self.loss = processes.all_reduce_sum(loss)


class Rehearsal:
    """Measures on the state itself, and leaves no trace in it.

    Args:
        loader, val_loader: of a run. Its `writer` names the checkpoint, beside which a trial is written.
        train: train.py's train_epoch, called with Steps.
        update: update_batch_norm of loader, called with nothing.
        check: check_accuracy of val_loader, called with nothing.
        score: full_size_dice, called with a checkpoint and validation photos.
        val_set: all validation photos.
    """

    def __init__(
        self,
        state: State,
        loader: DataLoader,
        val_loader: DataLoader,
        writer: CheckpointWriter,
        train: Callable[[Steps], None],
        update: Callable[[], None],
        check: Callable[[], object],
        score: Callable[[Path, Samples], object],
        val_set: Samples,
    ) -> None:
        self.state, self.loader, self.val_loader, self.writer = state, loader, val_loader, writer
        self.train, self.update, self.check, self.score, self.val_set = train, update, check, score, val_set

    def measure(self, seconds: float) -> dict[str, float]:
        """Return the seconds of training on an "image", of a "validation", and of the "end", the same in all processes.

        The rehearsal itself takes about as long as `seconds`, but at least a few steps.
        """
        photos, size = len(self.loader.dataset), self.loader.batch_sampler.size
        epoch_steps, val_photos, val_batches = math.ceil(photos / size), len(self.val_set.pairs), len(self.val_loader)
        updates = min(math.ceil(64 / size), epoch_steps)
        with self._no_trace(), redirect_stdout(io.StringIO()), self._trial_checkpoint() as path:
            with suppress(Exception):  # report.save_grid says what is wrong
                import torchvision.utils  # noqa: F401  (the pictures need it, and it takes seconds)
            step = mean(timings(self._train, 10**9, seconds / 2))
            update = mean(timings(partial(limited, self.loader, self.update), updates, seconds / 8))
            batch = mean(timings(partial(limited, self.val_loader, self.check), val_batches, seconds / 8))
            scores = timings(lambda number: self.score(path, self.val_set.part(number)), val_photos, seconds / 8)
        (_, one), (number, several) = scores[0], scores[-1]  # reading the checkpoint takes time, too
        end = several + max(0, several - one) / max(1, number - 1) * (val_photos - number)
        validation = update * updates + batch * val_batches
        costs = {"image": step * epoch_steps / photos, "validation": validation, "end": end}
        return processes.broadcast_object(lambda: costs)

    def _train(self, number: int) -> None:
        steps = Steps(self.state, self.loader, number)
        self.train(steps)
        steps.loss.item()  # waits for the device

    @contextmanager
    def _trial_checkpoint(self) -> Iterator[Path]:
        """Write the weights as a checkpoint, which is removed after the block, or by the next run if this is killed."""
        path = self.writer.path.with_name(f".{self.writer.path.name[:40]}.{secrets.token_hex(8)}.tmp")
        try:
            if processes.RANK == 0:
                checkpoints.save(self.writer.header | {"state_dict": self.state.model.state_dict()}, path)
            yield path
        finally:
            path.unlink(missing_ok=True)

    @contextmanager
    def _no_trace(self) -> Iterator[None]:
        """Give the state and the random numbers back as they were."""
        state = self.state
        before = checkpoints.copied(state.state_dict(), {}) | {"spent": state.spent}
        device = next(state.model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                yield
            finally:
                state.load_state_dict(before)


def limited(loader: DataLoader, work: Callable[[], object], batches: int) -> None:
    """Call what goes through a loader while it has so many batches at most."""
    order = loader.batch_sampler
    length, order.length = order.length, min(order.length, batches * order.size)
    try:
        work()
    finally:
        order.length = length


def mean(found: list[tuple[int, float]]) -> float:
    """Return the seconds for each of the last and largest number in `timings`."""
    number, seconds = found[-1]
    return seconds / number


def timings(work: Callable[[int], object], most: int, seconds: float) -> list[tuple[int, float]]:
    """Return how long work(number) takes for the numbers 1, 2, 4, ... until `seconds` have passed, but `most` at most.

    A trial before them, which compiles, imports and allocates, does not count.
    """
    work(1)
    begin, number, found, is_enough = time.perf_counter(), 1, [], False
    while not is_enough:
        start = time.perf_counter()
        work(number)
        end = time.perf_counter()
        found.append((number, end - start))
        is_enough = processes.all_reduce_max(int(number == most or end - begin > seconds))
        number = min(2 * number, most)
    return found

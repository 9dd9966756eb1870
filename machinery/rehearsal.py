"""The rehearsal before a run of MINUTES: how long training, validation and the end take here."""

import io
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import chain, count, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from machinery import checkpoints, processes
from machinery.checkpoints import CheckpointWriter, State
from machinery.files import temporary_name
from machinery.report import Report
from machinery.samples import Samples


class Steps:
    """Stands in for a Run in train_epoch: some real batches, at the beginning of the schedule."""

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
        loader, val_loader: of a run. Its `writer` names the checkpoint, beside which a trial is written, and its
            `report`, which the first process alone has, draws into another folder.
        train: train.py's train_epoch, called with Steps.
        update: update_batch_norm of loader, called with nothing.
        check: check_accuracy of val_loader, called with what draws a batch.
        score: full_size_dice, called with a checkpoint and validation photos.
        val_set: all validation photos.
    """

    def __init__(
        self,
        state: State,
        loader: DataLoader,
        val_loader: DataLoader,
        writer: CheckpointWriter,
        report: Report | None,
        train: Callable[[Steps], None],
        update: Callable[[], None],
        check: Callable[[object], tuple[dict, list]],
        score: Callable[[Path, Samples], object],
        val_set: Samples,
    ) -> None:
        self.state, self.loader, self.val_loader, self.writer, self.report = state, loader, val_loader, writer, report
        self.train, self.update, self.check, self.score, self.val_set = train, update, check, score, val_set

    def measure(self, seconds: float) -> dict[str, float]:
        """Return the seconds of training on an "image", of a "validation", and of the "end", the same in all processes.

        The rehearsal itself takes about as long as `seconds`, but at least a few steps.
        """
        photos, size = len(self.loader.dataset), self.loader.batch_sampler.size
        epoch_steps, val_photos, val_batches = math.ceil(photos / size), len(self.val_set.pairs), len(self.val_loader)
        updates = min(math.ceil(64 / size), epoch_steps)
        with self._no_trace(), redirect_stdout(io.StringIO()), self._trial_checkpoint() as path:
            steps, training = timings(self._train, 10**9, seconds / 2)[-1]
            validation = extrapolated(self._update, updates, seconds / 8)
            validation += extrapolated(self._validate, val_batches, seconds / 8)
            end = extrapolated(lambda number: self.score(path, self.val_set.part(number)), val_photos, seconds / 8)
        costs = {"image": training / steps * epoch_steps / photos, "validation": validation, "end": end}
        return processes.broadcast_object(lambda: costs)

    def _train(self, number: int) -> None:
        steps = Steps(self.state, self.loader, number)
        self.train(steps)
        steps.loss.item()  # waits for the device

    def _update(self, batches: int) -> None:
        with limited(self.loader, batches):
            self.update()

    def _validate(self, batches: int) -> None:
        """Check so many batches, and draw pictures, curves and page of them."""
        with limited(self.val_loader, batches) as photos, TemporaryDirectory() as folder:
            if not self.report:
                self.check(None)
                return
            with self.report.trial(Path(folder), photos) as trial:
                metrics, photo_dice = self.check(trial.begin(1, is_last=True))
                trial.finish([{"epoch": 1, **metrics}], [photo_dice])

    @contextmanager
    def _trial_checkpoint(self) -> Iterator[Path]:
        """Write the weights as a checkpoint, which is removed after the block, or by the next run if this is killed."""
        path = temporary_name(self.writer.path)
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


@contextmanager
def limited(loader: DataLoader, batches: int) -> Iterator[int]:
    """Let a loader have so many batches at most; give the number of their images."""
    order = loader.batch_sampler
    length, order.length = order.length, min(order.length, batches * order.size)
    try:
        yield order.length
    finally:
        order.length = length


def extrapolated(work: Callable[[int], object], number: int, seconds: float) -> float:
    """Return how long work(number) takes, from timings of less: it has a part that is the same for any number."""
    found = timings(work, number, seconds)
    (_, one), (most, several) = found[0], found[-1]
    return several + max(0, several - one) / max(1, most - 1) * (number - most)


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
        is_enough = processes.all_reduce_max(int(number == most or (number > 1 and end - begin > seconds)))
        number = min(2 * number, most)
    return found

"""A run beside its learning: how far it is, when it ends, saves and stops, and the row that a validation leaves."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from machinery import processes
from machinery.checkpoints import CheckpointWriter, Epoch, State
from machinery.errors import Stopped, UserError, counted
from machinery.length import Length
from machinery.processes import progress
from machinery.rehearsal import Rehearsal
from machinery.report import Report, save_train_batch
from machinery.samples import Samples, car_of

# Student's t at 97.5 % for 1, 2, ... degrees of freedom, which are one less than the values that have a mean
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
STUDENT += (2.120, 2.110, 2.101)


def doubt(images: list[Path], dice: list[float]) -> str | None:
    """Say how uncertain the mean Dice of a few validation photos is; None of 20 or more, or of 20 cars."""
    groups: dict[str, list[float]] = {}
    for image, value in zip(images, dice, strict=True):
        groups.setdefault(car_of(image) or image.name, []).append(value)
    count, noun = len(groups), "photo" if len(groups) == len(images) else "car"
    if count > len(STUDENT) + 1 or len(set(dice)) == 1 < count:  # equal ones, such as 0, have no spread
        return None
    if count == 1:
        return f"One validation {noun} says little about others."
    means = list(map(statistics.fmean, groups.values()))
    half = STUDENT[count - 2] * statistics.stdev(means) / math.sqrt(count)
    low, high = max(0, statistics.fmean(means) - half), min(1, statistics.fmean(means) + half)
    return f"Validation {noun}s are few, {count}: the mean Dice of many is between {low:.3f} and {high:.3f} (95 %)."


FEW_PIXELS = 100  # of foreground at training size, such as 10 x 10


def one_class(dice: list[float], foreground: np.ndarray) -> str | None:
    """Say that a network does not tell foreground from background, which its Dice shows; None where it does.

    Args:
        dice, foreground: of each validation photo; the latter is the share of its pixels.
    """
    share = f"{100 * foreground.mean():.1f} % of the validation masks"
    if foreground.any() and np.array_equal(dice, foreground == 0):
        return f"it finds no foreground, which {share} are"
    if np.allclose(dice, 2 * foreground / (1 + foreground), rtol=1e-6, atol=0):
        return f"it predicts foreground for every pixel, which {share} are"
    return None


def validation_size(val_set: Samples, s: SimpleNamespace) -> float:
    """Return as how many training images of IMAGE_HEIGHT x IMAGE_WIDTH (a crop's) a validation counts, by its pixels.

    Tiles of crops overlap by a quarter along each side, so that a photo of several counts nearly twice.
    """
    sizes = np.array([val_set.size_of(index) for index in range(len(val_set.pairs))])
    images = sizes.prod(1) / (s.image_height * s.image_width)
    return float(np.where(images > 1, images * 16 / 9, 1).sum())


class Run:
    """All that surrounds training steps: progress, saving, stopping, and the row that a validation leaves.

    Args:
        loader, val_loader: of the training and the validation photos.
        writer: of the checkpoints.
        report: draws the pictures, in the first process alone.
        s: train.py's settings.
    """

    def __init__(
        self,
        state: State,
        loader: DataLoader,
        val_loader: DataLoader,
        writer: CheckpointWriter,
        report: Report,
        s: SimpleNamespace,
    ) -> None:
        self.state, self.loader, self.val_loader, self.writer, self.s = state, loader, val_loader, writer, s
        self.report = report if processes.RANK == 0 else None
        self.has_warned = False  # of a network that does not tell the classes apart
        self.photos, self.batch_size = len(loader.dataset), loader.batch_sampler.size
        self.length = Length(state, self.photos, validation_size(val_loader.dataset, s), s)

    @contextmanager
    def until_stopped(self) -> Iterator[None]:
        """Let the block run until its end or a signal; then wait until all is written and drawn.

        Between two batches a signal can stop it: the state is saved, and Stopped passes on.
        """
        with self.writer, self.report or nullcontext(), processes.signals_wait():
            try:
                yield
            except Stopped as stopped:
                self._save_because_of(stopped)
                raise
            self.writer.wait()

    def plan(self, val_set: Samples, **work: object) -> None:
        """Say what to expect; for MINUTES rehearse before, with Rehearsal's arguments, and choose NUM_EPOCHS.

        Raises UserError where there is no time for a step.
        """
        self.length.guess["end"] *= len(val_set.pairs) / len(self.val_loader.dataset.pairs)  # with crops, of all photos
        if self.s.minutes:
            loaders = self.loader, self.val_loader
            self.length.choose(Rehearsal(self.state, *loaders, self.writer, self.report, val_set=val_set, **work))
            self._keep_num_epochs()
        if not self.is_done:
            print(self.length.expectation())

    def _keep_num_epochs(self) -> None:
        """Save and show NUM_EPOCHS as it was chosen."""
        self.writer.header["settings"]["num_epochs"] = self.length.num_epochs
        if self.report:
            self.report.settings = self.report.settings | {"num_epochs": self.length.num_epochs}

    @property
    def progress(self) -> float:
        """Return how much of the whole run is done, from 0 to 1."""
        return self.length.done / self.length.total

    @property
    def is_done(self) -> bool:
        return self.state.epochs >= self.length.num_epochs

    def _remaining(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches that are left until the next validation, of one epoch after the other."""
        state = self.state
        while state.epoch.images < self.length.until_validation:
            number, start = divmod(state.epoch.images, self.photos)
            for batch in self.loader.epoch(state.epochs + number, start):
                yield batch
                if state.epoch.images >= self.length.until_validation:
                    return

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches that are left until the next validation, uint8; after each show the loss, and save in time.

        Raises UserError if the loss is not finite.
        """
        epoch, skipped = self.state.epoch, 0
        start, title = time.perf_counter() - epoch.seconds, f"epoch {self.length.epoch}/{self.length.num_epochs}"
        with progress(total=self.length.until_validation, initial=epoch.images, desc=title, unit="img") as bar:
            line_due = time.monotonic() + 60
            for step, (images, masks) in enumerate(self._remaining()):
                if step == 0 and self.report:
                    save_train_batch(images, masks, self.report.folder / "train_batch.png")
                scale, seconds, photos = self.state.scaler.get_scale(), epoch.seconds, epoch.images
                yield images, masks

                skipped += self.state.scaler.get_scale() < scale  # fp16: a gradient has overflowed
                epoch.seconds = time.perf_counter() - start
                if self.length.watch(epoch.seconds - seconds, epoch.images - photos):
                    self._keep_num_epochs()
                    bar.total = self.length.until_validation
                title = f"epoch {self.length.epoch}/{self.length.num_epochs}"
                bar.set_description(title, refresh=False)
                bar.update(epoch.images - bar.n)
                is_silent = bar.disable and time.monotonic() > line_due  # no terminal: a line a minute in the log
                if step % 10 == 0 or is_silent:  # reading a loss waits for the device
                    loss = list(epoch.losses.values())[-1].item() / self.batch_size
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    if not math.isfinite(loss):
                        break
                if is_silent:
                    print(f"{title}: {epoch.images} of {bar.total} images, loss {loss:.4f}", flush=True)
                    line_due = time.monotonic() + 60
                if self.writer.seconds_since_save() > 60 * self.s.checkpoint_minutes:
                    self.save()
        if skipped:
            steps = counted(step + 1, "step")
            tqdm.write(
                f"Steps that were skipped: {skipped} of {steps}, whose gradients overflowed fp16. A few are normal."
            )
        self.raise_if_not_finite()
        self.trained_at = time.perf_counter()
        epoch.seconds = self.trained_at - start

    def add(self, loss: Tensor) -> None:
        """Count a step, and keep the sum of the losses of this process's images, 0-dim."""
        epoch = self.state.epoch
        epoch.losses[epoch.images] = processes.all_reduce_sum(loss)
        epoch.images += min(self.batch_size, self.photos - epoch.images % self.photos)
        epoch.computed += self.batch_size

    def pictures(self) -> Callable[[Tensor, Tensor], None] | None:
        """Return what draws a validation batch, from its logits and each image's Dice; None where nothing is drawn."""
        epoch = self.length.epoch
        return self.report.begin(epoch, is_last=epoch == self.length.num_epochs) if self.report else None

    def end_epoch(self, metrics: dict[str, float], photo_dice: list[float]) -> None:
        """Add a row to the history, from the means and each photo's Dice of check_accuracy; print and save."""
        self.raise_if_not_finite()  # again: validation follows new statistics of BatchNorm
        state, epoch = self.state, self.state.epoch
        row = {
            "epoch": self.length.epoch,
            "train_loss": torch.stack(list(epoch.losses.values())).sum().item() / epoch.computed,
            **metrics,
            "learning_rate": state.optimizer.param_groups[0]["lr"],
            "seconds": epoch.seconds + time.perf_counter() - self.trained_at,
            "images_per_second": epoch.computed / epoch.seconds,
        }
        is_best = row["dice"] > state.best
        state.history.append(row)
        state.photo_dice.append(photo_dice)
        state.best = max(state.best, row["dice"])
        state.epoch = Epoch()
        try:
            if self.report:
                self.report.finish(state.history, state.photo_dice)
        finally:  # a picture that cannot be written costs no epoch
            self.writer.save(state, is_best)

        self._print_row(row, is_best)
        if self.is_done or (self.progress >= 0.5 and not self.has_warned):
            self._warn_of_one_class(photo_dice)

    def _warn_of_one_class(self, photo_dice: list[float]) -> None:
        """Print a line where the network does not tell the classes apart, which means nothing at first."""
        foreground = self.val_loader.dataset.infos["foreground"]
        if said := one_class(photo_dice, foreground):
            self.has_warned = True
            pixels = np.median(foreground[foreground > 0]) * self.s.image_height * self.s.image_width
            crops = "; objects of a few pixels need crops (docs/crops.md)" if pixels < FEW_PIXELS else ""
            length = "MINUTES" if self.s.minutes else "NUM_EPOCHS"
            print(f"WARNING: {said}: raise {length}{'' if self.s.crop else crops}")

    def print_names(self, scores: Iterable[str]) -> None:
        """Print the names of the columns in which end_epoch prints, of which these are check_accuracy's scores."""
        self.columns = {name: max(len(name), 6) for name in ("train_loss", "val_loss", *scores)}  # and their widths
        print("  ".join(("epoch", *(f"{name:>{width}}" for name, width in self.columns.items()), "seconds")))

    def _print_row(self, row: dict, is_best: bool) -> None:
        values = (f"{row[name]:{width}.4f}" for name, width in self.columns.items())
        print("  ".join((f"{row['epoch']:5}", *values, f"{row['seconds']:7.1f}")) + "  best" * is_best)

    def save(self) -> None:
        """Queue a checkpoint, unless the weights are not finite: then the one before stays. Raises UserError."""
        if self.state.epoch.losses:
            self.raise_if_not_finite()
        self.writer.save(self.state)

    def raise_if_not_finite(self) -> None:
        """Raise UserError where a loss, weight or statistic is infinite or nan, with the first such batch's names."""
        state = self.state
        starts, losses = list(state.epoch.losses), torch.stack(list(state.epoch.losses.values()))
        bad = (~losses.isfinite()).nonzero()
        if len(bad) or not all(value.isfinite().all() for value in state.model.state_dict().values()):
            first = bad[0].item() if len(bad) else len(starts) - 1
            epoch, start = divmod(starts[first], self.photos)
            batch = self.loader.batch_sampler.batches(state.epochs + epoch, start)[0]
            names = dict.fromkeys(self.loader.dataset.image_of(index).name for index in batch)
            fp16 = ', or set PRECISION = "fp32"' if state.scaler.is_enabled() else ""
            raise UserError(
                f"training diverged (loss {losses[first].item():.3g}) with {', '.join(names)}: look at these photos "
                f"and their masks, or lower LEARNING_RATE{fp16}; no checkpoint was changed"
            )

    def _save_because_of(self, stopped: Stopped) -> None:
        state = self.state
        if not state.history and not state.epoch.images:
            print(f"Stopped by {stopped} before the first step: nothing was saved.")
            return
        self.save()
        self.writer.wait()
        print(
            f"Stopped by {stopped} after {counted(state.epochs, 'epoch')} and "
            f"{counted(state.epoch.images, 'image')} of the next, "
            f"which {self.writer.path} holds: continue with the same flags and --load-model"
        )

    def print_result(self, dice: float, threshold: float, highest: float) -> None:
        """Print the last lines of a run.

        Args:
            dice: the best weights' mean Dice at the photos' original size, nan where that is unknown.
            threshold, highest: the best threshold on these photos, and the mean Dice there.
        """
        best = f"{self.state.best:.4f}" if self.state.best >= 0 else "unknown"
        full = "unknown" if math.isnan(dice) else f"{dice:.4f}"
        print(f"Dice of the best weights: {best} at training size, {full} at the photos' original size.")
        if photo_dice := self.state.photo_dice:
            scores = [row["dice"] for row in self.state.history[-len(photo_dice) :]]
            images = [image for image, _ in self.val_loader.dataset.pairs]
            if line := doubt(images, photo_dice[scores.index(max(scores))]):
                print(line)
        if highest > 0:
            print(f"On these photos the best threshold would be {threshold:g}, with {highest:.4f}.")
        print(f"The best weights are in {self.writer.best_path}, the newest state in {self.writer.path}.")
        if self.report:
            print(f"Look at {(self.report.folder / 'index.html').resolve().as_uri()}")

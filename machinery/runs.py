"""A run beside its learning: how far it is, when it ends, saves and stops, and the row that a validation leaves."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime, timedelta
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from machinery import processes
from machinery.checkpoints import CheckpointWriter, Epoch, State
from machinery.errors import Stopped, UserError
from machinery.processes import progress
from machinery.rehearsal import FORWARD, Rehearsal
from machinery.report import Report, save_train_batch

FEW, ENOUGH = 75, 300  # steps: after few a network has learned little; the quick start has 96


class Run:
    """What surrounds the training of a state.

    An epoch of so few photos that validation would cost more than training is validated less often, so that validation
    takes a tenth of the time.

    Args:
        loader, val_photos: the training photos, and how many are validated on.
        writer: of the checkpoints.
        report: draws the pictures, in the first process alone.
        s: train.py's settings.
    """

    def __init__(
        self,
        state: State,
        loader: DataLoader,
        val_photos: int,
        writer: CheckpointWriter,
        report: Report,
        s: SimpleNamespace,
    ) -> None:
        self.state, self.loader, self.writer, self.s = state, loader, writer, s
        self.report = report if processes.RANK == 0 else None
        self.photos, self.batch_size = len(loader.dataset), loader.batch_sampler.size
        validation = FORWARD * (min(64, self.photos) + val_photos)  # in photos that are trained on
        self.every = math.ceil(10 * validation / self.photos) if validation > self.photos else 1  # epochs
        self.guess = {"image": 1.0, "validation": validation, "end": FORWARD * val_photos}  # as Rehearsal.measure's
        self.steps, self.timed_seconds, self.timed_photos = 0, 0.0, 0  # of this process; the first step is not timed

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

    # -----------------------------------------------------------------------------------------------------------------
    # How long it is

    @property
    def total(self) -> int:
        """How many photos the whole run trains on, each as often as it comes."""
        return self.state.plan["photos"] if self.state.plan else self.s.num_epochs * self.photos

    @property
    def num_epochs(self) -> int:
        """NUM_EPOCHS, or what was chosen for MINUTES, of which the last epoch may be cut off."""
        return math.ceil(self.total / self.photos)

    @property
    def done(self) -> int:
        """How many photos were trained on."""
        return self.state.epochs * self.photos + self.state.epoch.images

    @property
    def progress(self) -> float:
        """How much of the whole run is done, from 0 to 1."""
        return self.done / self.total

    @property
    def is_done(self) -> bool:
        return self.state.epochs >= self.num_epochs

    @property
    def epoch(self) -> int:
        """The number, from 1, of the epoch that the last photo belongs to."""
        return self.state.epochs + max(1, math.ceil(self.state.epoch.images / self.photos))

    @property
    def until_validation(self) -> int:
        """How many photos are trained on between the last validation and the next."""
        epochs = (self.state.epochs // self.every + 1) * self.every
        return min(epochs * self.photos, self.total) - self.state.epochs * self.photos

    def seconds_for(self, photos: int) -> float:
        """Return how long it takes to train on so many photos, validate, and end: in seconds of the rehearsal."""
        costs = self.state.plan or self.guess
        validations = math.ceil(photos / (self.every * self.photos))
        return photos * costs["image"] + validations * costs["validation"] + costs["end"]

    def photos_in(self, seconds: float) -> int:
        """Return the most photos of which seconds_for is no longer; below 0 where there is no time for any."""
        costs, round_ = self.state.plan or self.guess, self.every * self.photos
        seconds -= costs["end"]
        rounds = seconds // (round_ * costs["image"] + costs["validation"])
        seconds -= rounds * (round_ * costs["image"] + costs["validation"]) + costs["validation"]
        return int(rounds * round_ + max(seconds / costs["image"], 0 if rounds else -1))

    def plan(self, rehearsal: Rehearsal) -> None:
        """Say what to expect; for MINUTES choose first what there is time for, unless the checkpoint holds it.

        Raises UserError where there is no time for anything.
        """
        if self.s.minutes and not self.state.plan:
            self._choose(rehearsal)
        if self.s.minutes:
            self._keep_num_epochs()
            self.check_due = time.monotonic() + 3 * self.s.minutes  # a twentieth
        if not self.is_done:
            print(self._expectation())

    def _choose(self, rehearsal: Rehearsal) -> None:
        limit = 60 * self.s.minutes
        self.state.plan = {"photos": self.done + 1} | rehearsal.measure(limit / 20 if limit < 400 else 20)
        spent = processes.broadcast_object(lambda: self.state.seconds)
        photos = self.photos_in(0.97 * limit - spent)  # pictures and checkpoints, which threads write, take some, too
        if photos < self.batch_size:
            least = (spent + self.seconds_for(10 * self.batch_size)) / 60
            raise UserError(
                f"MINUTES is {self.s.minutes:g}, of which {spent / 60:.2g} are over before the first step: set it to "
                f"{math.ceil(11 * least) / 10:g} or more"
            )
        self.state.plan["photos"] = self.done + photos

    def _keep_num_epochs(self) -> None:
        """Show and save NUM_EPOCHS as it was chosen."""
        self.writer.header["settings"]["num_epochs"] = self.num_epochs
        if self.report:
            self.report.settings = self.report.settings | {"num_epochs": self.num_epochs}

    def _expectation(self) -> str:
        """Say of how many steps the run is, and with which flag there were enough of them."""
        epoch_steps = math.ceil(self.photos / self.batch_size)
        last = self.total - (self.num_epochs - 1) * self.photos
        steps = (self.num_epochs - 1) * epoch_steps + math.ceil(last / self.batch_size)
        advice = "."
        if self.s.minutes:
            length = f"{self.s.minutes:g} minutes are {self.total / self.photos:.4g} epochs, {steps} steps"
            if steps < FEW:
                seconds = self.state.seconds + self.seconds_for(ENOUGH * self.batch_size)
                advice = f", from which a network learns little; --minutes {math.ceil(seconds / 58)} takes {ENOUGH}."
        else:
            length = f"{self.num_epochs} epochs are {steps} steps"
            if steps < FEW:
                epochs = 10 * math.ceil(ENOUGH / 10 / epoch_steps)
                advice = f", from which a network learns little; --num-epochs {epochs} takes {epochs * epoch_steps}."
        noun = "crops" if self.s.crop else "photos"
        return f"{self.photos} {noun}: {length}{advice}"

    def _seconds_left(self) -> float:
        """Return how long the rest takes at the speed that training has had in this process."""
        slower = self.timed_seconds / self.timed_photos / (self.state.plan or self.guess)["image"]
        return slower * self.seconds_for(self.total - self.done)

    def _surplus(self) -> int:
        """Return for how many photos there is no time: 0 where the run ends within a twentieth of MINUTES."""
        if processes.RANK or time.monotonic() < self.check_due:
            return 0
        limit, left = 60 * self.s.minutes, self._seconds_left()
        self.check_due = time.monotonic() + limit / 20
        if self.state.seconds + left < 1.05 * limit:
            return 0
        share = self.seconds_for(self.total - self.done) / left  # of the rehearsal's speed
        fitting = self.photos_in(share * (limit - self.state.seconds))
        return max(0, self.total - self.done - max(fitting, self.batch_size))

    def _shorten(self) -> None:
        """Train on fewer photos where the machine is slower than the rehearsal: in all processes, as the first says."""
        if surplus := processes.all_reduce_max(self._surplus()):
            before = self.total / self.photos
            self.state.plan = self.state.plan | {"photos": self.total - surplus}
            self._keep_num_epochs()
            now = self.total / self.photos
            tqdm.write(f"This is slower than the rehearsal: it ends after {now:.4g} epochs instead of {before:.4g}.")

    # -----------------------------------------------------------------------------------------------------------------
    # Epochs

    def _remaining(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches that are left until the next validation, of one epoch after the other."""
        state = self.state
        while state.epoch.images < self.until_validation:
            number, start = divmod(state.epoch.images, self.photos)
            for batch in self.loader.epoch(state.epochs + number, start):
                yield batch
                if state.epoch.images >= self.until_validation:
                    return

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches that are left until the next validation, uint8; after each show the loss, and save in time.

        Raises UserError if the loss is not finite.
        """
        epoch, skipped = self.state.epoch, 0
        start, title = time.perf_counter() - epoch.seconds, f"epoch {self.epoch}/{self.num_epochs}"
        with progress(total=self.until_validation, initial=epoch.images, desc=title, unit="img") as bar:
            line_due = time.monotonic() + 60
            for step, (images, masks) in enumerate(self._remaining()):
                if step == 0 and self.report:
                    save_train_batch(images, masks, self.report.folder / "train_batch.png")
                scale, seconds, photos = self.state.scaler.get_scale(), epoch.seconds, epoch.images
                yield images, masks

                skipped += self.state.scaler.get_scale() < scale  # fp16: a gradient has overflowed
                epoch.seconds = time.perf_counter() - start
                self._watch(epoch.seconds - seconds, epoch.images - photos)
                title = f"epoch {self.epoch}/{self.num_epochs}"
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
            tqdm.write(f"{skipped} of {step + 1} steps were skipped: gradients overflowed fp16. A few are normal.")
        self.raise_if_not_finite()
        self.trained_at = time.perf_counter()
        epoch.seconds = self.trained_at - start

    def _watch(self, seconds: float, photos: int) -> None:
        """Time a step. After some of them say when the run ends, and see to it that it ends in time."""
        self.steps += 1
        if self.steps == 1:  # it compiles, allocates and starts workers
            return
        self.timed_seconds, self.timed_photos = self.timed_seconds + seconds, self.timed_photos + photos
        if self.s.minutes:
            self._shorten()
        if self.steps == 5:
            left = self._seconds_left()
            end = datetime.now() + timedelta(seconds=left)
            day = "" if end.date() == datetime.now().date() else f"{end:%A}, "
            tqdm.write(f"It takes about {duration(self.state.seconds + left)}, until {day}{end:%H:%M}.")

    def add(self, loss: Tensor) -> None:
        """Count a step, and keep the sum of the losses of this process's images, 0-dim."""
        epoch = self.state.epoch
        epoch.losses[epoch.images] = processes.all_reduce_sum(loss)
        epoch.images += min(self.batch_size, self.photos - epoch.images % self.photos)
        epoch.computed += self.batch_size

    def pictures(self) -> Callable[[Tensor, Tensor], None] | None:
        """Return what draws a validation batch, from its logits and each image's Dice; None where nothing is drawn."""
        return self.report.begin(self.epoch, is_last=self.epoch == self.num_epochs) if self.report else None

    def end_epoch(self, metrics: dict[str, float], photo_dice: list[float]) -> None:
        """Add a row to the history, from the means and each photo's Dice of check_accuracy; print and save."""
        self.raise_if_not_finite()  # again: validation follows new statistics of BatchNorm
        state, epoch = self.state, self.state.epoch
        row = {
            "epoch": self.epoch,
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
        if self.report:
            self.report.finish(state.history, state.photo_dice)
        self.writer.save(state, is_best)

        self._print_row(row, is_best)

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
            raise UserError(
                f"training diverged (loss {losses[first].item():.3g}) with {', '.join(names)}: look at these photos "
                "and their masks, or lower LEARNING_RATE; no checkpoint was changed"
            )

    def _save_because_of(self, stopped: Stopped) -> None:
        state = self.state
        if not state.history and not state.epoch.images:
            print(f"Stopped by {stopped} before the first step: nothing was saved.")
            return
        self.save()
        self.writer.wait()
        print(
            f"Stopped by {stopped} after {state.epochs} epochs and {state.epoch.images} images of the next, "
            f"which {self.writer.path} holds: continue with the same flags and --load-model"
        )

    def print_result(self, dice: float, threshold: float, highest: float) -> None:
        """Print the last lines of a run.

        Args:
            dice: the best weights' mean Dice at the photos' original size.
            threshold, highest: the best threshold on these photos, and the mean Dice there.
        """
        best = self.state.best
        print(f"Dice of the best weights: {best:.4f} at training size, {dice:.4f} at the photos' original size.")
        if highest:
            print(f"On these photos the best threshold would be {threshold:g}, with {highest:.4f}.")
        print(f"The best weights are in {self.writer.best_path}, the newest state in {self.writer.path}.")
        if self.report:
            print(f"Look at {(self.report.folder / 'index.html').resolve().as_uri()}")


def duration(seconds: float) -> str:
    """Return a time in words, such as 50 s, 12 min or 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"

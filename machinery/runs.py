"""A run beside its learning: how far it is, when it saves and stops, and the row that each epoch leaves."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from machinery import processes
from machinery.checkpoints import CheckpointWriter, Epoch, State
from machinery.errors import Stopped, UserError, counted
from machinery.processes import progress
from machinery.report import Report, save_train_batch


class Run:
    """What surrounds the training of a state.

    Args:
        loader: of the training photos.
        writer: of the checkpoints.
        report: draws the pictures, in the first process alone.
        num_epochs: the epochs of the whole run.
        checkpoint_minutes: between two checkpoints within an epoch.
    """

    def __init__(
        self,
        state: State,
        loader: DataLoader,
        writer: CheckpointWriter,
        report: Report,
        num_epochs: int,
        checkpoint_minutes: float,
    ) -> None:
        self.state, self.loader, self.writer = state, loader, writer
        self.report = report if processes.RANK == 0 else None
        self.num_epochs, self.checkpoint_minutes = num_epochs, checkpoint_minutes
        self.photos, self.batch_size = len(loader.dataset), loader.batch_sampler.size

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

    @property
    def progress(self) -> float:
        """How much of the whole run is done, from 0 to 1."""
        return (len(self.state.history) + self.state.epoch.images / self.photos) / self.num_epochs

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what is left of this epoch's batches, uint8; after each of them show the loss, and save in time.

        Raises UserError if the loss is not finite.
        """
        epoch, skipped = self.state.epoch, 0
        start, title = time.perf_counter() - epoch.seconds, f"epoch {len(self.state.history) + 1}/{self.num_epochs}"
        with progress(total=self.photos, initial=epoch.images, desc=title, unit="img") as bar:
            line_due = time.monotonic() + 60
            for step, (images, masks) in enumerate(self.loader.epoch(len(self.state.history), epoch.images)):
                if step == 0 and self.report:
                    save_train_batch(images, masks, self.report.folder / "train_batch.png")
                scale = self.state.scaler.get_scale()
                yield images, masks

                skipped += self.state.scaler.get_scale() < scale  # fp16: a gradient has overflowed
                epoch.seconds = time.perf_counter() - start
                bar.update(epoch.images - bar.n)
                is_silent = bar.disable and time.monotonic() > line_due  # no terminal: a line a minute in the log
                if step % 10 == 0 or is_silent:  # reading a loss waits for the device
                    loss = list(epoch.losses.values())[-1].item() / self.batch_size
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    if not math.isfinite(loss):
                        break
                if is_silent:
                    print(f"{title}: {epoch.images} of {self.photos} images, loss {loss:.4f}", flush=True)
                    line_due = time.monotonic() + 60
                if self.writer.seconds_since_save() > 60 * self.checkpoint_minutes:
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
        epoch.images += min(self.batch_size, self.photos - epoch.images)
        epoch.computed += self.batch_size

    def pictures(self) -> Callable[[Tensor, Tensor], None] | None:
        """Return what draws a validation batch, from its logits and each image's Dice; None where nothing is drawn."""
        epoch = len(self.state.history) + 1
        return self.report.begin(epoch, is_last=epoch == self.num_epochs) if self.report else None

    def end_epoch(self, metrics: dict[str, float], photo_dice: list[float]) -> None:
        """Add an epoch's row to the history, from the means and each photo's Dice of check_accuracy; print and save."""
        self.raise_if_not_finite()  # again: validation follows new statistics of BatchNorm
        state, epoch = self.state, self.state.epoch
        row = {
            "epoch": len(state.history) + 1,
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
            batch = self.loader.batch_sampler.batches(len(state.history), starts[first])[0]
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
            f"Stopped by {stopped} after {counted(len(state.history), 'epoch')} and "
            f"{counted(state.epoch.images, 'image')} of the next, "
            f"which {self.writer.path} holds: continue with the same flags and --load-model"
        )

    def print_advice(self, noun: str) -> None:
        """Print how long 300 steps take, where a run has so few that a network learns little.

        75 count as few, because the quick start has 96. `noun` says of what an epoch consists: "photo" or "crop".
        """
        steps, seconds = math.ceil(self.photos / self.batch_size), self.state.history[0]["seconds"]
        if len(self.state.history) == 1 and self.num_epochs * steps < 75:
            epochs = 10 * math.ceil(30 / steps)
            done = counted(self.num_epochs, "epoch") + (" is " if self.num_epochs == 1 else " are ")
            done += counted(self.num_epochs * steps, "step")
            minutes = math.ceil(epochs * seconds / 60)
            print(f"{counted(self.photos, noun)}: {done}; --num-epochs {epochs} takes about {minutes} min.")

    def print_result(self, dice: float, threshold: float, highest: float) -> None:
        """Print the last lines of a run.

        Args:
            dice: the best weights' mean Dice at the photos' original size, nan where that is unknown.
            threshold, highest: the best threshold on these photos, and the mean Dice there.
        """
        best, full = self.state.best, "unknown" if math.isnan(dice) else f"{dice:.4f}"
        print(f"Dice of the best weights: {best:.4f} at training size, {full} at the photos' original size.")
        if highest > 0:
            print(f"On these photos the best threshold would be {threshold:g}, with {highest:.4f}.")
        print(f"The best weights are in {self.writer.best_path}, the newest state in {self.writer.path}.")
        if self.report:
            print(f"Look at {(self.report.folder / 'index.html').resolve().as_uri()}")

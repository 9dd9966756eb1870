"""The length of a run: its photos, its epochs, when it is validated, and what time that takes."""

import math
import time
from datetime import datetime, timedelta
from types import SimpleNamespace

from tqdm import tqdm

from machinery import processes
from machinery.checkpoints import State
from machinery.errors import UserError, counted
from machinery.rehearsal import Rehearsal

FORWARD = 1 / 3  # of the time of training on an image that a forward pass takes
FEW, ENOUGH = 75, 300  # steps: after few a network has learned little; the quick start has 96


class Length:
    """The length of a run, which NUM_EPOCHS says, or MINUTES.

    An epoch of so few photos that validation would cost more than training is validated less often, so that validation
    takes a tenth of the time. That depends on the numbers of photos and their sizes alone.

    Args:
        state: keeps what was chosen for MINUTES, and what the run has done.
        photos: how many photos, or crops, an epoch trains on.
        val_photos: as how many of these a validation counts, by its pixels.
        s: train.py's settings.
    """

    def __init__(self, state: State, photos: int, val_photos: float, s: SimpleNamespace) -> None:
        self.state, self.photos, self.batch_size, self.s = state, photos, s.batch_size, s
        validation = FORWARD * (min(64, photos) + val_photos)  # in photos that are trained on
        self.every = math.ceil(10 * validation / photos) if validation > photos else 1  # epochs
        self.guess = {"image": 1.0, "validation": validation, "end": FORWARD * val_photos}  # for a rehearsal's costs
        self.steps, self.timed_seconds, self.timed_photos = 0, 0.0, 0.0  # of this process; the first step is not timed
        self.said = 0  # the run's photos that the last line has promised

    # -----------------------------------------------------------------------------------------------------------------
    # Photos and epochs

    @property
    def total(self) -> int:
        """Return how many photos the whole run trains on, each counted as often as it comes."""
        return self.state.plan["photos"] if self.state.plan else self.s.num_epochs * self.photos

    @property
    def num_epochs(self) -> int:
        """Return NUM_EPOCHS, or the number that was chosen for MINUTES, whose last epoch may be a part of one."""
        return math.ceil(self.total / self.photos)

    @property
    def done(self) -> int:
        """Return how many photos the run has trained on so far."""
        return self.state.epochs * self.photos + self.state.epoch.images

    @property
    def epoch(self) -> int:
        """Return the number, from 1, of the epoch under way, or of the one that has just ended."""
        return self.state.epochs + max(1, math.ceil(self.state.epoch.images / self.photos))

    @property
    def until_validation(self) -> int:
        """Return how many photos lie between the last validation and the next."""
        return min((self._rounds + 1) * self._round, self.total) - self.state.epochs * self.photos

    @property
    def _round(self) -> int:
        """Return how many photos lie between two validations, unless the run ends before."""
        return self.every * self.photos

    @property
    def _rounds(self) -> int:
        """Return how many of these have been validated."""
        return self.state.epochs // self.every

    # -----------------------------------------------------------------------------------------------------------------
    # Time

    def seconds_for(self, photos: int) -> float:
        """Return how long it takes to train on so many more photos, validate, and end, at the rehearsal's speed."""
        costs, validations = self.state.plan or self.guess, math.ceil((self.done + photos) / self._round) - self._rounds
        return photos * costs["image"] + validations * costs["validation"] + costs["end"]

    def photos_in(self, seconds: float) -> int:
        """Return on how many more photos the run can train in `seconds`, with validations and end; below 1 on none."""
        costs, first = self.state.plan or self.guess, self._until_round()
        image, validation = costs["image"], costs["validation"]
        seconds -= costs["end"] + validation
        if seconds < first * image:
            return int(seconds / image)
        rounds, seconds = divmod(seconds - first * image, self._round * image + validation)
        return first + int(rounds) * self._round + max(0, int((seconds - validation) / image))

    def _until_round(self) -> int:
        """Return on how many more photos the run trains before a validation that is due whatever its length is."""
        return (self._rounds + 1) * self._round - self.done

    def seconds_left(self) -> float:
        """Return how long the rest of the run takes at the speed that training has had of late."""
        slower = self.timed_seconds / self.timed_photos / (self.state.plan or self.guess)["image"]
        return slower * self.seconds_for(self.total - self.done)

    def choose(self, rehearsal: Rehearsal) -> None:
        """Choose for how many photos there is time in MINUTES, unless the checkpoint holds what was chosen.

        Raises UserError where there is no time for a step.
        """
        limit = 60 * self.s.minutes
        if not self.state.plan:
            self.state.plan = {"photos": self.done + 1} | rehearsal.measure(min(limit / 20, 20))
            spent = processes.broadcast_object(lambda: self.state.seconds)
            photos = self.photos_in(0.97 * limit - spent)  # threads that draw and save slow training down a little
            if photos < self.batch_size:
                least = (spent + self.seconds_for(10 * self.batch_size)) / 60
                raise UserError(
                    f"MINUTES is {self.s.minutes:g}, of which {spent / 60:.2g} are over before the first step: set it "
                    f"to {math.ceil(11 * least) / 10:g} or more"
                )
            self.state.plan["photos"] = self.done + photos
        self.said = self.total
        self.check_due = time.monotonic() + limit / 40

    def watch(self, seconds: float, photos: int) -> bool:
        """Time a step. Return whether the run has another length from now on, because its speed has changed.

        After some steps a line says when the run ends.
        """
        self.steps += 1
        if self.steps == 1:  # it compiles, allocates and starts workers
            return False
        kept = 0.5 ** (seconds / (3 * self.s.minutes)) if self.s.minutes else 1.0  # half of what is a twentieth old
        self.timed_seconds, self.timed_photos = kept * self.timed_seconds + seconds, kept * self.timed_photos + photos
        before = self.total
        if self.s.minutes:
            self._fit()
        if self.steps == 5:
            left = self.seconds_left()
            if self.s.minutes:  # where that is longer, the run will become shorter
                left = min(left, 60 * self.s.minutes - self.state.seconds)
            end = datetime.now() + timedelta(seconds=left)
            day = "" if end.date() == datetime.now().date() else f"{end:%A}, "
            tqdm.write(f"It takes about {duration(self.state.seconds + left)}, until {day}{end:%H:%M}.")
        return self.total != before

    def _fit(self) -> None:
        """Give the run the length that fits MINUTES now; say so where a tenth is different from what was said last."""
        photos = processes.all_reduce_max(self._fitting())  # the first process decides
        self.state.plan = self.state.plan | {"photos": photos}
        if abs(photos - self.said) > 0.1 * self.said:
            what, epochs = "slower" if photos < self.said else "faster", photos / self.photos
            said = self.said / self.photos
            tqdm.write(f"This is {what} than expected: it ends after {epochs:.4g} epochs instead of {said:.4g}.")
            self.said = photos

    def _fitting(self) -> int:
        """Return how many photos the run is to have in all, so that it takes 0.9 to 1.05 of MINUTES.

        A run that expects that keeps its length, and so ends with the same weights where it is stopped and continued.
        """
        if processes.RANK:
            return 0
        if time.monotonic() < self.check_due or self.done >= self.total:
            return self.total
        limit, left = 60 * self.s.minutes, self.seconds_left()
        self.check_due = time.monotonic() + limit / 40
        if 0.9 * limit < self.state.seconds + left < 1.05 * limit:
            return self.total
        speed = self.seconds_for(self.total - self.done) / left  # 1 is the rehearsal's
        fitting = self.photos_in(speed * (limit - self.state.seconds))
        fewest = min(self.batch_size, self._until_round())  # a step, unless that needed another validation
        return self.done + max(fitting, fewest)

    # -----------------------------------------------------------------------------------------------------------------
    # What to expect

    def expectation(self) -> str:
        """Say of how many steps the run is, and with which flag there were enough of them."""
        epoch_steps = math.ceil(self.photos / self.batch_size)
        last = self.total - (self.num_epochs - 1) * self.photos
        steps = (self.num_epochs - 1) * epoch_steps + math.ceil(last / self.batch_size)
        verb = "is" if (self.s.minutes or self.num_epochs) == 1 else "are"
        if self.s.minutes:
            seconds = self.state.seconds + self.seconds_for(ENOUGH * self.batch_size)
            enough = f"--minutes {math.ceil(seconds / 58)} takes {ENOUGH}"
            said = f"{counted(self.s.minutes, 'minute')} {verb} {self.total / self.photos:.4g} epochs"
            said += f", {counted(steps, 'step')}"
        else:
            epochs = 10 * math.ceil(ENOUGH / 10 / epoch_steps)
            enough = f"--num-epochs {epochs} takes {epochs * epoch_steps}"
            said = f"{counted(self.num_epochs, 'epoch')} {verb} {counted(steps, 'step')}"
        photos = counted(self.photos, "crop" if self.s.crop else "photo")
        return f"{photos}: {said}" + (f", which is few: {enough}." if steps < FEW else ".")


def duration(seconds: float) -> str:
    """Return a time in words, such as 50 s, 12 min or 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"

"""MINUTES: a run that knows how long it has. What every run says of its length, and how often it validates."""

import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import leave_photos, rows, same, weights
from forked import start_processes

import train
import utils
from machinery import errors, rehearsal
from machinery.errors import UserError
from machinery.length import Length
from machinery.runs import Run, validation_size

CHECKPOINT = Path("my_checkpoint.pth.tar")


class Clock:
    """A clock of its own, which only training, validation and the end move on: by so many seconds for a photo."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, image: float, validation: float = 0.0, end: float = 0.0
    ) -> None:
        self.now, self.image, self.steps = 1000.0, image, 0
        self.later: dict[int, float] = {}  # seconds for a photo from a step on, counted with those of the rehearsal
        step, forward, full_size = train.train_step, train.check_accuracy, train.full_size_dice
        update = train.update_batch_norm

        def train_step(state, images, *args):
            self.steps += 1
            self.image = self.later.get(self.steps, self.image)
            self.now += self.image * len(images)
            return step(state, images, *args)

        def check_accuracy(loader, *args, **more):
            self.now += validation * loader.batch_sampler.length
            return forward(loader, *args, **more)

        def update_batch_norm(loader, *args):
            self.now += self.image / 3 * min(64, loader.batch_sampler.length)
            update(loader, *args)

        def full_size_dice(path, data, *args, **more):
            self.now += end * len(data)
            return full_size(path, data, *args, **more)

        for name, function in (
            ("train_step", train_step),
            ("update_batch_norm", update_batch_norm),
            ("check_accuracy", check_accuracy),
            ("full_size_dice", full_size_dice),
        ):
            monkeypatch.setattr(train, name, function)
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(time, name, lambda: self.now)

    def minutes(self) -> float:
        return (self.now - 1000) / 60


def chosen() -> tuple[int, int]:
    """NUM_EPOCHS and the photos of the whole run, as the newest checkpoint holds them."""
    checkpoint = utils.load_checkpoint(CHECKPOINT)
    return checkpoint["settings"]["num_epochs"], checkpoint["plan"]["photos"]


# ---------------------------------------------------------------------------------------------------------------------
# The time


@pytest.mark.parametrize("seed", range(3))
def test_it_takes_its_time_and_the_schedule_ends_with_it(project, run_train, monkeypatch, capsys, seed):
    drawn = random.Random(seed)
    photos, val_photos, batch = drawn.randint(5, 30), drawn.randint(1, 20), drawn.randint(2, 6)
    leave_photos(photos, val_photos)
    image = drawn.uniform(0.5, 2)
    minutes = round((photos + val_photos) * image * drawn.uniform(24, 36) / 60, 1)
    clock, load_data = Clock(monkeypatch, image, image * drawn.random(), image * drawn.random()), train.load_data

    def slow_load_data(*args):
        clock.now += 20 * minutes  # a third of the time
        return load_data(*args)

    monkeypatch.setattr(train, "load_data", slow_load_data)
    run_train("--minutes", str(minutes), "--batch-size", str(batch))
    assert 0.9 * minutes < clock.minutes() < 1.1 * minutes
    epochs, total = chosen()
    assert epochs == math.ceil(total / photos) == int(rows()[-1]["epoch"])
    out = capsys.readouterr().out
    assert re.search(
        rf"^{photos} photos: {minutes:g} minutes are {total / photos:.4g} epochs, \d+ steps", out, re.MULTILINE
    )
    assert "slower than expected" not in out
    assert f"after epoch {epochs} of {epochs}" in Path("saved_images/index.html").read_text()
    assert float(rows()[-1]["learning_rate"]) < 0.1 * train.LEARNING_RATE


@pytest.mark.parametrize("seed", range(2))
def test_a_machine_that_becomes_slower_ends_in_time_with_a_finished_schedule(
    project, run_train, monkeypatch, capsys, seed
):
    drawn = random.Random(seed)
    leave_photos(drawn.randint(6, 20), 4)
    clock = Clock(monkeypatch, 1.0, 0.3, 0.3)
    clock.later = {drawn.randint(12, 40): drawn.uniform(1.5, 4)}
    run_train("--minutes", "5")
    assert 4.5 < clock.minutes() < 5.5
    assert "This is slower than expected: it ends after" in capsys.readouterr().out
    assert int(rows()[-1]["epoch"]) == chosen()[0]
    assert float(rows()[-1]["learning_rate"]) < 0.2 * train.LEARNING_RATE


def test_a_machine_that_is_slow_for_a_while_ends_in_time_with_no_more_epochs_than_chosen(
    project, run_train, monkeypatch, capsys
):
    leave_photos(8, 4)
    clock = Clock(monkeypatch, 1.0, 0.3, 0.3)
    clock.later = {16: 3.0, 24: 1.0}
    run_train("--minutes", "6")
    assert 5.4 < clock.minutes() < 6.6
    out = capsys.readouterr().out
    assert "slower than expected" in out and "This is faster than expected: it ends after" in out
    said = float(re.search(r"6 minutes are (\S+) epochs", out)[1])
    assert chosen()[0] <= said


def test_a_machine_that_becomes_faster_uses_its_time(project, run_train, monkeypatch, capsys):
    leave_photos(12, 4)
    clock = Clock(monkeypatch, 1.0, 0.3)
    clock.later = {12: 0.4}
    run_train("--minutes", "5")
    assert 4.5 < clock.minutes() < 5.5
    out = capsys.readouterr().out
    assert "This is faster than expected: it ends after" in out and "slower" not in out
    assert float(rows()[-1]["learning_rate"]) < 0.1 * train.LEARNING_RATE


@pytest.mark.parametrize("slower", [1.2, 1.4])
def test_a_validation_that_a_few_more_photos_would_need_counts(project, run_train, monkeypatch, capsys, slower):
    """A validation takes a fifth of the time here: where 1.1 epochs would fit but for a second one, it trains on 1."""
    leave_photos(44, 32)
    clock = Clock(monkeypatch, 1.0, 0.8)
    clock.later = {8: slower}  # and no faster from there on
    run_train("--minutes", "3.2")
    assert 0.7 < clock.minutes() / 3.2 < 1.1
    assert "faster than expected" not in capsys.readouterr().out


def test_the_part_of_an_epoch_that_fits_is_said_before_and_trained_on(project, run_train, monkeypatch, capsys):
    leave_photos(60, 4)
    clock = Clock(monkeypatch, 1.0)
    run_train("--minutes", "1.5")
    total = chosen()[1]
    out = capsys.readouterr().out
    assert f"60 photos: 1.5 minutes are {total / 60:.4g} epochs" in out.partition("train_loss")[0]
    assert total < 60 and 0.9 < clock.minutes() / 1.5 < 1.1
    assert [row["epoch"] for row in rows()] == ["1"] and chosen()[0] == 1


def test_a_time_too_short_for_a_step_gets_a_sentence_and_changes_nothing(project, run_train, monkeypatch):
    leave_photos(8, 4)
    run_train("--num-epochs", "1")
    before = {path: path.read_bytes() for path in Path().glob("*.tar")}
    table = Path("saved_images/metrics.csv").read_bytes()
    Clock(monkeypatch, 1.0, 1.0, 1.0)
    with pytest.raises(
        UserError, match=r"MINUTES is 0.1, of which .* are over before the first step: set it to (.*) or"
    ):
        run_train("--minutes", "0.1")
    assert before == {path: path.read_bytes() for path in Path().glob("*.tar")}
    assert table == Path("saved_images/metrics.csv").read_bytes()
    assert not list(Path().glob(".*.tmp"))


def test_the_time_that_is_named_is_enough(project, run_train, monkeypatch):
    leave_photos(8, 4)
    Clock(monkeypatch, 1.0, 1.0, 1.0)
    with pytest.raises(UserError) as error:
        run_train("--minutes", "0.1")
    Clock(monkeypatch, 1.0, 1.0, 1.0)
    run_train("--minutes", re.search(r"set it to (\S+) or more", str(error.value))[1])


def test_time_counts_from_the_start_of_a_process_that_is_a_script(tmp_path):
    script = tmp_path / "late.py"
    script.write_text("import time; time.sleep(1)\nfrom machinery import processes\nprint(processes.age())")
    done = subprocess.run([sys.executable, script], cwd=Path(train.__file__).parent, capture_output=True, text=True)
    assert float(done.stdout) >= 1


# ---------------------------------------------------------------------------------------------------------------------
# The rehearsal


def test_the_rehearsal_leaves_no_trace(project, run_train, monkeypatch):
    leave_photos(16, 8)
    run_train("--num-epochs", "3", "--num-workers", "1")
    wanted, measure, rehearsals = weights(), rehearsal.Rehearsal.measure, []

    def three_epochs(self, seconds):
        random_state = torch.get_rng_state()
        rehearsals.append(measure(self, 1))
        assert torch.equal(torch.get_rng_state(), random_state)
        return rehearsals[-1]

    monkeypatch.setattr(rehearsal.Rehearsal, "measure", three_epochs)
    monkeypatch.setattr(Length, "photos_in", lambda *_: 48)
    monkeypatch.setattr(Length, "_fitting", lambda length: length.total)
    run_train("--minutes", "5", "--num-workers", "1")
    assert same(wanted, weights())
    assert len(rehearsals) == 1 and all(seconds > 0 for seconds in rehearsals[0].values())
    assert [row["epoch"] for row in rows()] == ["1", "2", "3"]
    assert not list(Path().glob(".*.tmp"))


def test_without_minutes_nothing_is_rehearsed(project, run_train, monkeypatch):
    rehearsals, measure = [], rehearsal.Rehearsal.measure
    monkeypatch.setattr(rehearsal.Rehearsal, "measure", lambda *args: rehearsals.append(args) or measure(*args))
    leave_photos(8, 4)
    run_train("--num-epochs", "1")
    assert rehearsals == [] and len(rows()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Continuing


def stop_at(step: int, clock: Clock, run_train, monkeypatch, *flags: str) -> None:
    """Train until SIGTERM comes in the step of that number after the rehearsal."""
    plan, train_step, start = Run.plan, train.train_step, []

    def planned(self, **work):
        plan(self, **work)
        start.append(clock.steps)

    def stopping(*args):
        if start and clock.steps == start[0] + step - 1:
            signal.raise_signal(signal.SIGTERM)
        return train_step(*args)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "plan", planned)
        patched.setattr(train, "train_step", stopping)
        with pytest.raises(errors.Stopped):
            run_train(*flags)


@pytest.mark.parametrize("photos", [8, 21])
def test_stopped_and_continued_it_takes_the_same_time_and_ends_with_the_same_weights(
    project, run_train, monkeypatch, capsys, photos
):
    leave_photos(photos, 8)
    flags = ["--minutes", "4"]
    with monkeypatch.context() as patched:
        Clock(patched, 1.0, 0.5, 0.5)
        run_train(*flags)
    wanted, length, scores = weights(), chosen(), [row["dice"] for row in rows()]

    with monkeypatch.context() as patched:
        first = Clock(patched, 1.0, 0.5, 0.5)
        stop_at(13, first, run_train, patched, *flags)
    second = Clock(monkeypatch, 1.0, 0.5, 0.5)
    monkeypatch.setattr(rehearsal.Rehearsal, "measure", None)
    run_train(*flags, "--load-model")
    assert same(wanted, weights()) and length == chosen() and scores == [row["dice"] for row in rows()]
    assert 0.9 * 4 < first.minutes() + second.minutes() < 1.1 * 4
    assert utils.load_checkpoint(CHECKPOINT)["spent"] / 60 > first.minutes()
    assert "MINUTES was" not in capsys.readouterr().out


def test_what_was_shortened_stays_so(project, run_train, monkeypatch):
    leave_photos(8, 4)
    clock = Clock(monkeypatch, 1.0)
    clock.later = {12: 2.0}
    stop_at(16, clock, run_train, monkeypatch, "--minutes", "4")
    length = chosen()
    clock = Clock(monkeypatch, 0.1)
    run_train("--minutes", "4", "--load-model")
    assert chosen() == length


def test_a_finished_run_has_had_its_time_and_a_larger_one_continues_it(project, run_train, monkeypatch, capsys):
    leave_photos(8, 4)
    clock = Clock(monkeypatch, 1.0)
    run_train("--minutes", "2")
    before, (epochs, _) = CHECKPOINT.read_bytes(), chosen()
    run_train("--minutes", "2", "--load-model")
    out = capsys.readouterr().out
    assert "my_checkpoint.pth.tar has had its 2 minutes already: a larger MINUTES continues it." in out
    assert CHECKPOINT.read_bytes() == before
    clock.now = 1000.0
    run_train("--minutes", "4", "--load-model")
    assert "MINUTES was 2.0 and is 4.0 from here on" in capsys.readouterr().out
    assert 1.7 < clock.minutes() < 2.3  # the two that are left
    assert chosen()[0] > epochs and int(rows()[-1]["epoch"]) == chosen()[0]


def test_a_run_of_epochs_continues_for_minutes_and_the_reverse(project, run_train, monkeypatch, capsys):
    leave_photos(8, 4)
    Clock(monkeypatch, 1.0)
    run_train("--num-epochs", "1")
    run_train("--minutes", "2", "--load-model")
    epochs = chosen()[0]
    assert epochs > 1 and "MINUTES was None and is 2.0 from here on" in capsys.readouterr().out
    run_train("--num-epochs", str(epochs + 2), "--load-model")
    assert f"NUM_EPOCHS was {epochs} and is {epochs + 2} from here on" in capsys.readouterr().out
    assert int(rows()[-1]["epoch"]) == epochs + 2
    assert utils.load_checkpoint(CHECKPOINT)["plan"] is None


def test_both_flags_get_a_sentence_and_a_flag_is_stronger_than_a_constant(project, run_train, monkeypatch):
    leave_photos(8, 4)
    for flags in (["--minutes", "3", "--num-epochs", "2"], ["--num-epochs=2", "--minutes=3"]):
        with pytest.raises(UserError, match="give --minutes or --num-epochs, not both"):
            run_train(*flags)
    monkeypatch.setattr(train, "MINUTES", 30)
    run_train("--num-epochs", "2")
    assert len(rows()) == 2
    run_train("--minutes", "none", "--num-epochs", "1")
    assert len(rows()) == 1


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "1e9"])
def test_other_minutes_are_refused(project, run_train, value):
    with pytest.raises(UserError, match=r"(?i)minutes"):
        run_train("--minutes", value)


def test_all_processes_choose_the_same(project):
    leave_photos(16, 4)
    script = Path(__file__).with_name("train_at_a_speed.py")
    flags = ["--image-height", "32", "--image-width", "48", "--features", "8", "16", "--num-workers", "0"]
    started = start_processes(2, script, *flags, "--minutes", "3")
    assert [process.status(120) for process in started] == [0, 0], "".join(process.output() for process in started)
    found = [json.loads(Path(f"length{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1] and found[0][0] > 16
    assert "slower than expected" in started[0].output()


# ---------------------------------------------------------------------------------------------------------------------
# Small sets


@pytest.mark.parametrize(
    ("photos", "val_photos", "epochs", "validated"),
    [(8, 8, 2, [1, 2]), (4, 16, 40, [17, 34, 40]), (5, 11, 24, [11, 22, 24])],
)
def test_epochs_of_few_photos_are_validated_less_often(project, run_train, photos, val_photos, epochs, validated):
    leave_photos(photos, val_photos)
    run_train("--num-epochs", str(epochs))
    assert [int(row["epoch"]) for row in rows()] == validated
    checkpoint, best = utils.load_checkpoint(CHECKPOINT), utils.load_checkpoint(Path("my_checkpoint_best.pth.tar"))
    assert checkpoint["epoch"] == epochs and len(checkpoint["photo_dice"]) == len(validated)
    assert best["epoch"] == int(max(rows(), key=lambda row: float(row["dice"]))["epoch"])
    page = Path("saved_images/index.html").read_text()
    assert f"after epoch {epochs} of {epochs}" in page


@pytest.mark.parametrize(
    ("photos", "val_photos", "every"), [(20, 50, 12), (150, 50, 1), (4080, 1008, 1), (1, 1, 1), (2, 10, 20)]
)
def test_validation_takes_a_tenth_of_the_time_or_less_than_training(photos, val_photos, every):
    s = SimpleNamespace(batch_size=4, num_epochs=3, minutes=None, crop=None)
    assert Length(SimpleNamespace(), photos, val_photos, s).every == every


@pytest.mark.parametrize(
    ("crop", "sizes", "images"),
    [
        (None, [(160, 240)] * 50, 50),
        ((256, 256), [(256, 256), (100, 300)], 2),  # no larger than a crop
        ((256, 256), [(1280, 1918)] * 32, 32 * 1280 * 1918 / 256**2 * 16 / 9),  # tiles overlap
    ],
)
def test_a_validation_of_large_photos_counts_as_many_crops(crop, sizes, images):
    val_set = SimpleNamespace(pairs=sizes, size_of=sizes.__getitem__)
    height, width = crop or (160, 240)
    s = SimpleNamespace(image_height=height, image_width=width)
    assert validation_size(val_set, s) == pytest.approx(images)


@pytest.mark.parametrize("step", [5, 21])
def test_stopped_between_two_validations_it_continues_with_the_same_weights(project, run_train, monkeypatch, step):
    leave_photos(5, 11)
    flags = ["--num-epochs", "15"]  # of two steps, validated after 11 and 15
    clock = SimpleNamespace(steps=0)
    train_step = train.train_step

    def counted(*args):
        clock.steps += 1
        return train_step(*args)

    monkeypatch.setattr(train, "train_step", counted)
    run_train(*flags)
    wanted, table = weights(), [(row["epoch"], row["train_loss"], row["dice"]) for row in rows()]
    clock.steps = 0
    stop_at(step, clock, run_train, monkeypatch, *flags)
    run_train(*flags, "--load-model")
    assert same(wanted, weights())
    assert [(row["epoch"], row["train_loss"], row["dice"]) for row in rows()] == table


def test_a_photo_that_makes_training_diverge_is_named_in_whichever_epoch(project, run_train, monkeypatch):
    leave_photos(4, 16)
    seen, train_step = [], train.train_step

    def diverging(state, images, masks, device, s):
        loss = train_step(state, images, masks, device, s)
        seen.append(images)
        return loss * torch.nan if len(seen) == 4 else loss

    monkeypatch.setattr(train, "train_step", diverging)
    with pytest.raises(UserError, match="training diverged") as error:
        run_train("--num-epochs", "17", "--batch-size", "2")
    order = utils.Batches(4, 2, train.SEED).batches(epoch=1, start=2)[0]
    names = sorted(path.name for path in Path("data/train_images").iterdir())
    assert f"with {', '.join(names[index] for index in order)}:" in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# What a run says


@pytest.mark.parametrize(
    ("photos", "epochs", "said"),
    [
        (20, 3, "20 photos: 3 epochs are 15 steps, which is few: --num-epochs 60 takes 300."),
        (50, 3, "50 photos: 3 epochs are 39 steps, which is few: --num-epochs 30 takes 390."),
        (1, 3, "1 photo: 3 epochs are 3 steps, which is few: --num-epochs 300 takes 300."),
        (20, 60, "20 photos: 60 epochs are 300 steps."),
        (4, 1, "4 photos: 1 epoch is 1 step, which is few: --num-epochs 300 takes 300."),
        (128, 3, "128 photos: 3 epochs are 96 steps."),  # the quick start
    ],
)
def test_before_the_first_step_it_says_how_many_there_are(photos, epochs, said):
    s = SimpleNamespace(batch_size=4, num_epochs=epochs, minutes=None, crop=None)
    assert Length(SimpleNamespace(plan=None), photos, 8, s).expectation() == said


def test_a_short_time_says_which_would_do_better(project, run_train, monkeypatch, capsys):
    leave_photos(8, 4)
    Clock(monkeypatch, 1.0)
    run_train("--minutes", "2")
    minutes = re.search(r"which is few: --minutes (\d+) takes 300\.", capsys.readouterr().out)[1]
    assert int(minutes) in (27, 28)  # 1,200 photos, of which each is a third in update_batch_norm, too


@pytest.mark.parametrize("flags", [["--num-epochs", "3"], ["--minutes", "4"]])
def test_once_it_says_when_it_ends(project, run_train, monkeypatch, capsys, flags):
    leave_photos(12, 4)
    Clock(monkeypatch, 10.0 if "--num-epochs" in flags else 1.0)
    run_train(*flags)
    out = capsys.readouterr().out
    assert out.count("It takes about") == 1
    assert re.search(r"^It takes about \d min, until (\w+day, )?\d\d:\d\d\.$", out, re.MULTILINE)

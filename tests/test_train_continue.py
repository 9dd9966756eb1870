"""Stop it anywhere, kill it anywhere: a run that is continued ends with the weights of one that was never disturbed."""

import os
import pickle
import random
import re
import signal
import time
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PREPROCESSING, leave_photos, rows, same, weights
from forked import Training

import train
import utils
from machinery import checkpoints, errors
from machinery.errors import UserError
from machinery.muon import Muon
from model import UNet, build_network

ROUNDS = int(os.environ.get("KILL_ROUNDS", 2))  # 20 for a thorough look
NEW_IN_FORMAT_2 = ("format", "computed", "optimizer_name")
CHECKPOINT, PREVIOUS = Path("my_checkpoint.pth.tar"), Path("my_checkpoint.prev.pth.tar")


CROPS = ["--crop", "64", "64", "--batch-size", "16"]  # of which there are more than photos: larger batches


@pytest.fixture
def project(project: Path) -> Path:
    """Fewer photos: an epoch has 8 steps of 4."""
    leave_photos(32, 8)
    return project


def scores() -> list[dict[str, str]]:
    """metrics.csv apart from times."""
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows()]


# ---------------------------------------------------------------------------------------------------------------------
# Killed


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize(("precision", "workers", "more"), [("bf16", "0", []), ("fp32", "2", []), ("fp32", "2", CROPS)])
def test_a_run_killed_anywhere_and_continued_ends_with_the_same_weights(project, precision, workers, more, kill):
    leave_photos(8 if more == CROPS else 32, 4)
    flags = ["--precision", precision, "--num-workers", workers, *more]
    flags += ["--checkpoint-minutes", "0", "--num-epochs", "2"]
    whole = Training(*flags)
    whole.wait_for("train_loss")
    begun = time.monotonic()
    assert whole.status() == 0, whole.output()
    seconds = time.monotonic() - begun
    wanted, wanted_scores = weights(), scores()

    kills, number = 0, 0
    while number < ROUNDS:
        moments = random.Random(number)
        for path in (CHECKPOINT, PREVIOUS):
            path.unlink(missing_ok=True)
        ended, kills_before = False, kills
        while not ended:
            has_begun = CHECKPOINT.exists() or PREVIOUS.exists()
            process = Training(*flags, *["--load-model"] * has_begun)
            process.wait_for("train_loss")  # the table's head: from here on it trains
            if process.status(moments.uniform(0, seconds)) is None:
                with suppress(ProcessLookupError):  # it has ended in this very moment
                    os.killpg(process.pid, kill)
                    kills += 1
            ended = process.status() == 0  # also if the signal came after the last step
            statuses = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15)}  # -15: after training, when all is saved
            assert ended or process.exitcode in statuses[kill], process.output()
        assert same(wanted, weights())
        assert scores() == wanted_scores
        if kills > kills_before:
            number += 1
        else:
            seconds /= 2  # the machine has become faster: sooner, then
    assert not list(Path().glob("*.tmp"))


# ---------------------------------------------------------------------------------------------------------------------
# Stopped


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_saves_and_says_how_to_continue(project, number, status):
    process = Training("--num-epochs", "500", "--num-workers", "1")
    process.wait_for("  best")
    os.killpg(process.pid, number)  # as a terminal or Slurm does: to the workers too
    assert process.status() == status, process.output()
    out = process.output()
    assert "Traceback" not in out
    epochs, images = re.search(
        r"after (\d+) epochs? and (\d+) images? of the next, which my_checkpoint.pth.tar holds: continue", out
    ).groups()
    checkpoint = utils.load_checkpoint(CHECKPOINT)
    assert (checkpoint["epoch"], checkpoint["images"]) == (int(epochs), int(images))


def test_a_second_ctrl_c_ends_at_once(project):
    slow = ["--image-height", "160", "--image-width", "240", "--features", "16", "32", "--batch-size", "64"]
    process = Training(*slow, "--num-epochs", "500")
    process.wait_for("train_loss")
    os.kill(process.pid, signal.SIGINT)
    process.wait_for("Ctrl-C again ends at once")
    os.kill(process.pid, signal.SIGINT)
    assert process.status() == -signal.SIGINT
    assert not CHECKPOINT.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Continued


def stop_after(steps: int, run_train, monkeypatch, *flags: str) -> None:
    """Trains until SIGTERM comes in the step of that number, counted from 1; 8 steps are an epoch."""
    train_step, done = train.train_step, []

    def step(*args):
        done.append(1)
        if len(done) == steps:
            signal.raise_signal(signal.SIGTERM)
        return train_step(*args)

    with monkeypatch.context() as patched:
        patched.setattr(train, "train_step", step)
        with pytest.raises(errors.Stopped):
            run_train(*flags)
    assert len(done) == steps


def test_it_goes_on_at_the_next_batch_for_any_number_of_workers(project, run_train, monkeypatch):
    run_train("--num-epochs", "2")
    wanted, wanted_scores = weights(), scores()
    stop_after(13, run_train, monkeypatch, "--num-epochs", "2")
    assert utils.load_checkpoint(CHECKPOINT)["images"] == 5 * 4
    run_train("--num-epochs", "2", "--load-model", "--num-workers", "2")
    assert same(wanted, weights()) and scores() == wanted_scores


def test_validation_that_was_cut_off_is_repeated(project, run_train, monkeypatch):
    run_train("--num-epochs", "2")
    wanted, wanted_scores = weights(), scores()
    stop_after(8, run_train, monkeypatch, "--num-epochs", "2")
    assert utils.load_checkpoint(CHECKPOINT)["images"] == 32
    assert not Path("my_checkpoint_best.pth.tar").exists()
    run_train("--num-epochs", "2", "--load-model")
    assert same(wanted, weights()) and scores() == wanted_scores


def test_another_batch_size_goes_on_at_the_same_image(project, run_train, monkeypatch, capsys):
    stop_after(3, run_train, monkeypatch, "--num-epochs", "1")
    batches, train_step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: batches.append(len(args[1])) or train_step(*args))
    run_train("--num-epochs", "1", "--load-model", "--batch-size", "8")
    assert batches == [8, 8, 8]  # the last of the epoch begins again
    assert "BATCH_SIZE was 4 and is 8 from here on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [(["--image-height", "48", "--mean", "0", "0", "0"], r"IMAGE_HEIGHT = 32, MEAN = \(0.485"),
     (["--features", "8", "32"], r"FEATURES = \(8, 16\)")],
)  # fmt: skip
def test_what_cannot_change_is_refused_and_named(project, run_train, flags, named):
    run_train("--num-epochs", "1")
    before = CHECKPOINT.read_bytes()
    with pytest.raises(UserError, match=named):
        run_train("--num-epochs", "2", "--load-model", *flags)
    assert CHECKPOINT.read_bytes() == before


def test_continuing_takes_todays_epochs_learning_rate_weight_decay_and_precision(project, run_train, capsys):
    run_train("--num-epochs", "1", "--precision", "fp32")
    flags = ["--precision", "bf16", "--weight-decay", "0.5", "--learning-rate", "5e-4"]
    run_train("--num-epochs", "2", "--load-model", *flags)
    out = capsys.readouterr().out
    for line in (
        "PRECISION was fp32 and is bf16",
        "NUM_EPOCHS was 1 and is 2",
        "LEARNING_RATE was 0.05 and is 0.0005",
        "WEIGHT_DECAY was 0.01",
    ):
        assert line in out
    checkpoint = utils.load_checkpoint(CHECKPOINT)
    assert checkpoint["epoch"] == 2
    assert {group["weight_decay"] for group in checkpoint["optimizer"]["param_groups"]} <= {0.0, 0.5}
    assert float(rows()[1]["learning_rate"]) == pytest.approx(5e-4 * train.schedule((1 + 28 / 32) / 2))


def test_other_training_photos_begin_the_epoch_anew_and_other_validation_photos_the_best(
    project, run_train, monkeypatch, capsys
):
    monkeypatch.setattr(utils, "dice_scores", lambda tp, fp, fn: torch.full_like(tp, 0.5))
    stop_after(12, run_train, monkeypatch, "--num-epochs", "2")
    for folder in ("train", "val"):
        photo = sorted(Path(f"data/{folder}_images").iterdir())[0]
        photo.unlink()
        Path(f"data/{folder}_masks/{photo.stem}_mask.gif").unlink()
    monkeypatch.setattr(utils, "dice_scores", lambda tp, fp, fn: torch.zeros_like(tp))
    run_train("--num-epochs", "2", "--load-model")
    out = capsys.readouterr().out
    assert (
        "The training photos have changed" in out
        and "The epoch that was cut off begins anew" in out
        and "scores before and after do not compare" in out
    )
    assert [row["dice"] for row in rows()] == ["0.5", "0.0"]
    assert re.search(r"^    2 .* 0\.0000 .*best$", out, re.MULTILINE)  # although its Dice is smaller


def test_a_finished_run_says_what_to_raise_and_ends_well(project, run_train, capsys):
    run_train("--num-epochs", "1")
    before = CHECKPOINT.read_bytes()
    run_train("--num-epochs", "1", "--load-model")
    out = capsys.readouterr().out
    assert (
        "my_checkpoint.pth.tar has 1 epoch already: a larger NUM_EPOCHS continues it" in out
        and "at training size" in out
    )
    assert CHECKPOINT.read_bytes() == before


def test_without_the_best_weights_a_finished_run_scores_the_newest(project, run_train, capsys):
    leave_photos(8, 4)
    run_train("--num-epochs", "1")
    Path("my_checkpoint_best.pth.tar").unlink()
    run_train("--num-epochs", "1", "--load-model")
    out = capsys.readouterr().out
    assert "my_checkpoint_best.pth.tar is missing: a new best is sought." in out
    assert "Dice of the best weights: unknown at training size, 0." in out
    run_train("--num-epochs", "2", "--load-model")
    assert utils.load_checkpoint(Path("my_checkpoint_best.pth.tar"))["epoch"] == 2


@pytest.mark.parametrize("lacking", [[], ["photo_dice"]])
def test_a_checkpoint_of_an_older_format_continues(project, run_train, monkeypatch, lacking):
    stop_after(11, run_train, monkeypatch, "--num-epochs", "2")
    older = {name: value for name, value in torch.load(CHECKPOINT).items() if name not in (*NEW_IN_FORMAT_2, *lacking)}
    del older["settings"]["clip_norm"]  # there were fewer settings
    utils.save_checkpoint(older, CHECKPOINT)
    assert utils.load_checkpoint(CHECKPOINT)["computed"] == older["images"] == 12
    run_train("--num-epochs", "2", "--load-model")
    assert [row["epoch"] for row in rows()] == ["1", "2"]


def test_a_checkpoint_of_a_newer_format_is_refused(project, run_train):
    run_train("--num-epochs", "1")
    newer = torch.load(CHECKPOINT) | {"format": 99}
    newer["model"]["attention"] = True
    utils.save_checkpoint(newer, CHECKPOINT)
    with pytest.raises(UserError, match=r"format 99, newer than .*: update the repository"):
        run_train("--num-epochs", "2", "--load-model")


@pytest.mark.parametrize("groups", [1, 2])
def test_a_checkpoint_of_another_optimizer_is_refused(project, run_train, monkeypatch, groups):
    run_train("--num-epochs", "1")
    monkeypatch.setattr(train, "Muon", lambda both: torch.optim.SGD(both[:groups]))
    with pytest.raises(UserError, match="of another optimizer"):
        run_train("--num-epochs", "2", "--load-model")


OPTIMIZERS = [Muon, partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW, torch.optim.Adafactor]


def test_too_little_memory_is_no_other_optimizer(monkeypatch):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9)

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(checkpoints, "_try_a_step", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        checkpoints.restore(optimizer, "SGD", optimizer.state_dict())


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_an_optimizers_state_of_other_sizes_is_refused(make):
    """And one that fits continues: the step that tries it changes nothing."""
    weight = torch.nn.Parameter(torch.ones(4, 3, 2, 2))
    groups = [{"params": [weight], "update": "muon"}] if make is Muon else [weight]
    optimizer = make(groups, lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before, state = weight.detach().clone(), checkpoints.copied(optimizer.state_dict(), {})
    checkpoints.restore(optimizer, type(optimizer).__name__, state)
    assert torch.equal(weight, before)
    values, restored = state["state"][0], optimizer.state_dict()["state"][0]
    assert restored.keys() == values.keys() != set()
    assert all(torch.equal(torch.as_tensor(restored[name]), torch.as_tensor(values[name])) for name in values)
    values |= {name: value.repeat(2, 1, 1, 1) for name, value in values.items() if getattr(value, "ndim", 0) == 4}
    with pytest.raises(UserError, match=r"the checkpoint is of another optimizer \(.+\): use that one"):
        checkpoints.restore(optimizer, type(optimizer).__name__, state)


def test_a_new_metric_joins_a_run_that_has_begun(project, run_train, monkeypatch):
    run_train("--num-epochs", "1")
    image_scores = utils.image_scores
    monkeypatch.setattr(utils, "image_scores", lambda *counts: image_scores(*counts) | {"recall": counts[0] * 0 + 0.25})
    run_train("--num-epochs", "2", "--load-model")
    assert [row["recall"] for row in rows()] == ["", "0.25"]
    assert "recall" in Path("saved_images/index.html").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_new_run_renames_the_checkpoints_of_the_one_before(project, run_train, capsys):
    run_train("--num-epochs", "1")
    first, best = CHECKPOINT.read_bytes(), Path("my_checkpoint_best.pth.tar").read_bytes()
    run_train("--num-epochs", "2", "--seed", "1")
    assert "my_checkpoint.pth.tar of an earlier run is now my_checkpoint_1.pth.tar" in capsys.readouterr().out
    run_train("--num-epochs", "1", "--seed", "2")
    assert Path("my_checkpoint_1.pth.tar").read_bytes() == first
    assert Path("my_checkpoint_1_best.pth.tar").read_bytes() == best
    assert utils.load_checkpoint(Path("my_checkpoint_2.pth.tar"))["epoch"] == 2
    run_train("--num-epochs", "2", "--load-model", "--checkpoint", "my_checkpoint_1.pth.tar")


def test_the_one_before_is_kept_and_takes_the_place_of_one_that_is_missing(project, run_train, capsys):
    run_train("--num-epochs", "2")
    assert utils.load_checkpoint(PREVIOUS)["epoch"] == 1
    CHECKPOINT.unlink()
    checkpoints.restore_previous(CHECKPOINT)
    assert utils.load_checkpoint(CHECKPOINT)["epoch"] == 1
    assert "my_checkpoint.pth.tar does not exist: my_checkpoint.prev.pth.tar" in capsys.readouterr().out
    assert not PREVIOUS.exists()


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> tuple[bytes, bytes, dict]:
    """The bytes of a checkpoint and of the one before it, and what the first holds."""
    path = tmp_path_factory.mktemp("checkpoint") / CHECKPOINT
    model = UNet(3, 1, (4, 8))
    state = {
        "state_dict": model.state_dict(),
        "model": {"in_channels": 3, "out_channels": 1, "features": [4, 8]},
        "preprocessing": {"height": 32, "width": 48, "mean": train.MEAN, "std": train.STD},
    }
    for epoch in (1, 2):
        checkpoints.save(state | {"epoch": epoch}, path, checkpoints.sibling(path, ".prev"))
    return path.read_bytes(), checkpoints.sibling(path, ".prev").read_bytes(), state


def damaged_files(whole: bytes) -> list[bytes]:
    chance = random.Random(0)
    files = [whole[: chance.randrange(len(whole))] for _ in range(50)]
    for _ in range(50):
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= chance.randrange(1, 256)
        files.append(bytes(flipped))
    return files


def test_damage_is_never_a_traceback_nor_silently_other_weights(two_checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, _, state = two_checkpoints
    refused = 0
    for damaged in damaged_files(whole):
        CHECKPOINT.write_bytes(damaged)
        try:
            assert same(utils.load_checkpoint(CHECKPOINT)["state_dict"], state["state_dict"])
        except UserError as error:
            assert "my_checkpoint.pth.tar is damaged" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 80  # the other bytes are padding


def test_the_one_before_takes_the_place_of_a_damaged_one(two_checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole, previous, _ = two_checkpoints
    for damaged in damaged_files(whole)[::10]:
        CHECKPOINT.write_bytes(damaged)
        PREVIOUS.write_bytes(previous)
        checkpoints.restore_previous(CHECKPOINT)
        if utils.load_checkpoint(CHECKPOINT)["epoch"] == 1:
            assert "my_checkpoint.prev.pth.tar, the checkpoint before it, takes its place" in capsys.readouterr().out
            assert CHECKPOINT.read_bytes() == previous
            assert Path("my_checkpoint.damaged.pth.tar").read_bytes() == damaged
        else:
            assert PREVIOUS.exists()


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil_ran",)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_checkpoint_with_code_is_refused_and_the_code_does_not_run(tmp_path, monkeypatch, as_zip, two_checkpoints):
    monkeypatch.chdir(tmp_path)
    if as_zip:
        torch.save({**two_checkpoints[2], "epoch": Evil()}, CHECKPOINT)
        assert zipfile.is_zipfile(CHECKPOINT)
    else:
        CHECKPOINT.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="could run code" if as_zip else "no checkpoint"):
        utils.load_checkpoint(CHECKPOINT)
    assert not Path("evil_ran").exists()


FOREIGN = {
    "rule": [5, {"low": 1}, {"chosen": None, "low": "a", "high": 3.0}, {"chosen": None, "brightest": [3]}],
    "model": [
        5, {"features": [10**9, 8]}, {"features": [8] * 1000}, {"features": (8, 16), "tile": "no"},
        {"features": (8, 16), "tile": (0, 0)}, {"features": (8, 16), "what": 3}, {"features": (30_000, 30_000, "a")},
    ],
    "preprocessing": [
        5, *({"height": 32, "width": 48, "mean": (0, 0, 0), "std": (1, 1, 1)} | entry for entry in (
            {"mean": "abc"}, {"mean": (0, 0)}, {"std": (1, 0, 1)}, {"height": 10**9}, {"width": 1.5}, {"scale": "a"})),
    ],
    "photo_size": [5, (1,), "ab"],
    "history": [[3]],
    "epoch": ["many", [1]],
    "settings": [5],
    "state_dict": [5, {"a": 5}],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in FOREIGN.items() for value in values])
def test_a_checkpoint_of_something_else_is_refused(two_checkpoints, tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    utils.save_checkpoint({**two_checkpoints[2], name: value}, CHECKPOINT)
    with pytest.raises(UserError, match="is not from this train"):
        utils.load_checkpoint(CHECKPOINT)


def test_a_small_file_never_asks_for_a_large_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"features": (1000, 1000)}
    with torch.device("meta"):
        large = build_network(config).state_dict()
    repeated = {name: torch.zeros(()).expand(weight.shape) for name, weight in large.items()}
    state = {"model": config, "state_dict": repeated, "preprocessing": PREPROCESSING}
    utils.save_checkpoint(state, CHECKPOINT)
    assert CHECKPOINT.stat().st_size < 100_000
    with pytest.raises(UserError, match="is not from this train"):
        utils.load_checkpoint(CHECKPOINT)


def test_a_compressed_file_is_no_checkpoint(two_checkpoints, tmp_path, monkeypatch):
    """Otherwise a few kilobytes could become gigabytes in memory."""
    monkeypatch.chdir(tmp_path)
    CHECKPOINT.write_bytes(two_checkpoints[0])
    with zipfile.ZipFile(CHECKPOINT) as whole, zipfile.ZipFile("small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for name in whole.namelist():
            small.writestr(name, bytes(len(whole.read(name))) if "data/" in name else whole.read(name))
    with pytest.raises(UserError, match="no checkpoint"):
        utils.load_checkpoint(Path("small.pt"))


def test_statistics_that_are_not_finite_are_in_no_checkpoint(project, run_train, monkeypatch):
    update = train.update_batch_norm

    def diverge(loader, epoch, model, device):
        update(loader, epoch, model, device)
        if epoch:
            next(iter(model.buffers()))[0] = torch.inf

    monkeypatch.setattr(train, "update_batch_norm", diverge)
    with pytest.raises(UserError, match="training diverged"):
        run_train("--num-epochs", "2", "--batch-size", "64")
    assert utils.load_checkpoint(CHECKPOINT)["epoch"] == 1
    assert all(value.isfinite().all() for value in weights().values())


def test_a_checkpoint_is_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / CHECKPOINT
    utils.save_checkpoint({"epoch": 1}, path)

    def half(state, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    state = SimpleNamespace(state_dict=lambda: {"epoch": 2})
    with checkpoints.CheckpointWriter(path, {}, is_new=False) as writer:
        writer.save(state)
        with pytest.raises(UserError, match="No space left"):
            writer.wait()
    assert torch.load(path) == {"epoch": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == [CHECKPOINT.name]


def test_a_full_disk_ends_the_run_with_a_sentence_and_the_checkpoint_before_loads(project, run_train):
    run_train("--num-epochs", "1")
    before = CHECKPOINT.read_bytes()
    limit = len(before) * 3 // 4  # bytes a file may have: the best weights fit, the newest state does not
    process = Training("--num-epochs", "2", "--load-model", largest_file=limit)
    assert process.status() == 1
    out = process.output()
    assert re.search(r"^error: my_checkpoint.pth.tar could not be written \(.*\): make room", out, re.MULTILINE), out
    assert "Traceback" not in out
    assert CHECKPOINT.read_bytes() == before and utils.load_checkpoint(CHECKPOINT)["epoch"] == 1
    assert not list(Path().glob("*.tmp"))


def test_what_is_saved_is_the_state_at_that_moment(tmp_path):
    weight = torch.zeros(1000)
    state = SimpleNamespace(state_dict=lambda: {"weight": weight, "again": [weight]})
    with checkpoints.CheckpointWriter(tmp_path / "a.pth.tar", {}, is_new=False) as writer:
        writer.save(state)
        weight += 1
        writer.wait()
    saved = torch.load(tmp_path / "a.pth.tar")
    assert not saved["weight"].any()
    assert saved["again"][0].data_ptr() == saved["weight"].data_ptr()

"""The training step: precision, memory and guards change what they should, and nothing else."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, leave_photos, rows, same, weights
from PIL import Image

import train
import utils
from dataset import Batches
from machinery import muon
from machinery.checkpoints import Beginning
from machinery.device import Device
from machinery.errors import UserError
from machinery.runs import one_class
from machinery.settings import parse_settings
from model import DoubleConv

CROPS = ["--crop", "64", "64", "--batch-size", "16"]
CPU = Device(torch.device("cpu"), torch.float32)


def state_and_settings(*flags: str, rate: float = 1e-3) -> tuple[train.State, object]:
    s = parse_settings(vars(train), [*SMALL, *flags])
    state = train.new_state(s, CPU, foreground=0.2, photos=64, beginning=Beginning())
    for group in state.optimizer.param_groups:
        group["lr"] *= rate / s.learning_rate
    return state, s


def batch(size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 32, 48, generator=generator)
    return images, (images[:, :1] > 1).float()


def test_accumulation_learns_the_same_from_less_at_a_time():
    found = []
    for parts in ("1", "2"):
        state, s = state_and_settings("--accumulation", parts)
        state.model.eval()  # BatchNorm would see smaller batches
        sizes = []
        state.model.register_forward_pre_hook(lambda _, inputs, sizes=sizes: sizes.append(len(inputs[0])))
        for _ in range(2):
            loss = train.train_step(state, *batch(), CPU, s)
        assert sizes == {"1": [4, 4], "2": [2, 2, 2, 2]}[parts]
        found.append((loss, state.model.state_dict()))
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-5)
    for name, weight in found[0][1].items():
        torch.testing.assert_close(weight, found[1][1][name], rtol=1e-3, atol=1e-4)


def test_activation_checkpointing_computes_twice_and_gives_the_same_weights(monkeypatch):
    found, calls, forward = [], [], DoubleConv.forward
    monkeypatch.setattr(DoubleConv, "forward", lambda self, x: calls.append(1) or forward(self, x))
    for flag, number in (("--no-activation-checkpointing", 10), ("--activation-checkpointing", 20)):
        state, s = state_and_settings(flag)
        calls.clear()
        for _ in range(2):
            train.train_step(state, *batch(), CPU, s)
        assert len(calls) == number
        found.append(dict(state.model.named_parameters()))
    assert same(*found)


def test_gradients_are_cut_to_the_norm():
    for flags, is_cut in (((), False), (("--clip-norm", "1e-3"), True)):
        state, s = state_and_settings(*flags)
        train.train_step(state, *batch(), CPU, s)
        norm = torch.stack([weight.grad.norm() for weight in state.model.parameters()]).norm()
        assert (norm <= 1.001e-3) == is_cut


def test_only_kernels_decay():
    found = []
    for decay in ("0", "0.3"):
        state, s = state_and_settings("--weight-decay", decay, rate=0.1)
        train.train_step(state, *batch(), CPU, s)
        found.append(dict(state.model.named_parameters()))
    start = dict(state_and_settings()[0].model.named_parameters())
    for name, weight in start.items():
        is_kernel = weight.ndim == 4 and not name.startswith("head")
        wanted = found[0][name] - 0.1 * 0.3 * weight * is_kernel
        torch.testing.assert_close(found[1][name], wanted, msg=name)


@pytest.mark.parametrize("features", [(24, 48, 96), (10, 260), (3,)])
def test_muon_takes_any_number_of_channels(features):
    state, s = state_and_settings("--features", *map(str, features))
    before = state.model.state_dict()["downs.0.layers.0.weight"].clone()
    assert train.train_step(state, *batch(), CPU, s).isfinite()
    assert not torch.equal(before, state.model.state_dict()["downs.0.layers.0.weight"])


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])  # the former has gradients of our own
def test_compiling_changes_no_weight(monkeypatch, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    found = []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for flag in ("no", "yes"):
        state, s = state_and_settings("--compile", flag, "--features", "16", "--precision", "fp32")
        assert (state.forward is state.model) == (flag == "no")
        for _ in range(2):
            train.train_step(state, *batch(), CPU, s)
        found.append(state.model.state_dict())
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=1e-3, atol=1e-4)


def test_where_compiling_fails_it_says_why_and_goes_on(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    state, s = state_and_settings("--compile", "yes", "--features", "8")
    assert state.forward is state.model
    assert re.search("torch.compile failed .*no compiler here.*training continues without it", capsys.readouterr().out)
    untouched, _ = state_and_settings("--features", "8")
    assert same(state.model.state_dict(), untouched.model.state_dict())
    assert train.train_step(state, *batch(), CPU, s).isfinite()


def test_fp16_counts_the_steps_that_it_skips(project, run_train, monkeypatch, capsys):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**30)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    run_train("--num-epochs", "1", "--precision", "fp16")
    skipped = int(re.search(r"Steps that were skipped: (\d+) of 16 steps", capsys.readouterr().out)[1])
    assert 1 <= skipped < 16
    assert all(value.isfinite().all() for value in weights().values())


@pytest.mark.parametrize("flags", [["--batch-size", "128"], ["--batch-size", "24"]])
def test_batches_are_always_full(project, run_train, monkeypatch, flags):
    """64 photos are one batch of 128, in which each comes twice, or three of 24, of which the last begins again."""
    sizes, train_step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: sizes.append(len(args[1])) or train_step(*args))
    run_train("--num-epochs", "1", *flags)
    assert sizes == {"128": [128], "24": [24, 24, 24]}[flags[1]]
    checkpoint = utils.load_checkpoint(Path("my_checkpoint.pth.tar"))
    assert checkpoint["images"] == checkpoint["computed"] == 0 and float(rows()[0]["train_loss"]) < 1


def test_training_and_validation_have_one_loss(project, run_train, monkeypatch):
    leave_photos(32, 8)
    monkeypatch.setattr(train, "image_losses", lambda logits, masks: 0 * logits.flatten(1).mean(1) + 7)
    run_train("--num-epochs", "1", "--batch-size", "24")
    assert float(rows()[0]["train_loss"]) == float(rows()[0]["val_loss"]) == 7


@pytest.mark.parametrize(
    ("own_loss", "given"),
    [
        (torch.nn.BCEWithLogitsLoss(), "a single number"),
        (torch.nn.BCEWithLogitsLoss(reduction="none"), "4 x 1 x 32 x 48"),
    ],
)
def test_a_loss_from_a_tutorial_is_named(own_loss, given, project, run_train, monkeypatch):
    leave_photos(8, 4)
    monkeypatch.setattr(train, "image_losses", own_loss)
    with pytest.raises(UserError, match=f"gives {given} for 4 images: return a loss for each"):
        run_train("--num-epochs", "1")


def test_another_optimizer_is_one_line(project, run_train, monkeypatch):
    leave_photos(8, 4)
    monkeypatch.setattr(train, "Muon", functools.partial(torch.optim.SGD, momentum=0.9))
    for flags in (["--num-epochs", "1"], ["--num-epochs", "2", "--load-model"]):
        run_train("--precision", "fp16", *flags)
    assert [row["epoch"] for row in rows()] == ["1", "2"]


def test_muon_takes_any_number_of_groups():
    """An encoder's group has another rate and rule: its update is what a lone optimizer of that group makes."""
    generator = torch.Generator().manual_seed(0)
    kernels = [torch.nn.Parameter(torch.randn(8, 4, 3, 3, generator=generator)) for _ in range(3)]
    groups = [
        {"params": kernels[:1], "update": "muon", "lr": 0.1},
        {"params": kernels[1:2], "update": "muon", "lr": 0.01, "weight_decay": 0.5},
        {"params": kernels[2:], "update": "adam", "lr": 0.001},
    ]
    twins = [torch.nn.Parameter(kernel.detach().clone()) for kernel in kernels]
    for kernel, twin in zip(kernels, twins, strict=True):
        kernel.grad, twin.grad = torch.ones_like(kernel), torch.ones_like(kernel)
    for group, twin in zip(groups, twins, strict=True):
        muon.Muon([group | {"params": [twin]}]).step()
    muon.Muon(groups).step()
    assert all(torch.equal(kernel, twin) for kernel, twin in zip(kernels, twins, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Guards


def test_a_loss_that_is_not_finite_names_the_photos_and_leaves_the_checkpoint(project, run_train, monkeypatch):
    run_train("--num-epochs", "1")
    before = Path("my_checkpoint.pth.tar").read_bytes()
    train_step, seen = train.train_step, []

    def poisoned(state, images, *rest):
        seen.append(images)
        if len(seen) == 3:
            images = images * float("inf")
        return train_step(state, images, *rest)

    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(UserError) as error:
        run_train("--num-epochs", "2", "--load-model", "--checkpoint-minutes", "0")
    names = sorted(path.name for path in Path("data/train_images").iterdir())
    batch = Batches(64, 4, seed=0).batches(epoch=1)[2]
    assert ", ".join(names[index] for index in batch) in str(error.value)
    assert "LEARNING_RATE" in str(error.value) and "\n" not in str(error.value)
    checkpoint = utils.load_checkpoint(Path("my_checkpoint.pth.tar"))
    assert checkpoint["images"] == 8
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert Path("my_checkpoint.pth.tar").read_bytes() != before


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weights_that_are_not_finite_are_never_saved(project, run_train, monkeypatch, precision):
    """The range of fp16 is too small for some networks: the message then names fp32."""
    train_step = train.train_step

    def poisoned(state, *rest):
        loss = train_step(state, *rest)
        torch.nn.init.constant_(state.model.head.bias, float("nan"))
        return loss

    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(UserError, match="training diverged") as error:
        run_train("--num-epochs", "1", "--batch-size", "64", "--precision", precision)
    assert ('PRECISION = "fp32"' in str(error.value)) == (precision == "fp16")
    assert not Path("my_checkpoint.pth.tar").exists()


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate",
        "MPS backend out of memory",
        "DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_out_of_memory_says_what_to_lower(project, run_train, monkeypatch, message):
    def too_large(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(train, "train_step", too_large)
    with pytest.raises(UserError, match=r"BATCH_SIZE 4 and 32 x 48 pixels.*ACCUMULATION"):
        run_train()


def test_other_errors_keep_their_traceback(project, run_train, monkeypatch):
    def bug(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train, "train_step", bug)
    with pytest.raises(RuntimeError, match="shapes"):
        run_train()


def test_a_network_that_predicts_one_class_is_named(project, run_train, capsys):
    """When half of the epochs are over, and once more after the last: at first every network predicts so."""
    leave_photos(4, 2)
    run_train("--num-epochs", "6", "--learning-rate", "1e-9")
    before, *after = capsys.readouterr().out.split("\nWARNING: ")
    assert [re.findall(r"^ +(\d) ", part, re.MULTILINE) for part in (before, *after)] == [list("123"), list("456"), []]
    for line in after:
        assert re.match(
            r"it finds no foreground, which [0-9.]+ % of the validation masks are: raise NUM_EPOCHS\n", line
        )


def test_a_network_that_has_learned_is_not_warned_of(project, run_train, capsys):
    run_train("--num-epochs", "4")
    assert "WARNING" not in capsys.readouterr().out


def test_dice_shows_that_a_network_predicts_one_class():
    masks = torch.zeros(4, 10, 10, dtype=torch.bool)
    masks[0, :4], masks[1, 3:5, 3:5] = True, True
    foreground = masks.double().mean((1, 2)).numpy()

    def said(predictions: torch.Tensor) -> str | None:
        tp, fp, fn, _ = utils.confusion(predictions, masks, torch.ones_like(masks))
        return one_class(utils.dice_scores(tp, fp, fn).double().tolist(), foreground)

    assert said(torch.zeros_like(masks)) == "it finds no foreground, which 11.0 % of the validation masks are"
    every = "it predicts foreground for every pixel, which 11.0 % of the validation masks are"
    assert said(torch.ones_like(masks)) == every
    assert said(masks) is said(masks.roll(1, 1)) is None
    assert one_class([1.0, 1.0], np.zeros(2)) is None  # there is none to be found


@pytest.mark.parametrize(("pixels", "flags", "is_told"), [(2, [], True), (10, [], False), (2, CROPS, False)])
def test_only_where_objects_have_a_few_pixels_a_run_of_whole_photos_is_told_to_take_crops(
    project, run_train, capsys, pixels, flags, is_told
):
    leave_photos(4, 2)
    for mask in Path("data").glob("*_masks/*"):
        square = np.zeros((64, 96), np.uint8)
        square[20 : 20 + 2 * pixels, 40 : 40 + 3 * pixels] = 255  # at training size half as many
        Image.fromarray(square).save(mask)
    run_train("--num-epochs", "1", "--learning-rate", "1e-9", *flags)
    out = capsys.readouterr().out
    assert "WARNING: it finds no foreground" in out and ("need crops" in out) == is_told


def test_the_dice_weight_adds_soft_dice(monkeypatch):
    random = torch.Generator().manual_seed(0)
    logits, masks = torch.randn(3, 1, 9, 7, generator=random), torch.rand(3, 1, 9, 7, generator=random).round()
    masks[0, 0, :3], masks[2] = torch.nan, 0
    plain = train.image_losses(logits, masks)
    monkeypatch.setattr(train, "DICE_WEIGHT", 0.5)
    for image, (both, alone) in enumerate(zip(train.image_losses(logits, masks), plain, strict=True)):
        y = masks[image][~masks[image].isnan()].double()
        p = logits[image][~masks[image].isnan()].double().sigmoid()
        assert (both - alone).item() == pytest.approx(
            0.5 * (1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)).item()
        )
    right = torch.where(masks.nan_to_num() > 0, 100.0, -100.0)
    assert train.image_losses(right, masks).max() < 1e-6


def test_the_dice_weight_counts_in_training_and_validation(project, run_train, capsys):
    leave_photos(8, 4)
    run_train("--num-epochs", "1")
    before = rows()[0]
    run_train("--num-epochs", "1", "--dice-weight", "1")
    assert all(float(rows()[0][name]) > float(before[name]) + 0.2 for name in ("train_loss", "val_loss"))
    run_train("--num-epochs", "2", "--load-model")
    assert "DICE_WEIGHT was 1.0 and is 0.0 from here on." in capsys.readouterr().out

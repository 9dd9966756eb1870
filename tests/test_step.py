"""The training step: precision, memory and guards change what they should, and nothing else."""

import functools
import re
from pathlib import Path

import pytest
import torch
from conftest import SMALL, same, weights

import train
import utils
from model import DoubleConv

CPU = torch.device("cpu")


def state_and_settings(*flags: str) -> tuple[train.State, object]:
    s = utils.parse_settings(vars(train), [*SMALL, *flags])
    return train.new_state(s, CPU, torch.float32, foreground=0.2, images=64), s


def batch(size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 32, 48, generator=generator)
    return images, (images[:, :1] > 1).float()


def test_accumulation_learns_the_same_from_less_at_a_time():
    found = []
    for parts in ("1", "3"):  # 4 images in 3 parts: 2 and 2, as torch.chunk has it
        state, s = state_and_settings("--accumulation", parts)
        state.model.eval()  # BatchNorm would see smaller batches
        sizes = []
        state.model.register_forward_pre_hook(lambda _, inputs, sizes=sizes: sizes.append(len(inputs[0])))
        for _ in range(2):
            loss = train.train_step(state, *batch(), 1e-3, torch.float32, s, 4)
        assert sizes == {"1": [4, 4], "3": [2, 2, 2, 2]}[parts]
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
            train.train_step(state, *batch(), 1e-3, torch.float32, s, 4)
        assert len(calls) == number
        found.append(dict(state.model.named_parameters()))
    assert same(*found)


def test_gradients_are_cut_to_the_norm():
    for flags, is_cut in (((), False), (("--clip-norm", "1e-3"), True)):
        state, s = state_and_settings(*flags)
        train.train_step(state, *batch(), 1e-3, torch.float32, s, 4)
        norm = torch.stack([weight.grad.norm() for weight in state.model.parameters()]).norm()
        assert (norm <= 1.001e-3) == is_cut


def test_only_kernels_decay():
    found = []
    for decay in ("0", "0.3"):
        state, s = state_and_settings("--weight-decay", decay)
        train.train_step(state, *batch(), 0.1, torch.float32, s, 4)
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
    assert train.train_step(state, *batch(), 1e-2, torch.float32, s, 4).isfinite()
    assert not torch.equal(before, state.model.state_dict()["downs.0.layers.0.weight"])


def test_compiling_changes_no_weight(monkeypatch):
    found = []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for flag in ("no", "yes"):
        state, s = state_and_settings("--compile", flag)
        assert (state.forward is state.model) == (flag == "no")
        for size in (4, 2):  # the last batch is smaller
            train.train_step(state, *batch(size), 1e-3, torch.float32, s, size)
        found.append(state.model.state_dict())
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=1e-3, atol=1e-4)


def test_where_compiling_fails_it_says_why_and_goes_on(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    state, s = state_and_settings("--compile", "yes")
    assert state.forward is state.model
    assert re.search("torch.compile failed .*no compiler here.*going on without it", capsys.readouterr().out)
    untouched, _ = state_and_settings()
    assert same(state.model.state_dict(), untouched.model.state_dict())
    assert train.train_step(state, *batch(), 1e-3, torch.float32, s, 4).isfinite()


def test_fp16_counts_the_steps_that_it_skips(project, run_train, monkeypatch, capsys):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**30)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    run_train("--num-epochs", "1", "--precision", "fp16")
    skipped = int(re.search(r"(\d+) of 16 steps were skipped", capsys.readouterr().out)[1])
    assert 1 <= skipped < 16
    assert all(value.isfinite().all() for value in weights().values())


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
    with pytest.raises(utils.UserError) as error:
        run_train("--num-epochs", "2", "--load-model", "--checkpoint-minutes", "0")
    sampler = utils.Batches(64, 4, seed=0)
    sampler.epoch = 1
    names = sorted(path.name for path in Path("data/train_images").iterdir())
    assert ", ".join(names[index] for index in sampler.batches()[2]) in str(error.value)
    assert "LEARNING_RATE" in str(error.value) and "\n" not in str(error.value)
    checkpoint = utils.load_checkpoint(Path("my_checkpoint.pth.tar"))
    assert checkpoint["images"] == 8
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert Path("my_checkpoint.pth.tar").read_bytes() != before


def test_weights_that_are_not_finite_are_never_saved(project, run_train, monkeypatch):
    train_step = train.train_step

    def poisoned(state, *rest):
        loss = train_step(state, *rest)
        torch.nn.init.constant_(state.model.head.bias, float("nan"))
        return loss

    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(utils.UserError, match="training broke down"):
        run_train("--num-epochs", "1", "--batch-size", "64")
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
    with pytest.raises(utils.UserError, match=r"BATCH_SIZE 4 and 32 x 48 pixels.*ACCUMULATION"):
        run_train()


def test_other_errors_keep_their_traceback(project, run_train, monkeypatch):
    def bug(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train, "train_step", bug)
    with pytest.raises(RuntimeError, match="shapes"):
        run_train()


def test_a_network_that_predicts_one_class_is_named(project, run_train, capsys):
    run_train("--num-epochs", "1", "--learning-rate", "1e-9")
    out = capsys.readouterr().out
    assert re.search(r"WARNING: it predicts background for every pixel, and \d+\.\d % of the training masks", out)
    run_train("--num-epochs", "4")
    after_the_last_epoch = capsys.readouterr().out.split("\n    4 ")[1]
    assert "WARNING" not in after_the_last_epoch

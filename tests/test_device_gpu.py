"""What only a GPU can show: pytest -m gpu. Skipped where there is none."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, rows, weights
from PIL import Image

import predict
import train
from machinery.checkpoints import Beginning
from machinery.device import Device, tune
from machinery.errors import UserError
from machinery.runs import Run
from machinery.settings import parse_settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")]
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16


def state_and_batch(device: Device, *flags: str) -> tuple:
    s = parse_settings(vars(train), [*SMALL, "--compile", "no", *flags])
    tune(device)
    state = train.new_state(s, device, 0.2, 64, beginning=Beginning())
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, 32, 48, 3), dtype=torch.uint8, generator=generator)
    batch = device.to(images, (images[..., 0] > 200).byte())
    return state, (*batch, device, s)


@pytest.mark.parametrize("flags", [[], ["--device", "cuda"], ["--device", "cuda:0"]])
def test_training_runs_on_the_gpu(project, run_train, flags, capsys):
    run_train("--num-epochs", "6", *flags)
    assert "Training on cuda:0" in capsys.readouterr().out
    assert float(rows()[-1]["dice"]) > 0.7


def test_a_step_in_fp32_equals_the_cpus():
    results = []
    for device in (CPU, CUDA):
        state, batch = state_and_batch(Device(device, FP32))
        losses = [train.train_step(state, *batch).item() for _ in range(3)]
        results.append((losses, {name: weight.cpu() for name, weight in state.model.state_dict().items()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for name, weight in results[0][1].items():
        torch.testing.assert_close(weight, results[1][1][name], rtol=1e-2, atol=2e-3)


def test_a_bf16_step_never_waits_for_the_gpu():
    state, batch = state_and_batch(Device(CUDA, BF16), "--clip-norm", "1", "--accumulation", "2")
    train.train_step(state, *batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = train.train_step(state, *batch)  # raises where it waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


def test_fp16_survives_a_scale_that_is_too_large(project, run_train, monkeypatch, capsys):
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**30))
    run_train("--num-epochs", "1", "--precision", "fp16")
    assert "Steps that were skipped" in capsys.readouterr().out
    assert all(value.isfinite().all() for value in weights().values())


def test_compiled_and_eager_losses_are_equal():
    losses = []
    for flag in ("no", "yes"):
        state, batch = state_and_batch(Device(CUDA, FP32), "--compile", flag)
        losses.append([train.train_step(state, *batch).item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_run_stopped_on_the_gpu_continues_there_and_on_the_cpu(project, run_train, device):
    run_train("--num-epochs", "1", "--device", "cuda")
    run_train("--num-epochs", "2", "--load-model", "--device", device)
    assert len(rows()) == 2 and all(value.isfinite().all() for value in weights().values())


def test_memory_does_not_grow_over_epochs(project, run_train, monkeypatch):
    allocated, end_epoch = [], Run.end_epoch
    monkeypatch.setattr(
        Run, "end_epoch", lambda *args: (end_epoch(*args), allocated.append(torch.cuda.memory_allocated()))[0]
    )
    run_train("--num-epochs", "4")
    assert allocated[-1] <= allocated[1] + 2**16


def test_too_large_a_batch_says_what_to_lower(project, run_train):
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        with pytest.raises(UserError, match="out of memory at BATCH_SIZE 64"):
            run_train("--batch-size", "64", "--image-height", "512", "--image-width", "512", "--features", "64", "128")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_predictions_equal_the_cpus(project, run_train):
    run_train("--num-epochs", "2")
    image = np.asarray(Image.open(sorted(Path("data/val_images").iterdir())[0]))
    masks = [
        predict.predict(predict.load_model("my_checkpoint_best.pth.tar", device, "fp32"), image) > 0.5
        for device in ("cuda", "cpu")
    ]
    assert (masks[0] != masks[1]).mean() < 1e-3


def test_torchrun_starts_one_process_on_the_gpu(project):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += [Path(train.__file__), *SMALL, "--num-epochs", "1"]
    run_ = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    assert run_.returncode == 0, run_.stderr
    assert "Training on cuda:0" in run_.stdout

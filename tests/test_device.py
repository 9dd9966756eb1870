"""Devices that this machine may lack: GPUs are simulated, with fake tensors, which have shapes but no values."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.grad import conv2d_weight
from torch.torch_version import TorchVersion

import train
import utils
from dataset import Batches
from machinery import device, processes
from machinery.checkpoints import Beginning
from machinery.errors import UserError
from machinery.settings import parse_settings

CUDA = torch.device("cuda", 0)
CPU_FP32, CUDA_BF16 = (
    device.Device(torch.device("cpu"), torch.float32),
    device.Device(CUDA, torch.bfloat16),
)


@pytest.fixture
def gpus(monkeypatch):
    """gpus(2, (9, 0)): PyTorch sees so many GPUs of that compute capability. Returns a list of those made current."""

    def simulate(count: int = 1, capability: tuple[int, int] = (8, 0)) -> list[int]:
        current, choose_device, ones = [], device.choose_device, torch.ones
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: (current or [0])[-1])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: capability >= (8, 0))
        monkeypatch.setattr(torch._C, "_cuda_setDevice", current.append, raising=False)

        def choose(name: str, precision: str = "auto", **normalisation: tuple) -> device.Device:
            with monkeypatch.context() as patched:
                patched.setattr(torch, "ones", lambda *shape, device: ones(*shape))
                return choose_device(name, precision, **normalisation)

        for module in (device, train):
            monkeypatch.setattr(module, "choose_device", choose)
        return current

    return simulate


def torchrun(monkeypatch, count: int, local_rank: int) -> None:
    monkeypatch.setattr(processes, "WORLD_SIZE", count)
    monkeypatch.setattr(processes, "LOCAL_WORLD_SIZE", count)
    monkeypatch.setattr(processes, "LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_is_chosen_by_its_index(gpus, name, index):
    current = gpus(2)
    chosen = device.choose_device(name)
    assert chosen.device == torch.device("cuda", index)
    torch.cuda.set_device(chosen.device)  # refuses a device without an index
    assert current == [index]


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_training_starts_on_the_gpu(gpus, name, project, run_train, monkeypatch):
    current = gpus()

    class Reached(Exception):
        pass

    def move(model, device, **_):
        assert (device, current) == (torch.device("cuda", 0), [0])
        raise Reached

    monkeypatch.setattr(torch.nn.Module, "to", move)
    with pytest.raises(Reached):
        run_train("--device", name)


@pytest.mark.parametrize(
    ("capability", "precision"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_a_gpu_computes_in_the_type_that_it_is_made_for(gpus, capability, precision):
    gpus(1, capability)
    assert device.choose_device("auto").precision == precision
    assert device.choose_device("auto", "fp32").precision == torch.float32


def test_fp32_is_not_tf32(gpus, monkeypatch):
    gpus()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for precision, is_allowed in ((torch.float32, False), (torch.bfloat16, True)):
        device.tune(device.Device(CUDA, precision))
        assert torch.backends.cudnn.allow_tf32 == is_allowed


def test_a_gpu_without_kernels_leaves_the_work_to_the_cpu_and_says_why(gpus, monkeypatch, capsys):
    gpus()

    def conv2d(*_):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors")

    monkeypatch.setattr(F, "conv2d", conv2d)
    assert device.choose_device("auto").device == torch.device("cpu")
    assert "cuda:0 cannot be used (CUDA error: no kernel image is available" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"DEVICE cuda cannot be used here \(CUDA error: no kernel image"):
        device.choose_device("cuda")


@pytest.mark.parametrize("name", ["cuda", "cuda:5", "tpu", "meta", "xpu", ""])
def test_a_device_that_is_not_there_is_named(name):
    if torch.cuda.is_available() and name == "cuda":
        pytest.skip("it is there")
    with pytest.raises(UserError, match=f"DEVICE {name} cannot be used here"):
        device.choose_device(name)


def test_each_process_of_a_machine_gets_a_gpu_of_its_own(gpus, monkeypatch):
    gpus(2)
    torchrun(monkeypatch, 2, local_rank=1)
    for name in ("auto", "cuda"):
        assert device.choose_device(name).device == torch.device("cuda", 1)
    assert device.choose_device("cpu").device == torch.device("cpu")
    for name in ("cuda:0", "mps"):  # one for all of them
        with pytest.raises(UserError, match=f"DEVICE {name} .*for each"):
            device.choose_device(name)


def test_more_processes_than_gpus_are_refused(gpus, monkeypatch):
    gpus(2)
    torchrun(monkeypatch, 3, local_rank=2)
    with pytest.raises(UserError, match=r"there are fewer GPUs here, 2: set --nproc_per_node to that"):
        device.choose_device("auto")


def test_processes_on_gpus_need_nccl(gpus, monkeypatch):
    gpus(2)
    torchrun(monkeypatch, 2, local_rank=0)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="NCCL"):
        device.choose_device("auto")


def test_workers_share_a_machines_cores(monkeypatch):
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert device.choose_num_workers(-1, CUDA_BF16) == 8
    torchrun(monkeypatch, 4, local_rank=0)
    assert device.choose_num_workers(-1, CUDA_BF16) == 3
    torchrun(monkeypatch, 16, local_rank=0)
    assert device.choose_num_workers(-1, CUDA_BF16) == 1
    assert device.choose_num_workers(-1, CPU_FP32) == 0
    assert device.choose_num_workers(5, CUDA_BF16) == 5


def test_only_long_runs_on_cuda_are_compiled(monkeypatch):
    assert [device.should_compile("auto", CUDA_BF16, steps) for steps in (96, 4999, 5000)] == [False, False, True]
    assert not device.should_compile("auto", CPU_FP32, 10**6) and device.should_compile("yes", CPU_FP32, 1)
    assert not device.should_compile("no", CUDA_BF16, 10**6)
    torchrun(monkeypatch, 2, local_rank=0)
    assert not device.should_compile("auto", CUDA_BF16, 10**6)


# ---------------------------------------------------------------------------------------------------------------------
# What a GPU would compute, on fake tensors


@pytest.fixture
def on_cuda(gpus, monkeypatch):
    """A network with its optimizer on a simulated GPU, settings, a batch, and the devices that were waited for."""
    if torch.__version__ < TorchVersion("2.11"):
        pytest.skip("its fake tensors on CUDA ask for a driver")
    s = parse_settings(vars(train), [*SMALL, "--clip-norm", "1", "--accumulation", "2", "--compile", "no"])
    items = []
    with FakeTensorMode():
        with monkeypatch.context() as patched, CUDA:  # building only: what follows has to name its device
            patched.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
            patched.setattr(device, "tune", lambda _: None)
            state = train.new_state(s, CUDA_BF16, 0.2, 64, beginning=Beginning())
        images = torch.randn(4, 3, 32, 48, device=CUDA).contiguous(memory_format=torch.channels_last)
        masks = (torch.rand(4, 1, 32, 48, device=CUDA) < 0.2).float()

        def backward(loss: torch.Tensor) -> None:  # fake tensors have none on CUDA
            assert loss.device == CUDA and loss.dtype == torch.float32 and loss.ndim == 0
            for weight in state.model.parameters():
                weight.grad = torch.zeros_like(weight)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        for kind, name in ((torch.Tensor, "item"), (type(images), "tolist")):
            monkeypatch.setattr(kind, name, lambda tensor: items.append(tensor.device) or 0.5)
        gpus()
        yield state, s, images, masks, items


def test_a_step_stays_on_the_gpu_and_never_waits_for_it(on_cuda):
    state, s, images, masks, items = on_cuda
    for _ in range(2):
        loss = train.train_step(state, images, masks, CUDA_BF16, s)
        assert loss.device == CUDA and loss.ndim == 0
    assert CUDA not in items
    for weight in state.model.parameters():
        assert weight.device == CUDA
        assert all(value.device == CUDA for value in state.optimizer.state[weight].values() if torch.is_tensor(value))


def test_validation_counts_on_the_gpu(on_cuda):
    state, _, images, masks, items = on_cuda
    shown = []

    class Loader:
        def __init__(self, batches: int) -> None:
            self.batch_sampler = Batches(4 * batches, 4)

        def __iter__(self):
            batch = images.permute(0, 2, 3, 1).byte(), masks[:, 0].byte()
            yield from [batch] * len(self.batch_sampler)

    waits = []
    for batches in (1, 5):
        items.clear()
        utils.check_accuracy(
            Loader(batches), state.model, CUDA_BF16, train.image_losses, lambda logits, _: shown.append(logits)
        )
        waits.append(items.count(CUDA))
    assert waits == [1, 1]  # for the progress of the first of ten batches
    assert all(tensor.device == CUDA and tensor.dtype == torch.float32 for tensor in shown)
    assert [tensor.shape for tensor in shown] == [(4, 1, 32, 48)] * 6


@pytest.mark.parametrize(("capability", "precision"), [("AVX2", "fp32"), ("AVX2", "bf16"), ("AVX512", "fp32")])
def test_an_older_cpu_computes_the_weights_gradients_in_another_layout(monkeypatch, capability, precision):
    """Its kernels for channels_last are slow. The gradients are the same, for layers of all kinds."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    layouts = []

    def watched(x: torch.Tensor, shape: torch.Size, gradient: torch.Tensor, *others) -> torch.Tensor:
        layouts.append(x.is_contiguous() and gradient.is_contiguous())
        return conv2d_weight(x, shape, gradient, *others)

    monkeypatch.setattr(device, "conv2d_weight", watched)
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),  # this one,
        nn.Conv2d(64, 32, 5, stride=2, padding=2, dilation=2, bias=False),  # and this one
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Conv2d(32, 32, 3, groups=32, bias=False),
        nn.Conv2d(32, 32, 3, padding="same", bias=False),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect", bias=False),
        nn.Conv2d(32, 1, 1, bias=False),
    ]
    model, expected = nn.Sequential(*layers), nn.Sequential(*copy.deepcopy(layers))
    chosen = device.Device(torch.device("cpu"), device.PRECISIONS[precision])
    model, forward = device.to_device(model, (2, 3, 21, 30), chosen, "no", 1)
    images = torch.rand(2, 3, 21, 30).contiguous(memory_format=torch.channels_last)
    for network in (forward, expected):
        with chosen.autocast():
            logits = network(images)
        logits.float().mul(100).square().sum().backward()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        tolerance = (1e-4 if precision == "fp32" else 0.1) * other.grad.abs().max().item()
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=tolerance)
    with torch.no_grad():
        for one, other in zip((fused := copy.deepcopy(model)), expected, strict=True):
            one.weight.copy_(other.weight)
    fused[1].bias = nn.Parameter(torch.ones(64))  # as folding BatchNorm gives it one
    expected[1].bias = fused[1].bias
    torch.testing.assert_close(fused(images), expected(images))
    assert layouts == ([True, True] if (capability, precision) == ("AVX2", "fp32") else [])


def test_images_are_normalised_on_the_device():
    bytes_of = torch.randint(256, (2, 5, 7, 3), dtype=torch.uint8)
    masks = torch.randint(2, (2, 5, 7), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    chosen = device.Device(torch.device("cpu"), torch.float32, mean, std)
    images, wanted_masks = chosen.to(bytes_of, masks)
    expected = (bytes_of.double() / 255 - torch.tensor(mean, dtype=torch.float64)) / torch.tensor(std).double()
    torch.testing.assert_close(images.double(), expected.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    assert images.dtype == wanted_masks.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(wanted_masks[:, 0], masks.float())

"""Muon learns the same whatever a machine makes of float32 products, and learns the kernels that it is meant for."""

from collections import defaultdict

import pytest
import torch
from conftest import rows
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from machinery.muon import Muon, adam_, float32_products, muon_, muon_groups, newton_schulz
from model import UNet

PRODUCTS = {"aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm"}
BITS = {"none": 23, "ieee": 23, "tf32": 10, "bf16": 7}  # of mantissa that a machine may round a product's factors to
BITS |= {"highest": 23, "high": 10, "medium": 7}  # the same before torch 2.9
HAS_NEW_SWITCHES = hasattr(torch.backends.mkldnn, "matmul")


class RoughMachine(TorchDispatchMode):
    """Rounds the factors of every float32 product as far as the process allows.

    A GPU with TF32 does so under "high", a CPU with AMX under "medium".
    """

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if str(operation).rsplit(".", 1)[0] in PRODUCTS:
            args = [*args[:-2], *map(rounded, args[-2:])]
        return operation(*args, **(kwargs or {}))


def rounded(factor: torch.Tensor) -> torch.Tensor:
    if HAS_NEW_SWITCHES:
        precision = torch.backends.mkldnn.matmul.fp32_precision
    else:
        precision = torch.get_float32_matmul_precision()
    dropped = 23 - BITS[precision]
    if factor.dtype != torch.float32 or not dropped:
        return factor
    bits = factor.contiguous().view(torch.int32)
    return ((bits + (1 << (dropped - 1))) >> dropped << dropped).view(torch.float32)


@pytest.fixture(params=["highest", "high", "medium"])
def rough_machine(request):
    torch.set_float32_matmul_precision(request.param)
    with RoughMachine():
        yield request.param
    torch.set_float32_matmul_precision("highest")


def matrices() -> torch.Tensor:
    """(3, 64, 576), whose singular values differ by a factor of 100 and more, as a gradient's do."""
    generator = torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(3, 64, 64, generator=generator))[0]
    return turned @ (torch.randn(3, 64, 576, generator=generator) * torch.logspace(0, 2, 64)[:, None])


def step_of(gradients: torch.Tensor) -> torch.Tensor:
    """The first step of kernels (64, 64, 3, 3) with these gradients."""
    kernels = [torch.zeros(64, 64, 3, 3) for _ in gradients]
    for kernel, gradient in zip(kernels, gradients, strict=True):
        kernel.grad = gradient.reshape(kernel.shape).clone()
    with float32_products("cpu"):
        muon_(kernels, {kernel: {} for kernel in kernels}, 1.0, 0.0)
    return -torch.stack(kernels).reshape(gradients.shape)


def test_muon_moves_a_kernel_alike_in_all_directions(rough_machine):
    step = step_of(matrices())
    assert torch.get_float32_matmul_precision() == rough_machine  # what the user has set is as it was
    singular = torch.linalg.svdvals(step)
    assert singular.min() > 0.65 and singular.max() < 1.25
    left, _, right = torch.linalg.svd(matrices(), full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(step.flatten(1), (left @ right).flatten(1))
    assert cosine.min() > 0.97


@pytest.mark.skipif(not HAS_NEW_SWITCHES, reason="torch 2.9 brought them")
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_pytorchs_newer_switches_do_not_reach_the_products_either(precision):
    gradients, backend = matrices(), torch.backends.mkldnn.matmul
    wanted = step_of(gradients)
    before, backend.fp32_precision = backend.fp32_precision, precision
    try:
        with RoughMachine():
            assert torch.equal(step_of(gradients), wanted)
        assert backend.fp32_precision == precision
    finally:
        backend.fp32_precision = before


def test_autocast_does_not_reach_the_products():
    gradients = matrices()
    wanted = step_of(gradients)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(step_of(gradients), wanted)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_rounded_products_would_be_noticed(precision):
    torch.set_float32_matmul_precision(precision)
    with RoughMachine():
        gradients = matrices()
        step = newton_schulz(gradients @ gradients.mT) @ gradients
    torch.set_float32_matmul_precision("highest")
    assert torch.linalg.svdvals(step).max() > 1.25


def test_a_run_on_a_rough_machine_learns_the_same(project, run_train):
    flags = ["--num-epochs", "6", "--precision", "fp32"]
    run_train(*flags)
    wanted = float(rows()[-1]["dice"])
    torch.set_float32_matmul_precision("medium")
    with RoughMachine():
        run_train(*flags)
        dice = float(rows()[-1]["dice"])
    torch.set_float32_matmul_precision("highest")
    assert wanted > 0.8 and dice == pytest.approx(wanted, abs=0.02)


def test_the_small_weights_take_a_step_together():
    """Each operation waits for a GPU to start it: a network has 42 of these weights."""

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[-1] += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for number in (1, 20):
        weights, states = [torch.ones(4) for _ in range(number)], defaultdict(dict)
        for weight in weights:
            weight.grad = torch.ones(4)
        adam_(weights, states, 0.1)
        counts.append(0)
        with Count():
            adam_(weights, states, 0.1)
    assert counts[0] == counts[1] < 10


def test_the_other_weights_take_the_steps_of_pytorchs_adam():
    weights, twins = ([torch.nn.Parameter(torch.ones(size)) for size in (5, 3)] for _ in range(2))
    adam, states = torch.optim.Adam(twins, lr=0.1), defaultdict(dict)
    for seed in range(5):
        for weight, twin in zip(weights, twins, strict=True):
            weight.grad = twin.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            adam_(weights, states, 0.1)
        adam.step()
    torch.testing.assert_close(weights, twins)


# ---------------------------------------------------------------------------------------------------------------------
# Groups


def names_in_groups(network: nn.Module) -> dict[str, list[str]]:
    """The names of the weights of each group: "muon", "adam", and "pretrained", whose rate is lower."""
    names = {weight: name for name, weight in network.named_parameters()}
    groups = muon_groups(network, lr=1.0, weight_decay=0.0)
    kinds = [group["update"] if group["lr"] > 0.01 else "pretrained" for group in groups]
    return {kind: [names[weight] for weight in group["params"]] for kind, group in zip(kinds, groups, strict=True)}


def test_the_groups_of_the_u_net_stay_as_checkpoints_have_them():
    """An optimizer's state belongs to weights by their places in the groups."""
    assert names_in_groups(UNet(features=(4,))) == {
        "muon": [
            "downs.0.layers.0.weight",
            "downs.0.layers.3.weight",
            "bottleneck.layers.0.weight",
            "bottleneck.layers.3.weight",
            "ups.0.weight",
            "up_convs.0.layers.0.weight",
            "up_convs.0.layers.3.weight",
        ],
        "adam": [
            *(f"downs.0.layers.{layer}.{kind}" for layer in (1, 4) for kind in ("weight", "bias")),
            *(f"bottleneck.layers.{layer}.{kind}" for layer in (1, 4) for kind in ("weight", "bias")),
            "ups.0.bias",
            *(f"up_convs.0.layers.{layer}.{kind}" for layer in (1, 4) for kind in ("weight", "bias")),
            "head.weight",
            "head.bias",
        ],
    }


class Zoo(nn.Module):
    """Weights of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, bias=False)
        self.transposed = nn.ConvTranspose2d(8, 4, 2, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, bias=False)
        self.header = nn.Conv2d(8, 8, 1, bias=False)
        self.encoder = nn.Conv2d(8, 8, 1, bias=False)  # not pretrained
        self.position = nn.Parameter(torch.zeros(1, 8, 4, 4))
        self.linear = nn.Linear(8, 8, bias=False)
        self.volume = nn.Conv3d(8, 8, 3, bias=False)
        self.gate = nn.Conv2d(8, 1, 1, bias=False)
        self.last = nn.ConvTranspose2d(8, 1, 2, bias=False)


def test_muon_is_for_layers_that_mix_channels():
    kinds = {"muon": ["plain", "transposed", "header", "encoder"]}
    kinds["adam"] = ["position", "depthwise", "grouped", "linear", "volume", "gate", "last"]
    assert names_in_groups(Zoo()) == {
        kind: [name if name == "position" else f"{name}.weight" for name in names] for kind, names in kinds.items()
    }


def test_a_head_is_left_to_adam_however_many_channels_it_has():
    network = nn.Sequential()
    network.body, network.head = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 4, 1), nn.PixelShuffle(2))
    assert names_in_groups(network) == {"muon": ["body.weight"], "adam": ["body.bias", "head.0.weight", "head.0.bias"]}


def test_frozen_weights_stay_as_they_are():
    network = nn.Sequential(nn.Conv2d(3, 8, 3).requires_grad_(False), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 1))
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    optimizer = Muon(muon_groups(network, 0.1, 0.01))
    network(torch.randn(2, 3, 8, 8)).mean().backward()
    optimizer.step()
    moved = [name for name, weight in network.named_parameters() if not torch.equal(weight, before[name])]
    assert moved == ["1.weight", "1.bias", "2.weight", "2.bias"]

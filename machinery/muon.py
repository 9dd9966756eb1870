"""Muon for the kernels, and Adam for the few other weights.

Muon (Keller Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/) sets the singular values of a step's
matrix to about 1: the kernel moves alike in all directions, not mostly in the few that gradients share. After three
epochs on Carvana's thumbnails (32 x 48) Dice was 0.969; AdamW, at the best of its learning rates, reached 0.950.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

ROWS = 64  # at most, of a block that is orthogonalized by itself: as good as 128, in half the time


def muon_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict]:
    """Return groups of weights: Muon for convolutions, Adam with a tenth of the rate for the last layer and the rest.

    A pretrained encoder is a group of its own, Adam with 0.004 of the rate, which changes its weights little: on 50
    photos Dice was 0.881, with 0.01 of the rate 0.874, and with 0.03 0.815.

    Args:
        model: any network. Its `encoder` counts as pretrained if it has load_pretrained(). Its last layer is `head`;
            without that, a convolution with one output channel, as the last layer of a binary mask is.
        lr: how far a step moves a kernel, by the singular values of its blocks.
        weight_decay: a step shrinks the kernels by lr * weight_decay, and nothing else.
    """
    encoder, head = getattr(model, "encoder", None), getattr(model, "head", None)
    pretrained = set(encoder.parameters()) if hasattr(encoder, "load_pretrained") else set()
    kernels = {layer.weight for layer in model.modules() if mixes_channels(layer)}
    kernels -= set(head.parameters()) if isinstance(head, nn.Module) else set()
    parts: dict[str, list[Tensor]] = {"kernels": [], "others": [], "encoder": []}
    for weight in model.parameters():
        part = "encoder" if weight in pretrained else "kernels" if weight in kernels else "others"
        parts[part].append(weight)
    groups = [
        {"params": parts["kernels"], "update": "muon", "lr": lr, "weight_decay": weight_decay},
        {"params": parts["others"], "update": "adam", "lr": 0.1 * lr},
        {"params": parts["encoder"], "update": "adam", "lr": 0.004 * lr},
    ]
    return [group for group in groups if group["params"]]


def mixes_channels(layer: nn.Module) -> bool:
    """Return whether a layer is a 2D convolution that makes several channels, each of all input channels.

    Only there does a block of Muon's hold rows that see the same input. In a depthwise kernel (C, 1, 3, 3) 64 rows of 9
    columns would be made orthogonal that have nothing to do with each other, and the more channels, the longer a step.
    """
    is_convolution = isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    return is_convolution and layer.groups == 1 and layer.out_channels > 1


class Muon(torch.optim.Optimizer):
    """Muon for the groups whose "update" is "muon", of kernels with four dimensions, and Adam for those with "adam"."""

    def __init__(self, groups: list[dict], lr: float = 0.05, weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]  # the others are frozen
            if not weights:
                continue
            if group["update"] == "muon":
                with float32_products(weights[0].device.type):
                    muon_(weights, self.state, group["lr"], group["weight_decay"])
            else:
                adam_(weights, self.state, group["lr"])


@contextmanager
def float32_products(device_type: str) -> Iterator[None]:
    """Compute products of float32 matrices in float32, whatever the process has switched on.

    Rounded to bf16, as set_float32_matmul_precision("medium") allows a CPU with AMX, a Gram matrix gets negative
    eigenvalues, on which newton_schulz diverges: Dice after the quick start was 0.944 instead of 0.981. Rounded to
    TF32, as "high" allows a GPU, singular values reach 1.8 instead of 1.2. The products are 2 % of a step's FLOPs.
    """
    with torch.autocast(device_type, enabled=False), ExitStack() as restore:
        if hasattr(torch.backends.mkldnn, "matmul"):
            for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
                restore.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = "ieee"
        else:  # before torch 2.9
            restore.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


def muon_(kernels: list[Tensor], states: dict[Tensor, dict], lr: float, weight_decay: float) -> None:
    """Take a step with kernels (out, in, h, w), or (in, out, h, w) of up-convolutions, with Nesterov's momentum of 0.9.

    It overwrites each gradient with the step's direction. Blocks of one height are orthogonalized together.
    """
    for kernel in kernels:
        if not states[kernel]:
            states[kernel]["momentum"] = torch.zeros_like(kernel)
    gradients, momenta = [kernel.grad for kernel in kernels], [states[kernel]["momentum"] for kernel in kernels]
    torch._foreach_lerp_(momenta, gradients, 0.1)
    torch._foreach_lerp_(gradients, momenta, 0.9)
    steps: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by a block's rows: kernels and their steps in blocks
    for kernel, step in zip(kernels, gradients, strict=True):
        rows = max(divisor for divisor in range(1, ROWS + 1) if len(step) % divisor == 0)
        steps.setdefault(rows, []).append((kernel, blocks(step, kernel, rows)))

    for rows, pairs in steps.items():
        factors = newton_schulz(torch.cat([torch.bmm(step, step.mT) for _, step in pairs]))
        for (kernel, step), factor in zip(pairs, factors.split([len(step) for _, step in pairs]), strict=True):
            scale = lr * max(1, len(kernel) / step.shape[-1]) ** 0.5
            blocks(kernel, kernel, rows).baddbmm_(factor, step, beta=1 - lr * weight_decay, alpha=-scale)


def blocks(tensor: Tensor, kernel: Tensor, rows: int) -> Tensor:
    """Return (N * rows, in, h, w) as (N, rows, columns), in whose rows the numbers lie as the kernel's do in memory."""
    if not kernel.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)  # channels_last
    return tensor.reshape(-1, rows, tensor[0].numel())


def newton_schulz(gram: Tensor) -> Tensor:
    """Turn X X^T (N, rows, rows) into a factor of that shape: factor @ X has X's directions, all of length about 1.

    Five rounds of Newton and Schulz's iteration with Jordan's coefficients turn X's singular values into 0.65 to 1.25,
    those below 0.002 of its norm into less. The products must be float32's.
    """
    identity = torch.eye(gram.shape[1], device=gram.device)
    square = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] + 1e-30  # of X's norm, which becomes 1
    gram = gram / square
    product, start = identity / square.sqrt(), 3.4445 * identity
    for _ in range(5):
        factor = torch.baddbmm(torch.add(start, gram, alpha=-4.7750), gram, gram, alpha=2.0315)  # a + b G + c G²
        product = torch.bmm(factor, product)
        gram = torch.bmm(torch.bmm(factor, gram), factor)
    return product


def adam_(weights: list[Tensor], states: dict[Tensor, dict], lr: float) -> None:
    """Take a step of Adam, in place, with its usual betas, of all weights at once: a GPU would wait for single ones."""
    for weight in weights:
        if not states[weight]:
            states[weight] |= {"step": 0, "mean": torch.zeros_like(weight), "square": torch.zeros_like(weight)}
        states[weight]["step"] += 1
    steps, means, squares = ([states[weight][name] for weight in weights] for name in ("step", "mean", "square"))
    gradients = [weight.grad for weight in weights]
    torch._foreach_lerp_(means, gradients, 0.1)
    torch._foreach_mul_(squares, 0.999)
    torch._foreach_addcmul_(squares, gradients, gradients, 0.001)
    scales = torch._foreach_div(squares, [1 - 0.999**step for step in steps])
    torch._foreach_sqrt_(scales)
    torch._foreach_add_(scales, 1e-8)
    torch._foreach_addcdiv_(weights, means, scales, [-lr / (1 - 0.9**step) for step in steps])

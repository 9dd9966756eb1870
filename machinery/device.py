"""The device on which the network computes, and its precision."""

import copy
import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import cv2
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.nn.parallel import DistributedDataParallel

from machinery import processes
from machinery.decoding import VOID
from machinery.errors import UserError

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Device:
    """A device, the type in which autocast computes there, and the normalisation of images that it is sent."""

    device: torch.device
    precision: torch.dtype
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # of each RGB channel, range 0 to 1
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    @property
    def memory_format(self) -> torch.memory_format:
        """Return channels_last, with which CPU and CUDA convolve fastest; on MPS BatchNorm's gradient is wrong with it.

        https://github.com/pytorch/pytorch/issues/175189
        """
        return torch.contiguous_format if self.device.type == "mps" else torch.channels_last

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def to(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Send a uint8 batch to the device, as float32: images (N, 3, H, W), normalised, and masks (N, 1, H, W).

        Masks are 1 on the foreground, 0 on the background, and nan where they are void.
        """
        masks = self._sent(masks).unsqueeze(1)
        return self.normalised(images), masks.float().masked_fill_(masks == VOID, math.nan)

    def normalised(self, images: Tensor) -> Tensor:
        """Return the network's input: images uint8 (N, H, W, 3) -> (RGB / 255 - mean) / std, float32 (N, 3, H, W).

        They travel as bytes, which takes a quarter of the bus and of the workers' shared memory.
        """
        mean, std = self._statistics
        images = (self._sent(images) - mean).div_(std)
        return images.permute(0, 3, 1, 2).contiguous(memory_format=self.memory_format)

    def _sent(self, batch: Tensor) -> Tensor:
        is_cuda = self.device.type == "cuda"  # where kernels wait for the copy; on other devices this process must
        return batch.to(self.device, non_blocking=is_cuda)

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and std of values from 0 to 255, kept on the device: to send them there would wait for it."""
        return tuple(255 * torch.tensor(values, device=self.device) for values in (self.mean, self.std))

    def __str__(self) -> str:
        return f"{self.device} in {str(self.precision).removeprefix('torch.')}"


def choose_device(name: str, precision: str = "auto", **normalisation: tuple[float, ...]) -> Device:
    """Return the device of that name; "auto" is CUDA, else Apple's MPS, else the CPU. Raises UserError without it.

    CUDA's devices have an index. Under torchrun "cuda" and "auto" give each process of a machine a GPU of its own; MPS
    is for one process. Where "auto" finds a GPU that cannot compute, it says why and takes the CPU. `normalisation` is
    Device's mean and std.
    """
    alone, wanted = processes.WORLD_SIZE == 1, name
    if name == "auto":
        has_mps = torch.backends.mps.is_available() and alone
        wanted = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if not alone and wanted not in ("cpu", "cuda"):
        raise UserError(f'DEVICE {name} is one for all processes: set it to "cuda" (a GPU for each) or "cpu"')
    if not alone and wanted == "cuda" and not torch.distributed.is_nccl_available():
        raise UserError('processes on GPUs need NCCL, which this PyTorch lacks: set DEVICE to "cpu", or use Linux')
    if wanted == "cuda":
        wanted = f"cuda:{processes.LOCAL_RANK}"
        if 0 < torch.cuda.device_count() <= processes.LOCAL_RANK:
            raise UserError(f"there are fewer GPUs here, {torch.cuda.device_count()}: set --nproc_per_node to that")
    try:
        device = torch.device(wanted)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("only cpu, cuda and mps are supported")
        image = torch.ones(1, 1, 4, 4, device=device)
        F.conv2d(image, image)  # a GPU for which this PyTorch has no kernels still allocates memory
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        if name != "auto" or not alone:  # other processes may have a GPU that can
            raise UserError(f'DEVICE {name} cannot be used here ({reason}): set it to "auto", or "cpu"') from error
        print(f"{wanted} cannot be used ({reason}): the CPU computes.")
        device = torch.device("cpu")
    chosen = PRECISIONS[fastest_precision(device) if precision == "auto" else precision]
    return Device(device, chosen, **normalisation)


def fastest_precision(device: torch.device) -> str:
    """Return what the hardware computes fastest; a CPU without bf16 instructions would emulate them, slowly."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and has_bf16 else "fp32"


def choose_num_workers(number: int, device: Device) -> int:
    """Return the number of workers: for -1 none beside a CPU that computes, else one a core, 8 at most.

    A cached sample takes 1 ms, and 500 ms to be learned from on a CPU.

    The processes that torchrun starts on a machine divide its cores among them.
    """
    if number >= 0:
        return number
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 0 if device.device.type == "cpu" else max(1, min(8, cores // processes.LOCAL_WORLD_SIZE))


def tune(device: Device) -> None:
    """Make the device current, and switch on what makes training on it faster, for the whole process."""
    if device.device.type == "cuda":
        torch.cuda.set_device(device.device)
        torch.backends.cudnn.allow_tf32 = device.precision != torch.float32
        torch.backends.cudnn.benchmark = True  # tries convolution algorithms: most batches have one shape
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc gives large tensors back to the system, and every step would fault all their pages in again: 8 % slower
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD
        # The heap's next 4 GB are to lie in pages of 2 MB instead of 4 kB, which takes no memory now: another 7 % on a
        # Xeon with AMX
        size, huge = 2**32, 2**21
        libc.malloc.restype = ctypes.c_void_p
        if block := libc.malloc(ctypes.c_size_t(size)):
            first = math.ceil(block / huge) * huge
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size - huge), 14)  # MADV_HUGEPAGE
            libc.free(ctypes.c_void_p(block))


def learns_slowly(device: Device) -> bool:
    """Return whether it is a CPU without AVX512 that computes in float32.

    There the gradient of a convolution's weights, with images in channels_last, takes 2 to 4 times as long as it must,
    which was a third of a step of the U-Net, and more at 512 x 512 pixels (docs/measurements.md).
    """
    is_avx2 = device.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return is_avx2 and device.precision == torch.float32


def is_dense_convolution(layer: nn.Module) -> bool:
    """Return whether a layer is a convolution of many channels, of which each output sees all: not a 1x1 one.

    With fewer than 32 input channels, copies into the other layout cost what they save.
    """
    if type(layer) is not nn.Conv2d or layer.bias is not None or isinstance(layer.padding, str):
        return False
    sees_all = layer.groups == 1 and layer.in_channels >= 32 and max(layer.kernel_size) > 1
    return sees_all and layer.padding_mode == "zeros"


class OlderCpuConv2d(nn.Conv2d):
    """A dense convolution without bias, in float32; Convolution computes its gradients."""

    def forward(self, x: Tensor) -> Tensor:
        is_another = self.bias is not None or x.dim() != 4 or torch.is_autocast_enabled("cpu")
        if is_another or not torch.is_grad_enabled():
            return super().forward(x)
        return Convolution.apply(x, self.weight, self.stride, self.padding, self.dilation)


class Convolution(torch.autograd.Function):
    """F.conv2d; the gradient of the weights is computed with both tensors in PyTorch's own layout (N, C, H, W)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, *options: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        return F.conv2d(x, weight, None, *options)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = conv2d_input(x.shape, weight, gradient, *ctx.options)
        if ctx.needs_input_grad[1]:
            of_weight = conv2d_weight(x.contiguous(), weight.shape, gradient.contiguous(), *ctx.options)
        return of_x, of_weight, None, None, None


def should_compile(setting: str, device: Device, steps: int) -> bool:
    """Return whether COMPILE means torch.compile in a run of so many steps; "auto": if one process takes 5,000 on CUDA.

    Compiling takes about a minute, in which a large GPU takes thousands of steps. The steps are those of the whole run,
    so that continuing computes alike.
    """
    is_long = steps >= 5000 and device.device.type == "cuda" and processes.WORLD_SIZE == 1
    return setting == "yes" or (setting == "auto" and is_long)


def to_device(model: nn.Module, shape: tuple, device: Device, setting: str, steps: int) -> tuple[nn.Module, Callable]:
    """Move a network to the device, made fast by tune; return it, and what a run of so many steps calls in its place.

    That is compiled if COMPILE says so, and shares its gradients under torchrun, where BatchNorm on CUDA sees the whole
    batch. `shape` is that of all processes' images, (N, 3, H, W).
    """
    tune(device)
    model.to(device.device, memory_format=device.memory_format)
    for layer in model.modules() if learns_slowly(device) else ():
        if is_dense_convolution(layer):
            layer.__class__ = OlderCpuConv2d  # the layer itself: Muon and state dicts know its weights
    if processes.WORLD_SIZE > 1 and device.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    shape = (shape[0] // processes.WORLD_SIZE, *shape[1:])
    forward = compile_model(model, shape, device) if should_compile(setting, device, steps) else model
    if processes.WORLD_SIZE > 1:
        forward = DistributedDataParallel(forward)
        # It arranges its exchange after the first backward pass. A run that continues would do so after another step
        # than one that was never stopped, and sums of three and more gradients would be rounded otherwise.
        rehearse(forward, model, shape, device)
    return model, forward


def compile_model(model: nn.Module, shape: tuple, device: Device) -> Callable:
    """Return torch.compile's version of the model after a trial on zeros of that shape, or the model where it fails."""
    compiled = torch.compile(model)
    try:
        rehearse(compiled, model, shape, device)
    except Exception as error:  # from a missing compiler to a bug in it
        print(f"torch.compile failed ({' '.join(str(error).split()[:30])}): training continues without it.")
        return model
    return compiled


def rehearse(forward: Callable, model: nn.Module, shape: tuple, device: Device) -> None:
    """Run a forward and a backward pass on zeros of that shape, and leave the model as it was."""
    before = copy.deepcopy(model.state_dict())  # BatchNorm's statistics will move
    try:
        with device.autocast():
            logits = forward(torch.zeros(shape, device=device.device).contiguous(memory_format=device.memory_format))
        logits.float().sum().backward()
    finally:
        model.load_state_dict(before)
        model.zero_grad()


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turn errors for lack of memory into a UserError that ends with `advice`.

    So it does with those of lost workers, and of BatchNorm that has a single value to normalise.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "BATCH_SIZE gives this network one image at a time, of which its BatchNorm cannot learn: raise BATCH_SIZE, "
            "which ACCUMULATION and the processes divide"
        ) from error
    except (RuntimeError, MemoryError, cv2.error) as error:
        cause = f"{error} {error.__context__}"  # PyTorch raises its own error of a lost worker within another
        if "shared memory" in cause or "Bus error" in cause:  # a container has 64 MB of it
            raise UserError(
                "/dev/shm, where workers put their images, is too small: enlarge it (docker run --shm-size=8g), or set "
                "NUM_WORKERS = 0"
            ) from error
        if "by signal: Killed" in cause:
            raise UserError("the system has killed a worker, most likely for memory: lower NUM_WORKERS") from error
        if isinstance(error, MemoryError) or processes.is_out_of_memory(error):
            raise UserError(f"out of memory {advice}") from error
        raise

"""Pretrained networks of timm as encoders of a U-Net."""

import difflib
import logging
import math
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from machinery.errors import UserError

ANOTHER = "choose another, such as resnet34"


class Encoder(nn.Module):
    """A network of timm without its classifier: (N, 3, H, W) -> its features at 1, 1/2, 1/4, ... of the size, a list.

    `channels` holds the channels of each, 0 where the network has no features of that size, for which it gives None.
    The weights are random until load_pretrained. BatchNorm stays as it was pretrained: what a step's few images would
    make of it is worse.

    Raises UserError where timm is missing, or its network of that name cannot be an encoder of 64 x 96 pixels.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        timm = timm_with(name)
        try:
            self.network = with_frozen_batch_norm(timm.create_model(name, features_only=True))
            for layer in self.network.modules():
                if is_slow_in_bf16(layer):
                    layer.forward = partial(in_float32, layer)
            self.strides, channels = self.network.feature_info.reduction(), self.network.feature_info.channels()
        except Exception as error:  # some have no features: each says so in its own way
            raise UserError(f"ENCODER {name} has no features of several sizes: {ANOTHER}") from error
        self.check_size(64, 96)
        by_stride = dict(zip(self.strides, channels, strict=True))
        self.channels = [by_stride.get(2**stage, 0) for stage in range(max(self.strides).bit_length())]

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError unless images of this size have features at 1/2, 1/4, ...: some networks take others alone.

        The size is rounded up, as the U-Net pads it.
        """
        largest, channels = max(self.strides), self.network.feature_info.channels()
        padded = [math.ceil(side / largest) * largest for side in (height, width)]
        wanted = [(number, padded[0] // s, padded[1] // s) for number, s in zip(channels, self.strides, strict=True)]
        try:
            with torch.no_grad():
                images = torch.zeros(1, 3, *padded).to(next(self.parameters()))
                fits = [tuple(features.shape[1:]) for features in self.network(images)] == wanted
        except Exception:  # of many kinds
            fits = False
        if not fits:
            raise UserError(
                f"ENCODER {self.name} has no features at 1/2, 1/4, ... of {height} x {width} pixels: {ANOTHER}"
            )

    def forward(self, x: Tensor) -> list[Tensor | None]:
        features = dict(zip(self.strides, self.network(x), strict=True))
        return [features.get(2**stage) for stage in range(len(self.channels))]

    def load_pretrained(self, file: str | None = None) -> None:
        """Take the weights from a file, a state dict in timm's names, or from where timm downloads them.

        Raises UserError where they cannot be had, or are another network's.
        """
        timm, options = timm_with(self.name), {"features_only": True, "pretrained": True}
        if file:
            options["pretrained_cfg_overlay"] = {"state_dict": read_weights(self.name, file)}
        else:
            when = "unless an earlier run has: a minute or so, also where there is no connection"
            print(f"Downloading the weights of {self.name}, {when}.", flush=True)
        try:
            trained = timm.create_model(self.name, **options)
        except Exception as error:  # what timm downloads with raises many kinds
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise UserError(
                f"the weights of ENCODER {self.name} cannot be downloaded ({reason}): connect to the internet, or give "
                "the weights with --encoder-weights FILE"
            ) from error
        self.network.load_state_dict(with_frozen_batch_norm(trained).state_dict())


class FrozenBatchNorm(nn.Module):
    """BatchNorm whose weights and statistics stay as they are, in one step; timm's own computes it in seven."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(norm, name)
            self.register_buffer(name, None if value is None else value.detach())
        self.eps = norm.eps
        self.drop, self.act = getattr(norm, "drop", nn.Identity()), getattr(norm, "act", nn.Identity())  # timm's

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return self.act(self.drop(x))


def is_slow_in_bf16(layer: nn.Module) -> bool:
    """Return whether a layer is a depthwise convolution of which CPUs compute the weights' gradient slowly in bf16.

    Those of 5 x 5 or stride 2 took 4 to 6 times as long as in float32 on a CPU with AMX, and half of the whole step.
    """
    is_depthwise = isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels
    return is_depthwise and (max(layer.kernel_size) > 3 or max(layer.stride) > 1)


def in_float32(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return what a convolution makes of x, computed in float32 where a CPU trains in bf16."""
    if x.device.type != "cpu" or not torch.is_grad_enabled() or not torch.is_autocast_enabled("cpu"):
        return type(layer).forward(layer, x)
    with torch.autocast("cpu", enabled=False):
        return type(layer).forward(layer, x.float()).to(x.dtype)


def with_frozen_batch_norm(network: nn.Module) -> nn.Module:
    """Freeze each BatchNorm in the network, which is returned."""
    for name, layer in network.named_children():
        if isinstance(layer, nn.BatchNorm2d):
            setattr(network, name, FrozenBatchNorm(layer))
        else:
            with_frozen_batch_norm(layer)
    return network


def timm_with(name: str) -> ModuleType:
    """Return the package timm. Raises UserError where it is missing, or has no network of that name."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"the encoder {name} needs the package timm: pip install timm") from error
    except RuntimeError as error:  # from torchvision, which timm imports, and which was built for another torch
        raise UserError(f"timm cannot be imported ({error}): pip install --upgrade timm torch torchvision") from error
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models()) or ["tf_efficientnet_lite0", "resnet34"]
        raise UserError(f"timm {timm.__version__} has no encoder {name!r}: set ENCODER to {' or '.join(close)}")
    if (family := name.partition(".")[0]) != name and name not in (known := timm.list_pretrained(f"{family}.*")):
        raise UserError(f"timm has no weights {name!r}: set ENCODER to {' or '.join(known) or family}")
    for package in ("timm", "huggingface_hub"):  # which warn of the classifier's weights, and of each of 12 tries
        logging.getLogger(package).setLevel(logging.ERROR)
    return timm


def read_weights(name: str, file: str) -> dict[str, Tensor]:
    """Read the weights of timm's network of that name from a file. Raises UserError if it is damaged or another's."""
    timm = timm_with(name)
    try:
        weights = timm.models.load_state_dict(file, weights_only=True)
        shapes = {name: weight.shape for name, weight in weights.items()}
    except Exception as error:  # files of other kinds raise many kinds
        raise UserError(f"ENCODER_WEIGHTS: {file} is damaged, or no state dict: download it again") from error
    wanted = timm.create_model(name, num_classes=0)  # not on "meta": before 1.0.24 timm's convnext fails there
    needed = {key: weight.shape for key, weight in wanted.state_dict().items() if "num_batches_tracked" not in key}
    if not needed.items() <= shapes.items():
        raise UserError(f"ENCODER_WEIGHTS: {file} holds another network than ENCODER {name}: give that one's weights")
    if not all(weights[key].isfinite().all() for key in needed):
        raise UserError(f"ENCODER_WEIGHTS: {file} holds weights that are nan or infinite: download it again")
    return weights


def encoder_normalisation(name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[tuple, tuple]:
    """Return the mean and std of timm's network; instead those given, with a line, if they are not ImageNet's."""
    timm = timm_with(name)
    own = timm.get_pretrained_cfg(name)
    if (mean, std) != (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD):
        if (mean, std) != (own.mean, own.std):
            print(f"MEAN and STD are as you have set them; {name} was pretrained with {own.mean} and {own.std}.")
        return mean, std
    return own.mean, own.std

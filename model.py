"""The U-Net of Ronneberger, Fischer and Brox (2015, https://arxiv.org/abs/1505.04597), with padding and BatchNorm.

The padding keeps the output as large as the input, which the paper's network does not; BatchNorm trains it from scratch
in a few epochs. UNET_architecture.png shows it.
"""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from machinery import processes
from machinery.device import Device
from machinery.encoders import Encoder
from machinery.errors import UserError


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each with BatchNorm and ReLU: (N, in_channels, H, W) -> (N, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),  # BatchNorm has the bias
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def fold_batch_norm(self) -> None:
        """Make each BatchNorm in eval mode a part of the convolution before it; another norm stays as it is."""
        conv1, norm1, relu1, conv2, norm2, relu2 = self.layers
        if not isinstance(norm1, nn.BatchNorm2d):
            return
        self.layers = nn.Sequential(fuse_conv_bn_eval(conv1, norm1), relu1, fuse_conv_bn_eval(conv2, norm2), relu2)


class UpConv(nn.ConvTranspose2d):
    """Twice the height and width, (N, in_channels, H, W) -> (N, out_channels, 2 H, 2 W), for a 2x2 kernel and stride 2.

    Each pixel gives 2 x 2 new ones, by one matrix product. PyTorch's own backward pass takes four times as long on CPUs
    with AMX.
    """

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        kernel = self.weight.permute(2, 3, 1, 0).reshape(-1, self.in_channels)  # (2 * 2 * out, in)
        x = F.linear(x.permute(0, 2, 3, 1), kernel, self.bias.repeat(4))  # (N, H, W, 2 * 2 * out)
        x = x.view(batch, height, width, 2, 2, -1).transpose(2, 3)  # (N, H, 2, W, 2, out)
        return x.reshape(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)  # (N, out, 2 H, 2 W)


class UNet(nn.Module):
    """U-Net: (N, in_channels, H, W) float images -> (N, out_channels, H, W) logits, for any H and W from 16 up.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the logits; 1 for a binary mask.
        features: channels of each stage, from full size down; every stage halves height and width, and the bottleneck
            has twice the last stage's channels. The default has 31 million weights.
        checkpointing: whether training keeps no activations within a DoubleConv or an encoder, but computes them again
            when it needs them: less memory, a third more time, the same weights (BatchNorm counts a batch twice).
        encoder: the name of a network of timm that takes the place of the U-Net's own encoder, for images of three
            channels and 64 pixels or more. Its features give the stages their channels. The decoder ends at the size of
            the largest ones, half or a quarter of the image's. There the head gives a block of logits for each place.
            encoder.load_pretrained() loads its weights.
        tile: (height, width) of the tiles in which it sees larger images in eval mode; None shows it whole images.
        full_size_decoder: whether the decoder of an encoder goes on to full size, as it did until format 6 of
            checkpoints: two to four times slower, and no better (docs/measurements.md).

    UNet(**model.config) builds the same network again.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        features: tuple[int, ...] = (64, 128, 256, 512),
        checkpointing: bool = False,
        encoder: str | None = None,
        tile: tuple[int, int] | None = None,
        full_size_decoder: bool = False,
    ) -> None:
        super().__init__()
        self.config = {"in_channels": in_channels, "out_channels": out_channels}
        self.config |= {"encoder": encoder} if encoder else {"features": list(features)}
        self.config |= {"tile": list(tile)} if tile else {}
        self.config |= {"full_size_decoder": True} if full_size_decoder else {}
        self.checkpointing, self.tile = checkpointing, tile

        self.encoder = Encoder(encoder) if encoder else None
        if encoder:
            *skips, channels = self.encoder.channels
        else:
            skips, channels = features, in_channels
            self.downs = nn.ModuleList()
            for feature in features:
                self.downs.append(DoubleConv(channels, feature))
                channels = feature
            self.bottleneck = DoubleConv(channels, channels * 2)
            channels *= 2
        self.multiple = 2 ** len(skips)
        while not full_size_decoder and not skips[0]:  # no channels: the encoder has no features of that size
            skips = skips[1:]
        self.block = self.multiple // 2 ** len(skips)  # pixels, along each side, for which the head gives logits

        self.ups = nn.ModuleList()  # give twice the height and width, and the stage's channels
        self.up_convs = nn.ModuleList()  # merge that with the skip
        for skip in reversed(skips):
            feature = max(64, skip) if encoder else skip  # thinner stages learn slowly
            self.ups.append(UpConv(channels, feature, 2, stride=2))
            self.up_convs.append(DoubleConv(skip + feature, feature))
            channels = feature

        self.head = nn.Conv2d(channels, out_channels * self.block**2, 1)
        nn.init.zeros_(self.head.weight)  # so that training starts from the bias, not from noise

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        is_large = self.tile and (height > self.tile[0] or width > self.tile[1])
        if is_large and not self.training:
            return slide(self.forward_whole, x, self.tile, self.multiple)
        return self.forward_whole(x)

    def forward_whole(self, x: Tensor) -> Tensor:
        """Return the logits of images that the network sees as a whole."""
        height, width = x.shape[-2:]
        beyond = round_up(height, self.multiple) - height, round_up(width, self.multiple) - width
        if any(beyond):  # every stage is to halve without a remainder
            x = F.pad(x, (0, beyond[1], 0, beyond[0]), mode="replicate")

        *skips, x = self.recomputed(self.encoder, x) if self.encoder else self.encode(x)  # (N, 1024, H / 16, W / 16)
        for up, up_conv in zip(self.ups, self.up_convs, strict=True):
            x, skip = up(x), skips.pop()  # both (N, 512, H / 8, W / 8) at first, and (N, 64, H, W) at last
            x = self.recomputed(up_conv, x if skip is None else torch.cat((skip, x), dim=1))  # None: no such features

        return F.pixel_shuffle(self.head(x), self.block)[..., :height, :width]  # (N, 1, height, width)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return each stage's output, (N, 64, H, W) to (N, 512, H / 8, W / 8), and the bottleneck's at H / 16."""
        outputs = []
        for down in self.downs:
            outputs.append(self.recomputed(down, x))
            x = F.max_pool2d(outputs[-1], 2)
        return [*outputs, self.recomputed(self.bottleneck, x)]

    def fold_batch_norm(self) -> None:
        """Make BatchNorm a part of the convolutions, for prediction: 12 % faster. Needs eval mode."""
        for block in self.modules():
            if isinstance(block, DoubleConv):
                block.fold_batch_norm()

    def recomputed(self, block: nn.Module, x: Tensor) -> Tensor:
        """Call a block; with `checkpointing` its activations are computed again in the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
        return block(x)


# ---------------------------------------------------------------------------------------------------------------------
# The network that is trained


def build_network(config: dict, checkpointing: bool = False) -> nn.Module:
    """Make the network that is trained, exported and predicted with. To use another one, return it here.

    It takes images, float32 (N, 3, H, W), and returns logits, (N, 1, H, W). That is all that it must do. These
    attributes are optional:

    - `head`: its last layer. Its bias sets the first prediction, and Adam trains it, not Muon. Without `head`, the last
      convolution with one output channel is taken.
    - `encoder`: a part that ENCODER names, with load_pretrained(file). Adam changes its weights little.
    - `checkpointing`: whether it keeps few activations, as ACTIVATION_CHECKPOINTING asks.
    - `tile`: the (height, width) of the tiles in which it sees larger images in eval mode, or None. CROP and
      predict.py --tile set it. Without it, a network sees whole photos at once, and --tile is refused.
    - `multiple`: to which it pads height and width; 1 where it is not there. A tile has at least four times as much.
    - `fold_batch_norm()`: predict.py calls it once, in eval mode, and then has the weights in bf16 or fp16, too.

    Args:
        config: {"features": ..., "encoder": ..., "tile": ...}, UNet's arguments from train.py's constants. A checkpoint
            keeps them under "model", and the same network must be made of them again.
        checkpointing: whether training keeps few activations, UNet's `checkpointing`.
    """
    return UNet(**config, checkpointing=checkpointing)


class OnlyLogits(nn.Module):
    """A network that returns a dictionary with its logits as "out", as torchvision's do: returns only these."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)["out"]


def new_network(config: dict, checkpointing: bool, foreground: float) -> nn.Module:
    """Return build_network's network for training: its logits are checked, and it first predicts this foreground.

    `foreground` is a share of the pixels, 0 to 1. Raises UserError where a setting asks for what the network has not.
    """
    network = build_network(config, checkpointing)
    if config["encoder"] and not hasattr(getattr(network, "encoder", None), "load_pretrained"):
        raise UserError(f"ENCODER is {config['encoder']}, but the network of build_network has none: set it to None")
    if checkpointing and not getattr(network, "checkpointing", False):
        raise UserError("ACTIVATION_CHECKPOINTING is True, but the network of build_network has none: set it to False")
    set_first_prediction(network, foreground)
    network.register_forward_hook(check_logits)
    return network


def set_first_prediction(network: nn.Module, foreground: float) -> None:
    """Make the first prediction about this share of foreground, 0 to 1, if the last layer has a bias."""
    convolutions = nn.Conv2d | nn.ConvTranspose2d
    head = getattr(network, "head", None)
    if isinstance(head, nn.Module):
        found = [layer for layer in head.modules() if isinstance(layer, convolutions)]
    else:
        found = [layer for layer in network.modules() if isinstance(layer, convolutions) and layer.out_channels == 1]
    if found and found[-1].bias is not None:
        nn.init.constant_(found[-1].bias, math.log(foreground / (1 - foreground)))


def check_logits(_: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
    """Raise UserError unless a network returns logits (N, 1, H, W) for images (N, C, H, W): a forward hook."""
    if not isinstance(logits, Tensor):
        raise UserError(
            f"the network gives a {type(logits).__name__}, not logits: let build_network (model.py) return only "
            'these, as OnlyLogits does with a dictionary\'s "out"'
        )
    (images,) = inputs
    if logits.shape != (images.shape[0], 1, *images.shape[2:]):
        given, image = (" x ".join(map(str, tensor.shape[1:])) for tensor in (logits, images))
        raise UserError(
            f"the network gives logits of {given} for images of {image}: they must have 1 channel and the images' size "
            "(build_network in model.py)"
        )


def size_multiple(features: tuple[int, ...]) -> int:
    """Return the multiple that a U-Net of these features pads height and width to; each stage halves them."""
    return 2 ** len(features)


def update_batch_norm(loader: DataLoader, epoch: int, model: nn.Module, device: Device) -> None:
    """Set BatchNorm's running statistics to those of an epoch's last 64 images or more, with the current weights.

    Those kept while training lag behind weights that move fast: when this was added, Dice after the first epoch rose
    from 0.66 to 0.94. From 16 images they vary: that took a seed from 0.956 to 0.937. Layers of other classes, such as
    torchvision's FrozenBatchNorm2d, stay as they are.
    """
    order = loader.batch_sampler
    start = max(0, order.length - math.ceil(64 / order.size) * order.size)
    with device.autocast():
        update_bn((device.normalised(images) for images, _ in loader.epoch(epoch, start)), model)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for statistic in filter(torch.is_tensor, (layer.running_mean, layer.running_var)):
                processes.all_reduce_sum(statistic).div_(processes.WORLD_SIZE)


# ---------------------------------------------------------------------------------------------------------------------
# Large images


TILES = 4  # that the network sees at once


def round_up(length: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below `length`."""
    return math.ceil(length / multiple) * multiple


def fades(length: int, tile: int, multiple: int) -> list[tuple[int, np.ndarray]]:
    """Return where tiles begin along a side of `length` pixels, and each pixel's weight in each, float32 (tile,).

    Neighbours overlap by a quarter or more. In the middle half of that one fades into the other: what lies nearer to a
    tile's edge knows too little of its surroundings, and counts for nothing. The weights of a pixel add up to 1. Tiles
    begin at multiples of `multiple`, as every stage of the network needs; the last one may end beyond the side.
    """
    last = round_up(max(0, length - tile), multiple)
    distance = max(multiple, tile * 3 // 4 // multiple * multiple)
    starts = [*range(0, last, distance), last]
    weights = np.zeros((len(starts), last + tile), np.float32)
    position = np.arange(0.5, tile, dtype=np.float32)
    for number, start in enumerate(starts):
        before = position if start else np.inf
        after = position[::-1] if start < last else np.inf
        weights[number, start : start + tile] = np.clip(2 * np.minimum(before, after) / (tile // 4) - 0.5, 0, 1)
    weights /= weights.sum(0)
    return [(start, weights[number, start : start + tile]) for number, start in enumerate(starts)]


def slide(network: Callable[[Tensor], Tensor], images: Tensor, tile: tuple[int, int], multiple: int) -> Tensor:
    """Return the logits (N, 1, H, W) of images (N, C, H, W) of any size. The network sees one tile after the other.

    The network pads height and width to `multiple`. Beyond the image its last pixels are repeated.
    """
    height, width = images.shape[-2:]
    tile_height, tile_width = round_up(min(tile[0], height), multiple), round_up(min(tile[1], width), multiple)
    places = list(product(fades(height, tile_height, multiple), fades(width, tile_width, multiple)))
    logits = images.new_zeros(len(images), 1, height, width, dtype=torch.float32)
    for first in range(0, len(places), TILES):
        some, parts = places[first : first + TILES], []
        for (top, _), (left, _) in some:
            part = images[..., top : top + tile_height, left : left + tile_width]
            beyond = 0, tile_width - part.shape[-1], 0, tile_height - part.shape[-2]
            parts.append(F.pad(part, beyond, mode="replicate"))
        outputs = network(torch.cat(parts)).split(len(images))  # (N, 1, tile_height, tile_width) each
        for ((top, rows), (left, columns)), output in zip(some, outputs, strict=True):
            fade = torch.from_numpy(np.outer(rows, columns)).to(output.device)
            target = logits[..., top : top + tile_height, left : left + tile_width]
            target += (output * fade)[..., : target.shape[-2], : target.shape[-1]]
    return logits

"""The U-Net of Ronneberger, Fischer and Brox (2015, https://arxiv.org/abs/1505.04597), with padding and BatchNorm.

The padding keeps the output as large as the input, which the paper's network does not; BatchNorm trains it from scratch
in a few epochs. UNET_architecture.png shows it.
"""

import difflib
import logging
import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import distributed
from decoding import UserError
from device import Device
from tiles import slide


def size_multiple(features: tuple[int, ...]) -> int:
    """The multiple to which a U-Net of these features pads height and width; each stage halves them."""
    return 2 ** len(features)


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
        """Makes each BatchNorm in eval mode a part of the convolution before it."""
        conv1, norm1, relu1, conv2, norm2, relu2 = self.layers
        self.layers = nn.Sequential(fuse_conv_bn_eval(conv1, norm1), relu1, fuse_conv_bn_eval(conv2, norm2), relu2)


class UpConv(nn.ConvTranspose2d):
    """Twice the height and width, (N, in_channels, H, W) -> (N, out_channels, 2 H, 2 W), for a 2x2 kernel and stride 2.

    Each pixel gives 2 x 2 new ones, by one matrix product. PyTorch's own way back through it takes 10 % of a step on a
    CPU with AMX, four times this one's.
    """

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        kernel = self.weight.permute(2, 3, 1, 0).reshape(-1, self.in_channels)  # (2 * 2 * out, in)
        x = F.linear(x.permute(0, 2, 3, 1), kernel, self.bias.repeat(4)).view(batch, height, width, 2, 2, -1)
        x = x.transpose(2, 3).reshape(batch, 2 * height, 2 * width, -1)  # rows of a pixel's two halves, one by one
        return x.permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """A network of timm without its classifier: (N, 3, H, W) -> its features at 1, 1/2, 1/4, ... of the size, a list.

    `channels` holds the channels of each, 0 where the network has no features of that size, for which it gives None.
    The weights are random until load_pretrained. BatchNorm stays as it was pretrained: what a step's few images would
    make of it is worse.

    Raises UserError where timm is missing, or its network of that name cannot be an encoder.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        timm = timm_with(name)
        try:
            self.network = timm.layers.freeze_batch_norm_2d(timm.create_model(name, features_only=True))
            self.strides, channels = self.network.feature_info.reduction(), self.network.feature_info.channels()
            with torch.no_grad():
                shapes = [tuple(features.shape[1:]) for features in self.network(torch.zeros(1, 3, 64, 96))]
            fits = shapes == [(number, 64 // s, 96 // s) for number, s in zip(channels, self.strides, strict=True)]
        except Exception:  # some take images of one size, or have no features: each says so in its own way
            fits = False
        if not fits:
            raise UserError(
                f"ENCODER {name} has no features at 1/2, 1/4, ... of any image's size: choose another, such as resnet34"
            )
        by_stride = dict(zip(self.strides, channels, strict=True))
        self.channels = [by_stride.get(2**stage, 0) for stage in range(max(self.strides).bit_length())]

    def forward(self, x: Tensor) -> list[Tensor | None]:
        features = dict(zip(self.strides, self.network(x), strict=True))
        return [features.get(2**stage) for stage in range(len(self.channels))]

    def load_pretrained(self, file: str | None = None) -> None:
        """Takes the weights from a file, a state dict in timm's names, or from where timm downloads them.

        Raises UserError where they cannot be had, or are another network's.
        """
        timm, options = timm_with(self.name), {"features_only": True, "pretrained": True}
        if file:
            options["pretrained_cfg_overlay"] = {"state_dict": read_weights(self.name, file)}
        else:
            print(f"Downloading the weights of {self.name}, unless an earlier run has: a minute or so.", flush=True)
        try:
            trained = timm.create_model(self.name, **options)
        except Exception as error:  # what timm downloads with raises many kinds
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise UserError(
                f"the weights of ENCODER {self.name} cannot be downloaded ({reason}): connect to the internet, or give "
                "the weights with --encoder-weights FILE"
            ) from error
        self.network.load_state_dict(timm.layers.freeze_batch_norm_2d(trained).state_dict())


def timm_with(name: str) -> ModuleType:
    """The package timm, if it is there and has a network of that name. Raises UserError otherwise."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"the encoder {name} needs the package timm: pip install timm") from error
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models()) or ["resnet34", "convnext_tiny"]
        raise UserError(f"timm {timm.__version__} has no encoder {name!r}: set ENCODER to {' or '.join(close)}")
    if (family := name.partition(".")[0]) != name and name not in (known := timm.list_pretrained(f"{family}.*")):
        raise UserError(f"timm has no weights {name!r}: set ENCODER to {' or '.join(known) or family}")
    for package in ("timm", "huggingface_hub"):  # which warn of the classifier's weights, and of each of 12 tries
        logging.getLogger(package).setLevel(logging.ERROR)
    return timm


def read_weights(name: str, file: str) -> dict[str, Tensor]:
    """The weights of timm's network of that name, from a file. Raises UserError if they cannot be, or are another's."""
    timm = timm_with(name)
    try:
        weights = timm.models.load_state_dict(file, weights_only=True)
        shapes = {name: weight.shape for name, weight in weights.items()}
    except Exception as error:  # files of other kinds raise many kinds
        raise UserError(f"ENCODER_WEIGHTS: {file} is damaged, or no state dict: download it again") from error
    with torch.device("meta"):
        wanted = timm.create_model(name, num_classes=0)
    needed = {key: weight.shape for key, weight in wanted.state_dict().items() if "num_batches_tracked" not in key}
    if not needed.items() <= shapes.items():
        raise UserError(f"ENCODER_WEIGHTS: {file} holds another network than ENCODER {name}: give that one's weights")
    if not all(weights[key].isfinite().all() for key in needed):
        raise UserError(f"ENCODER_WEIGHTS: {file} holds weights that are nan or infinite: download it again")
    return weights


def encoder_normalisation(name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[tuple, tuple]:
    """The mean and std of timm's network; instead those given, with a line, if they are no longer ImageNet's."""
    timm = timm_with(name)
    own = timm.get_pretrained_cfg(name)
    if (mean, std) != (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD):
        if (mean, std) != (own.mean, own.std):
            print(f"MEAN and STD are as you have set them; {name} was pretrained with {own.mean} and {own.std}.")
        return mean, std
    return own.mean, own.std


class UNet(nn.Module):
    """U-Net: (N, in_channels, H, W) float images -> (N, out_channels, H, W) logits, for any H and W from 16 up.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the logits; 1 for a binary mask.
        features: channels of each stage, from full size down; every stage halves height and width, and the bottleneck
            has twice the last stage's channels. The default has 31 million weights.
        checkpointing: whether training keeps no activations within a DoubleConv or an encoder, but computes them again
            when it needs them: less memory, a third more time, the same weights (BatchNorm counts a batch twice).
        encoder: the name of a network of timm that takes the place of the U-Net's own, for images of three channels and
            64 pixels or more; its features give the stages their channels. encoder.load_pretrained() makes it worth
            having.
        tile: (height, width) of the tiles in which it sees larger images in eval mode; None shows it whole images.

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
    ) -> None:
        super().__init__()
        self.config = {"in_channels": in_channels, "out_channels": out_channels}
        self.config |= {"encoder": encoder} if encoder else {"features": list(features)}
        self.config |= {"tile": list(tile)} if tile else {}
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

        self.ups = nn.ModuleList()  # twice the height and width, and the stage's channels
        self.up_convs = nn.ModuleList()  # merges that with the skip of as many channels
        for skip in reversed(skips):
            feature = max(64, skip) if encoder else skip  # thinner stages learn slowly
            self.ups.append(UpConv(channels, feature, 2, stride=2))
            self.up_convs.append(DoubleConv(skip + feature, feature))
            channels = feature

        self.head = nn.Conv2d(channels, out_channels, 1)
        nn.init.zeros_(self.head.weight)  # so that training starts from the bias, not from noise

    def forward(self, x: Tensor) -> Tensor:
        if self.tile and not self.training:
            return slide(self.look, x, self.tile, self.multiple)
        return self.look(x)

    def look(self, x: Tensor) -> Tensor:
        """The logits of images that the network sees as a whole."""
        height, width = x.shape[-2:]
        if height % self.multiple or width % self.multiple:  # every stage is to halve without a remainder
            x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")

        *skips, x = self.run(self.encoder, x) if self.encoder else self.encode(x)
        for up, up_conv in zip(self.ups, self.up_convs, strict=True):
            x, skip = up(x), skips.pop()
            x = self.run(up_conv, x if skip is None else torch.cat((skip, x), dim=1))

        return self.head(x)[..., :height, :width]

    def encode(self, x: Tensor) -> list[Tensor]:
        """The output of each stage, from full size down, and the bottleneck's."""
        outputs = []
        for down in self.downs:
            outputs.append(self.run(down, x))
            x = F.max_pool2d(outputs[-1], 2)
        return [*outputs, self.run(self.bottleneck, x)]

    def start_from(self, foreground: float) -> None:
        """Makes the first prediction this share of foreground, 0 to 1, for every pixel."""
        nn.init.constant_(self.head.bias, math.log(foreground / (1 - foreground)))

    def fold_batch_norm(self) -> None:
        """Makes BatchNorm a part of the convolutions, for prediction: 12 % faster. Needs eval mode."""
        for block in self.modules():
            if isinstance(block, DoubleConv):
                block.fold_batch_norm()

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
        return block(x)


def update_batch_norm(loader: DataLoader, model: UNet, device: Device) -> None:
    """Sets BatchNorm's running statistics to those of the epoch's last 64 images or more, with today's weights.

    Those kept while training lag behind weights that move fast: Dice after the first epoch was 0.66, with this 0.94.
    From 16 images they vary: a seed of the quick start reached 0.937 instead of 0.956. Layers of other classes, such as
    torchvision's FrozenBatchNorm2d, stay as they are.
    """
    batches = loader.batch_sampler
    batches.start = max(0, batches.length - -(-64 // batches.size) * batches.size)
    with device.autocast():
        update_bn((device.normalised(images) for images, _ in loader), model)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for statistic in (layer.running_mean, layer.running_var):
                distributed.all_reduce_sum(statistic).div_(distributed.WORLD_SIZE)

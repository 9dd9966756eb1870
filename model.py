"""The U-Net of Ronneberger, Fischer and Brox (2015, https://arxiv.org/abs/1505.04597), with padding and BatchNorm.

The padding keeps the output as large as the input, which the paper's network does not; BatchNorm trains it from scratch
in a few epochs. UNET_architecture.png shows it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint


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


class UNet(nn.Module):
    """U-Net: (N, in_channels, H, W) float images -> (N, out_channels, H, W) logits, for any H and W from 16 up.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the logits; 1 for a binary mask.
        features: channels of each stage, from full size down; every stage halves height and width, and the bottleneck
            has twice the last stage's channels. The default has 31 million weights.
        checkpointing: whether training keeps no activations within a DoubleConv, but computes them again when it needs
            them: less memory, a third more time, the same weights (BatchNorm counts a batch twice).

    UNet(**model.config) builds the same network again.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        features: tuple[int, ...] = (64, 128, 256, 512),
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = {"in_channels": in_channels, "out_channels": out_channels, "features": list(features)}
        self.multiple = size_multiple(features)
        self.checkpointing = checkpointing

        self.downs = nn.ModuleList()
        channels = in_channels
        for feature in features:
            self.downs.append(DoubleConv(channels, feature))
            channels = feature

        self.bottleneck = DoubleConv(channels, channels * 2)
        channels *= 2

        self.ups = nn.ModuleList()  # twice the height and width, and the stage's channels
        self.up_convs = nn.ModuleList()  # merges that with the skip of as many channels
        for feature in reversed(features):
            self.ups.append(UpConv(channels, feature, 2, stride=2))
            self.up_convs.append(DoubleConv(feature * 2, feature))
            channels = feature

        self.head = nn.Conv2d(features[0], out_channels, 1)
        nn.init.zeros_(self.head.weight)  # so that training starts from the bias, not from noise

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % self.multiple or width % self.multiple:  # every stage is to halve without a remainder
            x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")

        skips = []
        for down in self.downs:
            x = self.run(down, x)
            skips.append(x)
            x = F.max_pool2d(x, 2)

        x = self.run(self.bottleneck, x)

        for up, up_conv in zip(self.ups, self.up_convs, strict=True):
            x = torch.cat((skips.pop(), up(x)), dim=1)
            x = self.run(up_conv, x)

        return self.head(x)[..., :height, :width]

    def start_from(self, foreground: float) -> None:
        """Makes the first prediction this share of foreground, 0 to 1, for every pixel."""
        nn.init.constant_(self.head.bias, math.log(foreground / (1 - foreground)))

    def fold_batch_norm(self) -> None:
        """Makes BatchNorm a part of the convolutions, for prediction: 12 % faster. Needs eval mode."""
        for block in (*self.downs, self.bottleneck, *self.up_convs):
            block.fold_batch_norm()

    def run(self, block: DoubleConv, x: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
        return block(x)

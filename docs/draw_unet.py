"""Draw UNET_architecture.png from the network itself: python docs/draw_unet.py (from the repository's root)."""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import UNet  # noqa: E402
from train import IMAGE_HEIGHT, IMAGE_WIDTH  # noqa: E402

SCALE = 2  # drawn at twice the size, then reduced: smooth edges
INK, PALE, CONV, COPY, DOWN, UP = "#1f2933", "#52606d", "#4c78a8", "#e4b363", "#b5483a", "#3d8b5f"
LEVEL_TOP = (110, 430, 635, 780, 895)  # of each level's feature maps, in pixels


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the output shape (C, H, W) of each layer by its name, for one image of the default size."""
    shapes = {}
    for name, layer in model.named_modules():
        layer.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    model(torch.empty(1, 3, IMAGE_HEIGHT, IMAGE_WIDTH, device="meta"))
    return shapes


class Sheet:
    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, size: int = 15, colour: str = INK, anchor: str = "mm") -> None:
        font = ImageFont.load_default(size * SCALE)
        self.pen.text((x * SCALE, y * SCALE), text, colour, font, anchor=anchor, align="center")

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: str) -> None:
        self.pen.rectangle([v * SCALE for v in (x0, y0, x1, y1)], fill=colour, outline="white", width=SCALE)

    def arrow(self, x0: float, y0: float, x1: float, y1: float, colour: str) -> None:
        """Draw a straight arrow, level or upright."""
        self.pen.line([v * SCALE for v in (x0, y0, x1, y1)], fill=colour, width=3 * SCALE)
        dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        tip = ((x1, y1), (x1 - 9 * dx - 5 * dy, y1 - 9 * dy - 5 * dx), (x1 - 9 * dx + 5 * dy, y1 - 9 * dy + 5 * dx))
        self.pen.polygon([(x * SCALE, y * SCALE) for x, y in tip], fill=colour)

    def maps(self, x: float, level: int, shape: tuple[int, ...], colour: str = CONV, label: str | None = None) -> float:
        """Draw a layer's feature maps as a slab, its channels above it; return the x at its right edge."""
        channels, height, _ = shape
        width, top = 2.2 * channels**0.5, LEVEL_TOP[level]
        self.box(x, top, x + width, top + 1.5 * height, colour)
        self.text(x + width / 2, top - 12, str(channels) if label is None else label)
        return x + width


def draw(model: UNet, path: Path) -> None:
    shapes, depth = shapes_of(model), len(model.config["features"])
    sheet = Sheet(1900, 1010)
    weights = sum(weight.numel() for weight in model.parameters())
    sheet.text(40, 40, f"U-Net: {weights:,} weights, shown for a {IMAGE_WIDTH} x {IMAGE_HEIGHT} image", 24, anchor="lm")

    def middle(level: int) -> float:
        return LEVEL_TOP[level] + 0.75 * IMAGE_HEIGHT / 2**level

    def block(name: str, x: float, level: int) -> float:
        """Draw the two convolutions of a DoubleConv."""
        for layer in ("layers.0", "layers.3"):
            sheet.arrow(x + 4, middle(level), x + 26, middle(level), CONV)
            x = sheet.maps(x + 30, level, shapes[f"{name}.{layer}"])
        height, width = shapes[name][1:]
        sheet.text(x + 6, LEVEL_TOP[level] + 1.5 * height + 13, f"{width} x {height}", 13, PALE, "rm")
        return x

    x = sheet.maps(50, 0, (3, IMAGE_HEIGHT, IMAGE_WIDTH), PALE)
    sheet.text(52, LEVEL_TOP[0] + 1.5 * IMAGE_HEIGHT + 32, "image", anchor="mm")
    skip_ends = []
    for level in range(depth):
        x = block(f"downs.{level}", x, level)
        skip_ends.append(x)
        channels, height, width = shapes[f"downs.{level}"]
        start = x + 26
        x = sheet.maps(start, level + 1, (channels, height // 2, width // 2), DOWN)
        sheet.arrow(
            (start + x) / 2, LEVEL_TOP[level] + 1.5 * height - 8, (start + x) / 2, LEVEL_TOP[level + 1] - 26, DOWN
        )
    x = block("bottleneck", x, depth)
    for step, level in enumerate(reversed(range(depth))):
        sheet.arrow(skip_ends[level] + 8, middle(level), x + 4, middle(level), COPY)
        shape = shapes[f"ups.{step}"]
        x = sheet.maps(x + 8, level, shape, COPY, "")
        sheet.text(x, LEVEL_TOP[level] - 12, f"{shape[0]} + {shape[0]}")
        start, x = x, sheet.maps(x, level, shape, UP, "")
        below = LEVEL_TOP[level + 1] - 26
        sheet.arrow((start + x) / 2, below, (start + x) / 2, LEVEL_TOP[level] + 1.5 * shape[1] + 6, UP)
        x = block(f"up_convs.{step}", x, level)
    sheet.arrow(x + 4, middle(0), x + 26, middle(0), INK)
    x = sheet.maps(x + 30, 0, shapes["head"], INK)
    sheet.text(x, LEVEL_TOP[0] + 1.5 * IMAGE_HEIGHT + 32, "logits", anchor="mm")

    for row, (colour, meaning) in enumerate(
        (
            (CONV, "3 x 3 convolution, BatchNorm, ReLU"),
            (DOWN, "2 x 2 max pooling"),
            (UP, "2 x 2 transposed convolution, stride 2"),
            (COPY, "skip: copied and concatenated"),
            (INK, "1 x 1 convolution"),
        )
    ):
        y = 800 + 34 * row
        sheet.arrow(1420, y, 1454, y, colour)
        sheet.text(1470, y, meaning, 17, anchor="lm")
    sheet.text(40, 985, "numbers above: channels; below: width x height", 14, PALE, "lm")
    sheet.image.reduce(SCALE).save(path, optimize=True)


if __name__ == "__main__":
    with torch.device("meta"):
        network = UNet()
    draw(network, ROOT / "UNET_architecture.png")

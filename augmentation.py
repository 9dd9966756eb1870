"""Augmentation: what training changes at random in a sample, each change a few lines of OpenCV.

A step is a function (random, image, mask) -> (image, mask): a generator of random numbers, the sample's own, an image
uint8 (H, W, 3), and a mask uint8 (H, W). It leaves the arrays that it is given as they are.
"""

from collections.abc import Callable

import cv2
import numpy as np

Step = Callable[[np.random.Generator, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def augment(
    steps: list[tuple[float, Step]], random: np.random.Generator, image: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Calls each of the steps, (probability, step), with its probability."""
    for probability, step in steps:
        if random.random() < probability:
            image, mask = step(random, image, mask)
    return image, mask


def horizontal_flip(random: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return cv2.flip(image, 1), cv2.flip(mask, 1)


def affine(
    random: np.random.Generator, image: np.ndarray, mask: np.ndarray, scale: float, shift: float, degrees: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scales height and width each by 1 ± scale, shifts by ± shift of them, and rotates by ± degrees about the centre.

    What comes in from beyond the border is the mirrored inside.
    """
    height, width = mask.shape
    angle = np.radians(random.uniform(-degrees, degrees))
    stretch = np.diag(random.uniform(1 - scale, 1 + scale, 2))
    matrix = np.array(((np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle)))) @ stretch
    centre = np.array((width - 1, height - 1)) / 2
    offset = centre - matrix @ centre + random.uniform(-shift, shift, 2) * (width, height)
    matrix, size = np.column_stack((matrix, offset)), (width, height)
    image = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)  # OpenCV warps 4 channels twice as fast as 3
    image = cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    mask = cv2.warpAffine(mask, matrix, size, flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)
    return cv2.cvtColor(image, cv2.COLOR_RGBA2RGB), mask


def brightness_contrast(
    random: np.random.Generator, image: np.ndarray, mask: np.ndarray, brightness: float, contrast: float
) -> tuple[np.ndarray, np.ndarray]:
    """Multiplies values by 1 ± contrast, and adds ± brightness of the whole range."""
    levels = np.arange(256) * random.uniform(1 - contrast, 1 + contrast) + 255 * random.uniform(-brightness, brightness)
    return cv2.LUT(image, levels.clip(0, 255).astype(np.uint8)), mask


def hue_saturation_value(
    random: np.random.Generator, image: np.ndarray, mask: np.ndarray, hue: float, saturation: float, value: float
) -> tuple[np.ndarray, np.ndarray]:
    """Turns hues by ± hue degrees, 180 for any, and adds ± saturation and ± value, of 255."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    levels = np.arange(256)
    table = np.stack(
        (
            (levels + random.uniform(-hue, hue) * 256 / 360) % 256,
            (levels + random.uniform(-saturation, saturation)).clip(0, 255),
            (levels + random.uniform(-value, value)).clip(0, 255),
        ),
        axis=1,
    )
    hsv = cv2.LUT(hsv, table[:, None].astype(np.uint8))
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), mask

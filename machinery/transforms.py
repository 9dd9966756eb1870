"""Transforms of albumentations: called with a sample's own random numbers, and checked in what they leave.

A sample is an image, uint8 (H, W, 3), and a mask, uint8 (H, W) in {0, 1, VOID}, before and after; H and W may change.
"""

import traceback
from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from machinery.decoding import VOID
from machinery.errors import UserError

if TYPE_CHECKING:  # who only predicts needs none of it
    import albumentations as A

DRAWS = 5  # of each transform when it is tried


def augment(
    augmentation: "A.Compose", random: np.random.Generator, image: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return an augmented copy of a sample, which depends on `random` alone; its height and width may be others.

    Raises UserError for transforms that leave something else.
    """
    # One stream for all: after Compose.set_random_seed each would draw the same numbers, and all would act together
    augmentation.set_random_state(random, Random(int(random.integers(2**63))))
    try:
        found = augmentation(image=image.copy(), mask=mask.copy())  # some write into what they get, which the cache is
    except Exception as error:
        try_each(augmentation, image, mask)  # the one that fails may have been given what another one has spoiled
        raise_if_not_a_bug(error, augmentation, mask)
        raise
    if fault := fault_of(**found):
        try_each(augmentation, image, mask)
        raise UserError(f"a transform in make_augmentation {fault}")
    return found["image"], found["mask"]


def check_transforms(augmentation: "A.Compose", size: tuple[int, int]) -> None:
    """Raise UserError if a transform cannot do with samples of this size, or leaves something else: all are tried."""
    if not hasattr(augmentation, "set_random_state"):
        kind = f"{type(augmentation).__module__.partition('.')[0]}'s {type(augmentation).__name__}"
        raise UserError(
            f"make_augmentation returns {kind}: let it return A.Compose([...]) of albumentations' transforms"
        )
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    mask = image[..., 0] // 128
    for seed in range(DRAWS):
        augment(augmentation, np.random.default_rng(seed), image, mask)
    try_each(augmentation, image, mask)


def try_each(augmentation: "A.Compose", image: np.ndarray, mask: np.ndarray) -> None:
    """Raise UserError that names the first transform which leaves no sample where it is given this one."""
    for transform in transforms_of(augmentation):
        for _ in range(DRAWS):
            try:
                found = transform(image=image.copy(), mask=mask.copy(), force_apply=True)
            except Exception:  # it may work after those before it, as a crop after padding does
                continue
            if fault := fault_of(**found):
                raise UserError(f"{type(transform).__name__} in make_augmentation {fault}")


def transforms_of(augmentation: "A.Compose") -> Iterator["A.BasicTransform"]:
    """Yield the transforms of a composition and of those within it, or the transform that it is."""
    if not hasattr(augmentation, "transforms"):
        yield augmentation
        return
    for part in augmentation.transforms:
        yield from transforms_of(part)


def fault_of(image: object = None, mask: object = None, **_: object) -> str:
    """Return what is wrong with a sample and how to fix it, for a sentence about a transform; "" if nothing is."""
    if getattr(image, "dtype", None) != np.uint8 or image.shape[2:] != (3,):
        return (
            f"turns images into {description(image)}, but they must stay uint8 (height, width, 3), which the device "
            "normalises by MEAN and STD: delete it"
        )
    if getattr(mask, "dtype", None) != np.uint8 or mask.shape != image.shape[:2]:
        return (
            f"turns masks into {description(mask)} beside images of {image.shape}, but they must stay uint8 of the "
            "image's height and width: delete it"
        )
    if (strange := (mask > 1) & (mask != VOID)).any():
        return (
            f"leaves {mask[strange][0]} in masks, which may hold 0, 1 and {VOID} (ignored pixels) alone: give it "
            "mask_interpolation=cv2.INTER_NEAREST and fill_mask=0, or delete it"
        )
    return ""


def description(found: object) -> str:
    """Return the type and the shape of an array or a tensor."""
    dtype = str(getattr(found, "dtype", type(found).__name__)).removeprefix("torch.")
    is_tensor = type(found).__module__ == "torch"
    return f"{'a tensor of ' * is_tensor}{dtype} {tuple(getattr(found, 'shape', ()))}"


def raise_if_not_a_bug(error: Exception, augmentation: "A.Compose", mask: np.ndarray) -> None:
    """Raise UserError if albumentations itself raised the error; one of a user's own function keeps its traceback."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if frames[-1].f_globals["__name__"].startswith("albu"):
        callers = [frame.f_locals.get("self") for frame in frames]
        names = [type(each).__name__ for each in transforms_of(augmentation) if any(each is self for self in callers)]
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{names[0] if names else 'a transform'} in make_augmentation cannot do with samples of {mask.shape[0]} x "
            f"{mask.shape[1]} pixels: change its arguments or delete it ({reason})"
        ) from error

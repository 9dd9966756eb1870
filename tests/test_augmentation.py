"""What the augmentation does to samples: reproducibly, independently, and within what a sample is."""

import os
import pickle
import subprocess
import sys
from functools import partial
from itertools import islice
from multiprocessing import get_all_start_methods
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from forked import Script
from torchvision.transforms import v2

import train
from dataset import CarvanaDataset, CropDataset
from machinery.decoding import VOID
from machinery.errors import UserError
from machinery.transforms import augment, check_transforms
from utils import get_loaders

NAMES = [type(transform).__name__ for transform in train.make_augmentation()]


@pytest.fixture
def sample() -> tuple[np.ndarray, np.ndarray]:
    """A smooth picture that is bright where its mask is, of which a part is ignored."""
    mask = cv2.ellipse(np.zeros((40, 60), np.uint8), (25, 20), (15, 9), 20, 0, 360, 1, -1)
    y, x = np.mgrid[:40, :60]
    image = np.stack((40 + x, 200 * mask + 20, 30 + 2 * y), axis=-1).astype(np.uint8)
    mask[30:, 50:] = VOID
    return image, mask


def draw(augmentation: A.Compose, sample: tuple[np.ndarray, np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray]:
    return augment(augmentation, np.random.default_rng(seed), *sample)


def surely(name: str) -> A.Compose:
    """Return the transform of this name in make_augmentation, with probability 1."""
    (transform,) = (transform for transform in train.make_augmentation() if type(transform).__name__ == name)
    transform.p = 1.0
    return A.Compose([transform])


# ---------------------------------------------------------------------------------------------------------------------
# What make_augmentation lists


@pytest.mark.parametrize("name", NAMES)
def test_a_transform_makes_another_sample_of_the_same_kind(name, sample):
    changed = 0
    for seed in range(20):
        image, mask = draw(surely(name), sample, seed)
        assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((40, 60, 3), np.uint8, (40, 60), np.uint8)
        assert set(np.unique(mask)) == {0, 1, VOID}
        changed += not np.array_equal(image, sample[0])
    assert changed >= 19


@pytest.mark.parametrize("name", ["HorizontalFlip", "Affine"])
def test_image_and_mask_move_together(name, sample):
    for seed in range(20):
        image, mask = draw(surely(name), sample, seed)
        assert ((image[..., 1] > 120) == (mask == 1)).mean() > 0.98


def test_affine_scales_shifts_and_rotates_within_its_limits_and_mirrors_the_border(sample):
    ellipse = np.where(sample[1] == VOID, 0, sample[1])
    found = []
    for seed in range(200):
        _, mask = draw(surely("Affine"), (sample[0], ellipse), seed)
        found.append((mask.sum(), *np.argwhere(mask).mean(0)))
    area, y, x = np.array(found).T
    assert 0.7 < area.min() / ellipse.sum() < 0.8 and 1.2 < area.max() / ellipse.sum() < 1.35
    assert 1.5 < np.abs(y - 20).max() < 4 and 3 < np.abs(x - 25).max() < 6
    white, everywhere = np.full((40, 60, 3), 255, np.uint8), np.ones((40, 60), np.uint8)
    assert all(part.all() for seed in range(20) for part in draw(surely("Affine"), (white, everywhere), seed))


def test_heights_and_widths_are_scaled_independently():
    square = np.zeros((100, 100), np.uint8)
    square[30:70, 30:70] = 1
    augmentation = surely("Affine")
    augmentation.transforms[0].rotate = (0, 0)
    masks = [draw(augmentation, (np.dstack([square] * 3), square), seed)[1] for seed in range(100)]
    sizes = np.array([(mask.any(1).sum(), mask.any(0).sum()) for mask in masks])
    assert sizes.min() < 36 and sizes.max() > 44 and abs(np.corrcoef(sizes.T)[0, 1]) < 0.3


def test_colours_change_as_much_as_they_are_told():
    mask = np.zeros((4, 4), np.uint8)
    grey = np.full((4, 4, 3), 100, np.uint8), mask
    levels = [draw(surely("RandomBrightnessContrast"), grey, seed)[0] for seed in range(200)]
    assert all(len(np.unique(level)) == 1 for level in levels)
    assert 29 <= np.min(levels) < 50 and 150 < np.max(levels) <= 171
    red = np.full((4, 4, 3), (200, 20, 20), np.uint8), mask
    found = [draw(surely("HueSaturationValue"), red, seed)[0][:1] for seed in range(200)]
    hues = [int(cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[0, 0, 0]) for image in found]
    assert {min(hue, 180 - hue) for hue in hues} == set(range(11))  # of 180: 20 degrees


# ---------------------------------------------------------------------------------------------------------------------
# Randomness


def correlations(parts: list[np.ndarray]) -> np.ndarray:
    return np.abs(np.corrcoef(np.array(parts, float)) - np.eye(len(parts)))


def test_transforms_fire_independently_of_each_other(sample):
    augmentation = A.Compose([*train.make_augmentation(), A.VerticalFlip(p=0.5), A.InvertImg(p=0.5)])
    fired = []
    for seed in range(400):
        draw(augmentation, sample, seed)
        fired.append([bool(transform.params) for transform in augmentation])
    assert np.mean(fired, 0) == pytest.approx([0.5, 0.7, 0.5, 0.5, 0.5, 0.5], abs=0.1)
    assert correlations(np.transpose(fired)).max() < 0.2


def test_transforms_draw_independently_of_each_other(sample):
    """Also those in compositions within the composition, and those that use Python's random or numpy's."""
    inner = A.Sequential([A.OneOf([surely("HueSaturationValue")[0]], p=1), A.GaussNoise(p=1)], p=1)
    augmentation = A.Compose([surely("RandomBrightnessContrast")[0], A.SomeOf([inner], n=1), surely("Affine")[0]])
    brightness, one_of, noise, affine = augmentation[0], inner[0][0], inner[1], augmentation[2]
    found = []
    for seed in range(300):
        draw(augmentation, sample, seed)
        noises = noise.params["noise_map"].ravel()[:2]
        scale = affine.params["scale"]
        found.append((brightness.params["beta"], one_of.params["hue_shift"], *noises, scale["x"], scale["y"]))
    assert correlations(np.transpose(found)).max() < 0.2


NESTED = A.Compose(
    [
        A.OneOf([A.HorizontalFlip(), A.VerticalFlip(), A.Transpose()], p=0.8),
        A.SomeOf([A.GaussNoise(p=0.9), A.ElasticTransform(p=0.9), A.CoarseDropout(p=0.9), A.GridDistortion()], n=2),
        A.Sequential([A.RandomRain(p=0.5), A.PixelDropout(p=0.5), A.RandomShadow(p=0.5)], p=0.9),
        A.RandomOrder([A.RandomGamma(), A.MotionBlur(), A.ISONoise()], n=2),
    ]
)


@pytest.mark.parametrize("make", [train.make_augmentation, lambda: NESTED])
def test_a_sample_depends_on_its_own_random_numbers_alone(make, sample):
    """Not on the global ones, on what was drawn before, or on the process, to which pickle carries it."""
    first = [draw(make(), sample, seed) for seed in range(20)]
    other = pickle.loads(pickle.dumps(make()))
    np.random.seed(1)
    for seed in reversed(range(20)):
        assert all(map(np.array_equal, draw(other, sample, seed), first[seed]))
    assert len({image.tobytes() + mask.tobytes() for image, mask in first}) > 15


def loaded(data: CarvanaDataset, workers: int, start: str | None, at: int = 0) -> list[torch.Tensor]:
    """Return six batches of an epoch from a position on, from so many workers that start so."""
    loader = get_loaders(data, data, 8, workers)[0]
    loader.multiprocessing_context = start
    return [tensor for batch in islice(loader.epoch(2, at), 6) for tensor in batch]


@pytest.mark.parametrize(
    (
        "kind",
        "starts",
    ),  # test_distributed_start_methods.py spawns workers for whole photos, too: each imports for 5 s
    [
        (partial(CarvanaDataset, size=(32, 48)), {"fork", "forkserver"}),
        (partial(CropDataset, size=1.0, crop=(32, 48)), {"fork", "spawn"}),
    ],
)
def test_workers_their_start_and_a_continuation_change_nothing(drawn, kind, starts):
    augmentation = A.Compose([*train.make_augmentation(), *NESTED])
    data = kind(drawn / "train_images", drawn / "train_masks", augmentation=augmentation, seed=3)
    data.prepare(None)
    batches = loaded(data, 0, None)
    for start in starts & {*get_all_start_methods()}:
        found = loaded(data, 2 if start == "fork" else 1, start)  # the others' workers are slow to start
        assert len(found) == len(batches) and all(map(torch.equal, found, batches)), start
    continued = loaded(data, 0, None, at=16)
    assert all(map(torch.equal, continued[:-4], batches[4:])) and len(continued) == len(batches) == 12


def write(image: np.ndarray, **_: object) -> np.ndarray:
    image[:] = 1
    return image


@pytest.mark.parametrize("cache", ["data/cache", None])
def test_a_transform_that_writes_into_what_it_gets_leaves_the_cache_alone(project, cache):
    for kind, size in ((CarvanaDataset, (32, 48)), (partial(CropDataset, crop=(32, 48)), 1.0)):
        augmentation = A.Compose([A.Lambda(image=write, mask=write, p=1.0)])
        data = kind("data/train_images", "data/train_masks", size, augmentation)
        data.prepare(cache)
        before = [part.copy() for part in data.sample(0)]
        assert all((part == 1).all() for part in data[0, 0, 0])
        assert all(map(np.array_equal, data.sample(0), before))


def test_prediction_needs_no_albumentations_and_training_asks_the_network_for_no_newer_one():
    code = (
        "import socket, sys, predict\n"
        "def refuse(*_, **__): sys.exit('the network was asked')\n"
        "socket.getaddrinfo = socket.socket.connect = refuse\n"
        "assert 'albumentations' not in sys.modules\n"
        "import train; train.A.Compose"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# What may come out


def set_of(drawn: Path, augmentation: object, size: tuple[int, int] = (32, 48)) -> CarvanaDataset:
    data = CarvanaDataset(drawn / "train_images", drawn / "train_masks", size, augmentation)
    data.prepare(None)
    return data


RESIZING = {
    "RandomRotate90": A.RandomRotate90(p=1),
    "Transpose": A.Transpose(p=1),
    "RandomScale": A.RandomScale((-0.5, 0.5), p=1),
    "Resize": A.Resize(50, 70),
    "RandomCrop": A.RandomCrop(16, 24),
    "PadIfNeeded": A.PadIfNeeded(64, 64),
}


@pytest.mark.parametrize("name", RESIZING)
def test_what_changes_the_size_is_resized(name, drawn):
    data = set_of(drawn, A.Compose([RESIZING[name], *train.make_augmentation()]))
    for position in range(20):
        image, mask = data[0, position, 0]
        assert image.shape == (32, 48, 3) and mask.shape == (32, 48) and set(np.unique(mask)) <= {0, 1}
    images, masks = next(iter(get_loaders(data, data, 8)[0]))
    assert images.shape == (8, 32, 48, 3) and masks.shape == (8, 32, 48)


def test_image_and_mask_are_resized_alike(sample):
    image, mask = (np.kron(part, np.ones((8, 8, 1) if part.ndim == 3 else (8, 8), np.uint8)) for part in sample)
    data = CarvanaDataset.__new__(CarvanaDataset)
    data.augmentation, data.seed = A.Compose([A.Transpose(p=1)]), 0
    data.sample = lambda _: (image, mask)
    found, truth = data[0]
    assert found.shape == (320, 480, 3) and set(np.unique(truth)) == {0, 1, VOID}
    assert ((found[..., 1] > 120) == (truth == 1)).mean() > 0.995


@pytest.mark.parametrize("name", [name for name in RESIZING if name != "Resize"])
def test_a_crop_is_the_middle_of_what_comes_out(name, drawn):
    """So that a rotation changes no scale; what a small output lacks is ignored."""
    augmentation = A.Compose([RESIZING[name]])
    data = CropDataset(drawn / "train_images", drawn / "train_masks", 1.0, augmentation, crop=(32, 48))
    data.prepare(None)
    for index in range(20):
        image, mask = data[0, 0, index]
        assert image.shape == (32, 48, 3) and mask.shape == (32, 48)
        assert name != "RandomCrop" or (mask == VOID).mean() >= 0.75
    if name == "Transpose":
        data.augmentation = None
        plain, truth = data[0, 0, index]
        assert np.array_equal(image[:, 8:40], plain[:, 8:40].transpose(1, 0, 2))
        assert np.array_equal(mask[:, 8:40], truth[:, 8:40].T)


def zero_to_one(image: np.ndarray, **_: object) -> np.ndarray:
    return image / np.float32(255)


IMAGE_FAULT = "turns images into {}, but they must stay uint8 (height, width, 3), which the device normalises"
FAULTS = {
    "Normalize": (A.Normalize(), IMAGE_FAULT.format("float32 (32, 48, 3)")),
    "ToFloat": (A.ToFloat(), IMAGE_FAULT.format("float32 (32, 48, 3)")),
    "ToTensorV2": (A.ToTensorV2(), IMAGE_FAULT.format("a tensor of uint8 (3, 32, 48)")),
    "ToGray": (A.ToGray(num_output_channels=1, p=0.01), IMAGE_FAULT.format("uint8 (32, 48)")),
    "Lambda": (A.Lambda(mask=zero_to_one, p=0.01), "turns masks into float32 (32, 48)"),
    "PadIfNeeded": (A.PadIfNeeded(64, 64, border_mode=cv2.BORDER_CONSTANT, fill_mask=127), "leaves 127 in masks"),
    "RandomCrop": (A.RandomCrop(64, 64), "cannot do with samples of 32 x 48 pixels"),
    "RandomSizedBBoxSafeCrop": (A.RandomSizedBBoxSafeCrop(8, 8, p=1), "cannot do with samples of 32 x 48 pixels"),
}


@pytest.mark.parametrize("nest", [lambda part: part, lambda part: A.OneOf([A.NoOp(), A.Sequential([part], p=1)], p=1)])
@pytest.mark.parametrize("name", FAULTS)
def test_what_leaves_something_else_is_named_before_anything_is_decoded(name, nest, drawn, monkeypatch):
    transform, fault = FAULTS[name]
    monkeypatch.setattr("machinery.samples.Samples.prepare", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError) as error:
        set_of(drawn, A.Compose([A.HorizontalFlip(), nest(transform), A.RandomBrightnessContrast()]))
    assert str(error.value).startswith(f"{name} in make_augmentation {fault}") and "delete it" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_fails_because_of_another_transform_names_that_one(drawn):
    with pytest.raises(UserError, match=r"^Normalize in make_augmentation turns"):
        set_of(drawn, A.Compose([A.Normalize(), A.CLAHE(p=1)]))
    with pytest.raises(UserError, match=r"^ToTensorV2 in make_augmentation turns"):
        set_of(drawn, A.Compose([A.ToTensorV2(), A.VerticalFlip(p=1)]))  # which fails with a tensor
    set_of(drawn, A.Compose([A.PadIfNeeded(64, 64), A.RandomCrop(64, 64)]))  # which alone would fail


def test_a_mask_that_is_interpolated_is_named_where_it_has_ignored_pixels(sample):
    blurred = A.Compose([A.HorizontalFlip(), A.Rotate((20, 20), mask_interpolation=cv2.INTER_LINEAR, p=1)])
    with pytest.raises(UserError, match=r"^Rotate in make_augmentation leaves \d+ in masks, which may hold"):
        draw(blurred, sample, 0)


@pytest.mark.parametrize(
    ("augmentation", "kind"),
    [
        ([A.HorizontalFlip()], "builtins's list"),
        (v2.Compose([v2.RandomHorizontalFlip()]), "torchvision's Compose"),
        (torch.nn.Identity(), "torch's Identity"),
    ],
)
def test_what_is_not_of_albumentations_is_refused(augmentation, kind, drawn):
    with pytest.raises(UserError, match=f"make_augmentation returns {kind}: let it return A.Compose"):
        set_of(drawn, augmentation)


FLIPS = [A.HorizontalFlip()]
OTHERS = [A.Transpose(p=1), A.OneOf(FLIPS), A.Compose([]), A.Compose(FLIPS, p=0.5), A.Compose(FLIPS, strict=True)]
WITH_KEYS = [A.ReplayCompose([A.HorizontalFlip()]), A.Compose(FLIPS, save_applied_params=True)]


@pytest.mark.parametrize("augmentation", [*OTHERS, *WITH_KEYS])
def test_what_else_albumentations_calls_will_do_and_more_keys_do_no_harm(augmentation, drawn):
    image, mask = set_of(drawn, augmentation)[0]
    assert image.shape == (32, 48, 3) and mask.shape == (32, 48)


def fail(image: np.ndarray, **_: object) -> np.ndarray:
    raise ZeroDivisionError("a bug")


def test_an_error_in_a_users_own_function_is_a_bug():
    with pytest.raises(ZeroDivisionError):
        check_transforms(A.Compose([A.Lambda(image=fail, p=1)]), (32, 48))


SCRIPT = """
import dataset, train
from machinery.errors import run

dataset.check_transforms = lambda *_: None  # so that a sample is the first to show it
train.make_augmentation = lambda: train.A.Compose([train.A.RandomBrightnessContrast(), train.A.Normalize()])
if __name__ == "__main__":
    run(train.main)
"""


def test_from_a_worker_the_sentence_is_one_line_and_the_status_is_1(project):
    Path("script.py").write_text(SCRIPT)
    flags = ["--image-height", "32", "--image-width", "48", "--features", "8", "16", "--num-workers", "2"]
    process = Script(Path("script.py"), *flags)
    assert process.status(300) == 1
    said = process.printed[1].read_text()
    line = said.rstrip("\n").splitlines()[-1]
    assert line.startswith("error: Normalize in make_augmentation turns images into float32 (32, 48, 3), but they must")
    assert "Traceback" not in said

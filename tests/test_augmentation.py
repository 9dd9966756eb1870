"""What each step of the augmentation does to a sample."""

import pickle
from functools import partial

import cv2
import numpy as np
import pytest

import augmentation
import train

STEPS = {getattr(step, "func", step).__name__: step for _, step in train.make_augmentation()}


@pytest.fixture
def sample() -> tuple[np.ndarray, np.ndarray]:
    """A smooth picture that is bright where its mask is."""
    mask = cv2.ellipse(np.zeros((40, 60), np.uint8), (25, 20), (15, 9), 20, 0, 360, 1, -1)
    y, x = np.mgrid[:40, :60]
    image = np.stack((40 + x, 200 * mask + 20, 30 + 2 * y), axis=-1).astype(np.uint8)
    return image, mask


@pytest.mark.parametrize("name", STEPS)
def test_a_step_makes_another_sample_of_the_same_kind(name, sample):
    before = [array.copy() for array in sample]
    changed = 0
    for seed in range(20):
        image, mask = STEPS[name](np.random.default_rng(seed), *sample)
        assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((40, 60, 3), np.uint8, (40, 60), np.uint8)
        assert set(np.unique(mask)) == {0, 1}
        changed += not np.array_equal(image, before[0])
    assert changed >= 19
    assert all(np.array_equal(*pair) for pair in zip(sample, before, strict=True))


@pytest.mark.parametrize("name", STEPS)
def test_a_step_depends_on_its_random_numbers_alone_and_goes_to_workers(name, sample):
    some, again, other = (
        step(np.random.default_rng(seed), *sample)[0]
        for step, seed in ((STEPS[name], 1), (pickle.loads(pickle.dumps(STEPS[name])), 1), (STEPS[name], 2))
    )
    assert np.array_equal(some, again)
    assert name == "horizontal_flip" or not np.array_equal(some, other)


@pytest.mark.parametrize("name", ["horizontal_flip", "affine"])
def test_image_and_mask_move_together(name, sample):
    for seed in range(20):
        image, mask = STEPS[name](np.random.default_rng(seed), *sample)
        assert ((image[..., 1] > 120) == (mask > 0)).mean() > 0.98


def test_affine_leaves_a_sample_alone_where_nothing_is_to_change(sample):
    found = augmentation.affine(np.random.default_rng(0), *sample, scale=0, shift=0, degrees=0)
    assert all(np.array_equal(*pair) for pair in zip(found, sample, strict=True))


def test_affine_stays_within_its_limits(sample):
    def moved(**limits: float) -> np.ndarray:
        limits = {"scale": 0, "shift": 0, "degrees": 0} | limits
        found = [augmentation.affine(np.random.default_rng(seed), *sample, **limits)[1] for seed in range(50)]
        return np.array([[mask.sum(), *np.argwhere(mask).mean(0)] for mask in found])

    area, y, x = moved()[0]
    areas = moved(scale=0.1)[:, 0] / area
    assert 0.78 < areas.min() < 0.9 and 1.1 < areas.max() < 1.23
    shifts = moved(shift=0.05)[:, 1:] - (y, x)
    assert np.abs(shifts).max(0) == pytest.approx((2, 3), abs=0.6)
    places = moved(degrees=10)[:, 1:] - (19.5, 29.5)
    angles = np.degrees(np.arctan2(-places[:, 0], -places[:, 1]))  # the ellipse lies left of the centre
    assert np.ptp(angles) == pytest.approx(20, abs=3)


def test_colours_change_as_much_as_they_are_told(sample):
    grey = np.full((4, 4, 3), 100, np.uint8)
    step = partial(augmentation.brightness_contrast, brightness=0.2, contrast=0)
    levels = [step(np.random.default_rng(seed), grey, sample[1])[0][0, 0] for seed in range(100)]
    assert all(len(set(level.tolist())) == 1 for level in levels)
    assert 48 <= np.min(levels) < 60 and 140 < np.max(levels) <= 152

    red = np.full((4, 4, 3), (200, 20, 20), np.uint8)
    step = partial(augmentation.hue_saturation_value, hue=180, saturation=0, value=0)
    colours = np.array([step(np.random.default_rng(seed), red, sample[1])[0][0, 0] for seed in range(100)])
    assert set(colours.argmax(1)) == {0, 1, 2}
    assert np.abs(colours.max(1).astype(int) - 200).max() <= 2 and np.abs(colours.min(1).astype(int) - 20).max() <= 2


def test_each_step_has_a_probability_of_its_own(sample):
    calls = []

    def note(name: str) -> augmentation.Step:
        return lambda random, image, mask: (calls.append(name), (image, mask))[1]

    for seed in range(300):
        steps = [(0.0, note("never")), (0.3, note("some")), (0.3, note("others")), (1.0, note("always"))]
        augmentation.augment(steps, np.random.default_rng(seed), *sample)
    assert calls.count("never") == 0 and calls.count("always") == 300
    assert 60 < calls.count("some") < 120 and 60 < calls.count("others") < 120

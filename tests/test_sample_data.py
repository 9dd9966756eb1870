import re

import cv2
import numpy as np
import pytest
from PIL import Image

from machinery import sample_data
from machinery.decoding import read_mask
from machinery.errors import UserError
from machinery.files import find_pairs


def test_layout_is_carvanas(drawn):
    for split, cars in (("train", 4), ("val", 2)):
        pairs = find_pairs(drawn / f"{split}_images", drawn / f"{split}_masks")
        assert len(pairs) == cars * 16
        names = {re.fullmatch(r"([0-9a-f]{12})_(\d\d)\.jpg", image.name).groups() for image, _ in pairs}
        assert len({car for car, _ in names}) == cars
        assert {view for _, view in names} == {f"{view:02}" for view in range(1, 17)}
        for image, mask in pairs:
            assert mask.name == f"{image.stem}_mask.gif"
            assert Image.open(image).size == Image.open(mask).size == (96, 64)
            assert set(np.unique(Image.open(mask).convert("L"))) == {0, 255}


def test_no_car_is_in_both_sets(drawn):
    train, val = ({path.name[:12] for path in (drawn / f"{split}_images").iterdir()} for split in ("train", "val"))
    assert not train & val


def test_a_seed_draws_the_same_photos_and_another_one_others():
    first, again, other = (sample_data.draw_photo(seed, 1, 3, 64, 96) for seed in (0, 0, 1))
    sample_data.make_scene.cache_clear()
    fresh = sample_data.draw_photo(0, 1, 3, 64, 96)
    for one in (again, fresh):
        assert one[0] == first[0]
        np.testing.assert_array_equal(one[1], first[1])
        np.testing.assert_array_equal(one[2], first[2])
    assert other[0] != first[0] and not np.array_equal(other[1], first[1])


def test_photos_are_as_large_as_carvanas():
    _, photo, mask = sample_data.draw_photo(0, 0, 0, sample_data.HEIGHT, sample_data.WIDTH)
    assert photo.shape == (1280, 1918, 3) and mask.shape == (1280, 1918)
    assert 0.03 < (mask > 0).mean() < 0.4


def test_a_threshold_does_not_solve_the_task(drawn):
    """Otsu's threshold of each photo, even with the better polarity, stays below 0.80 mean Dice."""
    scores = []
    for image, mask in find_pairs(drawn / "train_images", drawn / "train_masks"):
        truth = read_mask(mask) > 0
        _, bright = cv2.threshold(cv2.imread(str(image), cv2.IMREAD_GRAYSCALE), 0, 1, cv2.THRESH_OTSU)
        guesses = (bright > 0, bright == 0)
        scores.append(max(2 * (guess & truth).sum() / (guess.sum() + truth.sum()) for guess in guesses))
    assert np.mean(scores) < 0.80


def test_every_body_is_one_piece_without_holes():
    for index in range(len(sample_data.BODIES)):
        for view in range(0, 16, 3):
            mask = sample_data.draw_photo(0, index, view, 320, 480)[2]
            assert cv2.connectedComponents(mask)[0] == 2  # the car and the background
            _, _, stats, _ = cv2.connectedComponentsWithStats(255 - mask)
            _, *holes = sorted(stats[1:, cv2.CC_STAT_AREA], reverse=True)
            assert sum(holes) < 5  # pixels


def test_an_existing_folder_is_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty: remove it, or choose another --output-dir"):
        sample_data.main(["--output-dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_data, "draw_photo", stop)
    with pytest.raises(KeyboardInterrupt):
        sample_data.draw_dataset(tmp_path / "sample", 1, 1, 64, 96)
    assert not list(tmp_path.iterdir())

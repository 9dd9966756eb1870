import os
import pickle
import shutil
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import train
import utils
from dataset import CarvanaDataset
from machinery.decoding import VOID, Rule, decode_mask, read_image, read_mask, read_sample
from machinery.errors import UserError
from machinery.files import find_pairs


def photo_and_mask(height: int = 40, width: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """A smooth RGB picture, and an ellipse in {0, 1}."""
    y, x = np.mgrid[:height, :width]
    photo = np.stack((x * 255 / width, y * 255 / height, 128 + 0 * x), axis=-1).astype(np.uint8)
    return photo, cv2.ellipse(np.zeros((height, width), np.uint8), (25, 20), (15, 9), 20, 0, 360, 1, -1)


def palette_image(mask: np.ndarray, colours: dict[int, tuple[int, int, int]]) -> Image.Image:
    """A palette image in which mask value 0 and 1 are the two given indices."""
    background, foreground = colours
    image = Image.fromarray(np.where(mask, foreground, background).astype(np.uint8), "P")
    palette = np.zeros((256, 3), np.uint8)
    for index, colour in colours.items():
        palette[index] = colour
    image.putpalette(palette.tobytes())
    return image


def white_on_transparent(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack((np.full((*mask.shape, 3), 255, np.uint8), mask * 255)), "RGBA")


MASK_KINDS = {
    "1-bit.gif": lambda m: Image.fromarray(m > 0),
    "1-bit.png": lambda m: Image.fromarray(m > 0),
    "1-bit.bmp": lambda m: Image.fromarray(m > 0),
    "palette.gif": lambda m: palette_image(m, {0: (0, 0, 0), 1: (255, 255, 255)}),
    "palette-white-first.gif": lambda m: palette_image(m, {1: (0, 0, 0), 0: (255, 255, 255)}),
    "grey-0-1.png": lambda m: Image.fromarray(m),
    "grey-0-255.png": lambda m: Image.fromarray(m * 255),
    "grey-0-128.png": lambda m: Image.fromarray(m * 128),
    "labels-0-7.png": lambda m: Image.fromarray(m * 7),
    "grey-0-255.tif": lambda m: Image.fromarray(m * 255),
    "grey-0-255.webp": lambda m: Image.fromarray(m * 255),
    "grey-0-255.jpg": lambda m: Image.fromarray(m * 255),  # with compression noise
    "16-bit-0-65535.png": lambda m: Image.fromarray(m.astype(np.uint16) * 65535),
    "16-bit-0-1.png": lambda m: Image.fromarray(m.astype(np.uint16)),
    "16-bit-0-65535.tif": lambda m: Image.fromarray(m.astype(np.uint16) * 65535),
    "rgb.png": lambda m: Image.fromarray(np.dstack([m * 255] * 3)),
    "rgb.jpg": lambda m: Image.fromarray(np.dstack([m * 255] * 3)),
    "rgb-red.png": lambda m: Image.fromarray(np.dstack((m * 200, m * 0, m * 0))),
    "rgba.png": lambda m: Image.fromarray(np.dstack((*[m * 255] * 3, np.full_like(m, 255)))),
    "white-on-transparent.png": white_on_transparent,
    "grey-alpha.png": lambda m: Image.fromarray(np.dstack((np.full_like(m, 255), m * 255)), "LA"),
    "voc-palette.png": lambda m: palette_image(m, {0: (0, 0, 0), 1: (128, 0, 0)}),
    "voc-dark-class.png": lambda m: palette_image(m, {0: (0, 0, 0), 8: (64, 0, 0)}),
    "anti-aliased.png": lambda m: Image.fromarray(cv2.GaussianBlur(m * 255, (3, 3), 0)),
}


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_kind_of_mask_becomes_the_same_array(kind, tmp_path):
    _, mask = photo_and_mask()
    path = tmp_path / f"{Path(kind).stem}_mask{Path(kind).suffix}"
    MASK_KINDS[kind](mask).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    found = read_mask(path)
    assert found.dtype == np.uint8
    if kind == "anti-aliased.png":  # a blurred edge moves a little where it is curved
        assert (found != mask).mean() < 0.005
    else:
        np.testing.assert_array_equal(found, mask)


def test_a_voc_mask_takes_every_class_and_the_border_is_void(tmp_path):
    labels = np.array([[0, 1, 8, 255]] * 4, np.uint8)
    image = Image.fromarray(labels, "P")
    palette = np.zeros((256, 3), np.uint8)
    palette[[1, 8, 255]] = (128, 0, 0), (64, 0, 0), (224, 224, 192)
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "voc.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "voc.png"), [[0, 1, 1, 0]] * 4)
    np.testing.assert_array_equal(decode_mask(tmp_path / "voc.png", None)[0], [[0, 1, 1, VOID]] * 4)


@pytest.mark.parametrize("value", [0, 1])
def test_empty_and_full_masks_stay_so(value, tmp_path):
    for name in ("mask.gif", "mask.png", "mask.jpg"):
        Image.fromarray(np.full((20, 30), 255 * value, np.uint8)).save(tmp_path / name)
        assert (read_mask(tmp_path / name) == value).all()


def test_noise_in_an_empty_jpeg_mask_is_no_foreground(tmp_path):
    noise = np.random.default_rng(0).integers(0, 6, (40, 60), np.uint8)
    Image.fromarray(noise).save(tmp_path / "mask.jpg")
    assert not read_mask(tmp_path / "mask.jpg").any()


@pytest.mark.parametrize("size", [(160, 240), (80, 120)])
def test_reducing_a_mask_keeps_its_area(size, tmp_path):
    """From 1918 x 1280, whose width is no multiple: few pixels are wrong, and as many too much as too little."""
    errors = []
    for angle in range(0, 180, 20):
        full = np.zeros((1280, 1918), np.uint8)
        cv2.ellipse(full, (950 + angle, 600), (600, 250), angle, 0, 360, 255, -1)
        Image.fromarray(full).save(tmp_path / "mask.png")
        covered = cv2.resize(full, size[::-1], interpolation=cv2.INTER_AREA) / 255  # share of each new pixel's area
        found = read_mask(tmp_path / "mask.png", size)
        assert (found[covered < 0.4] == 0).mean() > 0.998 and (found[covered > 0.6] == 1).mean() > 0.998
        errors.append(found.mean() / covered.mean() - 1)
    assert np.abs(errors).max() < 0.005 and abs(np.mean(errors)) < 0.001


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "convert", "tolerance"),
    [
        ("photo.png", lambda im: im, 0),
        ("photo.bmp", lambda im: im, 0),
        ("photo.tif", lambda im: im, 0),
        ("photo.jpg", lambda im: im, 12),
        ("photo.JPEG", lambda im: im, 12),
        ("photo.webp", lambda im: im, 12),
        ("rgba.png", lambda im: im.convert("RGBA"), 0),
        ("cmyk.jpg", lambda im: im.convert("CMYK"), 12),
        ("palette.png", lambda im: im.quantize(256), 24),
    ],
)
def test_photos_of_every_kind_become_rgb(name, convert, tolerance, tmp_path):
    photo, _ = photo_and_mask()
    convert(Image.fromarray(photo)).save(tmp_path / name)
    found = read_image(tmp_path / name)
    assert found.dtype == np.uint8 and found.shape == photo.shape
    assert np.abs(found.astype(int) - photo).mean() <= tolerance / 4
    assert np.abs(found.astype(int) - photo).max() <= 2 * tolerance


def test_grey_and_16_bit_photos_become_rgb(tmp_path):
    grey = photo_and_mask()[0][..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("grey.png", "deep.png"):
        found = read_image(tmp_path / name, None, Rule(low=0, high=65535))
        np.testing.assert_array_equal(found, np.dstack([grey] * 3))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [None, (10, 15)])
def test_exif_orientation_is_honoured(orientation, size, tmp_path):
    """A photo stored turned, with the tag that says so, is read upright, at full size and reduced."""
    photo, _ = photo_and_mask(80, 120)
    upright_to_stored = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF tag -> inverse Image.Transpose
    image = Image.fromarray(photo)
    if orientation > 1:
        image = image.transpose(Image.Transpose(upright_to_stored[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    found = read_image(tmp_path / "photo.jpg", size)
    wanted = photo if size is None else cv2.resize(photo, size[::-1], interpolation=cv2.INTER_AREA)
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).mean() < 3


@pytest.mark.parametrize("shape", [(1280, 1918), (200, 100), (101, 67)])
def test_a_reduced_jpeg_looks_like_a_resized_one(shape, tmp_path):
    photo, _ = photo_and_mask(*shape)
    Image.fromarray(photo).save(tmp_path / "photo.jpg", quality=95)
    found = read_image(tmp_path / "photo.jpg", (50, 60))
    wanted = cv2.resize(photo, (60, 50), interpolation=cv2.INTER_AREA)
    assert np.abs(found.astype(int) - wanted).mean() < 2


def test_a_turned_photo_pairs_with_a_turned_or_an_upright_mask(tmp_path):
    """A phone's photo lies on its side in the file; its mask may be stored upright, or turned with the same tag."""
    photo, mask = photo_and_mask()
    turned = Image.Transpose.ROTATE_90
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo).transpose(turned).save(tmp_path / "photo.jpg", exif=exif)
    Image.fromarray(mask * 255).save(tmp_path / "upright.png")
    Image.fromarray(mask * 255).transpose(turned).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(mask * 255).transpose(turned).save(tmp_path / "wrong.png")
    for name in ("upright.png", "turned.png"):
        _, found, size, _ = read_sample(tmp_path / "photo.jpg", tmp_path / name, (40, 60))
        assert size == (40, 60)
        np.testing.assert_array_equal(found, mask)
    with pytest.raises(UserError, match=r"wrong\.png is 40 x 60 pixels"):
        read_sample(tmp_path / "photo.jpg", tmp_path / "wrong.png", (40, 60))


def save_pair(folder: Path, image_name: str, mask_name: str) -> None:
    photo, mask = photo_and_mask()
    for sub, name, pixels in (("images", image_name, photo), ("masks", mask_name, mask * 255)):
        (folder / sub).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / sub / name)


@pytest.mark.parametrize(
    ("image_name", "mask_name"),
    [
        ("a.jpg", "a_mask.gif"),
        ("a.jpg", "a_mask.png"),
        ("a.png", "a.png"),
        ("a.b.c.jpg", "a.b.c_mask.png"),
        ("two words.JPG", "two words_mask.PNG"),
        ("Straße 7 汽车.jpg", "Straße 7 汽车_mask.gif"),
        ("caf\u00e9.jpg", "cafe\u0301_mask.png"),  # NFC beside macOS's NFD
        ("mask_mask.jpg", "mask_mask_mask.gif"),
    ],
)
def test_masks_pair_by_stem(image_name, mask_name, tmp_path):
    save_pair(tmp_path, image_name, mask_name)
    (tmp_path / "images" / ".gitkeep").touch()
    (tmp_path / "masks" / "notes.txt").touch()
    assert find_pairs(tmp_path / "images", tmp_path / "masks") == [
        (tmp_path / "images" / image_name, tmp_path / "masks" / mask_name)
    ]
    image, mask, size, _ = read_sample(tmp_path / "images" / image_name, tmp_path / "masks" / mask_name, (20, 30))
    assert image.shape == (20, 30, 3) and mask.shape == (20, 30) and size == (40, 60)


def test_carvanas_name_wins(tmp_path):
    for mask_name in ("a.png", "a_mask.png", "a_mask.gif"):
        save_pair(tmp_path, "a.jpg", mask_name)
    assert find_pairs(tmp_path / "images", tmp_path / "masks")[0][1].name == "a_mask.gif"


@pytest.mark.parametrize(
    ("suffix", "hint"),
    [("_seg", "--mask-suffix _seg"), ("-label", "--mask-suffix=-label"), (" copy", "--mask-suffix ' copy'")],
)
def test_masks_of_another_suffix_are_named(suffix, hint, tmp_path):
    for stem in ("1", "10", "11", "12"):  # 10_seg begins with 1, too
        save_pair(tmp_path, f"{stem}.jpg", f"{stem}{suffix}.png")
    with pytest.raises(UserError) as raised:
        find_pairs(tmp_path / "images", tmp_path / "masks")
    assert f"1.jpg has no mask: found 1{suffix}.png: is it {hint}? If not" in str(raised.value)
    assert [mask.name for _, mask in find_pairs(tmp_path / "images", tmp_path / "masks", suffix)] == [
        f"{stem}{suffix}.png" for stem in ("1", "10", "11", "12")
    ]


def test_masks_with_names_of_their_own_are_named(tmp_path):
    save_pair(tmp_path, "a_sat.jpg", "a_mask.png")
    with pytest.raises(UserError, match=r"a_sat\.jpg has no mask: give masks their images' names \(a_mask\.png is"):
        find_pairs(tmp_path / "images", tmp_path / "masks")


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".mpo", ".avif", ".jp2", ".ppm", ".tga", ".JPG"])
def test_photos_with_rare_endings_are_found(ending, tmp_path):
    save_pair(tmp_path, "a.jpg", "a_mask.png")
    (tmp_path / "images" / "a.jpg").rename(tmp_path / "images" / f"a{ending}")
    assert find_pairs(tmp_path / "images", tmp_path / "masks")[0][0].suffix == ending


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def make_dataset(drawn: Path, **options) -> CarvanaDataset:
    return CarvanaDataset(drawn / "train_images", drawn / "train_masks", (32, 48), **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def test_cached_samples_are_the_decoded_ones(drawn, tmp_path):
    plain, cached = make_dataset(drawn), make_dataset(drawn)
    plain.prepare(None)
    cached.prepare(tmp_path)
    np.testing.assert_array_equal(cached.infos, plain.infos)
    assert (cached.infos["height"] == 64).all() and (cached.infos["width"] == 96).all()
    for index in range(len(plain)):
        for one, other in zip(plain.sample(index), cached.sample(index), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_second_run_decodes_nothing(drawn, tmp_path, monkeypatch):
    first = make_dataset(drawn)
    first.prepare(tmp_path)
    monkeypatch.setattr("machinery.samples.read_sample", lambda *_: pytest.fail("decoded again"))
    again = make_dataset(drawn)
    again.prepare(tmp_path)
    np.testing.assert_array_equal(again.infos, first.infos)
    assert again.sample(0)[0].shape == (32, 48, 3)


def test_only_what_changed_is_decoded_again(project, monkeypatch):
    data = project / "data"
    make_dataset(data).prepare(project / "cache")
    changed = sorted((data / "train_images").iterdir())[5]
    Image.open(changed).rotate(180).save(changed)
    seen = []
    monkeypatch.setattr("machinery.samples.read_sample", lambda *args: seen.append(args[0]) or read_sample(*args))
    cached = make_dataset(data)
    cached.prepare(project / "cache")
    assert seen == [changed]
    assert sum(path.suffix == ".samples" for path in (project / "cache").iterdir()) == 1  # the older one is gone
    plain = make_dataset(data)
    for index in range(len(plain)):
        for one, other in zip(plain.sample(index), cached.sample(index), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("ending", [".samples", ".json"])
@pytest.mark.parametrize("share", [0, 0.5])
@pytest.mark.parametrize("changed", [False, True])
def test_a_damaged_cache_is_built_again(ending, share, changed, project):
    data, cache = project / "data", project / "cache"
    make_dataset(data).prepare(cache)
    damaged = next(path for path in cache.iterdir() if path.suffix == ending)
    damaged.write_bytes(damaged.read_bytes()[: int(share * damaged.stat().st_size)])
    if changed:
        os.utime(sorted((data / "train_images").iterdir())[5], (1, 1))
    cached, plain = make_dataset(data), make_dataset(data)
    cached.prepare(cache)
    for index in range(len(plain)):
        np.testing.assert_array_equal(plain.sample(index)[0], cached.sample(index)[0])


def test_the_cache_may_be_deleted_while_it_is_used(drawn, tmp_path):
    dataset = make_dataset(drawn)
    dataset.prepare(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    np.testing.assert_array_equal(dataset.sample(3)[0], make_dataset(drawn).sample(3)[0])


def test_another_size_has_a_cache_of_its_own(drawn, tmp_path):
    make_dataset(drawn).prepare(tmp_path)
    other = CarvanaDataset(drawn / "train_images", drawn / "train_masks", (16, 24))
    other.prepare(tmp_path)
    assert other.sample(0)[1].shape == (16, 24)
    assert sum(path.suffix == ".samples" for path in tmp_path.iterdir()) == 2


def test_a_cache_that_cannot_be_built_is_done_without(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    dataset = make_dataset(drawn)
    dataset.prepare(tmp_path)
    assert "No cache" in capsys.readouterr().out
    assert dataset.sample(0)[0].shape == (32, 48, 3)
    assert not files(tmp_path)


def test_a_disk_that_fills_up_while_the_cache_is_built_leaves_nothing(drawn, tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    dataset = make_dataset(drawn)
    dataset.prepare(tmp_path)
    assert "No space left" in capsys.readouterr().out
    assert dataset.cache_file is None and not files(tmp_path)


def test_a_pickled_dataset_does_not_carry_the_samples(drawn, tmp_path):
    dataset = make_dataset(drawn)
    dataset.prepare(tmp_path)
    image, mask = dataset.sample(3)
    assert len(pickle.dumps(dataset)) < 32 * 48 * 4 * len(dataset) / 4
    again = pickle.loads(pickle.dumps(dataset)).sample(3)
    np.testing.assert_array_equal(again[0], image)
    np.testing.assert_array_equal(again[1], mask)


# ---------------------------------------------------------------------------------------------------------------------
# The loader


@pytest.mark.filterwarnings("error")
def test_validation_raises_no_warnings(drawn, tmp_path):
    dataset = make_dataset(drawn)
    for cache in (None, tmp_path):
        dataset.prepare(cache)
        assert next(iter(utils.get_loaders(dataset, dataset, 2)[1]))[1].shape == (2, 32, 48)


def batches(drawn: Path, num_workers: int, epoch: int = 0, seed: int = 0) -> list[torch.Tensor]:
    train_set = make_dataset(drawn, augmentation=train.make_augmentation(), seed=seed)
    loader, _ = utils.get_loaders(train_set, train_set, 5, num_workers, seed=seed)
    return [tensor for batch in loader.epoch(epoch) for tensor in batch]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def test_samples_have_the_promised_types(drawn):
    images, masks = batches(drawn, 0)[:2]
    assert images.shape == (5, 32, 48, 3) and images.dtype == torch.uint8
    assert masks.shape == (5, 32, 48) and masks.dtype == torch.uint8
    assert set(masks.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_workers(drawn, num_workers):
    assert equal(batches(drawn, 0), batches(drawn, num_workers))


def test_order_and_augmentation_depend_on_seed_and_epoch(drawn):
    first = batches(drawn, 0)
    assert equal(first, batches(drawn, 0))
    assert not equal(first, batches(drawn, 0, epoch=1))
    assert not equal(first, batches(drawn, 0, seed=1))


def test_no_image_is_left_out(drawn):
    sampler = utils.Batches(33, 4)
    batches = list(sampler)
    assert [len(batch) for batch in batches] == 8 * [4] + [1]
    assert [sample for batch in batches for sample in batch] == [(0, index, index) for index in range(33)]


@pytest.mark.parametrize(("length", "size", "start"), [(33, 4, 0), (33, 4, 12), (33, 33, 0), (20, 128, 0), (5, 3, 4)])
def test_shuffled_batches_are_full_and_begin_again(length, size, start):
    sampler = utils.Batches(length, size, seed=3)
    for wanted in range(3):
        order = [index for batch in sampler.batches(wanted) for index in batch][:length]
        assert sorted(order) == list(range(length))
        sampler.set_epoch(wanted, start)
        batches = list(sampler)
        assert len(batches) == len(sampler) == -(-(length - start) // size)
        assert all(len(batch) == size for batch in batches)
        for place, (epoch, position, index) in enumerate(sample for batch in batches for sample in batch):
            assert (epoch, position, index) == (wanted, start + place, order[(start + place) % length])


def test_a_photo_that_comes_twice_is_augmented_twice(drawn):
    dataset = make_dataset(drawn, augmentation=A.Compose([A.RandomBrightnessContrast(p=1)]))
    some, again, other = (dataset[key][0] for key in ((2, 5, 7), (2, 5, 7), (2, 69, 7)))
    assert np.array_equal(some, again) and not np.array_equal(some, other)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        find_pairs(tmp_path / "nowhere", tmp_path)

"""What train.py says about the data before it trains."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import CarvanaDataset
from machinery.decoding import read_mask
from machinery.samples import describe


def report(cache: Path | None = None) -> list[str]:
    sets = [CarvanaDataset(Path(f"data/{n}_images"), Path(f"data/{n}_masks"), (32, 48)) for n in ("train", "val")]
    for data in sets:
        data.prepare(cache)
    return describe(*sets).splitlines()


def change_masks(folder: str, change) -> None:
    for path in Path("data", folder).glob("*_mask.gif"):
        Image.fromarray(change(read_mask(path)) > 0).save(path)


def dot(mask: np.ndarray) -> np.ndarray:
    """A mask of 2 x 2 pixels, which are one at the size of the samples."""
    mask = np.zeros_like(mask)
    mask[30:32, 40:42] = 1
    return mask


def warnings() -> list[str]:
    return [line for line in report() if line.startswith("WARNING")]


def test_it_counts_what_is_there(project):
    Image.new("1", (96, 64)).save(sorted(Path("data/val_masks").glob("*.gif"))[0])
    header, train_line, val_line, *rest = report()
    assert header.split()[0] == "set" and not rest
    assert train_line.split()[:5] == ["train", "64", "96", "x", "64"] and train_line.split()[-1] == "0"
    assert val_line.split()[:2] == ["val", "32"] and val_line.split()[-1] == "1"
    assert " 0.0 %," in val_line


def test_it_says_the_same_from_the_cache(project):
    assert report(Path("cache")) == report(Path("cache")) == report()


def test_photos_of_several_sizes_are_named_by_the_extremes(project):
    for kind in ("images", "masks"):
        path = sorted(Path("data", f"train_{kind}").glob("*.*"))[1]
        Image.open(path).resize((120, 80)).save(path)
    assert "96 x 64 to 120 x 80" in report()[1]


def test_good_data_raises_no_warning(project):
    assert not warnings()


def test_a_car_in_both_sets_is_noticed(project):
    for kind in ("images", "masks"):
        path = sorted(Path("data", f"train_{kind}").glob("*.*"))[1]
        path.rename(Path("data", f"val_{kind}", path.name))
    (warning,) = warnings()
    assert path.name[:12] in warning and "python -m tools.split_data" in warning


def test_photos_that_are_numbered_alike_are_no_cars(project):
    for name in ("train", "val"):
        for kind in ("images", "masks"):
            for number, path in enumerate(sorted(Path("data", f"{name}_{kind}").glob("*.*"))):
                path.rename(path.with_name(f"photo_{number}{'_mask' * (kind == 'masks')}{path.suffix}"))
    assert not warnings()


def test_a_copy_under_another_name_is_noticed(project):
    image = sorted(Path("data/train_images").glob("*.jpg"))[0]
    shutil.copy(image, "data/val_images/other.jpg")
    shutil.copy(Path("data/train_masks", f"{image.stem}_mask.gif"), "data/val_masks/other_mask.gif")
    assert len(warnings()) == 1 and "other.jpg" in warnings()[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda mask: 1 - mask, "inverted"),
        (lambda mask: dot(mask), "0.1 %"),
        (lambda mask: 1 - dot(mask), "99 %"),
    ],
)
def test_strange_masks_are_noticed(change, words, project):
    change_masks("train_masks", change)
    found = warnings()
    assert len(found) == 1 and words in found[0] and "data/train_masks" in found[0]


def test_the_first_batch_is_drawn_with_its_masks_outlined(project, run_train):
    run_train("--num-epochs", "1", "--batch-size", "8")
    picture = np.asarray(Image.open("saved_images/train_batch.png")).astype(int)
    assert picture.shape == (2 * 34 + 2, 4 * 50 + 2, 3)
    yellow = (picture[..., 0] > 250) & (abs(picture[..., 1] - 230) < 3) & (picture[..., 2] < 5)
    for row in range(2):
        for column in range(4):
            tile = yellow[2 + 34 * row : 34 + 34 * row, 2 + 50 * column : 50 + 50 * column]
            assert 15 < tile.sum() < 300


def test_photos_turned_by_exif_whose_masks_are_not_are_counted(project):
    """Orientation 3 keeps the size: masks that were drawn on the photo as it is stored would be learned from."""
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = sorted(Path("data/train_images").iterdir())[:5]
    for path in turned:
        Image.open(path).rotate(180).save(path, exif=exif, quality=95)
    for cache in (None, Path("cache"), Path("cache")):
        assert report(cache)[3:] == ["photos turned by EXIF in data/train_images: 5; their masks are taken as upright"]
    mask = Path(f"data/train_masks/{turned[0].stem}_mask")
    Image.open(f"{mask}.gif").convert("L").rotate(180).save(f"{mask}.png", exif=exif)  # one that says so itself
    mask.with_suffix(".gif").unlink()
    assert "data/train_images: 4;" in report()[3]


def test_files_that_are_passed_over_are_counted(project):
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._x.jpg", "notes.txt", "x.dng", ".hidden"):
        Path("data/train_images", name).write_text("?")
    for folder in ("more/and/more", "@eaDir", "more/@eaDir", "__MACOSX"):
        Path("data/val_images", folder).mkdir(parents=True)
        shutil.copy(next(Path("data/train_images").glob("*.jpg")), Path("data/val_images", folder))
    Path("data/val_masks/below").mkdir()
    assert report()[3:] == [
        "passed over in data/train_images, no photos by their endings: 2, such as notes.txt",
        "folders in data/val_images, which are not searched: 1, such as more: 1 photo",
        "folders in data/val_masks, which are not searched: 1, such as below: 0 photos",
    ]

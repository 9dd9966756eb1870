import shutil
import zipfile
from pathlib import Path

import pytest

from machinery.errors import UserError
from machinery.files import find_pairs
from tools import split_data


def zip_folder(folder: Path, target: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, prefix + path.name)
    return target


@pytest.fixture
def download(drawn, tmp_path, monkeypatch) -> Path:
    """Kaggle's two zip files: 4 cars of 16 photos."""
    (tmp_path / "download").mkdir()
    zip_folder(drawn / "train_images", tmp_path / "download" / "train.zip", "train/")
    zip_folder(drawn / "train_masks", tmp_path / "download" / "train_masks.zip", "train_masks/")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "download"


def split(*flags: object) -> None:
    split_data.main([str(flag) for flag in flags])


def check(cars: tuple[int, int] = (3, 1)) -> dict[str, bytes]:
    """Both sets hold whole cars and each pair; returns every file's content by its place."""
    found = []
    for name, count in zip(("train", "val"), cars, strict=True):
        pairs = find_pairs(Path("data", f"{name}_images"), Path("data", f"{name}_masks"))
        found.append({image.name[:12] for image, _ in pairs})
        assert len(found[-1]) == count and len(pairs) == 16 * count
    assert not found[0] & found[1]
    assert not Path("data/.split").exists()
    return {str(path): path.read_bytes() for path in Path("data").rglob("*") if path.is_file()}


def test_zip_files_as_downloaded(download, capsys):
    split(download / "train.zip", download / "train_masks.zip")
    check()
    assert "train  48 photos of 3 cars" in capsys.readouterr().out


def test_a_folder_with_the_zip_files_and_test_photos(download, drawn):
    zip_folder(drawn / "val_images", download / "test.zip")
    shutil.copytree(drawn / "val_images", download / "test")
    split(download)
    check()


def test_nested_folders(download, drawn):
    split(download)
    wanted = check()
    shutil.rmtree("data")
    shutil.rmtree(download)
    shutil.copytree(drawn / "train_images", download / "a" / "train" / "train")
    shutil.copytree(drawn / "train_masks", download / "a" / "masks")
    split(download)
    assert check() == wanted  # the same seed chooses the same cars


def test_drawn_cars_and_caches_are_not_gathered(download, drawn):
    shutil.copytree(drawn, "data/sample")
    shutil.copytree(drawn / "train_images", "data/unpacked/train")
    shutil.copytree(drawn / "train_masks", "data/unpacked/train_masks")
    sample = files("data/sample")
    split("data", "--move")
    assert files("data/sample") == sample
    shutil.rmtree("data/sample")
    check()


def test_seed_and_share_choose_the_cars(download):
    chosen = set()
    for seed in range(6):
        split(download, "--seed", seed, "--val-share", "0.5")
        check((2, 2))
        chosen.add(tuple(sorted(path.name for path in Path("data/val_images").iterdir())))
        shutil.rmtree("data")
    assert len(chosen) > 1


@pytest.mark.parametrize("how", ["--move", "--link"])
def test_move_and_link(how, download, drawn):
    shutil.copytree(drawn / "train_images", "mine")
    shutil.copytree(drawn / "train_masks", "mine", dirs_exist_ok=True)
    split("mine", how)
    check()
    left = list(Path("mine").iterdir())
    assert len(left) == (0 if how == "--move" else 128)
    if how == "--link":
        assert all(path.stat().st_nlink == 2 for path in left)


def test_move_deletes_no_mask_that_was_passed_over(download, drawn):
    """A photo with two masks takes the .gif; the other one stays where it is."""
    shutil.copytree(drawn / "train_images", "mine")
    shutil.copytree(drawn / "train_masks", "mine", dirs_exist_ok=True)
    second = Path("mine", next(Path("mine").glob("*.jpg")).stem + "_mask.png")
    second.write_bytes(b"second")
    split("mine", "--move")
    check()
    assert [path.name for path in Path("mine").iterdir()] == [second.name]


def test_a_run_that_was_stopped_is_run_again(download, drawn, monkeypatch):
    shutil.copytree(drawn / "train_images", "mine")
    shutil.copytree(drawn / "train_masks", "mine", dirs_exist_ok=True)
    split("mine", "--data-dir", "other")
    wanted = {path.replace("other", "data", 1): content for path, content in files("other").items()}
    for stop_after in (3, 70, 130, 200, 250):
        calls = []

        def stopping(self, target, replace=Path.replace, calls=calls, stop_after=stop_after):
            calls.append(target)
            if len(calls) > stop_after:
                raise KeyboardInterrupt
            return replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", stopping)
            with pytest.raises(KeyboardInterrupt):
                split("mine")
        split("mine")
        assert files("data") == wanted
        shutil.rmtree("data")


def files(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def add_member(name: str) -> None:
    with zipfile.ZipFile("download/train.zip", "a") as archive:
        archive.writestr(name, b"x")


def add_pair(content: bytes) -> None:
    with zipfile.ZipFile("download/train.zip", "a") as archive:
        archive.writestr("broken_01.jpg", content)
        archive.writestr("broken_01_mask.gif", content)
        archive.writestr("./", b"")  # some packers add it


def corrupt() -> None:
    path = Path("download/train.zip")
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)


def fill() -> None:
    Path("data/val_masks").mkdir(parents=True)
    Path("data/val_masks/mine_mask.gif").write_bytes(b"mine")


MISTAKES = {
    "the data folders are not empty": (fill, ["download"], "data/val_masks"),
    "a source is missing": (lambda: None, ["nowhere"], "nowhere"),
    "a zip file is none": (lambda: Path("download/train.zip").write_text("no"), ["download"], "train.zip"),
    "a zip file is damaged": (corrupt, ["download"], "train.zip"),
    "a member climbs out": (lambda: add_member("../../evil.jpg"), ["download"], "evil.jpg"),
    "a member is absolute": (lambda: add_member("/etc/evil.jpg"), ["download"], "evil.jpg"),
    "a member names a drive": (lambda: add_member("C:\\evil.jpg"), ["download"], "evil.jpg"),
    "masks are missing": (lambda: Path("download/train_masks.zip").unlink(), ["download"], "no masks"),
    "photos are missing": (lambda: Path("download/train.zip").unlink(), ["download"], "no photos"),
    "a mask is missing": (lambda: add_member("train/lonely_01.jpg"), ["download"], "train.zip/train/lonely_01.jpg"),
    "a photo is broken": (lambda: add_pair(b"x"), ["download"], "train.zip/broken_01.jpg"),
    "a negative seed": (lambda: None, ["download", "--seed", "-1"], "--seed"),
    "a photo is there twice": (
        lambda: shutil.copy("download/train.zip", "download/train_hq.zip"), ["download"], "twice"),
    "no val share": (lambda: None, ["download", "--val-share", "0"], "--val-share"),
    "an unknown flag": (lambda: None, ["download", "--vall-share", "0.2"], "--vall-share"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_change_nothing(mistake, download):
    prepare, flags, named = MISTAKES[mistake]
    prepare()
    before = files("data") | files("download")
    with pytest.raises(UserError) as caught:
        split(*flags)
    assert named in str(caught.value) and "\n" not in str(caught.value)
    after = {path: content for path, content in files("data").items() if ".split" not in path} | files("download")
    assert after == before


def test_one_car_cannot_be_split(download, drawn):
    car = next((drawn / "val_images").iterdir()).name[:12]
    for folder in ("val_images", "val_masks"):
        for path in (drawn / folder).glob(f"{car}*"):
            Path("one").mkdir(exist_ok=True)
            shutil.copy(path, "one")
    with pytest.raises(UserError, match=car):
        split("one")


def test_masks_of_another_suffix_get_train_pys(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(drawn / "train_images", "photos")
    Path("photos/notes.txt").write_text("mine")
    Path("masks").mkdir()
    for mask in (drawn / "train_masks").iterdir():
        shutil.copy(mask, Path("masks", mask.name.replace("_mask", "-label")))
    split("photos", "masks", "--mask-suffix=-label", "--move")
    check()
    assert "passed over in the sources, no photos by their endings: 1, such as notes.txt" in capsys.readouterr().out
    assert not list(Path("masks").iterdir()) and [path.name for path in Path("photos").iterdir()] == ["notes.txt"]


def test_photos_that_end_in_mask_are_photos_where_masks_end_otherwise(drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in ("photos", "masks"):
        Path(kind).mkdir()
    pairs = find_pairs(drawn / "train_images", drawn / "train_masks")[:4]
    for (photo, mask), name in zip(pairs, ("x", "x_mask", "y", "z"), strict=True):
        shutil.copy(photo, f"photos/{name}.jpg")
        shutil.copy(mask, f"masks/{name}_seg.gif")
    split("photos", "masks", "--mask-suffix", "_seg")
    found = {path.name for path in Path("data").rglob("*_masks/*")}
    assert found == {"x_mask.gif", "x_mask_mask.gif", "y_mask.gif", "z_mask.gif"}


def test_an_empty_suffix_tells_no_masks_from_photos(download):
    with pytest.raises(UserError, match="--mask-suffix is empty"):
        split(download, "--mask-suffix", "")

import os
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from killed import is_killed

from machinery.errors import UserError
from machinery.files import find_pairs, locked
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


def empty_the_folders() -> None:
    for path in Path("data").glob("*_*/*"):
        path.unlink()


AGAIN = {
    "the same command": (lambda: None, ["mine", "--move"]),
    "without --move": (lambda: None, ["mine"]),
    "the folders emptied": (empty_the_folders, ["mine", "--move"]),
    "the folders emptied, without --move": (empty_the_folders, ["mine"]),
    "one photo taken out": (lambda: next(iter(Path("data").glob("*_images/*")), Path("none")).unlink(True), ["mine"]),
}


@pytest.mark.parametrize("again", AGAIN)
def test_no_original_is_lost_by_a_kill_anywhere_and_another_start(again, drawn, tmp_path, monkeypatch):
    """A file is in its folder or at its place, whatever was between; what the user has emptied is the user's loss."""
    between, flags = AGAIN[again]
    photos = sorted((drawn / "train_images").iterdir())
    pairs = [(photo, drawn / "train_masks" / f"{photo.stem}_mask.gif") for photo in (photos[0], photos[16])]
    for number in range(1000):
        folder = tmp_path / str(number)
        (folder / "mine").mkdir(parents=True)
        monkeypatch.chdir(folder)
        wanted = {shutil.copy(path, f"mine/{path.name}").removeprefix("mine/") for pair in pairs for path in pair}
        was_killed = is_killed(lambda: split("mine", "--move"), number)
        assert {path.name for path in Path().rglob("*_*.*")} >= wanted
        between()
        left = {path.name for path in (*Path("mine").iterdir(), *Path("data").glob("*_*/*"))}
        with suppress(UserError):  # it may have ended: "has files already"
            split(*flags)
        assert {path.name for path in (*Path("mine").iterdir(), *Path("data").glob("*_*/*"))} == left
        if not was_killed:
            break
    assert number > 15


def test_originals_that_cannot_be_deleted_or_have_changed_stay(download, drawn, monkeypatch, capsys):
    shutil.copytree(drawn / "train_images", "mine")
    shutil.copytree(drawn / "train_masks", "mine", dirs_exist_ok=True)
    changed, locked = sorted(Path("mine").absolute().glob("*.jpg"))[:2]

    def choose(*args: object, choose=split_data.choose_val_cars) -> set[str]:  # after the files were gathered
        changed.unlink()
        changed.write_bytes(b"a better photo")
        return choose(*args)

    def unlink(path: Path, *args: object, unlink=os.unlink, **kwargs: object) -> None:
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(split_data, "choose_val_cars", choose)
    monkeypatch.setattr(os, "unlink", unlink)
    split("mine", "--move")
    check()
    assert sorted(Path("mine").absolute().iterdir()) == [changed, locked]
    assert f"cannot be deleted: 2, such as {changed}, kept" in capsys.readouterr().out


def test_links_to_files_are_sources_as_files_are(download, drawn):
    shutil.copytree(drawn / "train_images", "far/away")
    shutil.copytree(drawn / "train_masks", "far/away", dirs_exist_ok=True)
    for how in ("--link", "--move"):
        Path("mine").mkdir()
        for path in Path("far/away").iterdir():
            Path("mine", path.name).symlink_to(Path("..", path))
        split("mine", how)
        check()
        assert len(files("far")) == 128
        shutil.rmtree("data")
        shutil.rmtree("mine")


def test_a_member_that_unpacks_to_more_than_a_photo_is_refused(download, monkeypatch):
    add_pair(bytes(20_000))
    monkeypatch.setattr(split_data, "LARGEST", 19_999)
    with pytest.raises(UserError, match=r"train.zip: broken_01.jpg is larger than a photo"):
        split(download)
    with zipfile.ZipFile("download/train.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a_01.jpg", b"x")
    with pytest.raises(UserError, match=r"a_01.jpg is packed in an unusual way"):
        split(download)


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


def test_an_empty_suffix_pairs_equal_names_alone(download):
    with pytest.raises(UserError, match=r"_01_mask.gif: is it --mask-suffix _mask\? If not"):
        split(download, "--mask-suffix", "")


def test_two_splits_into_one_folder_do_not_meet(download):
    with locked(Path("data/.split.lock"), "a first split"), pytest.raises(UserError, match="in use by another run"):
        split(download)
    split(download)
    check()


def test_a_zip_that_unpacks_to_more_than_the_disk_has_is_not_unpacked(download, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="GB are free in data: make room there"):
        split(download)
    assert not any(Path("data/.split/images").iterdir())

import os
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from killed import is_killed
from PIL import Image

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
    sorted_ = {Path(path).name for path in check()}
    assert not sorted_ & {photo.name for photo in (drawn / "val_images").iterdir()}  # they have no masks


def test_nested_folders(download, drawn):
    split(download)
    wanted = check()
    shutil.rmtree("data")
    shutil.rmtree(download)
    shutil.copytree(drawn / "train_images", download / "a" / "train" / "train")
    shutil.copytree(drawn / "train_masks", download / "a" / "masks")
    split(download)
    assert check() == wanted  # the same seed chooses the same cars


def test_photos_of_one_object_by_their_names_are_on_one_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "masks"):
        Path(folder).mkdir()
        for number in range(12):  # a_0.png, b_0.png, c_0.png, a_1.png, ...
            Image.new("L", (8, 8), 20 * number).save(f"{folder}/{'abc'[number % 3]}_{number // 3}.png")
    split("photos", "masks", "--val-share", "0.3", "--group", "^[^_]+")
    sides = [{path.name[0] for path in Path(f"data/{side}_images").iterdir()} for side in ("train", "val")]
    assert sorted(map(len, sides)) == [1, 2] and not sides[0] & sides[1]
    assert "val    4 photos of 1 object in" in capsys.readouterr().out
    with pytest.raises(UserError, match="--group zebra finds nothing in any photo's name, such as "):
        split("photos", "masks", "--group", "zebra")


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
    after = {path: content for path, content in files("data").items() if ".split.lock" not in path} | files("download")
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
    assert not Path("data/.split").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Round two: the same command when data/ has files


def draw_pair(name: str, value: int, folder: str = "", mask: str = ".png") -> None:
    """Save a photo of one colour into photos/ and its mask, whose left part is the object, into masks/."""
    for kind in ("photos", "masks"):
        Path(folder, kind).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), (value, 99, 5)).save(Path(folder, "photos", f"{name}.png"))
    draw_mask(Path(folder, "masks", f"{name}{mask}"), value % 9 + 2)


def draw_mask(path: Path, columns: int) -> None:
    mask = np.zeros((8, 12), np.uint8)
    mask[:, :columns] = 255
    Image.fromarray(mask).save(path)


@pytest.fixture
def twenty(tmp_path, monkeypatch) -> None:
    """Twenty pairs in photos/ and masks/, which were split into data/."""
    monkeypatch.chdir(tmp_path)
    for number in range(20):
        draw_pair(f"p{number:02}", number)
    split("photos", "masks")


def sides() -> dict[str, str]:
    """The side of each photo of data/, which has its mask there."""
    found = {}
    for side in ("train", "val"):
        pairs = find_pairs(Path("data", f"{side}_images"), Path("data", f"{side}_masks"))
        assert not found.keys() & {image.stem for image, _ in pairs}
        found |= {image.stem: side for image, _ in pairs}
    return found


def draw_more(first: int, last: int) -> None:
    for number in range(first, last):
        draw_pair(f"a{number:02}", number)  # before the others by name


def test_photos_that_are_added_leave_the_others_on_their_sides(twenty, capsys):
    before = sides()
    draw_more(20, 30)
    capsys.readouterr()
    split("photos", "masks")
    assert sides() == before | {f"a{number}": "train" for number in range(20, 30)}
    assert "New photos: 10 for training, 0 for validation" in capsys.readouterr().out
    content = files("data")
    split("photos", "masks")
    assert files("data") == content
    assert "New photos: 0 for training, 0 for validation" in capsys.readouterr().out


def test_a_share_that_is_given_holds_for_all_photos_but_moves_none(twenty):
    before = sides()
    draw_more(20, 40)
    split("photos", "masks", "--val-share", "0.25")
    assert before.items() <= sides().items() and list(sides().values()).count("val") == 10


def test_new_photos_of_a_car_join_its_others(download, drawn):
    split(download)
    before = sides()
    for number, stem in enumerate(("train", "val")):
        photo = next(Path("data", f"{stem}_images").iterdir())
        shutil.move(photo, f"{photo.stem[:12]}_9{number}.jpg")
        mask = Path("data", f"{stem}_masks", f"{photo.stem}_mask.gif")
        Path("more").mkdir(exist_ok=True)
        shutil.move(f"{photo.stem[:12]}_9{number}.jpg", "more")
        shutil.move(mask, f"more/{photo.stem[:12]}_9{number}_mask.gif")
        before[f"{photo.stem[:12]}_9{number}"] = before.pop(photo.stem)
    split("more", "--val-share", "0.5")
    assert sides() == before


@pytest.mark.parametrize("ending", [".png", ".gif", ".bmp"])
def test_a_replaced_mask_is_taken_whatever_its_ending(ending, twenty, capsys):
    before = sides()
    for name in ("p03", next(name for name, side in before.items() if side == "val")):
        Path(f"masks/{name}.png").unlink()
        draw_mask(Path(f"masks/{name}{ending}"), 11)
    split("photos", "masks")
    assert sides() == before and "and are replaced: 2, such as data/" in capsys.readouterr().out
    (mask,) = Path("data").glob("*_masks/p03_mask.*")
    assert mask.suffix == ending and np.asarray(Image.open(mask).convert("L"))[0, 10]


def test_a_photo_that_has_vanished_from_the_sources_stays(twenty, capsys):
    before = sides()
    for kind in ("photos", "masks"):
        Path(f"{kind}/p05.png").unlink()
    split("photos", "masks")
    assert sides() == before and "not in the sources, and stay: 1, such as p05" in capsys.readouterr().out


def test_a_mask_that_was_retouched_in_data_is_not_overwritten(twenty, capsys):
    (mask,) = Path("data").glob("*_masks/p03_mask.png")
    draw_mask(mask, 1)
    retouched = mask.read_bytes()
    split("photos", "masks")
    assert mask.read_bytes() == retouched and "changed here, and stay: 1, such as" in capsys.readouterr().out
    draw_mask(Path("masks/p03.png"), 10)
    before = files("data")
    with pytest.raises(UserError, match=r"p03_mask.png was retouched, and masks/p03.png has changed, too: delete"):
        split("photos", "masks")
    assert {path: content for path, content in files("data").items() if ".split/" not in path} == before
    mask.unlink()
    split("photos", "masks")
    assert mask.read_bytes() == Path("masks/p03.png").read_bytes()


def test_another_photo_of_the_same_name_replaces_none(twenty):
    draw_pair("p03", 200, "others")
    before = files("data")
    with pytest.raises(UserError, match=r"others/photos/p03.png differs from data/\w+/p03.png, which has its name"):
        split("others/photos", "others/masks")
    assert {path: content for path, content in files("data").items() if ".split/" not in path} == before


def test_emptied_folders_get_the_same_sides_unless_others_are_asked_for(twenty):
    before = sides()
    draw_more(20, 30)
    empty_the_folders()
    split("photos", "masks")
    assert before.items() <= sides().items() and set(sides().items() - before.items()) == {
        (f"a{number}", "train") for number in range(20, 30)
    }
    others = []
    for flags in (["--seed", "5"], ["--val-share", "0.4"]):
        empty_the_folders()
        split("photos", "masks", *flags)
        others.append(sides())
        assert not before.items() <= sides().items()
    assert list(others[1].values()).count("val") == 12
    empty_the_folders()
    split("photos", "masks")
    assert sides() == others[1]


def test_photos_that_were_moved_by_hand_stay_there(twenty):
    for side, other in (("train", "val"), ("val", "train")):
        photo = min(Path(f"data/{side}_images").iterdir())
        shutil.move(photo, f"data/{other}_images")
        shutil.move(f"data/{side}_masks/{photo.stem}_mask.png", f"data/{other}_masks")
    before = sides()
    split("photos", "masks")
    assert sides() == before
    empty_the_folders()
    split("photos", "masks")
    assert sides() == before


def test_data_that_was_filled_by_hand_is_added_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        draw_pair(f"p{number}", number)
        side = ("train", "val")[number % 2]
        for kind, source, name in (("images", "photos", f"p{number}.png"), ("masks", "masks", f"p{number}.png")):
            Path(f"data/{side}_{kind}").mkdir(parents=True, exist_ok=True)
            shutil.copy(f"{source}/{name}", f"data/{side}_{kind}")
    draw_mask(Path("masks/p1.png"), 9)
    draw_pair("p4", 4)
    split("photos", "masks")
    assert sides() == {"p0": "train", "p1": "val", "p2": "train", "p3": "val", "p4": "train"}
    assert [path.name for path in Path("data/val_masks").glob("p1*")] == ["p1_mask.png"]


def test_data_is_not_sorted_into_itself(twenty):
    with pytest.raises(UserError, match="data/train_images is one of the folders that photos are sorted into"):
        split("data/train_images", "data/train_masks")
    shutil.move("photos", "data/photos")
    shutil.move("masks", "data/masks")
    before = sides()
    split("data", "--move")
    assert sides() == before and not list(Path("data/photos").iterdir())


def test_photos_without_partners_in_data_are_named(twenty):
    Path("data/val_masks/mine_mask.gif").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"data/val_masks/mine_mask.gif has no photo in data/val_images"):
        split("photos", "masks")
    Path("data/val_masks/mine_mask.gif").unlink()
    shutil.copy("photos/p03.png", "data/train_images/mine.png")
    with pytest.raises(UserError, match=r"data/train_images/mine.png has no mask: add it, or move the photo away"):
        split("photos", "masks")


def test_without_any_for_validation_it_says_what_to_do(twenty):
    for path in Path("data").glob("val_*/*"):
        path.unlink()
    for path in Path("data/train_images").iterdir():
        shutil.copy(path, "kept.png")
    names = [path.stem for path in Path("data/train_images").iterdir()]
    for path in [*Path("photos").iterdir(), *Path("masks").iterdir()]:
        if path.stem not in names:
            path.unlink()
    with pytest.raises(UserError, match="all photos are on the side of train: move some, with their masks,"):
        split("photos", "masks")


def test_a_damaged_memory_is_named(twenty):
    for damage in ("{", "[1]", '{"sides": {}}'):
        Path("data/.split.json").write_text(damage)
        with pytest.raises(UserError, match=r"data/.split.json, which remembers the sides of photos, is damaged"):
            split("photos", "masks")


@pytest.mark.parametrize("flags", [[], ["--move"]], ids=["copy", "move"])
def test_round_two_killed_anywhere_is_run_again(flags, tmp_path, monkeypatch):
    """A mask that is replaced, one with another ending, a new photo: each is old or new, and no original is lost."""
    (tmp_path / "start").mkdir()
    monkeypatch.chdir(tmp_path / "start")
    names = ["p0", "p1", "p2"]
    for number, name in enumerate(names):
        draw_pair(name, number)
    split("photos", "masks")
    draw_mask(Path("masks/p0.png"), 11)
    Path("masks/p1.png").unlink()
    draw_mask(Path("masks/p1.gif"), 11)
    draw_pair("a", 9)
    wanted = None
    for number in (10**6, *range(1000)):  # the first is not killed
        shutil.copytree(tmp_path / "start", tmp_path / str(number))
        monkeypatch.chdir(tmp_path / str(number))
        was_killed = is_killed(lambda: split("photos", "masks", *flags), number)
        for name in ("a", *names):
            assert [*Path("data").glob(f"*_images/{name}.png"), *Path("photos").glob(f"{name}.png")]
            assert [*Path("data").glob(f"*_masks/{name}_mask.*"), *Path("masks").glob(f"{name}.*")]
        with suppress(UserError):  # all originals may be gone
            split("photos", "masks", *flags)
        found = {path: content for path, content in files("data").items() if ".lock" not in path}
        wanted = wanted or found
        assert found == wanted
        if not was_killed and number < 10**6:
            break
    assert number > 20 and len(list(Path("photos").iterdir())) == (0 if flags else 4)

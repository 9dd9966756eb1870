"""What lies in people's folders: links, what other programs leave there, brackets, ~, and what cannot be read."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import predict
from machinery import errors, files
from machinery.errors import UserError
from machinery.files import files_below, files_in, find_pairs
from machinery.photos import find_photos
from machinery.settings import Parser, parse_settings
from tools import demo, export, make_masks, split_data


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def draw(*paths: str | Path) -> None:
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), "grey").save(path)


def draw_mask(*paths: str, box: tuple[int, int, int, int] = (8, 8, 20, 20), size: tuple[int, int] = (32, 32)) -> None:
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = Image.new("L", size)
        mask.paste(255, box)
        mask.save(path)


def link(path: str, target: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).symlink_to(os.path.relpath(target, Path(path).parent))


def found(*inputs: str) -> list[str]:
    return [photo.path.as_posix() for photo in find_photos(list(inputs))]


# ---------------------------------------------------------------------------------------------------------------------
# Folders below folders


def test_links_to_folders_are_followed_by_every_command():
    draw("disk/2023/a.jpg", "disk/2024/b.jpg", "photos/c.jpg")
    draw_mask("truth/a_mask.png", "truth/b_mask.png", "truth/c_mask.png")
    link("photos/archive", "disk")
    assert found("photos") == ["photos/archive/2023/a.jpg", "photos/archive/2024/b.jpg", "photos/c.jpg"]
    assert files_below(Path("photos")) == make_masks.list_files([Path("photos")])[0]
    link("set/masks", "truth")
    link("set/photos", "photos")
    split_data.main(["set"])
    assert {path.name for path in Path("data").glob("*_images/*")} == {"a.jpg", "b.jpg", "c.jpg"}


@pytest.mark.parametrize("target", ["photos", "photos/more", ".", "photos/more/below"])
def test_links_that_lead_back_are_followed_once(target):
    draw("photos/a.jpg", "photos/more/b.jpg", "photos/more/below/c.jpg", "elsewhere/d.jpg", "beside.jpg")
    link("photos/more/below/back", target)
    link("elsewhere/photos", "photos")
    link("photos/elsewhere", "elsewhere")
    wanted = ["photos/a.jpg", "photos/elsewhere/d.jpg", "photos/more/b.jpg", "photos/more/below/c.jpg"]
    assert [path.as_posix() for path in files_below(Path("photos"))] == wanted


@pytest.mark.parametrize("name", ["a", "z"])
def test_a_folder_that_is_linked_twice_is_listed_by_its_own_name(name):
    draw(f"photos/{name}/a.jpg")
    link("photos/b", f"photos/{name}")
    link("photos/c", f"photos/{name}")
    assert found("photos") == [f"photos/{name}/a.jpg"]


def test_a_link_that_leads_nowhere_is_named_as_a_photo_that_cannot_be_read():
    draw("photos/a.jpg")
    link("photos/b.jpg", "gone.jpg")
    link("photos/gone", "gone")
    assert found("photos") == ["photos/a.jpg", "photos/b.jpg"]


@pytest.mark.parametrize("command", [find_photos, split_data.main, make_masks.main])
def test_a_folder_that_cannot_be_read_is_named(command, monkeypatch):
    draw("photos/a.jpg", "photos/private/b.jpg")
    scandir = os.scandir

    def forbidding(path: Path | int):
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    with pytest.raises(UserError, match=r"photos/private cannot be read \(Permission denied\): allow yourself to read"):
        command(["photos"])


CLUTTER = ["@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/._a.jpg", "__MACOSX/a.jpg", "#recycle/old.jpg"]
CLUTTER += [
    "$RECYCLE.BIN/old.png",
    "lost+found/x.png",
    ".thumbnails/a.png",
    "._a.jpg",
    "System Volume Information/a.jpg",
]


def test_what_other_programs_leave_in_folders_is_never_a_photo(capsys):
    draw("photos/a.jpg", "photos/more/b.jpg", *(f"photos/{name}" for name in CLUTTER))
    for name in ("Thumbs.db", "DESKTOP.INI", ".DS_Store", "ehthumbs.db", "Icon\r", "more/Thumbs.db"):
        Path("photos", name).write_bytes(b"?")
    assert found("photos") == ["photos/a.jpg", "photos/more/b.jpg"]
    assert capsys.readouterr().out == ""
    assert found("photos/**/*.jpg") == ["photos/a.jpg", "photos/more/b.jpg"]
    assert [path.name for path in files_in(Path("photos"))] == ["a.jpg", "more"]
    draw_mask("masks/a_mask.png", "masks/b_mask.png", "masks/@eaDir/c_mask.png")
    Path("masks/Thumbs.db").write_bytes(b"?")
    split_data.main(["photos", "masks"])
    assert len(list(Path("data").glob("*_images/*"))) == 2 and "passed over" not in capsys.readouterr().out


def test_clutter_that_is_given_by_name_is_taken():
    draw("@eaDir/a.jpg", ".hidden/b.jpg")
    assert found("@eaDir/a.jpg", ".hidden") == ["@eaDir/a.jpg", ".hidden/b.jpg"]
    assert found("@eaDir/*.jpg") == ["@eaDir/a.jpg"]


def test_a_folder_without_photos_of_its_own_says_how_many_its_folders_hold():
    draw("images/train/a.jpg", "images/train/more/b.png")
    draw_mask("masks/a_mask.png")
    with pytest.raises(UserError, match=r"of its own, but train, a folder with 2 photos, which is not searched: add"):
        find_pairs(Path("images"), Path("masks"))


def test_what_is_there_instead_of_photos_is_named_without_a_list_of_endings():
    for name in ("IMG_1.CR2", "IMG_2.CR2"):
        Path("raw").mkdir(exist_ok=True)
        Path("raw", name).write_bytes(b"?")
    with pytest.raises(UserError) as caught:
        find_photos(["raw"])
    assert "by their endings (docs/data.md lists those), but IMG_1.CR2 and 1 other file" in str(caught.value)
    assert ".jpeg" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_brackets_of_a_folder_that_is_there_are_no_pattern():
    draw("shots [2024]/a.jpg", "shots [2024]/b [1].jpg", "shots [2024]/more [x]/c.png", "shots 2/d.jpg")
    assert found("shots [2024]/*.jpg") == ["shots [2024]/a.jpg", "shots [2024]/b [1].jpg"]
    assert found("shots [2024]/*[1].jpg") == ["shots [2024]/b [1].jpg"]
    assert found("shots [2024]/[ab]*.jpg") == ["shots [2024]/a.jpg", "shots [2024]/b [1].jpg"]
    assert found("shots [[]2024]/a.jpg") == ["shots [2024]/a.jpg"]
    assert found("*[2024]/more*/*") == ["shots [2024]/more [x]/c.png"]
    assert found("shots [2024]/**/*.png") == ["shots [2024]/more [x]/c.png"]
    assert found("shots [0-9]/*") == ["shots 2/d.jpg"]


def test_folders_that_a_pattern_matches_are_searched():
    draw("a1/x.jpg", "a2/more/y.jpg", "a3.jpg")
    assert found("a*") == ["a1/x.jpg", "a2/more/y.jpg", "a3.jpg"]


@pytest.mark.parametrize("given", ["nowhere", "nowhere/*.jpg", "x" * 300, "[", "photos/*.png"])
def test_an_input_that_is_not_there_is_named(given):
    draw("photos/a.jpg")
    with pytest.raises(UserError, match="nothing is there: correct the path"):
        find_photos([given])


@pytest.mark.parametrize(
    ("value", "wanted"),
    [("~/a.jpg", "HOME/a.jpg"), ("~", "~"), ("~tilde", "~tilde"), ("a/~/b", "a/~/b"), ("a~", "a~"), ("~~/x", "~~/x"),
     (Path("~/a"), Path("HOME/a")), (Path("~"), Path("HOME")), (["~/a", 3], ["HOME/a", 3]), ((1, 2), (1, 2)),
     (None, None)],
)  # fmt: skip
def test_a_tilde_is_the_home_folder(value, wanted, monkeypatch):
    monkeypatch.setenv("HOME", "HOME")
    parser = Parser("x", None)
    parser.add_argument("--value", default=value)
    assert parser.parse_args([]).value == wanted


def test_every_path_setting_of_train_expands_a_tilde(monkeypatch):
    import train

    monkeypatch.setenv("HOME", "/home/me")
    paths = ["TRAIN_IMG_DIR", "TRAIN_MASK_DIR", "VAL_IMG_DIR", "VAL_MASK_DIR", "CACHE_DIR", "ENCODER_WEIGHTS"]
    paths += ["START_FROM", "CHECKPOINT", "SAVED_IMAGES_DIR", "TENSORBOARD_DIR"]
    for name in paths:
        monkeypatch.setattr(train, name, "~/x")
    settings = vars(parse_settings(vars(train), []))
    assert {settings[name.lower()] for name in paths} == {"/home/me/x"}
    settings = vars(parse_settings(vars(train), [part for name in paths for part in (flag_of(name), "~/y")]))
    assert {settings[name.lower()] for name in paths} == {"/home/me/y"}
    monkeypatch.setattr(train, "CHECKPOINT", Path("~/x"))
    assert parse_settings(vars(train), []).checkpoint == "/home/me/x"


def flag_of(name: str) -> str:
    return f"--{name.lower().replace('_', '-')}"


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (predict.main, ["a.jpg", "--checkpoint", "~/nowhere"]),
        (export.main, ["--checkpoint", "~/nowhere"]),
        (split_data.main, ["~/nowhere"]),
        (make_masks.main, ["~/nowhere"]),
        (demo.main, ["--checkpoint", "~/nowhere"]),
    ],
)
def test_every_command_expands_a_tilde(command, flags, monkeypatch):
    pytest.importorskip("gradio" if command is demo.main else "onnx" if command is export.main else "numpy")
    monkeypatch.setenv("HOME", "/home/me")
    with pytest.raises(UserError, match=r"^/home/me/nowhere does not exist"):
        command(flags)


# ---------------------------------------------------------------------------------------------------------------------
# Several masks of a photo


@pytest.mark.parametrize("name", ["x_mask_1", "x_mask2", "x_mask (2)", "x_mask-left", "x_1_mask", "x (1)_mask", "x_1"])
def test_a_second_mask_of_a_photo_is_named_as_such(name):
    draw("images/x.jpg", "images/y.jpg")
    draw_mask("masks/x_mask.png", "masks/y_mask.png", f"masks/{name}.png")
    with pytest.raises(UserError) as caught:
        find_pairs(Path("images"), Path("masks"))
    assert f"masks/{name}.png looks like a second mask of images/x.jpg: unite them (python -m tools.split" in str(
        caught.value
    )
    assert "remove" not in str(caught.value) and "delete" not in str(caught.value)


@pytest.mark.parametrize("names", [("x_mask_1", "x_mask_2"), ("x_1", "x_2"), ("x_mask", "x_mask_1", "x_mask_2")])
def test_several_masks_of_a_photo_are_united_on_request(names, capsys):
    """A pixel is foreground if it is in one of them; photos with one mask keep that file."""
    draw("images/x.jpg", "images/y.jpg")
    for number, name in enumerate(names):
        draw_mask(f"masks/{name}.png", box=(10 * number, 0, 10 * number + 5, 32))
    draw_mask("masks/y_mask.png")
    before = {path: path.read_bytes() for path in Path("masks").iterdir()}
    with pytest.raises(UserError, match=r"looks like a second mask of the photo x, as .* is: add --unite"):
        split_data.main(["images", "masks"])
    split_data.main(["images", "masks", "--unite", "--move"])
    united = np.asarray(Image.open(next(Path("data").glob("*_masks/x_mask.png"))))
    wanted = np.zeros((32, 32), np.uint8)
    for number in range(len(names)):
        wanted[:, 10 * number : 10 * number + 5] = 255
    np.testing.assert_array_equal(united, wanted)
    assert next(Path("data").glob("*_masks/y_mask.png")).read_bytes() == before[Path("masks/y_mask.png")]
    assert {path.stem for path in Path("masks").iterdir()} == set(names)  # the truth itself stays
    assert f"Masks that were united: {len(names)}, into 1; the originals stay" in capsys.readouterr().out


def test_void_stays_void_where_no_mask_has_the_object():
    draw("images/x.jpg", "images/y.jpg")
    for name, rows in (("x_mask", slice(0, 8)), ("x_mask_1", slice(4, 16)), ("y_mask", slice(0, 8))):
        mask = np.zeros((32, 32), np.uint8)
        mask[rows], mask[6:7], mask[30:] = 1, 255, 255
        Path("masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(f"masks/{name}.png")
    split_data.main(["images", "masks", "--unite"])
    united = np.asarray(Image.open(next(Path("data").glob("*_masks/x_mask.png"))))
    assert [int(united[row, 0]) for row in (0, 5, 6, 10, 20, 31)] == [1, 1, 255, 1, 0, 255]


def test_masks_of_different_sizes_are_not_united():
    draw("images/x.jpg", "images/y.jpg")
    draw_mask("masks/x_mask.png", "masks/y_mask.png")
    draw_mask("masks/x_mask_1.png", size=(20, 20))
    with pytest.raises(UserError, match=r"masks/x_mask.png and the photo's other masks differ in size"):
        split_data.main(["images", "masks", "--unite"])


def test_photos_with_numbers_are_photos_of_their_own():
    draw("images/x.jpg", "images/x_1.jpg", "images/x_2.jpg")
    draw_mask("masks/x_mask.png", "masks/x_1_mask.png", "masks/x_2_mask.png")
    assert len(find_pairs(Path("images"), Path("masks"))) == 3
    split_data.main(["images", "masks"])
    assert len(list(Path("data").glob("*_masks/*"))) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Photos and masks of equal names


EQUAL = {
    "two folders": (["set/images/{}.png", "set/masks/{}.png"], ["set/images", "set/masks"]),
    "two folders, an empty suffix": (["a/{}.png", "b/{}.png"], ["a", "b", "--mask-suffix", ""]),
    "two folders by their order": (["img/{}.jpg", "other/{}.png"], ["img", "other"]),
    "two folders by their names": (["set/images/{}.png", "set/masks/{}.png"], ["set/masks", "set/images"]),
    "one folder with both": (["set/images/{}.png", "set/labels/{}.png"], ["set"]),
    "one folder with both, an empty suffix": (["set/img/{}.png", "set/gt/{}.png"], ["set", "--mask-suffix", ""]),
    "below a folder that is named for masks": (["mask_set/a/{}.png", "mask_set/masks/{}.png"], ["mask_set"]),
    "folders below": (["set/images/day/{}.jpg", "set/masks/day/{}.png"], ["set"]),
}


@pytest.mark.parametrize("case", EQUAL)
def test_photos_and_masks_of_equal_names_are_paired_as_train_py_does(case):
    (photo, mask), flags = EQUAL[case]
    for name in "xyz":
        draw(photo.format(name))
        draw_mask(mask.format(name))
    split_data.main([*flags, "--move"])
    for name in ("train", "val"):
        for image, mask_path in find_pairs(Path(f"data/{name}_images"), Path(f"data/{name}_masks")):
            assert mask_path.name == f"{image.stem}_mask.png"
            assert sorted(np.unique(np.asarray(Image.open(mask_path))).tolist()) == [0, 255]
    assert len(list(Path("data").glob("*_masks/*"))) == 3 and not list(Path().glob("*/*/*.png"))[6:]


def test_masks_that_are_given_before_the_photos_are_named():
    for name in "xy":
        draw(f"a/{name}.png")
        draw_mask(f"b/{name}.png")
    with pytest.raises(UserError, match=r"a/x.png and all other masks have colours everywhere: give the photos first"):
        for name in "xy":
            Image.new("RGB", (32, 32), "red").save(f"a/{name}.png")
        split_data.main(["b", "a"])


# ---------------------------------------------------------------------------------------------------------------------
# Disks


def test_a_link_to_another_disk_is_symbolic(monkeypatch):
    """Such as that of a notebook's input folder, which may be read-only. Where there are none, a sentence says so."""
    draw("images/x.jpg", "images/y.jpg")
    draw_mask("masks/x_mask.png", "masks/y_mask.png")

    def another_disk(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", another_disk)
    split_data.main(["images", "masks", "--link", "--data-dir", "linked"])
    linked = {path.name: path.readlink() for path in Path("linked").glob("*_*/*")}
    assert linked == {path.name: path.resolve() for path in Path().glob("*s/*") if path.parent.name != "linked"}

    def no_links(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    with pytest.raises(UserError, match=r"x.jpg cannot be linked into data \(.*\): leave out --link, which copies"):
        split_data.main(["images", "masks", "--link"])


@pytest.mark.parametrize(
    ("number", "advice"), [(28, "make room there"), (13, "allow yourself to read and write there")]
)
def test_room_is_asked_for_only_where_it_is_missing(number, advice, monkeypatch):
    draw("images/x.jpg", "images/y.jpg")
    draw_mask("masks/x_mask.png", "masks/y_mask.png")

    def failing(*_: object) -> None:
        raise OSError(number, os.strerror(number), "data/.split")

    monkeypatch.setattr(files.shutil, "copyfile", failing)
    with pytest.raises(UserError, match=f"data/.split: {os.strerror(number)}: {advice}, or choose another --data-dir"):
        split_data.main(["images", "masks"])


def test_a_lock_that_a_dead_run_has_left_is_named_on_disks_without_flock(monkeypatch, tmp_path):
    """There a lock is a file, which outlives a run that was killed on another machine."""
    import fcntl

    def no_flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    with files.locked(Path("x.lock"), "it"):
        if not Path("x.lock").stat().st_size:
            pytest.skip("this version of filelock needs flock")
        message = r"it is in use by another run: wait for its end, or choose another; if no run is alive, delete x.lock"
        with pytest.raises(UserError, match=message), files.locked(Path("x.lock"), "it"):
            pass
    monkeypatch.undo()
    with files.locked(tmp_path / "y.lock", "it"), pytest.raises(UserError, match=r"or choose another$"):
        files.locked(tmp_path / "y.lock", "it").__enter__()


REASONS = {
    "disk": (OSError(28, "No space left on device", "/x/y"), "No space left on device"),
    "bomb": (Image.DecompressionBombError("Image size (700000000 pixels) exceeds limit of 600000000 pixels, could be "
                                          "decompression bomb DOS attack."), "it has more than 600 million pixels"),
    "torch": (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64"), "the disk may be full"),
    "cut": (OSError("image file is truncated (12 bytes not processed)"), "it is cut off"),
    "broken": (SyntaxError("broken PNG file (chunk b'IDAT')"), "it is damaged"),
    "stream": (OSError("broken data stream when reading image file"), "it is damaged"),
    "ours": (ValueError("it holds nan or infinity"), "it holds nan or infinity"),
    "wordless": (ValueError(), "ValueError"),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_reasons_are_in_our_words(case):
    error, wanted = REASONS[case]
    assert errors.reason_of(error) == wanted


def test_outlines_beside_a_photo_are_not_said_to_be_passed_over():
    paths = [Path("x/a.jpg"), Path("x/a.json"), Path("x/b.json")]
    assert files.passed_over(paths, "x") == ["passed over in x, no photos by their endings: 1, such as b.json"]

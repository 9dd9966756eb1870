"""Counting and measuring: the table of objects, specks that are removed, and COCO's file."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import save_network
from forked import start_processes
from killed import kills
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from test_predict_labelme import MASKS

import predict
from machinery import outputs
from machinery.errors import UserError
from machinery.objects import COLUMNS, Objects, remove_specks
from machinery.shapes import coco_polygon_mask
from model import UNet
from predict import objects
from tools import make_masks


def discs(radii: tuple[int, ...], size: tuple[int, int] = (200, 400)) -> np.ndarray:
    """A mask, uint8 (H, W) in {0, 255}, of discs side by side."""
    mask = np.zeros(size, np.uint8)
    for number, radius in enumerate(radii):
        y, x = np.ogrid[: size[0], : size[1]]
        centre = 60 + 90 * number
        mask[(x - centre) ** 2 + (y - 100) ** 2 <= radius**2] = 255
    return mask


def specks() -> np.ndarray:
    """Ten thousand specks of different sizes, some of which touch."""
    random, mask = np.random.default_rng(0), np.zeros((1300, 1300), np.uint8)
    for x, y in random.integers(0, 1300, (10_000, 2)).tolist():
        mask[y : y + random.integers(1, 7), x : x + random.integers(1, 7)] = 255
    return mask


def one_pixel() -> np.ndarray:
    mask = np.zeros((7, 9), np.uint8)
    mask[6, 0] = 255
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# Measures


def test_discs_have_their_areas_diameters_and_places():
    radii = 10, 25, 40
    for row, radius in zip(objects(discs(radii)), sorted(radii, reverse=True), strict=True):  # the largest begins first
        number = radii.index(radius)
        assert row["area_px"] == pytest.approx(np.pi * radius**2, rel=0.02)
        assert row["area_share"] == row["area_px"] / (200 * 400)
        assert row["equivalent_diameter"] == pytest.approx(2 * radius, rel=0.02)
        assert (row["centroid_x"], row["centroid_y"]) == (60 + 90 * number, 100)
        box = 60 + 90 * number - radius, 100 - radius, 2 * radius + 1, 2 * radius + 1
        assert tuple(row[name] for name in ("left", "top", "width", "height")) == box
        assert not row["touches_border"]


@pytest.mark.parametrize("side", [np.s_[0, 5], np.s_[5, 0], np.s_[-1, 5], np.s_[5, -1]])
def test_an_object_touches_the_border_at_each_side(side):
    mask = np.zeros((11, 12), np.uint8)
    mask[5:7, 5:7] = mask[side] = 255
    assert sorted((row["area_px"], row["touches_border"]) for row in objects(mask)) == [(1, True), (4, False)]


TALL = np.tile(MASKS["blobs of 2 pixels, 0.5"], (20, 1))  # measured in bands of 512 rows
ALL_MASKS = MASKS | {"one pixel": one_pixel(), "ten thousand specks": specks(), "tall blobs": TALL}


@pytest.mark.parametrize("kind", ALL_MASKS)
def test_rows_are_those_of_regionprops(kind):
    measure = pytest.importorskip("skimage.measure")
    mask = ALL_MASKS[kind]
    probabilities = np.random.default_rng(0).random(mask.shape, np.float32) / 2 + (mask > 0) / np.float32(2)
    rows, found = objects(probabilities), measure.regionprops(measure.label(mask > 0, connectivity=2), probabilities)
    assert [row["object"] for row in rows] == [region.label for region in found]
    for row, region in zip(rows, found, strict=True):
        top, left, bottom, right = region.bbox
        assert (row["area_px"], row["left"], row["top"]) == (region.area, left, top)
        assert (row["width"], row["height"]) == (right - left, bottom - top)
        assert (row["centroid_y"], row["centroid_x"]) == region.centroid
        assert row["equivalent_diameter"] == region.equivalent_diameter_area
        assert row["mean_probability"] == pytest.approx(region.intensity_mean, abs=1e-6)
    if kind == "ten thousand specks":  # regionprops' perimeters of all take seconds
        rows, found = rows[::50], found[::50]
    assert [row["perimeter"] for row in rows] == pytest.approx([region.perimeter for region in found], rel=1e-12)


def test_masks_of_any_kind_give_the_same_rows():
    mask = MASKS["blobs of 2 pixels, 0.1"]
    rows = objects(mask)
    assert rows and list(rows[0]) == list(COLUMNS) and rows[0]["mean_probability"] is None
    for same in (mask > 0, mask.astype(int) // 255, np.asfortranarray(mask)):
        assert objects(same) == rows
    probabilities = np.where(mask > 0, np.float32(0.75), np.float32(0.25))
    assert objects(probabilities) == [row | {"mean_probability": 0.75} for row in rows]
    assert objects(probabilities, threshold=0.8) == []
    with pytest.raises(ValueError, match="3 dimensions"):
        objects(mask[None])


# ---------------------------------------------------------------------------------------------------------------------
# The command


class FindsRed(predict.Predictor):
    """Sees photos at their original size, and finds what is not green: 0.9997 on red, 0.0003 on white."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.size = 1.0

    def forward(self, images: np.ndarray, tta: bool = False) -> np.ndarray:
        return 8 - images[..., 1] * np.float32(16 / 255)


def draw(masks: dict[str, np.ndarray], folder: str = "photos") -> None:
    """Write photos, red on white."""
    for name, mask in masks.items():
        path = Path(folder, f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.where(mask[..., None] > 0, (255, 0, 0), 255).astype(np.uint8)).save(path)


@pytest.fixture
def red(tmp_path, monkeypatch) -> None:
    """A working directory with a network that finds red."""
    monkeypatch.chdir(tmp_path)
    save_network(UNet(3, 1, (8, 16)))
    monkeypatch.setattr(predict, "Predictor", FindsRed)


def run(*args: object) -> None:
    predict.main([str(arg) for arg in args])


def table() -> list[dict[str, str]]:
    with Path("predictions/objects.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def mask_of(name: str, folder: str = "predictions") -> np.ndarray:
    return np.asarray(Image.open(Path(folder, f"{name}_mask.png"))) > 0


def test_the_table_has_a_row_for_each_object_in_the_photos_order(red, capsys):
    masks = {"b": discs((20, 30)), "a": MASKS["blobs of 2 pixels, 0.1"], "c": MASKS["nothing"], "d": one_pixel()}
    draw(masks)
    run("photos/b.png", "photos/a.png", "photos/c.png", "photos/d.png", "--objects")
    out, rows = capsys.readouterr().out, table()
    assert list(rows[0]) == ["photo", *COLUMNS]
    wanted = [(f"photos/{name}.png", row) for name, mask in masks.items() for row in objects(mask)]
    assert [row["photo"] for row in rows] == [photo for photo, _ in wanted]
    for row, (_, measured) in zip(rows, wanted, strict=True):
        assert float(row.pop("mean_probability")) == pytest.approx(0.99966, abs=1e-4)
        assert row == {"photo": row["photo"]} | {
            name: str(value) for name, value in measured.items() if name != "mean_probability"
        }
    for name, mask in masks.items():
        count = len(objects(mask))
        assert f"photos/{name}.png: {count} object{'s' * (count != 1)}, {(mask > 0).sum()} pixels\n" in out
        np.testing.assert_array_equal(mask_of(name), mask > 0)
    assert {path.name for path in Path("predictions").iterdir()} == {f"{name}_mask.png" for name in masks} | {
        "objects.csv"
    }


def test_photos_without_objects_give_an_empty_table(red):
    draw({"a": MASKS["nothing"]})
    run("photos", "--objects", "--coco", "a.json")
    assert Path("predictions/objects.csv").read_text().strip() == ",".join(("photo", *COLUMNS))
    content = json.loads(Path("a.json").read_text())
    assert len(content["images"]) == 1 and content["annotations"] == []


def test_several_processes_write_one_table_and_one_file(photos):
    flags = ["data/val_images", "--objects", "--coco", "all.json"]
    run(*flags)
    alone = Path("predictions/objects.csv").read_bytes(), Path("all.json").read_bytes()
    processes = start_processes(2, Path(predict.__file__), *flags)
    assert [process.status() for process in processes] == [0, 0], processes[0].output()
    assert (Path("predictions/objects.csv").read_bytes(), Path("all.json").read_bytes()) == alone
    assert len(table()) >= 8 and not list(Path("predictions").glob(".*"))


def test_a_broken_photo_costs_its_rows_alone_and_an_error_leaves_nothing(red, monkeypatch):
    draw({"a": discs((20,)), "b": discs((20,)), "c": discs((20, 30))})
    Path("photos/b.png").write_bytes(Path("photos/b.png").read_bytes()[:100])
    with pytest.raises(UserError, match="1 of 3 photos"):
        run("photos", "--objects", "--coco", "a.json")
    assert [row["photo"] for row in table()] == ["photos/a.png", "photos/c.png", "photos/c.png"]
    assert [image["id"] for image in json.loads(Path("a.json").read_text())["images"]] == [1, 3]
    before = table()

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("json", "csv"):
        with monkeypatch.context() as patched, pytest.raises(UserError, match=r"objects\.csv could not be written"):
            patched.setattr(getattr(outputs, name), "dumps" if name == "json" else "DictWriter", no_room)
            run("photos/a.png", "--objects")
        assert table() == before and not list(Path("predictions").glob(".*"))


def test_a_run_removes_what_killed_ones_have_left_and_nothing_of_one_under_way(red):
    draw({"a": discs((20,)), "b": discs((20, 30))})
    folder = Path("predictions")
    run("photos", "--objects")
    wanted, left = table(), []
    with outputs.Found(folder / "objects.csv") as other:
        for _ in kills(lambda: run("photos", "--objects"), fewest=5, among="objects.csv"):
            left += set(folder.glob(".*.tmp")) - {other.part}
            run("photos", "--objects")
            assert table() == wanted and list(folder.glob(".*.tmp")) == [other.part]
    assert left
    outputs.remove_found(other.part)
    assert not list(folder.glob(".*.tmp*"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("objects.csv", "photo,object,note\n"), ("mine.json", '{"images": [], "annotations": []}'), ("mine.json", "{")],
)
def test_files_of_others_are_kept(red, name, content):
    draw({"a": discs((20,))})
    path = Path("predictions", name)
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match=rf"{name} was not written by predict\.py"):
        run("photos", *(["--objects"] if name == "objects.csv" else ["--coco", path]))
    assert path.read_text() == content and len(list(Path("predictions").iterdir())) == 1


def test_our_own_files_are_replaced(red):
    draw({"a": discs((20,)), "b": discs((20, 30))})
    for photo, count in (("a", 1), ("b", 2)):
        run(f"photos/{photo}.png", "--objects", "--coco", "all.json")
        assert len(table()) == count == len(json.loads(Path("all.json").read_text())["annotations"])


def test_the_overlay_shows_the_objects_numbers(red):
    draw({"a": discs((40, 40, 40))})
    run("photos", "--overlay")
    plain = np.asarray(Image.open("predictions/a_overlay.png")).astype(int)
    run("photos", "--overlay", "--objects")
    changed = (np.asarray(Image.open("predictions/a_overlay.png")) != plain).any(2)
    assert all(changed[90:110, 50 + 90 * n : 70 + 90 * n].sum() > 10 for n in range(3))  # about the centroids
    assert changed.sum() == sum(changed[80:120, 40 + 90 * n : 80 + 90 * n].sum() for n in range(3))


def test_numbers_stand_on_their_objects():
    mask = MASKS["a circle with a hole in it"]
    found = Objects(mask)
    assert [found.labels[y, x] for x, y in found.places.tolist()] == [1, 2]
    assert found.places[1].tolist() == [55, 40] and found.places[0].tolist() != [50, 40]


# ---------------------------------------------------------------------------------------------------------------------
# Specks


def speckled() -> tuple[np.ndarray, np.ndarray]:
    """A mask of a disc and specks of 1, 4 and 16 pixels, the first near the disc, and which pixels are of the disc."""
    disc = discs((40,), (200, 200))
    mask = disc.copy()
    mask[100, 102] = mask[20:22, 150:152] = mask[150:154, 150:154] = 255
    return mask, disc > 0


def test_specks_are_removed_from_every_output_alike(red):
    mask, disc = speckled()
    draw({"a": mask})
    run("photos", "--min-area", 17, "--mask", "--cutout", "--probabilities", "--labelme", "--objects", "--overlay",
        "--coco", "a.json", "--submission", "s.csv")  # fmt: skip
    np.testing.assert_array_equal(mask_of("a"), disc)
    far = ~cv2.dilate(disc.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool)
    alpha, probabilities = (np.asarray(Image.open(f"predictions/a_{kind}.png")) for kind in ("cutout", "probabilities"))
    assert not alpha[..., 3][far].any() and not (alpha[..., 3] > 127)[~disc].any() and (alpha[..., 3] > 127)[disc].all()
    np.testing.assert_array_equal(probabilities > 32768, disc)
    assert len(json.loads(Path("predictions/a.json").read_text())["shapes"]) == 1
    assert [row["area_px"] for row in table()] == [str(disc.sum())]
    assert len(json.loads(Path("a.json").read_text())["annotations"]) == 1
    overlay, photo = (np.asarray(Image.open(path)) for path in ("predictions/a_overlay.png", "photos/a.png"))
    np.testing.assert_array_equal(overlay[far], photo[far])
    run("photos", "--min-area", 17, "--submission", "again.csv", "--output-dir", "again")
    submitted = Path("s.csv").read_text()
    assert Path("again.csv").read_text() == submitted
    make_masks.main(["s.csv", "photos"])
    np.testing.assert_array_equal(mask_of("a", "masks_of_object/masks"), disc)


def test_nothing_is_left_of_a_faint_speck_in_a_cutout(tmp_path):
    """Its soft edge lies far outside of what is above the threshold."""
    y, x = np.mgrid[:60, :60]
    faint, clear = (np.exp(-((x - at) ** 2 + (y - 30) ** 2) / 2 / 4**2) for at in (12, 45))
    probabilities = (0.52 * faint + clear).clip(0, 1).astype(np.float32)
    path = tmp_path / "photo.png"
    Image.new("RGB", (60, 60)).save(path)
    args = SimpleNamespace(threshold=0.5)
    before, after = (
        np.asarray(outputs.Prediction(path, np.zeros((60, 60, 3), np.uint8), probabilities.copy(), args, least).alpha)
        for least in (0, 20)
    )
    assert before[:, :28].any() and not after[:, :28].any()
    np.testing.assert_array_equal(after[:, 28:], before[:, 28:])


@pytest.mark.parametrize(("min_area", "left"), [(1, 4), (2, 3), (4, 3), (5, 2), (16, 2), (17, 1), (10**6, 0)])
def test_objects_of_the_least_area_stay(red, min_area, left):
    draw({"a": speckled()[0]})
    run("photos", "--objects", "--min-area", min_area)
    assert len(table()) == left == len(objects(mask_of("a")))


def test_no_mask_changes_by_itself_and_labelme_keeps_its_ten_pixels(red):
    mask, _ = speckled()
    mask[90:93, 40:43] = mask[110:114, 60:64] = 0  # holes of 9 and 16
    draw({"a": mask})
    run("photos", "--labelme", "--cutout")
    np.testing.assert_array_equal(mask_of("a"), mask > 0)
    assert (np.asarray(Image.open("predictions/a_cutout.png"))[..., 3] > 127)[mask > 0].all()
    make_masks.main(["predictions", "photos"])
    again = mask_of("a", "masks_of_object/masks")
    assert len(objects(again)) == 2 and again[91, 41] and not again[112, 62]
    run("photos", "--labelme", "--min-area", 0)
    assert len(json.loads(Path("predictions/a.json").read_text())["shapes"]) == 4


def test_the_largest_object_stays_alone_in_every_output(red):
    mask, disc = speckled()
    mask[5:30, 5:30] = 255  # 625 pixels, 5000 has the disc
    draw({"a": mask, "b": discs(()), "c": one_pixel()})
    run("photos", "--largest", "--mask", "--cutout", "--probabilities", "--labelme", "--objects",
        "--coco", "a.json", "--submission", "s.csv", "--background", "lime")  # fmt: skip
    np.testing.assert_array_equal(mask_of("a"), disc)
    assert not mask_of("b").any() and mask_of("c").sum() == 1
    alpha, probabilities, background = (
        np.asarray(Image.open(f"predictions/a_{kind}.png")) for kind in ("cutout", "probabilities", "background")
    )
    assert not alpha[:60, :60, 3].any() and (background[:60, :60] == (0, 255, 0)).all()
    np.testing.assert_array_equal(probabilities > 32768, disc)
    assert [len(json.loads(Path(f"predictions/{name}.json").read_text())["shapes"]) for name in "abc"] == [1, 0, 0]
    assert [(Path(row["photo"]).stem, row["area_px"]) for row in table()] == [("a", str(disc.sum())), ("c", "1")]
    assert len(json.loads(Path("a.json").read_text())["annotations"]) == 2
    make_masks.main(["s.csv", "photos"])
    np.testing.assert_array_equal(mask_of("a", "masks_of_object/masks"), disc)
    run("photos", "--largest", "--min-area", disc.sum() + 1, "--output-dir", "none")
    assert not any(mask_of(name, "none").any() for name in "abc")
    run("photos", "--largest", "--min-area", disc.sum(), "--output-dir", "again")
    np.testing.assert_array_equal(mask_of("a", "again"), disc)


def test_of_two_largest_objects_the_first_stays():
    mask = np.zeros((30, 30), np.uint8)
    mask[20:25, 2:7] = mask[3:8, 20:25] = mask[0, 0] = 255
    removed = remove_specks(mask, mask.astype(np.float32), 0, largest=True)
    assert mask[3:8, 20:25].all() and np.count_nonzero(mask) == 25 and np.count_nonzero(removed) == 26


@pytest.mark.parametrize("flag", [["--min-area", 17], ["--largest"]])
def test_scores_say_what_the_removal_changed(red, capsys, flag):
    mask, disc = speckled()
    draw({"a": mask, "b": disc})
    Path("truth").mkdir()
    for name in ("a", "b"):
        Image.fromarray(disc).save(f"truth/{name}_mask.png")
    run("photos", "--mask-dir", "truth", *flag)
    out = capsys.readouterr().out
    with Path("predictions/scores.csv").open() as file:
        rows = {Path(row["photo"]).stem: row for row in csv.DictReader(file)}
    with_specks = 2 * disc.sum() / (disc.sum() + (mask > 0).sum())
    assert [float(rows[name]["dice"]) for name in "ab"] == [1, 1]
    assert [float(rows[name]["dice_with_specks"]) for name in "ab"] == pytest.approx([with_specks, 1])
    assert "dice_with_specks" in out and f"{(with_specks + 1) / 2:.4f}" in out
    run("photos", "--mask-dir", "truth")  # over its own table
    assert "dice_with_specks" not in Path("predictions/scores.csv").read_text()


@pytest.mark.parametrize("flag", [["--min-area", 17], ["--largest"]])
def test_a_submission_takes_over_no_rows_of_other_objects(red, flag):
    mask, disc = speckled()
    draw({"a": mask, "b": mask})
    Path("photos/b.png").rename("b.png")
    Path("photos/b.png").write_text("broken")
    with pytest.raises(UserError):
        run("photos", "--submission", "s.csv")
    Path("b.png").replace("photos/b.png")
    run("photos", "--submission", "s.csv", *flag)
    make_masks.main(["s.csv", "photos"])
    for name in ("a", "b"):
        np.testing.assert_array_equal(mask_of(name, "masks_of_object/masks"), disc)


# ---------------------------------------------------------------------------------------------------------------------
# COCO


def iou(some: np.ndarray, other: np.ndarray) -> float:
    return (some & other).sum() / max(1, (some | other).sum())


def test_polygons_have_pycocotools_masks():
    random = np.random.default_rng(0)
    for number in range(500):
        width, height = random.integers(1, 90, 2).tolist()
        ring = random.uniform(0, 1, (random.integers(3, 12), 2)) * (width, height)
        ring = (2 * ring).round() / 2 if number % 2 else ring  # as outlines have them
        ring = np.repeat(ring, 2, 0) if number % 5 == 0 else ring
        wanted = coco_masks.decode(coco_masks.frPyObjects([ring.ravel().tolist()], height, width)[0]) > 0
        np.testing.assert_array_equal(coco_polygon_mask(ring, [0, 0, width, height]), wanted)


def test_coco_gives_every_object_and_mask_again(red):
    draw({str(number): mask for number, mask in enumerate(MASKS.values())})
    run("photos", "--coco", "out/all.json", "--label", "car")
    coco = COCO("out/all.json")
    assert [category["name"] for category in coco.dataset["categories"]] == ["car"]
    assert sorted(image["file_name"] for image in coco.dataset["images"]) == sorted(f"{n}.png" for n in range(16))
    for image in coco.dataset["images"]:
        mask = list(MASKS.values())[int(Path(image["file_name"]).stem)]
        assert (image["height"], image["width"]) == mask.shape
        found, entries = Objects(mask), coco.loadAnns(coco.getAnnIds(image["id"]))
        assert len(entries) == len(found)
        for number, (entry, row) in enumerate(zip(entries, found.rows(), strict=True), 1):
            drawn = coco.annToMask(entry)
            assert entry["area"] == coco_masks.area(coco.annToRLE(entry)) == drawn.sum()
            assert entry["bbox"] == [row[name] for name in ("left", "top", "width", "height")]
            assert iou(drawn > 0, found.labels == number) >= 0.98
    make_masks.main(["out", "photos"])
    for number, mask in enumerate(MASKS.values()):
        again = mask_of(str(number), "masks_of_car/masks")
        assert again.any() == mask.any() and (not mask.any() or iou(again, mask > 0) >= 0.99)


def test_objects_are_polygons_but_with_holes_or_where_these_lose_too_much():
    kinds = {kind: [type(a["segmentation"]) for a in Objects(mask).annotations()] for kind, mask in MASKS.items()}
    assert kinds["a circle with a hole in it"] == [dict, list]
    assert set(kinds["blobs of 8 pixels, 0.1"]) == {list} and kinds["a thin circle"] == [dict]
    disc = discs((40,))
    disc[100, 60] = 0  # a polygon without it would lose next to nothing
    assert [type(a["segmentation"]) for a in Objects(disc).annotations()] == [dict]
    assert kinds["a line"] == [dict]  # without holes, but as a polygon it would lose an eighth


def test_photos_of_one_name_are_told_apart(red):
    draw({"a": discs((20,))}, "x")
    draw({"a": discs((20, 30)), "b": discs(())}, "y")
    run("x", "y", "--coco", "all.json")
    names = [image["file_name"] for image in json.loads(Path("all.json").read_text())["images"]]
    assert names == ["x/a.png", "y/a.png", "b.png"]
    make_masks.main(["all.json", "x", "y"])
    assert sorted(len(objects(np.asarray(Image.open(path)))) for path in Path("masks_of_object/masks").iterdir()) == [
        0, 1, 2,
    ]  # fmt: skip


def test_names_for_coco_that_cannot_be_are_refused(red):
    draw({"a": discs((20,))})
    with pytest.raises(UserError, match=r"--coco is .*photos/a\.png.*ends in \.json"):
        run("photos", "--coco", "photos/a.png")
    with pytest.raises(UserError, match=r"--coco predictions/a\.json is where LabelMe's outlines"):
        run("photos", "--labelme", "--coco", "predictions/a.json")
    with pytest.raises(UserError, match="--min-area is -1"):
        run("photos", "--min-area", -1)

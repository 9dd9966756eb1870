"""From predicted masks to LabelMe's files, and from those back to masks."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import predict
from machinery.errors import UserError
from machinery.outputs import write_labelme
from machinery.shapes import outlines, polygon_mask
from predict import uncertain_share
from tools import make_masks


def blobs(smoothness: float, share: float, size: tuple[int, int] = (59, 83)) -> np.ndarray:
    """A random mask, uint8 (H, W) in {0, 255}, with so large a share of objects, which touch the border."""
    noise = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), smoothness)
    return np.where(noise > np.quantile(noise, 1 - share), 255, 0).astype(np.uint8)


def drawn(kind: str) -> np.ndarray:
    mask = np.zeros((80, 100), np.uint8)
    if kind == "a line":
        cv2.line(mask, (3, 5), (90, 61), 255, 1)
    elif kind == "a circle with a hole in it":
        cv2.circle(mask, (50, 40), 30, 255, -1)
        cv2.circle(mask, (55, 40), 12, 0, -1)
        cv2.circle(mask, (55, 40), 5, 255, -1)
    elif kind == "a thin circle":
        cv2.circle(mask, (50, 40), 30, 255, 1)
    elif kind == "specks":
        mask[::7, ::5] = 255
    elif kind == "pixels whose corners touch":
        mask[np.arange(40), np.arange(40)] = mask[40:, 60:][np.indices((40, 40)).sum(0) % 2 > 0] = 255
    elif kind == "all":
        mask[:] = 255
    return mask


KINDS = (
    "a line",
    "a circle with a hole in it",
    "a thin circle",
    "specks",
    "pixels whose corners touch",
    "all",
    "nothing",
)
MASKS = {kind: drawn(kind) for kind in KINDS} | {
    f"blobs of {smoothness} pixels, {share}": blobs(smoothness, share)
    for smoothness in (0.5, 2, 8) for share in (0.1, 0.5, 0.9)
}  # fmt: skip


def distances(points: np.ndarray, rings: list[np.ndarray]) -> np.ndarray:
    """From points (n, 2) to the nearest of the rings' edges."""
    nearest = np.full(len(points), np.inf)
    for ring in rings:
        for start, end in zip(ring, np.roll(ring, -1, 0), strict=True):
            along = end - start
            place = np.clip((points - start) @ along / max(along @ along, 1e-12), 0, 1)
            nearest = np.minimum(nearest, np.hypot(*(points - start - place[:, None] * along).T))
    return nearest


def edge_of(mask: np.ndarray) -> np.ndarray:
    """The middles of the sides between pixels inside and outside, and both of their ends: (n, 2)."""
    padded = np.pad(mask > 0, 1)
    upright, level = (np.argwhere(change)[:, ::-1] for change in (np.diff(padded, axis=1), np.diff(padded, axis=0)))
    steps = np.array((-1, -0.5, 0))[:, None, None]
    sides = upright + steps * (0, 1), level + steps * (1, 0)
    return np.concatenate([points.reshape(-1, 2) for points in sides])


@pytest.mark.parametrize("kind", MASKS)
def test_outlines_keep_to_the_edge_and_give_the_mask_again(kind):
    mask = MASKS[kind]
    rings = list(outlines(mask, 0))
    again = polygon_mask(rings, mask.shape)
    assert (again & (mask > 0)).sum() >= 0.99 * (again | (mask > 0)).sum()
    assert distances(edge_of(mask), rings).max(initial=0) <= 3
    assert len(rings) == cv2.connectedComponents(mask)[0] - 1
    assert all((ring >= 0).all() and (ring <= mask.shape[::-1]).all() for ring in rings)


def shapes() -> dict[str, tuple[np.ndarray, int]]:
    """Masks of one object, and the corners that it may have at most."""
    canvas, centre = np.zeros((400, 400), np.uint8), (200, 200)
    ring = cv2.circle(cv2.circle(canvas.copy(), centre, 150, 255, -1), centre, 60, 0, -1)
    person = cv2.ellipse(canvas.copy(), (200, 250), (60, 140), 0, 0, 360, 255, -1)
    person = cv2.line(cv2.circle(person, (200, 90), 40, 255, -1), (180, 180), (60, 320), 255, 30)
    wavy = np.indices((400, 400))[1] < 200 + 20 * np.sin(np.arange(400) / 15)[:, None]
    return {
        "a circle": (cv2.circle(canvas.copy(), centre, 150, 255, -1), 30),
        "a ring": (ring, 52),
        "a square": (cv2.rectangle(canvas.copy(), (50, 60), (300, 350), 255, -1), 4),
        "a turned square": (
            cv2.fillPoly(canvas.copy(), [np.array([(200, 20), (380, 190), (210, 390), (9, 180)])], 255),
            4,
        ),
        "a person": (person, 50),
        "a wavy edge": (np.where(wavy, np.uint8(255), np.uint8(0)), 60),
        "a small circle": (cv2.circle(canvas.copy(), centre, 6, 255, -1), 30),
    }


@pytest.mark.parametrize("kind", shapes())
def test_outlines_have_few_corners(kind):
    mask, most = shapes()[kind]
    (ring,) = outlines(mask, 0)
    again = polygon_mask([ring], mask.shape)
    assert len(ring) <= most
    assert (again & (mask > 0)).sum() >= 0.99 * (again | (mask > 0)).sum()


def test_a_small_hole_in_a_large_object_stays():
    mask, _ = shapes()["a circle"]
    mask[200:205, 200:205] = 0
    assert not polygon_mask(list(outlines(mask, 10)), mask.shape)[201:204, 201:204].any()


def test_small_objects_and_holes_are_left_out():
    mask = np.zeros((50, 60), np.uint8)
    mask[5:35, 5:45] = mask[40:43, 3:6] = 255
    mask[10:13, 10:13] = mask[20:24, 20:24] = 0
    again = polygon_mask(list(outlines(mask, 10)), mask.shape)
    assert not again[40:43, 3:6].any() and again[10:13, 10:13].all() and not again[20:24, 20:24].any()
    assert len(list(outlines(mask, 9))) == 2


@pytest.mark.parametrize("min_area", [1, 2, 5, 12, 40])
def test_objects_of_the_least_area_stay(min_area):
    mask = blobs(2, 0.1)
    areas = cv2.connectedComponentsWithStats(mask)[2][1:, cv2.CC_STAT_AREA]
    assert len(list(outlines(mask, min_area))) == (areas >= min_area).sum()


# ---------------------------------------------------------------------------------------------------------------------
# The command


def run(*args: object) -> None:
    predict.main([str(arg) for arg in args])


def test_predictions_come_back_as_the_same_masks(photos, capsys):
    run("data/val_images", "--labelme", "--label", "car", "--min-area", 1)
    content = json.loads(Path("predictions", f"{photos[0].stem}.json").read_text())
    assert content["imagePath"] == f"../data/val_images/{photos[0].name}" and content["imageData"] is None
    assert (content["imageHeight"], content["imageWidth"]) == (64, 96)
    assert {shape["label"] for shape in content["shapes"]} == {"car"}
    make_masks.main(["predictions"])
    assert f"nobody has saved in LabelMe since: {len(photos)}, taken" in capsys.readouterr().out
    for photo in photos:
        name = f"{photo.stem}_mask.png"
        ours, again = (
            np.asarray(Image.open(Path(folder, name))) > 0 for folder in ("predictions", "masks_of_car/masks")
        )
        assert (ours & again).sum() >= 0.99 * (ours | again).sum()


def saved_by_labelme(path: Path) -> None:
    """LabelMe keeps keys that it does not know, and adds others to each shape: labelme/_label_file.py."""
    content = json.loads(path.read_text())
    content["shapes"] = [shape | {"description": "", "mask": None} for shape in content["shapes"]]
    path.write_text(json.dumps(content, indent=2))


def test_what_a_person_has_saved_is_never_overwritten(photos, capsys):
    run("data/val_images", "--labelme")
    corrected, mine, broken = (Path("predictions", f"{photo.stem}.json") for photo in photos[:3])
    saved_by_labelme(corrected)
    mine.write_text('["notes"]')
    broken.write_text("{")
    kept = {path: path.read_bytes() for path in (corrected, mine, broken)}
    capsys.readouterr()
    run("data/val_images", "--labelme", "--label", "other")
    assert {path: path.read_bytes() for path in kept} == kept
    out = capsys.readouterr().out
    names = ", ".join(sorted(map(str, kept)))
    assert out.count("kept: ") == 1 and f"kept: {names}, 3 files that were made or corrected by hand" in out
    assert out.startswith("5 photos in ")
    assert '"other"' in Path("predictions", f"{photos[3].stem}.json").read_text()  # its own are replaced

    mine.unlink()
    broken.unlink()
    make_masks.main(["predictions", "--corrected"])
    assert [path.stem for path in Path("masks_of_object/images").iterdir()] == [photos[0].stem]


def test_photos_that_were_outlined_by_hand_get_no_prediction(photos, capsys):
    run("data/val_images", "--labelme", "--output-dir", "data/val_images")
    saved_by_labelme(photos[0].with_suffix(".json"))
    photos[1].with_suffix(".json").write_text('{"camera": "another program\'s"}')
    capsys.readouterr()
    run("data/val_images", "--labelme")
    out = capsys.readouterr().out
    assert f"kept: {photos[0].with_suffix('.json')}, which was made" in out and out.count("kept: ") == 1
    assert "least certain of 7" in out and photos[0].name not in out
    assert {path.stem for path in Path("predictions").glob("*.json")} == {photo.stem for photo in photos[1:]}


@pytest.mark.parametrize(("flags", "predicted"), [((), 4), (["--mask"], 8), (["--cutout"], 8), (["--objects"], 8)])
def test_photos_with_outlines_by_hand_are_predicted_where_more_is_asked_for(photos, capsys, flags, predicted):
    for photo in photos[4:]:
        photo.with_suffix(".json").write_text('{"shapes": []}')
    run(*reversed(photos), "--labelme", *flags)
    assert len(list(Path("predictions").glob("*_mask.png"))) == predicted
    assert len(list(Path("predictions").glob("*.json"))) == 4
    out = capsys.readouterr().out
    kept = ", ".join(str(photo.with_suffix(".json")) for photo in photos[4:7])
    assert f"kept: {kept}, ..., 4 files that were made or corrected by hand" in out
    assert ("their photos are not predicted" in out) == (predicted == 4) == out.startswith("4 photos in ")


def test_nothing_is_predicted_where_all_photos_have_outlines_by_hand(photos, capsys):
    photos[0].with_suffix(".json").write_text('{"shapes": []}')
    run(photos[0], "--labelme")
    assert f"kept: {photos[0].with_suffix('.json')}, which was made" in capsys.readouterr().out
    assert not list(Path("predictions").iterdir())


def test_outlines_where_a_folder_lies_are_named(photos, capsys):
    Path("predictions", f"{photos[0].stem}.json").mkdir(parents=True)
    with pytest.raises(UserError, match="1 of 8 photos could not be predicted"):
        run("data/val_images", "--labelme")
    assert re.search(rf"{photos[0].stem}\.json cannot be read \(.*\): move it away", capsys.readouterr().err)


def test_the_least_certain_come_first(photos, capsys):
    Path("masks").mkdir()
    Path("data/val_masks", f"{photos[0].stem}_mask.gif").rename(f"masks/{photos[0].stem}_mask.gif")
    run("data/val_images", "--labelme", "--mask-dir", "masks")
    out = capsys.readouterr().out
    shown = re.findall(r"^ +(\d\.\d{4})  (.*)$", out[out.index("least certain of 7") :], re.MULTILINE)
    assert len(shown) == 7 and [share for share, _ in shown] == sorted((share for share, _ in shown), reverse=True)
    assert photos[0].name not in "".join(name for _, name in shown)  # its mask is known: it has scores
    assert Path("predictions/scores.csv").read_text().count("\n") == 2


def test_uncertain_share_by_hand():
    probabilities = np.zeros((10, 10), np.float32)
    assert uncertain_share(probabilities) == 0
    probabilities[0] = 0.4  # an object that the threshold loses
    assert uncertain_share(probabilities) == 1
    probabilities[1:4] = 0.9
    assert uncertain_share(probabilities) == 0.25


def test_a_file_of_another_folder_names_its_photo_from_there(tmp_path):
    Path(tmp_path, "x/y").mkdir(parents=True)
    write_labelme(tmp_path / "x/y/ä.json", drawn("a line"), tmp_path / "z/ä.jpg", "Straße", 0)
    write_labelme(tmp_path / "x/y/ä.json", drawn("all"), tmp_path / "z/ä.jpg", "Straße", 0)
    content = json.loads((tmp_path / "x/y/ä.json").read_text(encoding="utf-8"))
    assert content["imagePath"] == "../../z/ä.jpg" and content["shapes"][0]["label"] == "Straße"


def test_a_photo_whose_name_is_no_text_gets_its_file(photos):
    photos[0].rename(photos[0].with_name("caf\udce9.jpg"))
    run("data/val_images", "--labelme")
    assert json.loads(Path("predictions/caf\udce9.json").read_text())["imagePath"].endswith("caf\udce9.jpg")


def test_corrected_files_without_a_corrected_one_are_named(photos):
    run(*photos[:2], "--labelme", "--threshold", "0.01")
    with pytest.raises(UserError, match="none of these files was saved in LabelMe"):
        make_masks.main(["predictions", "--corrected"])


def test_pictures_and_predictions_are_no_photos_that_nobody_has_outlined(photos, capsys):
    predict.main(["data/val_images", "--labelme", "--overlay", "--cutout"])
    saved_by_labelme(Path("predictions", f"{photos[0].stem}.json"))
    capsys.readouterr()
    make_masks.main(["data/val_images", "predictions", "--corrected"])
    out = capsys.readouterr().out
    assert "Predictions that nobody has saved in LabelMe since: 7, left out" in out and "no file mentions" not in out
    Path("predictions", f"{photos[1].stem}.json").unlink()
    make_masks.main(["data/val_images", "predictions", "--corrected"])
    assert "Photos that no file mentions: 1, left out" in capsys.readouterr().out

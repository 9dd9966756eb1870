"""From what annotation tools export to pairs of photos and masks. Every test draws its own photos and files."""

import base64
import csv
import io
import json
import os
import re
import unicodedata
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from killed import kills
from PIL import Image, ImageDraw
from pycocotools import mask as coco_tools

from dataset import CarvanaDataset
from machinery import errors
from machinery.files import find_pairs
from machinery.shapes import polygon_mask, rle_encode
from tools import make_masks

SIZE = 300, 400  # (height, width) of the photos
CAR = [(60.5, 200.25), (80, 120), (160.75, 80.5), (290.5, 90), (350, 200.5), (330.25, 240), (90, 250.75)]
VAN = [(20, 20), (60, 20), (60, 50), (20, 50)]


def photo(path: str, size: tuple[int, int] = SIZE, **options: object) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path)).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(noise).save(path, **options)


def write(path: str, content: object) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def make(*args: object) -> None:
    make_masks.main([str(arg) for arg in args])


def error_of(*args: object) -> str:
    """The one sentence with which the command ends, and exit status 1; nothing may have been written."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        errors.run(lambda: make(*args))
    message = exit_.value.code  # a text: Python prints it and exits with status 1
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert sorted(Path().rglob("*")) == before
    return message


def mask_of(name: str, folder: str = "masks_of_car") -> np.ndarray:
    return np.asarray(Image.open(Path(folder, "masks", f"{name}_mask.png")))


def inside(*rings: list, size: tuple[int, int] = SIZE) -> np.ndarray:
    return polygon_mask([np.array(ring, float) for ring in rings], size)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# Files as the tools write them: each has a car on a.jpg, and the van is a second label


def labelme_file(shapes: list[dict], image_path: str = "a.jpg", size: tuple[int, int] = SIZE, **more: object) -> dict:
    """https://github.com/wkentaro/labelme/blob/main/labelme/_label_file.py, write_label_file"""
    rest = {"group_id": None, "description": "", "flags": {}, "mask": None}
    shapes = [{"label": "car", "shape_type": "polygon"} | rest | shape for shape in shapes]
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": image_path, "imageData": None}
    return content | {"imageHeight": size[0], "imageWidth": size[1]} | more


def write_labelme() -> None:
    write("photos/a.json", labelme_file([{"points": CAR}, {"label": "van", "points": VAN}]))


def coco_file(*annotations: dict) -> dict:
    """https://cocodataset.org/#format-data"""
    image = {"id": 7, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1], "license": 1, "date_captured": ""}
    categories = [{"id": 3, "name": "car", "supercategory": "vehicle"}, {"id": 9, "name": "van"}]
    rest = {"image_id": 7, "category_id": 3, "iscrowd": 0, "area": 1.0, "bbox": [0, 0, 1, 1]}
    annotations = [{"id": number} | rest | annotation for number, annotation in enumerate(annotations, 100)]
    return {"info": {}, "licenses": [], "images": [image], "annotations": annotations, "categories": categories}


def flat(ring: list) -> list[float]:
    return np.array(ring, float).ravel().tolist()


def write_coco() -> None:
    write(
        "photos/instances.json",
        coco_file({"segmentation": [flat(CAR)]}, {"category_id": 9, "segmentation": [flat(VAN)]}),
    )


def cvat_file(shapes: str, name: str = "a.jpg") -> str:
    """https://docs.cvat.ai/docs/dataset_management/formats/format-cvat/ and its XML annotation format"""
    return f"""<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><task><name>streets</name><labels><label><name>car</name></label></labels></task></meta>
  <image id="0" name="{name}" width="{SIZE[1]}" height="{SIZE[0]}">
    <tag label="good_frame" source="manual"></tag>
    {shapes}
  </image>
</annotations>
"""


def cvat_polygon(label: str, ring: list) -> str:
    points = ";".join(f"{x:.2f},{y:.2f}" for x, y in ring)
    return f'<polygon label="{label}" source="manual" occluded="0" points="{points}" z_order="0"></polygon>'


def write_cvat() -> None:
    write("photos/annotations.xml", cvat_file(cvat_polygon("car", CAR) + cvat_polygon("van", VAN)))


def yolo_row(number: int, ring: list) -> str:
    return f"{number} " + " ".join(f"{x / SIZE[1]:.8f} {y / SIZE[0]:.8f}" for x, y in ring)


def write_yolo() -> None:
    """https://docs.ultralytics.com/datasets/segment/"""
    write("photos/a.txt", yolo_row(0, CAR) + "\n" + yolo_row(1, VAN) + "\n")
    write("photos/data.yaml", "path: x\ntrain: images\n\nnames:\n  0: car  # comment\n  1: 'van'\n\nnc: 2\n")


def write_labels() -> None:
    """Pascal VOC's SegmentationClass: a palette whose indices are the labels."""
    labels = np.zeros(SIZE, np.uint8)
    labels[inside(CAR)], labels[inside(VAN)] = 7, 6
    image = Image.fromarray(labels).convert("P")
    image.putpalette([0, 0, 0, *np.random.default_rng(0).integers(1, 255, 765).tolist()])
    Path("photos/SegmentationClass").mkdir(parents=True)
    image.save("photos/SegmentationClass/a.png")


def write_table() -> None:
    """https://www.kaggle.com/c/carvana-image-masking-challenge/data, with a column for the class."""
    rows = [
        ["img", "class", "rle_mask"],
        *(["a.jpg", n, rle_encode(inside(r))] for n, r in (("car", CAR), ("van", VAN))),
    ]
    with Path("photos/train_masks.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


FORMATS: dict[str, tuple[Callable, str, str]] = {  # what writes the file, its name, and the car's label
    "labelme": (write_labelme, "a.json", "car"),
    "coco": (write_coco, "instances.json", "car"),
    "cvat": (write_cvat, "annotations.xml", "car"),
    "yolo": (write_yolo, "a.txt", "car"),
    "label images": (write_labels, "SegmentationClass/a.png", "7"),
    "run lengths": (write_table, "train_masks.csv", "car"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_mask(kind, capsys):
    write_it, _, label = FORMATS[kind]
    photo("photos/a.jpg")
    write_it()
    make("photos", "--label", label, "--output-dir", "out")
    assert np.array_equal(mask_of("a", "out"), np.where(inside(CAR), 255, 0))
    assert Path("out/images/a.jpg").read_bytes() == Path("photos/a.jpg").read_bytes()
    lines = capsys.readouterr().out.splitlines()
    share = f"{100 * inside(CAR).mean():.1f}"
    assert lines[1].split() == [label, "1", "1", share, "%"] and lines[2].endswith("not asked for")
    assert lines[-1] == "python -m tools.split_data out/images out/masks"


@pytest.mark.parametrize("kind", FORMATS)
def test_the_file_alone_finds_the_photo_beside_it_or_in_another_source(kind):
    write_it, name, label = FORMATS[kind]
    photo("elsewhere/deep/A.JPG")
    Path("photos").mkdir()
    write_it()
    make(f"photos/{name}", "elsewhere", "--label", label, "--output-dir", "out")
    assert [path.name for path in Path("out/images").iterdir()] == ["A.jpg"]


def truncate(path: Path) -> None:
    content = path.read_bytes()
    end = content.rstrip().rfind(b" ") if path.suffix in (".txt", ".csv") else len(content) // 2
    path.write_bytes(content[:end])


FAULTS = {
    "truncated": (truncate, "--label"),
    "missing photo": (lambda _: Path("photos/a.jpg").unlink(), "--label"),
    "wrong size": (lambda _: photo("photos/a.jpg", (150, 200)), "--label"),
    "unknown label": (lambda _: None, "--label lorry --label"),
    "several labels": (lambda _: None, ""),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_fault_is_one_sentence_and_nothing_is_written(kind, fault):
    if (kind, fault) == ("yolo", "wrong size"):
        pytest.skip("YOLO's coordinates are shares of any size")
    write_it, name, label = FORMATS[kind]
    photo("photos/a.jpg")
    write_it()
    spoil, flags = FAULTS[fault]
    spoil(Path("photos", name))
    message = error_of("photos", *flags.split(), *([label] if flags else []))
    expected = {"unknown label": "lorry", "several labels": "--label"}.get(fault, str(Path("photos", name)))
    assert expected in message and message.count(": ") <= 3  # an error is not the reason of another


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def rings() -> list[np.ndarray]:
    """Stars around the middle of 600 x 800 pixels, some of them with whole numbers, and one that leaves the photo."""
    random, found = np.random.default_rng(0), []
    for number in range(8):
        corners = int(random.integers(3, 25))
        angles = np.sort(random.uniform(0, 2 * np.pi, corners))
        radii = random.uniform(200, 290 if number else 600, corners)
        ring = np.stack((400 + radii * np.cos(angles), 300 + radii * np.sin(angles)), 1)
        found.append(ring.round() if number % 3 == 1 else ring)
    return found


def crossed(ring: np.ndarray, size: tuple[int, int], margin: float) -> np.ndarray:
    """Pixels, grown by a margin, that the outline touches: bool (H, W)."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    touched = np.zeros(size, bool)
    for start, end in zip(ring, np.roll(ring, -1, 0), strict=True):
        enters, leaves = np.zeros(size), np.ones(size)
        for begin, change, low in ((start[0], end[0] - start[0], columns), (start[1], end[1] - start[1], rows)):
            change = change or 1e-12
            one, other = (low - margin - begin) / change, (low + 1 + margin - begin) / change
            enters, leaves = np.maximum(enters, np.minimum(one, other)), np.minimum(leaves, np.maximum(one, other))
        touched |= enters <= leaves
    return touched


def pycocotools_mask(ring: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return coco_tools.decode(coco_tools.merge(coco_tools.frPyObjects([ring.ravel().tolist()], *size))) > 0


def labelme_mask(ring: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """https://github.com/wkentaro/labelme/blob/main/labelme/utils/shape.py, shape_to_mask"""
    image = Image.new("1", size[::-1])
    ImageDraw.Draw(image).polygon([tuple(corner) for corner in ring], outline=1, fill=1)
    return np.asarray(image)


@pytest.mark.parametrize(("other", "margin"), [(pycocotools_mask, 0), (labelme_mask, 1)])  # Pillow cuts coordinates off
def test_polygons_are_those_of_pycocotools_and_labelme(other, margin):
    for ring in rings():
        ours, theirs = polygon_mask([ring], (600, 800)), other(ring, (600, 800))
        assert (ours & theirs).sum() >= 0.99 * (ours | theirs).sum()
        assert not ((ours != theirs) & ~crossed(ring, (600, 800), margin)).any()


def test_pixels_belong_to_a_polygon_by_their_centres():
    assert inside([(1.5, 1), (3.5, 1), (3.5, 3.4), (1.5, 3.4)], size=(5, 5)).sum() == 4
    assert inside([(0.6, 0), (1.4, 0), (1.4, 5), (0.6, 5)], size=(5, 5)).sum() == 0
    left, right = (
        inside([(0, 0), (3.3, 0), (1.1, 9), (0, 9)], size=(9, 9)),
        inside([(3.3, 0), (9, 0), (9, 9), (1.1, 9)], size=(9, 9)),
    )
    assert (left ^ right).all()  # neighbours share no pixel and leave none
    pentagram = [(100 + 90 * np.sin(4 * np.pi * k / 5), 100 - 90 * np.cos(4 * np.pi * k / 5)) for k in range(5)]
    assert not inside(pentagram, size=(200, 200))[100, 100]  # even-odd, as all tools draw it


def test_parts_are_united_holes_stay_holes_and_crowds_count():
    photo("photos/a.jpg")
    ring, hole = [(50, 50), (150, 50), (150, 150), (50, 150)], [(80, 80), (120, 80), (120, 120), (80, 120)]
    other = [(200, 200), (250, 200), (250, 250)]
    crowd = np.zeros(SIZE, bool)
    crowd[5:20, 300:333] = crowd[10:12, 310:390] = True
    slit = [*ring, ring[0], *hole, hole[0]]
    counts = [int(count) for count in np.diff(np.flatnonzero(np.diff(crowd.ravel("F"), prepend=False)), prepend=0)]
    counts.append(crowd.size - sum(counts))
    write("photos/coco.json", coco_file(
        {"segmentation": [flat(slit), flat(other), [1, 2]]},
        {"segmentation": {"counts": counts, "size": list(SIZE)}, "iscrowd": 1},
    ))  # fmt: skip
    make("photos")
    assert np.array_equal(mask_of("a") > 0, (inside(ring) & ~inside(hole)) | inside(other) | crowd)


def test_compressed_run_lengths_are_exact():
    random = np.random.default_rng(0)
    photo("photos/a.jpg")
    for share in (0, 0.001, 0.5, 0.999, 1):
        mask = random.random(SIZE) < share
        encoded = coco_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
        write("photos/coco.json", coco_file({"segmentation": encoded | {"counts": encoded["counts"].decode()}}))
        make("photos")
        assert np.array_equal(mask_of("a") > 0, mask)


def test_all_shapes_of_labelme():
    photo("photos/a.jpg")
    disc = np.zeros((31, 41), np.uint8)
    disc[5:20, 3:30] = 1
    png = io.BytesIO()
    Image.fromarray(disc).save(png, "PNG")
    shapes = [
        {"shape_type": "rectangle", "points": [[60, 50], [20.2, 10.6]]},  # drawn from its lower right corner
        {"shape_type": "circle", "points": [[200, 100], [200, 140.5]]},
        {"shape_type": "mask", "points": [[370, 280], [410, 310]], "mask": base64.b64encode(png.getvalue()).decode()},
        {"shape_type": "oriented_rectangle", "points": [[100, 200], [120, 220], [110, 230], [90, 210]]},
        {"shape_type": None, "points": [[380, -20], [450, 20], [380, 40]]},  # leaves the photo
    ]
    write("photos/a.json", labelme_file(shapes))
    make("photos")
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    wanted = (rows - 100) ** 2 + (columns - 200) ** 2 < 40.5**2
    wanted[11:50, 20:60] = True
    wanted[280:300, 370:400] |= disc[:20, :30] > 0
    wanted |= inside(shapes[3]["points"]) | inside(shapes[4]["points"])
    assert np.array_equal(mask_of("a") > 0, wanted)


def test_all_shapes_of_cvat():
    photo("photos/a.jpg")
    counts = "3, 5, 7, 7, 5, 9, 3, 11, 2, 11, 2, 12, 1, 12, 1, 26, 1, 12, 1, 12, 2, 11, 3, 9, 5, 7, 7, 5, 3"
    write(
        "photos/annotations.xml",
        cvat_file(f"""
        <mask label="car" rle="{counts}" left="390" top="88" width="13" height="15"></mask>
        <box label="car" xtl="100" ytl="200" xbr="140" ybr="220" rotation="90.0"></box>
        <ellipse label="car" cx="200" cy="100" rx="50" ry="20" rotation="30"></ellipse>"""),
    )  # fmt: skip; the mask is the documentation's
    make("photos")
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    along = (columns - 200) * np.cos(np.pi / 6) + (rows - 100) * np.sin(np.pi / 6)
    across = (rows - 100) * np.cos(np.pi / 6) - (columns - 200) * np.sin(np.pi / 6)
    wanted = (along / 50) ** 2 + (across / 20) ** 2 < 1
    wanted[190:230, 110:130] = True
    numbers = [int(count) for count in counts.split(",")]
    wanted[88:103, 390:400] |= np.repeat(np.arange(len(numbers)) % 2, numbers).reshape(15, 13)[:, :10] > 0
    assert ((mask_of("a") > 0) != wanted).sum() <= 2  # an ellipse has 720 corners


@pytest.mark.parametrize("names", [
    "names: [car, 'van']", "names:\n- car\n- van\nnc: 2", "names:\n  0: car\n  1: van", "names: {0: car, 1: 'van'}", "",
])  # fmt: skip
def test_yolo_in_the_usual_folders_with_and_without_names(names, capsys):
    for part in ("train", "val"):
        photo(f"set/images/{part}/a.jpg", (100 if part == "val" else 300, 400))
        photo(f"set/images/{part}/nothing {part}.jpg")
        write(f"set/labels/{part}/a.txt", yolo_row(1, CAR if part == "val" else VAN) + "\n0 0.5 0.5 0.2 0.2\n")
        write(f"set/labels/{part}/nothing {part}.txt", "")
    write("set/classes.txt", "")
    write("set/data.yaml", f"path: .\n{names}\n")
    make("set", "--output-dir", "out")
    assert {path.name for path in Path("out/images").iterdir()} == {
        "a.jpg",
        "a-2.jpg",
        "nothing train.jpg",
        "nothing val.jpg",
    }
    assert np.array_equal(mask_of("a", "out") > 0, inside(VAN)) and mask_of("a-2", "out").shape == (100, 400)
    out = capsys.readouterr().out
    assert re.search(rf"^{'van' if names else '1'} +2 +2 ", out, re.MULTILINE) and "Photos without an object: 2" in out
    assert "no area" not in out  # boxes of a label that is not asked for


@pytest.mark.parametrize(("names", "label"), [
    ("['van, red', 'the driver''s car']", "the driver's car"),
    (r'{0: van, 1: "a \"car\" \u00e9, blue"}', 'a "car" é, blue'),
    ("\n  1: >\n    a car\n    of two lines\n", "a car of two lines"),
    ("[on, no]", "no"),  # which YAML would take for false
])  # fmt: skip
def test_names_of_yolo_are_what_yaml_says(names, label):
    photo("photos/a.jpg")
    write("photos/a.txt", yolo_row(1, CAR))
    write("photos/data.yaml", f"nc: 2\nnames: {names}\ntrain: images\n")
    make("photos", "--label", label, "--output-dir", "out")
    assert np.array_equal(mask_of("a", "out") > 0, inside(CAR))


@pytest.mark.parametrize(
    ("content", "reason"),
    [("nc: 1\nnames: [car, van\n", "line 3"), ("names: {car: 0}", "'car'"), ("names: \0", "#x0000")],
)
def test_a_broken_yaml_with_names_is_named_and_others_are_passed_over(content, reason):
    photo("photos/a.jpg")
    write("photos/a.txt", yolo_row(0, CAR))
    write("photos/data.yaml", content)
    assert "photos/data.yaml cannot be read (" in error_of("photos") and reason in error_of("photos")
    write("photos/data.yaml", "{% template: [of another program")
    make("photos", "--output-dir", "out")


@pytest.mark.parametrize("relative", [False, True])
def test_runs_that_count_from_the_end_of_the_run_before_are_refused(relative):
    photo("photos/a.jpg")
    runs = np.array(rle_encode(inside(CAR).T).split(), int).reshape(-1, 2)
    if relative:  # as in SIIM's table of pneumothoraces
        runs[1:, 0] -= runs[:-1].sum(1)
    write("photos/train.csv", f"ImageId, EncodedPixels\na,{' '.join(map(str, runs.ravel()))}\n")
    if relative:
        assert "photos/train.csv: line 2 cannot be read (its runs overlap or go back" in error_of("photos")
    else:
        make("photos")
        assert np.array_equal(mask_of("a", "masks_of_object") > 0, inside(CAR))


@pytest.mark.parametrize(("runs", "reason"), [
    ("1 5 3 5", "overlap"), ("9 2 1 2", "go back"), ("1 5 9", "pairs"), ("1 five", "pairs"), ("[0, 5]", "pairs"),
])  # fmt: skip
def test_runs_that_no_encoder_writes_are_named(runs, reason):
    photo("photos/a.jpg")
    write("photos/masks.csv", f'img,rle_mask\na.jpg,"{runs}"\n')
    message = error_of("photos")
    assert "photos/masks.csv: line 2" in message and reason in message and "literal" not in message


def test_runs_that_touch_are_two_parts_of_one():
    photo("photos/a.jpg")
    write("photos/masks.csv", "img,rle_mask\na.jpg,1 5 6 5\n")
    make("photos", "--output-dir", "out")
    assert (mask_of("a", "out").ravel() > 0).nonzero()[0].tolist() == list(range(10))


@pytest.mark.parametrize(("head", "name", "label"), [
    ("ImageId_ClassId,EncodedPixels", "a.jpg_1", "1"),  # steel
    ("Image_Label,EncodedPixels", "a.jpg_Fish", "Fish"),  # clouds
    ("Image_Label,EncodedPixels", "a_big_Fish", "Fish"),  # of a_big.jpg
    ("Image_Label,EncodedPixels", "a.jpg_big_Fish", "big_Fish"),
    ("ImageId_ClassId,ImageId,ClassId,EncodedPixels", "a.jpg_1,a.jpg,1", "1"),  # as notebooks add them
    ("ClassId,ImageId,EncodedPixels", "1,a.jpg", "1"),
    ("ImageId,ClassId,EncodedPixels", "a.jpg,1", "1"),
    ("id,class,rle", "a,car", "car"),
])  # fmt: skip
def test_the_photo_and_its_label_in_one_column_or_in_two(head, name, label):
    file = "a_big" if name.startswith("a_big") else "a"
    photo(f"photos/{file}.jpg")
    empty = name.replace(label, "other")
    write("photos/train.csv", f"{head}\n{empty},\n{name},{rle_encode(inside(CAR).T)}\n")
    make("photos", "--label", label, "--output-dir", "out")
    assert np.array_equal(mask_of(file, "out") > 0, inside(CAR))


def test_tables_of_other_challenges_count_down_the_columns():
    photo("photos/a.jpg")
    photo("photos/b.jpg")
    write(
        "train.csv",
        f"ImageId,EncodedPixels\na.jpg,{rle_encode(inside(CAR).T)}\na.jpg,{rle_encode(inside(VAN).T)}\nb.jpg,\n",
    )
    make("train.csv", "photos", "--output-dir", "out")
    assert np.array_equal(mask_of("a", "out") > 0, inside(CAR) | inside(VAN)) and not mask_of("b", "out").any()


# ---------------------------------------------------------------------------------------------------------------------
# Shapes without an area

LINE = [(30.5, 40.5), (200, 250), (200, 250), (370, 100.25)]  # with a corner that is there twice
POLYLINE = '<polyline label="car" points="{}" z_order="0"></polyline>'.format(";".join(f"{x},{y}" for x, y in LINE))
POINTS = '<points label="car" points="20,20;30,30" z_order="0"></points>'
CAR_XML = cvat_polygon("car", CAR)
WITHOUT_AREA = {  # the file of a.jpg, which has an outlined car and one that is not outlined
    "a point": ("a.json", labelme_file([{"points": CAR}, {"shape_type": "point", "points": VAN[:1]}])),
    "a line": ("a.json", labelme_file([{"points": CAR}, {"shape_type": "line", "points": LINE[:2]}])),
    "a linestrip": ("a.json", labelme_file([{"points": CAR}, {"shape_type": "linestrip", "points": LINE}])),
    "a polygon of two corners": ("a.json", labelme_file([{"points": CAR}, {"points": LINE[:2]}])),
    "a polyline of CVAT": ("a.xml", cvat_file(CAR_XML + POLYLINE)),
    "points of CVAT": ("a.xml", cvat_file(CAR_XML + POINTS)),
    "a box of COCO": ("coco.json", coco_file({"segmentation": [flat(CAR)]}, {"segmentation": []})),
    "a box of COCO without a segmentation": ("coco.json", coco_file({"segmentation": [flat(CAR)]}, {})),
}


@pytest.mark.parametrize("kind", WITHOUT_AREA)
def test_a_photo_with_an_object_that_has_no_area_is_left_out(kind, capsys):
    for name in "ab":
        photo(f"photos/{name}.jpg")
    write(f"photos/{WITHOUT_AREA[kind][0]}", WITHOUT_AREA[kind][1])
    assert "photos/" in (message := error_of("photos")) and "no photo has all its objects outlined" in message
    write("photos/b.json", labelme_file([{"points": VAN}], "b.jpg"))
    make("photos")
    assert [path.name for path in Path("masks_of_car/images").iterdir()] == ["b.jpg"]
    out = capsys.readouterr().out
    assert "have no area (points, lines, or boxes of COCO and YOLO): 1, left out" in out and "mentions" not in out


def test_boxes_of_yolo_beside_outlines_leave_their_photos_out(capsys):
    for name in "abcd":
        photo(f"photos/{name}.jpg")
    for name, rows in {"a": yolo_row(0, CAR) + "\n0 0.5 0.5 0.2 0.2", "b": "0 0.5 0.5 0.2 0.2", "d": ""}.items():
        write(f"photos/{name}.txt", rows)
    write("photos/c.txt", yolo_row(0, CAR) + "\n1 0.5 0.5 0.2 0.2")  # the box is of another label
    make("photos", "--label", "0", "--output-dir", "out")
    assert sorted(path.name for path in Path("out/images").iterdir()) == ["c.jpg", "d.jpg"]
    assert np.array_equal(mask_of("c", "out") > 0, inside(CAR))
    assert "YOLO): 2, left out" in capsys.readouterr().out


def test_void_without_an_area_leaves_its_photo_out():
    for name in "ab":
        photo(f"photos/{name}.jpg")
        shapes = [{"points": CAR}, {"label": "void", "points": VAN}]
        shapes += [{"label": "void", "shape_type": "point", "points": VAN[:1]}] if name == "a" else []
        write(f"photos/{name}.json", labelme_file(shapes, f"{name}.jpg"))
    make("photos", "--ignore-label", "void")
    assert [path.name for path in Path("masks_of_car/images").iterdir()] == ["b.jpg"]


@pytest.mark.parametrize("width", [1, 4, 15])
@pytest.mark.parametrize("kind", ["a line", "a linestrip", "a polyline of CVAT"])
def test_lines_are_drawn_as_wide_as_asked(kind, width):
    photo("photos/a.jpg")
    write(f"photos/{WITHOUT_AREA[kind][0]}", WITHOUT_AREA[kind][1])
    make("photos", "--line-width", width)
    corners = np.array(LINE[:2] if kind == "a line" else LINE, float)
    centres = np.stack(np.mgrid[: SIZE[0], : SIZE[1]][::-1], -1) + 0.5
    distance = np.full(SIZE, np.inf)
    for start, end in pairwise(corners):
        along = end - start
        share = np.clip((centres - start) @ along / max(along @ along, 1), 0, 1)
        distance = np.minimum(distance, np.linalg.norm(centres - start - share[..., None] * along, axis=-1))
    wanted = (distance < width / 2) | inside(CAR)
    assert ((mask_of("a") > 0) != wanted).sum() <= 2  # a round end has 720 corners


def test_lines_alone_are_drawn_and_points_never():
    photo("photos/a.jpg")
    write("photos/a.json", labelme_file([{"label": "crack", "shape_type": "linestrip", "points": LINE}]))
    assert "photos/a.json" in (message := error_of("photos")) and "--line-width" in message
    assert "--line-width 0: give a width of 1 pixel or more" in error_of("photos", "--line-width", 0)
    make("photos", "--line-width", 3)
    assert mask_of("a", "masks_of_crack").any()
    write("photos/a.json", WITHOUT_AREA["a point"][1])
    assert "photos/a.json" in error_of("photos", "--line-width", 3)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes that overlap

BODY, WHEEL = [(50, 50), (350, 50), (350, 250), (50, 250)], [(100, 100), (200, 100), (200, 300), (100, 300)]


def ordered_file(tool: str, *shapes: tuple[str, list]) -> None:
    """Write labels and rings, of which the last lies on top; CVAT's file is in another order."""
    if tool == "labelme":
        write("photos/a.json", labelme_file([{"label": label, "points": ring} for label, ring in shapes]))
    else:
        lines = [cvat_polygon(*shape).replace('z_order="0"', f'z_order="{z - 1}"') for z, shape in enumerate(shapes)]
        write("photos/a.xml", cvat_file("".join(reversed(lines))))


@pytest.mark.parametrize("tool", ["labelme", "cvat"])
def test_the_shape_on_top_covers_those_below(tool, capsys):
    photo("photos/a.jpg")
    ordered_file(tool, ("car", BODY), ("wheel", WHEEL))
    make("photos", "--label", "car")
    assert np.array_equal(mask_of("a") > 0, inside(BODY) & ~inside(WHEEL))
    assert re.search(
        "^wheel .* 16.7 %  not asked for, covers 25.0 % of the object", capsys.readouterr().out, re.MULTILINE
    )
    make("photos", "--label", "car", "--label", "wheel", "--output-dir", "out")
    assert np.array_equal(mask_of("a", "out") > 0, inside(BODY) | inside(WHEEL))
    ordered_file(tool, ("wheel", WHEEL), ("car", BODY))
    make("photos", "--label", "car")
    assert np.array_equal(mask_of("a") > 0, inside(BODY)) and "covers" not in capsys.readouterr().out


@pytest.mark.parametrize("tool", ["labelme", "cvat"])
@pytest.mark.parametrize("label", ["_background_", "background", "Background"])
def test_background_cuts_holes_and_is_no_object(tool, label):
    photo("photos/a.jpg")
    ordered_file(tool, (label, BODY), ("car", BODY), (label, WHEEL), ("car", VAN))
    make("photos")
    assert np.array_equal(mask_of("a") > 0, (inside(BODY) & ~inside(WHEEL)) | inside(VAN))
    make("photos", "--label", label, "--output-dir", "out")  # who asks for it gets it
    assert np.array_equal(mask_of("a", "out") > 0, inside(BODY) & inside(WHEEL) | inside(WHEEL) & ~inside(VAN))
    ordered_file(tool, (label, BODY))
    assert "every label is ignored or background" in error_of("photos")


@pytest.mark.parametrize("tool", ["labelme", "cvat"])
def test_void_lies_on_top_wherever_it_is_in_the_order(tool):
    photo("photos/a.jpg")
    for shapes in ([("car", BODY), ("void", WHEEL), ("van", VAN)], [("void", WHEEL), ("car", BODY), ("van", VAN)]):
        ordered_file(tool, *shapes)
        make("photos", "--label", "car", "--ignore-label", "void")
        assert np.array_equal(mask_of("a"), np.where(inside(WHEEL), 255, inside(BODY) & ~inside(VAN)))


def test_formats_without_an_order_unite_what_overlaps_and_background_cuts_there_too():
    photo("photos/a.jpg")
    write("photos/data.yaml", "names: [car, wheel]")
    write("photos/a.txt", yolo_row(0, BODY) + "\n" + yolo_row(1, WHEEL))
    make("photos", "--label", "car")
    assert np.array_equal(mask_of("a") > 0, inside(BODY))
    Path("photos/a.txt").unlink()
    content = coco_file(*({"segmentation": [flat(ring)], "category_id": n} for n, ring in ((3, BODY), (9, WHEEL))))
    write("photos/coco.json", content)
    make("photos", "--label", "car")
    assert np.array_equal(mask_of("a") > 0, inside(BODY))
    content["categories"][1]["name"] = "_background_"
    write("photos/coco.json", content)
    make("photos")
    assert np.array_equal(mask_of("a") > 0, inside(BODY) & ~inside(WHEEL))


# ---------------------------------------------------------------------------------------------------------------------
# COCO as other tools write it


def ids_as_text(content: dict) -> None:
    for entry in content["annotations"]:
        entry["image_id"], entry["category_id"] = str(entry["image_id"]), float(entry["category_id"])


def a_flat_ring(content: dict) -> None:
    content["annotations"][0]["segmentation"] = flat(CAR)


def pairs(content: dict) -> None:
    content["annotations"][0]["segmentation"] = [list(corner) for corner in CAR]


def rings_of_pairs(content: dict) -> None:
    content["annotations"][0]["segmentation"] = [[list(corner) for corner in CAR]]


def two_ids(content: dict) -> None:
    content["images"].append(content["images"][0] | {"id": "b"})
    content["annotations"].append(content["annotations"][0] | {"id": 5, "image_id": "b", "segmentation": [flat(VAN)]})


def unknown_size(content: dict) -> None:
    content["images"][0] |= {"height": None, "width": None}


@pytest.mark.parametrize("change", [ids_as_text, a_flat_ring, pairs, rings_of_pairs, two_ids, unknown_size])
def test_coco_of_other_tools(change):
    photo("photos/a.jpg")
    content = coco_file({"segmentation": [flat(CAR)]})
    change(content)
    write("photos/coco.json", content)
    make("photos")
    assert np.array_equal(mask_of("a") > 0, inside(CAR) | (inside(VAN) if change is two_ids else False))
    assert len(list(Path("masks_of_car/masks").iterdir())) == 1


@pytest.mark.parametrize(("categories", "label"), [(None, "3"), ([], "3"), ("no key", "3"), ("no ids", "object")])
def test_coco_without_categories_has_their_numbers_or_objects(categories, label):
    photo("photos/a.jpg")
    content = coco_file({"segmentation": [flat(CAR)]}) | {"categories": categories}
    if isinstance(categories, str):
        del content["categories"]
    if categories == "no ids":
        del content["annotations"][0]["category_id"]
    write("photos/coco.json", content)
    make("photos")
    assert np.array_equal(mask_of("a", f"masks_of_{label}") > 0, inside(CAR))


@pytest.mark.parametrize("name", [
    "my%20photo%20%C3%A4.jpg", "https://x.org/up/my%20photo%20%C3%A4.jpg?v=12&size=9", "/data/?d=my photo ä.jpg",
    "/data/local-files/?d=photos%5Cmy%20photo%20ä.jpg", "my photo ä.jpg",
])  # fmt: skip
def test_names_as_web_addresses_give_them_find_the_photo(name):
    photo("photos/my photo ä.jpg")
    photo("photos/12.jpg")
    content = coco_file({"segmentation": [flat(CAR)]})
    content["images"][0]["file_name"] = name
    write("coco.json", content)
    make("coco.json", "photos")
    assert np.array_equal(mask_of("my photo ä") > 0, inside(CAR))


def test_a_photo_whose_name_has_such_signs_is_found_first():
    photo("photos/a%20b.jpg")
    photo("photos/a b.jpg", (30, 40))
    content = coco_file({"segmentation": [flat(CAR)]})
    content["images"][0]["file_name"] = "a%20b.jpg"
    write("photos/coco.json", content)
    make("photos")
    assert np.array_equal(mask_of("a%20b") > 0, inside(CAR))


# ---------------------------------------------------------------------------------------------------------------------
# Photos


@pytest.mark.parametrize("name", ["IMG_1.jpg", "C:\\old\\IMG_1.jpg", "site.bmp", "", None])
@pytest.mark.parametrize("has_data", [False, True])
def test_a_photo_that_was_renamed_with_its_file_is_found_by_the_files_name(name, has_data):
    photo("photos/site.jpg")
    photo("x.jpg")
    data = base64.b64encode(Path("x.jpg").read_bytes()).decode() if has_data else None
    write("photos/site.json", labelme_file([{"points": CAR}], name, imageData=data))
    make("photos")
    assert np.array_equal(mask_of("site") > 0, inside(CAR))
    assert Path("masks_of_car/images/site.jpg").samefile("photos/site.jpg")


@pytest.mark.parametrize(("labels", "named"), [("photos", "1.jpg"), ("labels", "../photos/1.jpg"), ("labels", "1.jpg")])
def test_a_file_that_names_the_photo_of_another_stops(labels, named):
    for number in (1, 2):
        photo(f"photos/{number}.jpg")
    write(f"{labels}/2.json", labelme_file([{"points": CAR}], named))
    message = error_of(labels, "photos")
    assert f"{labels}/2.json names " in message and "photos/1.jpg" in message and "photos/2.jpg" in message


def test_files_that_are_named_otherwise_than_any_photo_are_right():
    photo("photos/a.jpg")
    photo("photos/a.png")
    photo("photos/b.jpg")
    write("labels/first.json", labelme_file([{"points": CAR}], "../photos/b.jpg"))
    write("photos/a.json", labelme_file([{"points": VAN}], "a.jpg"))  # a.png has the same stem
    write("photos/a.png.json", labelme_file([{"points": CAR}], "a.png"))
    make("labels", "photos")
    assert np.array_equal(mask_of("b") > 0, inside(CAR))
    assert np.array_equal(mask_of("a") > 0, inside(VAN)) and np.array_equal(mask_of("a-2") > 0, inside(CAR))


@pytest.mark.parametrize("kind", ["gtFine_labelIds", "gtCoarse_labelIds", "gtFine_labelTrainIds", "gtFine"])
def test_cityscapes_in_its_own_folders(kind):
    stem = "aachen_000000_000019"
    photo(f"leftImg8bit/train/aachen/{stem}_leftImg8bit.png")
    Path("gtFine/train/aachen").mkdir(parents=True)
    for name, values in {kind: 26, "gtFine_instanceIds": 26001}.items():
        Image.fromarray(np.where(inside(CAR), values, 0).astype(np.uint16 if values > 255 else np.uint8)).save(
            f"gtFine/train/aachen/{stem}_{name}.png"
        )
    photo(f"gtFine/train/aachen/{stem}_gtFine_color.png")
    write(f"gtFine/train/aachen/{stem}_gtFine_polygons.json", {"imgHeight": 300, "imgWidth": 400, "objects": []})
    make("gtFine", "leftImg8bit")
    assert np.array_equal(mask_of(f"{stem}_leftImg8bit", "masks_of_26") > 0, inside(CAR))


@pytest.mark.parametrize("name", [
    "a.jpg", "..\\photos\\a.jpg", "../photos/a.jpg", "C:\\Users\\a.jpg", "/home/a.jpg", "../../../etc/a.jpg", "A.JPG",
])  # fmt: skip
def test_paths_of_other_machines_find_the_photo(name):
    photo("photos/a.jpg")
    write("labels/a.json", labelme_file([{"points": CAR}], name))
    make("labels", "photos")
    assert np.array_equal(mask_of("a") > 0, inside(CAR))


def test_a_photo_inside_of_the_file_is_used_where_there_is_no_other():
    photo("a.jpg")
    data = base64.b64encode(Path("a.jpg").read_bytes()).decode()
    write("labels/a.json", labelme_file([{"points": CAR}], "lost.jpg", imageData=data))
    make("labels")
    assert Path("masks_of_car/images/lost.jpeg").read_bytes() == Path("a.jpg").read_bytes()
    write("labels/a.json", labelme_file([{"points": CAR}], "lost.jpg", imageData=data[:100]))
    assert "imageData" in error_of("labels")


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_photo_that_lies_on_its_side_is_taken_as_the_tool_took_it(orientation, capsys):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo("photos/a.jpg", SIZE, exif=exif)
    upright = np.rot90(np.zeros(SIZE), {3: 2, 6: -1, 8: 1}[orientation]).shape
    write("photos/a.json", labelme_file([{"points": VAN}], size=upright))
    make("photos")
    assert np.array_equal(mask_of("a") > 0, inside(VAN, size=upright)) and "EXIF" not in capsys.readouterr().out
    if orientation != 3:  # of a photo upside down the sizes say nothing
        write("photos/a.json", labelme_file([{"points": VAN}], size=SIZE))
        make("photos")
        assert np.array_equal(mask_of("a") > 0, np.rot90(inside(VAN), {6: -1, 8: 1}[orientation]))
        assert "EXIF's orientation: 1" in capsys.readouterr().out
    data = CarvanaDataset(Path("masks_of_car/images"), Path("masks_of_car/masks"), (48, 64))
    data.prepare(None)
    assert tuple(data.infos[0][["height", "width"]]) == upright


def test_photos_of_one_stem_and_names_that_differ_in_case_or_form():
    names = ["x/a.jpg", "y/a.png", "y/A_mask.jpg", "x/" + unicodedata.normalize("NFD", "bäume.jpg")]
    for name in names:
        photo(name)
        write(
            str(Path(name).with_suffix(".json")),
            labelme_file([{"points": VAN}], unicodedata.normalize("NFC", Path(name).name)),
        )
    make("x", "y")
    pairs = find_pairs(Path("masks_of_car/images"), Path("masks_of_car/masks"))
    assert [image.name for image, _ in pairs] == ["A-2.jpg", "a.jpg", "a-3.png", "bäume.jpg"]


def test_two_photos_that_may_be_meant_or_two_files_on_one_photo_stop():
    for place in ("x", "y"):
        photo(f"{place}/a.jpg")
    write("labels/a.json", labelme_file([{"points": CAR}]))
    assert "twice" in error_of("labels", "x", "y")
    os.link("x/a.jpg", "labels/a.jpg")
    write("labels/b.json", labelme_file([{"points": CAR}]))
    message = error_of("labels", "x")
    assert "labels/a.json" in message and "labels/b.json" in message


# ---------------------------------------------------------------------------------------------------------------------
# Odd input


ODD = {
    "nan": [{"points": [[float("nan"), 1], [2, 3], [4, 5]]}],
    "far away": [{"points": [[1e300, 1], [2, 3], [4, 5]]}],
    "no pairs": [{"points": [[1, 2], [3], [4, 5]]}],
    "words": [{"points": [["x", "y"], [2, 3], [4, 5]]}],
    "no points": [{}],
    "a circle of one point": [{"points": [[1, 2]], "shape_type": "circle"}],
    "a broken mask": [{"points": [[1, 2], [3, 4]], "shape_type": "mask", "mask": "iVBORw0KGgo="}],
    "no mask": [{"points": [[1, 2], [3, 4]], "shape_type": "mask"}],
    "a mask that is no base64": [{"points": [[1, 2], [3, 4]], "shape_type": "mask", "mask": "x"}],
    "no label": [{"points": CAR, "label": None}],
    "points that are null": [{"points": None}],
    "a point that is null": [{"points": [[1, 2], None, [4, 5]]}],
    "a coordinate that is null": [{"points": [[1, 2], [3, None], [4, 5]]}],
    "a mask without points": [{"points": [], "shape_type": "mask", "mask": "iVBORw0KGgo="}],
}
PYTHONS = "None|object|index|literal|convert|attribute|argument|subscript|dimension|argument|Error|padding"


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_shape_is_named(odd):
    photo("photos/a.jpg")
    write("photos/a.json", labelme_file([{"points": CAR}, *ODD[odd]]))
    message = error_of("photos")
    assert f"photos/a.json: shape 2 ({'no label' if odd == 'no label' else 'car'}) cannot be read (" in message
    assert not re.search(PYTHONS, message)


@pytest.mark.parametrize("content", [
    labelme_file([]) | {"shapes": [None]}, labelme_file([]) | {"shapes": None}, labelme_file([], size=("x", 3)),
    coco_file({}) | {"images": None}, coco_file({}) | {"annotations": [None]}, coco_file({"image_id": None}),
    coco_file({"segmentation": ["x"]}), coco_file({"segmentation": {"counts": None, "size": [300, 400]}}),
    coco_file({}) | {"categories": [{"id": 3}]}, coco_file({}) | {"categories": [{"id": 3, "name": None}]},
])  # fmt: skip
def test_nulls_and_other_kinds_are_named_without_words_of_python(content):
    photo("photos/a.jpg")
    write("photos/a.json", content)
    message = error_of("photos")
    assert message.startswith("error: photos/a.json") and not re.search(PYTHONS, message)


def test_a_file_without_a_photos_name_is_named_with_its_own():
    write("a.json", labelme_file([{"points": CAR}], None))
    assert "a.json: its photo a is not there" in error_of("a.json")


def test_a_file_in_another_encoding_is_named():
    photo("photos/a.jpg")
    Path("photos/a.json").write_bytes(json.dumps(labelme_file([{"points": CAR}])).encode("utf-16"))
    assert "photos/a.json cannot be read (it is no text in UTF-8)" in error_of("photos")


OUTLINE = [[60, 200], [80, 120], [160, 80]]
OTHER_FORMATS = {  # what other tools export, each in its few typical keys
    "via.json": {"a.jpg123": {"filename": "a.jpg", "size": 123, "regions": [
        {"shape_attributes": {"name": "polygon", "all_points_x": [1, 2, 3], "all_points_y": [1, 5, 1]}}]}},
    "via_project.json": {"_via_settings": {}, "_via_img_metadata": {}, "_via_attributes": {}},
    "via.csv": "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes\n",
    "a.jpg.json": {"description": "", "tags": [], "size": {"height": 300, "width": 400}, "objects": [
        {"classTitle": "car", "geometryType": "polygon", "points": {"exterior": OUTLINE, "interior": []}}]},
    "datumaro.json": {"info": {}, "categories": {"label": {"labels": [{"name": "car"}]}}, "items": [{"id": "a"}]},
    "isat.json": {"info": {"description": "ISAT", "name": "a.jpg"}, "objects": [{"segmentation": OUTLINE}]},
    "sa_1.json": {"image": {"file_name": "a.jpg"}, "annotations": [{"segmentation": {"size": [300, 400]}}]},
    "voc.xml": "<annotation><filename>a.jpg</filename><object><name>car</name><bndbox/></object></annotation>",
    "label_studio.json": [{"id": 1, "data": {"image": "a.jpg"}, "annotations": [{"result": []}]}],
    "dota.txt": "imagesource:GoogleEarth\ngsd:0.1\n1 2 3 4 5 6 7 8 car 0\n",
    "sartorius.csv": "id,annotation,width,height,cell_type\na,1 5,400,300,cort\n",
    "commas.txt": "0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6\n",
    "export.zip": "PK\x03\x04",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_formats_end_with_what_is_read_and_where_to_find_it(name):
    photo("photos/a.jpg")
    write(f"photos/{name}", OTHER_FORMATS[name])
    write("photos/data.yaml", "names: [car]")
    message = error_of("photos")
    assert f"photos/{name} holds no annotations that are read: export COCO" in message and "unpack" in message


def test_colour_masks_and_masks_of_a_brush_end_with_that_sentence_too():
    photo("photos/a.jpg")
    Path("masks").mkdir()
    Image.fromarray(np.where(inside(CAR)[..., None], [200, 0, 0], [0, 90, 0]).astype(np.uint8)).save("masks/a.png")
    assert "save colour masks as label images of one channel" in error_of("masks", "photos")
    Image.fromarray(np.where(inside(CAR), 255, 0).astype(np.uint8)).save("masks/task-1-annotation-2-by-1-tag-car-0.png")
    assert "export COCO" in error_of("masks", "photos")


def test_other_files_are_passed_over_and_none_is_an_error(capsys):
    photo("photos/a.jpg")
    for name, content in {
        "notes.json": '{"a": 1}', "list.json": "[1, 2]", "voc.xml": "<annotation></annotation>", "notes.txt": "2024 12",
        "page.html": "<html><p>", "empty.txt": "", "table.csv": "a,b\n1,2\n",
    }.items():  # fmt: skip
        write(f"photos/{name}", content)
    assert "no annotations" in error_of("photos")
    write("photos/a.json", labelme_file([{"points": CAR}]))
    make("photos")
    assert "Passed over, because they are no annotations: 7 files" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["", "{", "[" * 100_000, '{"shapes": 3, "imagePath": "a.jpg"}', '{"shapes": [], "imagePath": 3}']
)
def test_a_broken_json_is_named(content):
    photo("photos/a.jpg")
    write("photos/a.json", content)
    assert "photos/a.json" in error_of("photos")


def test_coco_without_its_category_or_image_names_the_annotation():
    photo("photos/a.jpg")
    for wrong in ({"category_id": 5}, {"image_id": 5}):
        write("photos/a.json", coco_file({"segmentation": [flat(CAR)]} | wrong))
        assert "annotation 100" in error_of("photos")


def test_a_mask_that_would_fill_the_memory_is_refused():
    photo("photos/a.jpg")
    mask = '<mask label="car" rle="0,1000000000000" left="0" top="0" width="1000000" height="1000000"></mask>'
    write("photos/a.xml", cvat_file(mask))
    assert "photos/a.xml: image a.jpg, shape 1 (car)" in error_of("photos")


def cvat_mask(runs: str, left: object = 0, top: object = 0, width: object = 8, height: object = 9) -> str:
    return f'<mask label="car" rle="{runs}" left="{left}" top="{top}" width="{width}" height="{height}"></mask>'


WRAPPING = f"{2**62}, {2**62}, {2**62}, {2**62}, 72"  # their sum is 72 in 64 bits: memory was overwritten
TURNED = '<box label="car" xtl="1" ytl="1" xbr="9" ybr="9" rotation="{}"></box>'
PIXELS = SIZE[0] * SIZE[1]
OVERFLOWS = {
    "runs whose sum wraps around": cvat_mask(WRAPPING),
    "a run beyond 64 bits": cvat_mask(f"{2**64}, 72"),
    "a negative run": cvat_mask("80, -8"),
    "a mask that is larger than the photo": cvat_mask(PIXELS * 9, width=SIZE[1] * 9, height=SIZE[0]),
    "a negative size": cvat_mask("72", width=-8, height=-9),
    "a place far away": cvat_mask("0, 72", left=1e300),
    "a place that is no number": cvat_mask("0, 72", top="nan"),
    "a size that is infinite": cvat_mask("0, 72", width="inf"),
    "no angle": TURNED.format("nan"),
    "an angle without end": TURNED.format("inf"),
}


@pytest.mark.parametrize("odd", OVERFLOWS)
def test_numbers_of_cvat_are_checked_before_they_size_memory(odd):
    photo("photos/a.jpg")
    write("photos/a.xml", cvat_file(OVERFLOWS[odd]))
    assert "photos/a.xml: image a.jpg, shape 1 (car) cannot be read" in error_of("photos")


@pytest.mark.parametrize(
    "counts",
    [
        [2**62, 2**62, 2**62, 2**62, PIXELS],  # 2 ** 64 + PIXELS
        [2**64, PIXELS],
        [-PIXELS, PIXELS, PIXELS],
        [float("nan")],
        [[PIXELS]],
        [PIXELS - 0.5, 0.5],
        "?" * 300_000,  # digits of one number without end, which took a minute
        "o" * 300_000,
        "\u20ac",
    ],
    ids=lambda counts: ascii(counts)[:20],
)
def test_run_lengths_of_coco_are_checked_before_they_size_memory(counts):
    photo("photos/a.jpg")
    write("photos/a.json", coco_file({"segmentation": {"size": list(SIZE), "counts": counts}}))
    assert "photos/a.json: annotation 100 cannot be read" in error_of("photos")


@pytest.mark.parametrize("size", [[10**9, 10**9], [-300, -400], [2**63, 1], [1e400, 1], [300], 7])
def test_sizes_of_coco_are_compared_with_the_photo(size):
    photo("photos/a.jpg")
    write("photos/a.json", coco_file({"segmentation": {"size": size, "counts": [0, 10**18]}}))
    assert "photos/a.json: annotation 100 cannot be read" in error_of("photos")


def test_a_mask_of_labelme_that_is_larger_than_its_photo_is_not_decoded():
    photo("photos/a.jpg")
    png = io.BytesIO()
    Image.new("1", (SIZE[1] + 1, SIZE[0])).save(png, "png")
    shape = {"points": [[1, 2], [3, 4]], "shape_type": "mask", "mask": base64.b64encode(png.getvalue()).decode()}
    write("photos/a.json", labelme_file([shape]))
    assert "its mask is 401 x 300, but its photo 400 x 300" in error_of("photos")


@pytest.mark.parametrize(
    "runs",
    [f"1 {2**63 - 1}", f"{2**63 - 1} {2**63 - 1}", f"{-(2**63)} 9", f"1 {2**64 + 5}", "9 -3", f"{PIXELS} 2", "0 5"],
)
def test_runs_of_tables_that_do_not_fit_the_photo_are_named(runs):
    photo("photos/a.jpg")
    write("photos/masks.csv", f"img,rle_mask\na.jpg,{runs}\n")
    assert "photos/masks.csv: line 2 cannot be read" in error_of("photos")


def test_videos_of_cvat_are_sent_back():
    write("a.xml", '<?xml version="1.0"?><annotations><track id="0" label="car"></track></annotations>')
    assert "CVAT for images" in error_of("a.xml")


# ---------------------------------------------------------------------------------------------------------------------
# Labels and output


def test_labels_are_united_and_empty_photos_left_out(capsys):
    for name in "abc":
        photo(f"photos/{name}.jpg")
    write(
        "photos/a.json",
        labelme_file([{"label": "tree", "points": VAN}, {"points": CAR}, {"label": "van", "points": VAN}]),
    )
    write("photos/b.json", labelme_file([], "b.jpg"))
    make("photos", "--label", "car", "--label", "van")
    assert np.array_equal(mask_of("a", "masks_of_car_van") > 0, inside(CAR) | inside(VAN))
    assert not mask_of("b", "masks_of_car_van").any() and "Photos without an object: 1, with" in capsys.readouterr().out
    make("photos", "--label", "car", "--label", "van", "--skip-empty")
    assert len(list(Path("masks_of_car_van/images").iterdir())) == 1
    assert "Photos without an object: 1, left out" in capsys.readouterr().out


def test_ignored_labels_are_void_in_training():
    for name in "ab":
        photo(f"photos/{name}.jpg")
        write(f"photos/{name}.json", labelme_file([{"label": "void", "points": VAN}, {"points": CAR}], f"{name}.jpg"))
    make("photos", "--ignore-label", "void")
    data = CarvanaDataset(Path("masks_of_car/images"), Path("masks_of_car/masks"), SIZE)
    data.prepare(None)
    wanted = np.where(inside(VAN), 255, inside(CAR))
    assert data.rule.has_void and all(np.array_equal(data.sample(row)[1], wanted) for row in range(2))
    for name in "ab":
        write(f"photos/{name}.json", labelme_file([{"label": "void", "points": VAN}], f"{name}.jpg"))
    photo("photos/c.jpg")
    write("photos/c.json", labelme_file([{"points": CAR}], "c.jpg"))
    assert "--skip-empty" in error_of("photos", "--ignore-label", "void", "--output-dir", "out")


def test_the_same_command_again_replaces_its_own_output_and_nothing_else():
    photo("photos/a.jpg")
    photo("photos/b.jpg")
    for name in "ab":
        write(f"photos/{name}.json", labelme_file([{"points": CAR}], f"{name}.jpg"))
    make(".")
    Path("photos/b.json").unlink()
    write("photos/a.json", labelme_file([{"points": VAN}]))
    make(".")
    assert np.array_equal(mask_of("a") > 0, inside(VAN)) and len(list(Path("masks_of_car/images").iterdir())) == 1
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]
    written = ("images/a.jpg", "masks/a_mask.png")  # the list of these has the form that make_masks.py gave it
    checksums = {name: zlib.crc32(Path("masks_of_car", name).read_bytes()) for name in written}
    assert json.loads(Path("masks_of_car/make_masks.json").read_text()) == checksums

    Image.new("L", SIZE[::-1], 255).save("masks_of_car/masks/a_mask.png")  # somebody has retouched it
    assert "masks_of_car/masks/a_mask.png" in error_of("photos")
    photo("mine/x.jpg")
    assert "mine/x.jpg" in error_of("photos", "--output-dir", "mine")


def test_a_label_that_is_a_path_stays_in_the_folder(folder):
    photo("photos/a.jpg")
    write("photos/a.json", labelme_file([{"label": "../../evil\n", "points": CAR}]))
    make("photos")
    assert Path("masks_of_.._.._evil/masks/a_mask.png").exists()


def test_a_file_in_the_place_of_the_output_and_retouched_photos_are_not_lost():
    write_labelme()
    write("thesis.txt", "precious")
    photo("photos/a.jpg")
    assert "thesis.txt is a file" in error_of("photos", "--label", "car", "--output-dir", "thesis.txt")
    make("photos", "--label", "car")
    for name in (".DS_Store", "thumbs.db", "Desktop.ini", "@eaDir"):
        Path("masks_of_car/images", name).write_text("a file browser's")
    make("photos", "--label", "car")
    photo("retouched.jpg")
    Path("retouched.jpg").replace("masks_of_car/images/a.jpg")
    assert "images/a.jpg was not written by tools.make_masks, or changed" in error_of("photos", "--label", "car")


@pytest.mark.parametrize("names", [("a_mask", "a_mask_1"), ("a_mask_1", "a_mask_2"), ("a_1", "a_2", "A_mask-left")])
def test_several_label_images_of_a_photo_are_united_on_request(names):
    photo("photos/a.jpg")
    photo("photos/b.jpg")
    wanted = np.zeros(SIZE, np.uint8)
    for number, name in enumerate((*names, "b")):
        label = np.zeros(SIZE, np.uint8)
        label[10 * number : 10 * number + 5, :50] = 7
        wanted[label > 0] = 255 * (name != "b")
        Path("labels").mkdir(exist_ok=True)
        Image.fromarray(label).save(f"labels/{name}.png")
    message = error_of("labels", "photos", "--label", "7")
    assert "photos/a.jpg is annotated in labels/" in message and "or add --unite" in message
    make("labels", "photos", "--label", "7", "--unite")
    np.testing.assert_array_equal(mask_of("a", "masks_of_7"), wanted)
    assert np.count_nonzero(mask_of("b", "masks_of_7")) == 250


def test_two_peoples_outlines_of_a_photo_are_united_on_request():
    photo("photos/a.jpg")
    write("first/a.json", labelme_file([{"points": CAR}]))
    write("second/a.json", labelme_file([{"points": VAN}]))
    assert "or add --unite" in error_of("first", "second", "photos")
    make("first", "second", "photos", "--unite")
    np.testing.assert_array_equal(mask_of("a") > 0, inside(CAR, VAN))
    write("second/a.json", labelme_file([{"points": VAN}]) | {"imageHeight": SIZE[1], "imageWidth": SIZE[0]})
    assert "give only one of them, for they say two sizes" in error_of("first", "second", "photos", "--unite")


def test_hidden_files_that_the_user_added_to_the_output_are_not_lost():
    write_labelme()
    photo("photos/a.jpg")
    make("photos", "--label", "car")
    Path("masks_of_car/.notes").write_text("mine")
    assert "masks_of_car/.notes was not written by tools.make_masks" in error_of("photos", "--label", "car")
    Path("masks_of_car/.notes").replace("notes")
    Path("masks_of_car/images/more").symlink_to("nowhere")
    assert "images/more was not written by tools.make_masks" in error_of("photos", "--label", "car")


def test_an_output_that_is_a_link_stays_one():
    write_labelme()
    photo("photos/a.jpg")
    Path("disk").mkdir()
    Path("masks_of_car").symlink_to("disk/masks")
    for _ in range(2):
        make("photos", "--label", "car")
        assert Path("masks_of_car").is_symlink() and [path.name for path in Path("disk").iterdir()] == ["masks"]
        assert mask_of("a").any()


def test_a_kill_anywhere_leaves_one_whole_output_and_nothing_hidden_after_the_next_start():
    write_labelme()
    photo("photos/a.jpg")
    make("photos", "--label", "car")
    Path(".make_masks-thesis").mkdir()
    Path(".make_masks-thesis/notes").write_text("mine")
    for _ in kills(lambda: make("photos", "--label", "car"), fewest=10):
        found = [path for path in (Path("masks_of_car"), Path(".make_masks-masks_of_car/old")) if path.exists()]
        make_masks.check_ours(found[0])
        assert len(list(found[0].glob("masks/a_mask.png"))) == 1
        make("photos", "--label", "car")
        assert mask_of("a").any()
        assert {path.name for path in Path().glob(".*")} == {".make_masks-thesis"}


def test_an_output_that_was_set_aside_is_put_back_where_nothing_new_is_written():
    write_labelme()
    photo("photos/a.jpg")
    make("photos", "--label", "car")
    Path(".make_masks-masks_of_car").mkdir()
    Path("masks_of_car").replace(".make_masks-masks_of_car/old")
    Path("photos/a.jpg").write_bytes(b"broken")
    with pytest.raises(errors.UserError):
        make("photos", "--label", "car")
    assert mask_of("a").any()


@pytest.mark.parametrize("name", ["..", ".", "", "/", "_mask.jpg", "....jpg"])
def test_embedded_photos_without_a_name_get_one(name):
    photo("a.jpg")
    data = base64.b64encode(Path("a.jpg").read_bytes()).decode()
    write("labels/x.json", labelme_file([{"points": CAR}], name, imageData=data))
    make("labels")
    assert [path.name for path in Path("masks_of_car/images").iterdir()] == ["photo.jpeg"]
    assert [path.name for path in Path("masks_of_car/masks").iterdir()] == ["photo_mask.png"]


def test_sizes_that_are_floats_and_two_images_of_one_id():
    content = coco_file({"segmentation": [flat(CAR)]})
    content["images"][0]["height"] = float(SIZE[0])
    write("photos/instances.json", content)
    photo("photos/a.jpg")
    make("photos")
    np.testing.assert_array_equal(mask_of("a") > 0, inside(CAR))
    write("photos/instances.json", content | {"images": content["images"] * 2})
    assert "image 7 cannot be read (there are two of this id)" in error_of("photos")
    write(
        "photos/instances.json",
        content | {"images": [content["images"][0], content["images"][0] | {"id": 8, "width": 9}]},
    )
    assert "photos/instances.json cannot be read (a.jpg has two sizes in it)" in error_of("photos")


def test_labels_that_are_both_or_all_ignored():
    write_labelme()
    photo("photos/a.jpg")
    message = error_of("photos", "--label", "car", "--ignore-label", "car")
    assert "car is given as --label and as --ignore-label" in message
    assert "every label is ignored" in error_of("photos", "--ignore-label", "car", "--ignore-label", "van")


def test_a_table_whose_first_column_is_a_number():
    photo("photos/a.jpg")
    runs = rle_encode(inside(CAR))
    write("photos/masks.csv", f",img,rle_mask\n0,a.jpg,{runs}\n")
    make("photos")
    np.testing.assert_array_equal(mask_of("a", "masks_of_object") > 0, inside(CAR))

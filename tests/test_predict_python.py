"""From Python: what predict and predict_files take, what they give, and what they say of anything else."""

import re
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import predict
import utils
from machinery.errors import UserError
from predict import load_model, predict_files

CHECKPOINT = "my_checkpoint_best.pth.tar"


@pytest.fixture
def probabilities_of(photos):
    """Returns the probabilities of an image."""
    return partial(predict.predict, load_model(CHECKPOINT))


@pytest.fixture
def colours(photos) -> np.ndarray:
    """A photo of some size, uint8 (H, W, 3)."""
    return np.asarray(Image.open(photos[0]).convert("RGB").resize((201, 150)))


def test_an_array_gives_what_its_file_gives(colours, probabilities_of):
    opacity = np.full(colours.shape[:2], 255, np.uint8)
    opacity[20:90, 30:120] = np.linspace(0, 255, 90)
    arrays = {
        "RGB": colours,
        "grey": colours[..., 1],
        "RGBA": np.dstack((colours, opacity)),
        "RGBA without opacity": np.dstack((colours, 0 * opacity)),
        "mirrored": colours[:, ::-1],
        "a row": colours[:1],
        "grey with an axis": colours[..., :1],
    }
    for kind, array in arrays.items():
        Image.fromarray(np.ascontiguousarray(array).squeeze(2 if array.shape[2:] == (1,) else ())).save("drawn.png")
        wanted = probabilities_of("drawn.png")
        assert wanted.dtype == np.float32 and wanted.shape == array.shape[:2]
        np.testing.assert_array_equal(probabilities_of(array), wanted, err_msg=kind)


def exif(orientation: int) -> Image.Exif:
    entries = Image.Exif()
    entries[0x0112] = orientation
    return entries


LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
FILES = {
    "a turned JPEG": (".jpg", "RGB", {"exif": exif(6)}),
    "a turned PNG": (".png", "RGB", {"exif": exif(5)}),
    "a turned TIFF": (".tif", "RGB", {"exif": exif(8)}),
    "a palette": (".png", "P", {"transparency": 3}),
    "a GIF": (".gif", "P", {}),
    "opacity": (".png", "RGBA", {}),
    "grey and opacity": (".png", "LA", {}),
    "CMYK": (".jpg", "CMYK", {}),
    "a profile of another kind": (".jpg", "RGB", {"icc_profile": LAB}),
    "one bit": (".png", "1", {}),
    "16 bits": (".png", "I;16", {}),
}


def test_an_opened_image_gives_what_its_file_gives_and_stays_as_it_is(colours, probabilities_of):
    picture = Image.fromarray(colours).resize((800, 600))  # so large that a JPEG is decoded at a half
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    for kind, (ending, mode, options) in FILES.items():
        image = picture.convert("RGB") if mode in ("P", "CMYK") else picture
        if mode == "I;16":
            image = Image.fromarray(np.asarray(picture.convert("L")) * np.uint16(257))
        path = Path(f"drawn{ending}")
        image.convert(mode).save(path, **options)
        wanted, content = probabilities_of(path), path.read_bytes()
        with Image.open(path) as by_name, Image.open(BytesIO(content)) as by_content:
            for opened in (by_name, by_content):
                size = opened.size
                np.testing.assert_array_equal(probabilities_of(opened), wanted, err_msg=kind)
                assert opened.size == size
                np.testing.assert_array_equal(np.asarray(opened), np.asarray(Image.open(path)), err_msg=kind)
                same_pixels = probabilities_of(opened)  # which Pillow has read: a JPEG in full
                assert abs(same_pixels - wanted).mean() < (0.02 if ending == ".jpg" else 1e-6), kind


def test_what_was_done_to_an_opened_image_counts(colours, probabilities_of):
    Image.fromarray(colours).save("drawn.png")
    image = Image.open("drawn.png")
    image.paste("red", (20, 20, 90, 90))
    np.testing.assert_array_equal(probabilities_of(image), probabilities_of(np.asarray(image)))


def wrong_inputs() -> dict[str, tuple[object, str]]:
    grey = np.zeros((20, 30), np.uint8)
    return {
        "floats": (grey / 255, r"float64 of the shape \(20, 30\).*uint8"),
        "16 bits": (grey.astype(np.uint16), "uint16"),
        "booleans": (grey > 0, "bool"),
        "channels first": (np.zeros((3, 20, 30), np.uint8), r"\(3, 20, 30\)"),
        "two channels": (np.zeros((20, 30, 2), np.uint8), r"\(20, 30, 2\)"),
        "a batch": (np.zeros((1, 20, 30, 3), np.uint8), r"\(1, 20, 30, 3\)"),
        "a row of numbers": (grey[0], r"\(30,\)"),
        "no rows": (grey[:0], r"\(0, 30\)"),
        "an empty image": (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
        "a missing file": ("none.png", "none.png.*No such file"),
        "a folder": (Path("data"), "data is no readable image"),
        "nothing": (None, "a NoneType is no image"),
        "a tensor": (torch.zeros(3, 20, 30), "a Tensor is no image"),
        "a list": ([[0, 1]], "a list is no image"),
        "floats in PIL": (Image.fromarray(grey.astype(np.float32)), "more than 8 bits.*path of its file"),
        "16 bits in PIL": (Image.fromarray(grey.astype(np.uint16)), "more than 8 bits.*path of its file"),
    }


def test_anything_else_is_one_sentence(photos):
    state = utils.load_checkpoint(Path(CHECKPOINT))
    utils.save_checkpoint(state | {"rule": state["rule"] | {"low": None, "high": None}}, Path(CHECKPOINT))
    model = load_model(CHECKPOINT)
    for image, message in wrong_inputs().values():
        with pytest.raises(UserError, match=message) as error:
            predict.predict(model, image)
        assert "\n" not in str(error.value)


def test_a_closed_image_and_a_broken_one_are_one_sentence(photos, probabilities_of):
    with Image.open(photos[0]) as closed:
        pass
    photos[1].write_bytes(photos[1].read_bytes()[:900])
    for image in (closed, Image.open(photos[1])):
        with pytest.raises(UserError, match=r"\.jpg is no readable image \("):
            probabilities_of(image)


def test_files_give_what_the_command_gives(photos, probabilities_of):
    Image.open(photos[0]).resize((301, 200)).save(photos[0], exif=exif(6))
    found = dict(predict_files(load_model(CHECKPOINT), "data/val_images", photos[0], batch_size=3))
    assert list(found) == photos
    predict.main(["data/val_images", "--probabilities"])
    for path, probabilities in found.items():
        written = np.asarray(Image.open(f"predictions/{path.stem}_probabilities.png"))
        assert probabilities.dtype == np.float32 and probabilities.shape == written.shape
        np.testing.assert_allclose(probabilities, written / 65535, atol=1e-3)
        np.testing.assert_allclose(probabilities, probabilities_of(path), atol=1e-3)


def test_a_broken_file_is_named_and_the_others_are_given(photos, capsys):
    photos[2].write_bytes(b"broken")
    files = predict_files(load_model(CHECKPOINT), "data/val_images", tta=True)
    assert [path for path, _ in (next(files) for _ in range(7))] == photos[:2] + photos[3:]
    with pytest.raises(UserError, match="1 of 8 photos could not be predicted"):
        next(files)
    assert f"skipped: {photos[2]}" in capsys.readouterr().err
    with pytest.raises(UserError, match="nothing is there"):
        next(predict_files(load_model(CHECKPOINT), "nowhere"))


def test_a_loop_over_files_may_end_early(photos):
    for path, _ in predict_files(load_model(CHECKPOINT), *photos):
        assert path == photos[0]
        break


@pytest.mark.parametrize("page", ["README.md", "docs/predict.md"])
def test_the_lines_of_the_pages_run(page, colours):
    text = (Path(predict.__file__).parent / page).read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(from predict .*?)```", text, re.DOTALL)
    for path in ("photo.jpg", "folder/a.jpg", "more/b.png"):
        Path(path).parent.mkdir(exist_ok=True)
        Image.fromarray(colours).save(path)
    names = {}
    exec(lines, names)
    assert names["probabilities"].shape == colours.shape[:2]

"""The ONNX file of tools.export gives PyTorch's probabilities, and docs/export.md's lines give predict.py's masks."""

import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from test_predict import PREPROCESSING

import predict
import utils
from machinery import errors
from model import UNet
from tools import export

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the packages onnx, onnxscript and onnxruntime")
onnx = pytest.importorskip("onnx", reason="needs the packages onnx, onnxscript and onnxruntime")
pytest.importorskip("onnxscript", reason="needs the packages onnx, onnxscript and onnxruntime")

DOCS = Path(__file__).parents[1] / "docs/export.md"
READS_ONNX = int(cv2.__version__.split(".")[0]) >= 5  # what PyTorch exports
CHECKPOINT = Path("my_checkpoint_best.pth.tar")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "SECONDS", 0)
    return tmp_path


def save_network(model: UNet, height: int, width: int, **entries: object) -> None:
    preprocessing = PREPROCESSING | {"height": height, "width": width}
    state = {"model": model.config, "state_dict": model.state_dict(), "preprocessing": preprocessing}
    utils.save_checkpoint(state | entries, CHECKPOINT)


def random_network() -> UNet:
    """A network whose BatchNorm does something, as after training."""
    torch.manual_seed(0)
    model = UNet(3, 1, (8, 16))
    torch.nn.init.normal_(model.head.weight)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for values in (layer.running_mean, layer.running_var, layer.weight.data, layer.bias.data):
                values.uniform_(0.5, 1.5)
    return model


def network_for_dark_things() -> UNet:
    """A network whose foreground is what is dark: it hands on how dark each pixel is, from 0 to about 1."""
    model = UNet(3, 1, (4,))
    with torch.no_grad():
        for conv in (layer for block in (*model.downs, *model.up_convs) for layer in block.layers[::3]):
            conv.weight.zero_()[0, 0, 1, 1] = 1
        model.downs[0].layers[0].weight[0, :, 1, 1] = -1 / 3  # ReLU lets through what is positive
        model.head.weight[0, 0], model.head.bias[0] = 8, -4
    return model


def run(*flags: object) -> None:
    export.main(list(map(str, flags)))


def error_of(*flags: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        errors.run(lambda: run(*flags))
    message = exit_.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def test_any_batch_gives_pytorchs_probabilities(folder, capsys):
    save_network(random_network(), 37, 50)  # sides that the network pads
    run()
    first, *others = capsys.readouterr().out.splitlines()
    assert first == f"Exporting {CHECKPOINT} to unet.onnx, and comparing both: a few minutes."
    assert any("16 drawn cars take their place" in line for line in others)
    session, model = onnxruntime.InferenceSession("unet.onnx"), predict.load_model(CHECKPOINT, "cpu", "fp32")
    rng = np.random.default_rng(0)
    for batch in (1, 3, 8):
        images = rng.integers(0, 256, (batch, 37, 50, 3), np.uint8)
        expected = torch.from_numpy(model(images)).sigmoid().numpy()
        (probabilities,) = session.run(["probabilities"], {"images": images})
        assert probabilities.dtype == np.float32
        assert np.abs(probabilities - expected).max() < 1e-4
        if READS_ONNX:
            net = cv2.dnn.readNetFromONNX("unet.onnx")
            net.setInput(images)
            assert np.abs(net.forward() - expected).max() < 1e-4


def test_a_network_of_crops_takes_parts_of_photos_at_its_scale(folder, drawn, capsys):
    model = random_network()
    model.config["tile"] = [32, 64]
    settings = {"val_img_dir": str(drawn / "val_images"), "val_mask_dir": str(drawn / "val_masks")}
    save_network(
        model, 32, 64, preprocessing=PREPROCESSING | {"height": 32, "width": 64, "scale": 0.75}, settings=settings
    )
    run()  # photos of 48 x 72 pixels then
    assert "Comparing on 32 of 32 photos" in capsys.readouterr().out
    session, model = onnxruntime.InferenceSession("unet.onnx"), predict.load_model(CHECKPOINT, "cpu", "fp32")
    metadata = session.get_modelmeta().custom_metadata_map
    assert (metadata["height"], metadata["width"], metadata["scale"]) == ("32", "64", "0.75")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 64, 3), np.uint8)
    expected = torch.from_numpy(model(images)).sigmoid().numpy()
    assert np.abs(session.run(None, {"images": images})[0] - expected).max() < 1e-4


def test_the_lines_of_the_documentation_give_the_masks_of_predict(folder, drawn, capsys):
    settings = {"val_img_dir": str(drawn / "val_images"), "val_mask_dir": str(drawn / "val_masks")}
    save_network(network_for_dark_things(), 144, 192, settings=settings, history=[{"dice": 0.12341}])
    run()
    assert "Comparing on 32 of 32 photos" in capsys.readouterr().out
    metadata = onnxruntime.InferenceSession("unet.onnx").get_modelmeta().custom_metadata_map
    assert metadata == {
        "software": export.SOFTWARE,
        "height": "144",
        "width": "192",
        "threshold": "0.5",
        "dice": "0.1234",
    }

    photo = np.full((600, 800, 3), 230, np.uint8)
    cv2.ellipse(photo, (300, 320), (220, 130), 20, 0, 360, (40, 60, 80), -1, cv2.LINE_AA)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo).save("photo.jpg", exif=exif)
    blocks = [block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "mask.png" in block]
    assert len(blocks) == 2  # with onnxruntime and Pillow, and with OpenCV alone
    predict.main(["photo.jpg", "--device", "cpu"])
    for code in blocks if READS_ONNX else blocks[:1]:
        assert code.count("\n") <= 13
        Path("mask.png").unlink(missing_ok=True)
        exec(code.replace("(240, 160)", "(192, 144)"), {})
        mask, expected = (np.asarray(Image.open(name)) > 0 for name in ("mask.png", "predictions/photo_mask.png"))
        assert mask.shape == (800, 600) and 0.1 < expected.mean() < 0.5
        assert 2 * (mask & expected).sum() / (mask.sum() + expected.sum()) >= 0.99


def test_no_file_is_left_where_onnxruntime_gives_another_dice(folder, monkeypatch):
    save_network(random_network(), 32, 48)
    monkeypatch.setattr(export, "to_onnx", lambda *_: b"")
    monkeypatch.setattr(export, "open_session", lambda _: lambda images: np.full(images.shape[:3], np.nan, np.float32))
    assert "unet.onnx was not written, because Dice is" in error_of()
    assert list(folder.iterdir()) == [folder / CHECKPOINT]


def test_files_of_the_user_are_never_overwritten(folder):
    save_network(random_network(), 32, 48)
    others = onnx.helper.make_model(onnx.helper.make_graph([], "theirs", [], [])).SerializeToString()
    for content in (b"mine", others):
        Path("unet.onnx").write_bytes(content)
        assert "unet.onnx was not written by tools.export: move it away" in error_of()
        assert Path("unet.onnx").read_bytes() == content


def test_files_of_the_command_export_py_are_still_ours(folder):
    model = onnx.helper.make_model(onnx.helper.make_graph([], "ours", [], []))
    onnx.helper.set_model_props(model, {"software": "export.py (U-Net for Carvana)"})
    onnx.save(model, "unet.onnx")
    assert export.is_ours(Path("unet.onnx"))


@pytest.mark.parametrize("package", export.PACKAGES)
def test_a_missing_package_is_named(folder, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = error_of()
    assert f"needs {package}" in message and "pip install onnx onnxscript onnxruntime" in message


def test_what_cannot_be_read_or_written_is_named(folder):
    assert "my_checkpoint_best.pth.tar does not exist" in error_of()
    Path("text").write_text("no checkpoint")
    assert "text is damaged or no checkpoint" in error_of("--checkpoint", "text")
    assert "--output is car.pt: give it the ending .onnx" in error_of("--output", "car.pt")
    save_network(random_network(), 32, 48)
    assert "--output: text cannot be written" in error_of("--output", "text/unet.onnx")
    Path("unet.onnx").mkdir()
    assert "unet.onnx was not written by tools.export" in error_of()

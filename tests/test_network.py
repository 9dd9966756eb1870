"""Any network that gives logits can take the U-Net's place, by one change in build_network."""

import re
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rows, same, weights
from PIL import Image
from torch import nn
from torchvision.models import segmentation

import model
import predict
import train
import utils
from machinery.decoding import read_image
from machinery.errors import Stopped, UserError
from model import OnlyLogits, UNet, build_network, new_network, set_first_prediction
from tools import export

ROOT = Path(train.__file__).parent
BEST = "my_checkpoint_best.pth.tar"


def network_of(*last: nn.Module) -> nn.Sequential:
    """A network of a few layers, with these at its end, which get 8 channels."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *last)


class Pooled(nn.Module):
    """Adds the image's mean features after BatchNorm, as DeepLab does: it cannot be trained on one image."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(x.mean((2, 3), keepdim=True))


class Position(nn.Module):
    """Multiplies by a constant of float32, whatever type the weights have, and convolves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x * torch.linspace(0.5, 1, x.shape[-1]))


class Dictionary(nn.Module):
    """Returns its logits in a dictionary, as torchvision's networks do, and has dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network_of(Pooled(), nn.Dropout(0.5), nn.Conv2d(8, 1, 1))
        self.calls, self.stop_at = 0, None  # the call in which it sends its process a signal

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        if self.calls == self.stop_at:
            signal.raise_signal(signal.SIGTERM)
        return {"out": self.layers(x)}


NETWORKS = {
    "dictionary": lambda: OnlyLogits(Dictionary()),
    "without BatchNorm": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1)),
    "statistics of the batch alone": lambda: network_of(
        nn.BatchNorm2d(8, track_running_stats=False), nn.Conv2d(8, 1, 1)
    ),
    "without bias": lambda: network_of(nn.Conv2d(8, 1, 1, bias=False)),
    "transposed": lambda: network_of(nn.MaxPool2d(2), nn.ConvTranspose2d(8, 1, 2, stride=2)),
    "enlarged": lambda: network_of(nn.MaxPool2d(2), nn.Conv2d(8, 1, 1), nn.Upsample(scale_factor=2, mode="bilinear")),
    "pixels shuffled": lambda: network_of(nn.MaxPool2d(2), nn.Conv2d(8, 4, 1), nn.PixelShuffle(2)),
    "depthwise": lambda: network_of(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 1, 1)),
    "float32 constants": lambda: network_of(Position(), nn.Conv2d(8, 1, 1)),
    "frozen": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False), nn.Conv2d(8, 1, 1)),
}


@pytest.fixture
def swap(monkeypatch):
    """Makes build_network return what a function returns."""

    def put(make) -> None:
        for room in (model, predict, utils):
            monkeypatch.setattr(room, "build_network", lambda config, checkpointing=False: make())

    return put


def refusal(run: partial) -> str:
    with pytest.raises(UserError) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Training and prediction


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_is_trained_and_predicted_with(project, run_train, swap, capsys, name):
    swap(NETWORKS[name])
    run_train("--num-epochs", "1", "--batch-size", "21")  # the last of 64 photos is a batch with 20 of the others
    last = capsys.readouterr().out
    assert 0 < float(rows()[0]["val_loss"]) < 0.7 and "at the photos' original size." in last
    photo = min(Path("data/val_images").iterdir())
    predict.main([str(photo), "--tta"])
    assert Image.open(f"predictions/{photo.stem}_mask.png").size == Image.open(photo).size
    image = read_image(photo, (32, 48))[None]
    precise, rounded = (predict.load_model(BEST, "cpu", precision) for precision in ("fp32", "bf16"))
    assert rounded(image) == pytest.approx(precise(image), abs=0.05) and (rounded(image) != precise(image)).any()
    assert all(value.dtype != torch.bfloat16 for value in rounded.state_dict().values())  # BatchNorm would lose by it


@pytest.mark.parametrize("flags", [["--batch-size", "1"], ["--batch-size", "2", "--accumulation", "2"]])
def test_a_network_that_cannot_learn_from_one_image_names_the_setting(project, run_train, swap, flags):
    """Batches are always full, so that a last one of one photo is none: 64 photos are 4 batches of 21 above."""
    swap(NETWORKS["dictionary"])
    said = refusal(partial(run_train, "--num-epochs", "1", *flags))
    assert said.startswith("BATCH_SIZE gives this network one image at a time") and "raise BATCH_SIZE" in said


def test_a_run_of_another_network_that_is_stopped_and_continued_ends_with_the_same_weights(project, run_train, swap):
    flags = ["--num-epochs", "2", "--batch-size", "16"]
    swap(NETWORKS["dictionary"])
    run_train(*flags)
    wanted = weights()

    def stopping() -> nn.Module:
        network = NETWORKS["dictionary"]()
        network.network.stop_at = 3  # in the first epoch
        return network

    swap(stopping)
    with pytest.raises(Stopped):
        run_train(*flags)
    swap(NETWORKS["dictionary"])
    run_train(*flags, "--load-model")
    assert same(wanted, weights())


def test_another_network_trains_on_crops_and_sees_whole_photos(project, run_train, swap):
    shapes = []

    def make() -> nn.Module:
        network = NETWORKS["without bias"]()
        network.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape[-2:])))
        return network

    swap(make)
    run_train("--num-epochs", "1", "--crop", "64", "64", "--batch-size", "32")
    assert set(shapes) == {(64, 64), (64, 96)}
    assert predict.load_model(BEST).window == (64, 64)
    predict.main(["data/val_images"])
    assert len(list(Path("predictions").iterdir())) == 32


def test_a_new_network_predicts_the_share_of_foreground_everywhere():
    network = new_network({"features": (4, 8), "encoder": None, "tile": None}, checkpointing=False, foreground=0.2)
    torch.testing.assert_close(network(torch.rand(2, 3, 32, 48)).sigmoid(), torch.full((2, 1, 32, 48), 0.2))


def test_the_last_layers_bias_makes_the_first_prediction():
    images = torch.rand(2, 3, 32, 48)
    for name in ("dictionary", "transposed", "enlarged"):
        network = NETWORKS[name]().eval()
        for layer in network.modules():  # all but the bias of the last layer gives 0
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.out_channels == 1:
                nn.init.zeros_(layer.weight)
        set_first_prediction(network, 0.2)
        assert network(images).sigmoid().mean().item() == pytest.approx(0.2), name
    for name in ("without bias", "pixels shuffled"):
        network = NETWORKS[name]()
        before = {name: weight.clone() for name, weight in network.state_dict().items()}
        set_first_prediction(network, 0.2)
        assert same(before, network.state_dict()), name


def test_an_exported_network_gives_its_probabilities(project, run_train, swap, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the packages onnx, onnxscript and onnxruntime")
    pytest.importorskip("onnxscript", reason="needs the packages onnx, onnxscript and onnxruntime")
    swap(NETWORKS["dictionary"])
    run_train("--num-epochs", "1")
    monkeypatch.setattr(export, "SECONDS", 0)
    export.main([])
    session, network = onnxruntime.InferenceSession("unet.onnx"), predict.load_model(BEST, "cpu")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), np.uint8)
    expected = torch.from_numpy(network(images)).sigmoid().numpy()
    assert np.abs(session.run(None, {"images": images})[0] - expected).max() < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# One sentence


WRONG = {
    "half the size": (
        lambda: network_of(nn.MaxPool2d(2), nn.Conv2d(8, 1, 1)),
        "the network gives logits of 1 x 16 x 24 for images of 3 x 32 x 48: they must have 1 channel and the images'",
    ),
    "two channels": (
        lambda: network_of(nn.Conv2d(8, 2, 1)),
        "the network gives logits of 2 x 32 x 48 for images of 3 x 32 x 48: they must have 1 channel and the images'",
    ),
    "no channel": (lambda: network_of(nn.Conv2d(8, 1, 1), nn.Flatten(1, 2)), "the network gives logits of 32 x 48 for"),
    "a dictionary": (
        Dictionary,
        "the network gives a dict, not logits: let build_network (model.py) return only these",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_network_without_a_logit_for_each_pixel(project, run_train, swap, name):
    make, sentence = WRONG[name]
    swap(make)
    assert refusal(partial(run_train, "--num-epochs", "1")).startswith(sentence)
    assert not Path("my_checkpoint.pth.tar").exists()


def test_a_size_at_which_the_logits_are_smaller(project, run_train, swap):
    swap(NETWORKS["transposed"])
    run_train("--num-epochs", "1")
    sentence = refusal(partial(predict.main, ["data/val_images", "--size", "33", "48"]))
    assert sentence.startswith("the network gives logits of 1 x 32 x 48 for images of 3 x 33 x 48:")


def test_settings_for_which_another_network_has_nothing(project, run_train, swap):
    swap(NETWORKS["without bias"])
    pytest.importorskip("timm")
    sentence = refusal(partial(run_train, "--encoder", "test_resnet", "--image-height", "64", "--image-width", "64"))
    assert sentence == "ENCODER is test_resnet, but the network of build_network has none: set it to None"
    sentence = refusal(partial(run_train, "--activation-checkpointing"))
    assert sentence == "ACTIVATION_CHECKPOINTING is True, but the network of build_network has none: set it to False"
    run_train("--num-epochs", "1")
    sentence = refusal(partial(predict.main, ["data/val_images", "--size", "32", "48", "--tile", "64"]))
    assert sentence == "--tile needs a network that has `tile` (build_network in model.py): leave --tile out"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_network_that_cannot_be_built_without_memory_is_read(project, run_train, swap):
    def make() -> nn.Module:
        share = torch.linspace(0, 0.5, 3)[1].item()  # which the meta device cannot tell
        return network_of(nn.Dropout(share), nn.Conv2d(8, 1, 1))

    swap(make)
    run_train("--num-epochs", "1")
    assert same(weights(BEST), weights())


def test_a_checkpoint_of_another_network_is_refused(photos, swap):
    swap(NETWORKS["dictionary"])
    sentence = refusal(partial(predict.main, ["data/val_images"]))
    assert sentence.startswith(f"{BEST} is not from this train.py, or its network is not the one that")


@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_older_descriptions_of_the_network_make_the_same_one(tile):
    older = {"in_channels": 3, "out_channels": 1, "features": [4, 8]} | ({"tile": list(tile)} if tile else {})
    todays = {"features": (4, 8), "encoder": None, "tile": tile}
    networks = [UNet(**older), UNet(**todays), build_network(older), build_network(todays)]
    shapes = [{name: weight.shape for name, weight in network.state_dict().items()} for network in networks]
    assert all(some == shapes[0] for some in shapes)
    assert all((tuple(network.tile) if network.tile else None) == tile for network in networks)


# ---------------------------------------------------------------------------------------------------------------------
# One place


def test_the_lines_of_the_readme_make_a_network_of_torchvision():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"^## The network$.*?^```python$(.*?)^```$", readme, re.MULTILINE | re.DOTALL)[1]
    names = {"OnlyLogits": OnlyLogits}
    exec("def build_network(config, checkpointing=False):" + lines.replace("\n", "\n    "), names)
    with torch.device("meta"):
        network = names["build_network"]({})
        assert network(torch.empty(2, 3, 64, 96)).shape == (2, 1, 64, 96)
    assert isinstance(network.network, segmentation.DeepLabV3)


def test_networks_are_made_in_one_place():
    files = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("machinery/*.py"), *ROOT.glob("docs/*.py")]
    makers = {path.name for path in files if re.search(r"(?<!class )\bUNet\(", path.read_text(encoding="utf-8"))}
    assert makers == {"model.py", "draw_unet.py"}  # which draws the U-Net, whatever is trained

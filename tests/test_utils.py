import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score, jaccard_score
from torch import nn

import utils
from machinery.device import Device
from train import image_losses

CPU = Device(torch.device("cpu"), torch.float32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


class FirstChannel(nn.Module):
    """A network whose logits are the image's first channel, normalised, so that a test chooses them."""

    def forward(self, x):
        return x[:, :1]


class Items(list):
    shown = None

    def __getitem__(self, key):
        return super().__getitem__(key[2])


def loader(items: list, batch_size: int) -> utils.Loader:
    return utils.Loader(Items(items), batch_sampler=utils.Batches(len(items), batch_size))


@pytest.fixture
def images_and_masks():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (7, 9, 11, 3), np.uint8)
    masks = (random.random((7, 9, 11)) < np.linspace(0, 1, 7)[:, None, None]).astype(np.uint8)
    images[0] = 0  # with mask 0: both empty
    return list(zip(images, masks, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3, 7])  # 3 leaves an uneven last batch
def test_metrics_equal_those_of_scikit_learn(images_and_masks, batch_size):
    found, photo_dice = utils.check_accuracy(loader(images_and_masks, batch_size), FirstChannel(), CPU, image_losses)
    assert np.mean(photo_dice) == pytest.approx(found["dice"])
    pairs = [(image[..., 0].flatten() > 127, mask.flatten() > 0) for image, mask in images_and_masks]
    assert found["dice"] == pytest.approx(np.mean([f1_score(m, p, zero_division=1) for p, m in pairs]))
    assert found["iou"] == pytest.approx(np.mean([jaccard_score(m, p, zero_division=1) for p, m in pairs]))
    assert found["pixel_accuracy"] == pytest.approx(np.mean([accuracy_score(m, p) for p, m in pairs]))
    logits = torch.tensor(np.stack([(image[..., 0] / 255 - 0.5) / 0.2 for image, _ in images_and_masks]))
    masks = torch.tensor(np.stack([mask for _, mask in images_and_masks])).double()
    assert found["val_loss"] == pytest.approx(F.binary_cross_entropy_with_logits(logits, masks).item())


@pytest.mark.parametrize(
    ("prediction", "mask", "dice", "iou"),
    [
        ([0, 0, 0, 0], [0, 0, 0, 0], 1, 1),  # both empty
        ([1, 1, 1, 1], [1, 1, 1, 1], 1, 1),
        ([1, 1, 0, 0], [0, 0, 1, 1], 0, 0),
        ([0, 0, 0, 0], [1, 0, 0, 0], 0, 0),
        ([1, 1, 0, 0], [1, 0, 0, 0], 2 / 3, 1 / 2),
    ],
)
def test_dice_and_iou_by_hand(prediction, mask, dice, iou):
    tp, fp, fn, tn = utils.confusion(
        torch.tensor([prediction]).bool(), torch.tensor([mask]).bool(), torch.ones(1, 4).bool()
    )
    assert tp + fp + fn + tn == 4
    assert utils.dice_scores(tp, fp, fn).item() == pytest.approx(dice)
    assert utils.iou_scores(tp, fp, fn).item() == pytest.approx(iou)


def test_a_probability_of_one_half_is_background(images_and_masks):
    images = [(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8))]
    cpu = Device(torch.device("cpu"), torch.float32)
    assert utils.check_accuracy(loader(images, 1), FirstChannel(), cpu, image_losses)[1] == [1]


def test_validation_never_changes_the_model(images_and_masks):
    from model import UNet

    model = UNet(features=(4, 8)).train()
    images = [(np.tile(image, (2, 2, 1)), np.tile(mask, (2, 2))) for image, mask in images_and_masks]
    before = copy.deepcopy(model.state_dict())
    utils.check_accuracy(loader(images, 3), model, CPU, image_losses)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and all(layer.training for layer in model.modules())

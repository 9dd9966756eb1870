import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score, jaccard_score
from torch import nn

import utils
from device import Device
from train import image_losses

CPU = Device(torch.device("cpu"), torch.float32)


class FirstChannel(nn.Module):
    """A network whose logits are the image's first channel, so that a test chooses them."""

    def forward(self, x):
        return x[:, :1]


class Items(list):
    def __getitem__(self, key):
        return super().__getitem__(key[2])


def loader(items: list, batch_size: int) -> utils.Loader:
    return utils.Loader(Items(items), batch_sampler=utils.Batches(len(items), batch_size))


@pytest.fixture
def images_and_masks():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(7, 3, 9, 11, generator=generator)
    masks = (torch.rand(7, 9, 11, generator=generator) < torch.linspace(0, 1, 7)[:, None, None]).float()
    images[0, 0] = -1  # with mask 0: both empty
    return list(zip(images, masks, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3, 7])  # 3 leaves an uneven last batch
def test_metrics_equal_those_of_scikit_learn(images_and_masks, batch_size):
    found, photo_dice = utils.check_accuracy(loader(images_and_masks, batch_size), FirstChannel(), CPU, image_losses)
    assert np.mean(photo_dice) == pytest.approx(found["dice"])
    pairs = [((image[0].flatten() > 0).numpy(), (mask.flatten() > 0).numpy()) for image, mask in images_and_masks]
    assert found["dice"] == pytest.approx(np.mean([f1_score(m, p, zero_division=1) for p, m in pairs]))
    assert found["iou"] == pytest.approx(np.mean([jaccard_score(m, p, zero_division=1) for p, m in pairs]))
    assert found["pixel_accuracy"] == pytest.approx(np.mean([accuracy_score(m, p) for p, m in pairs]))
    logits = torch.stack([image[0] for image, _ in images_and_masks])
    masks = torch.stack([mask for _, mask in images_and_masks])
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
    tp, fp, fn, tn = utils.confusion(torch.tensor([prediction]).bool(), torch.tensor([mask]).bool())
    assert tp + fp + fn + tn == 4
    assert utils.dice_scores(tp, fp, fn).item() == pytest.approx(dice)
    assert utils.iou_scores(tp, fp, fn).item() == pytest.approx(iou)


def test_a_probability_of_one_half_is_background(images_and_masks):
    images = [(torch.zeros(3, 4, 4), torch.zeros(4, 4))]
    assert utils.check_accuracy(loader(images, 1), FirstChannel(), CPU, image_losses)[1] == [1]


def test_validation_never_changes_the_model(images_and_masks):
    from model import UNet

    model = UNet(features=(4, 8)).train()
    images = [(F.pad(image, (4, 4, 4, 4)), F.pad(mask, (4, 4, 4, 4))) for image, mask in images_and_masks]
    before = copy.deepcopy(model.state_dict())
    utils.check_accuracy(loader(images, 3), model, CPU, image_losses)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and all(layer.training for layer in model.modules())

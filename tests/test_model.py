import pytest
import torch
from torch import nn

from model import UNet, UpConv


@pytest.mark.parametrize("size", [(16, 16), (16, 33), (31, 47), (160, 240), (97, 16)])
def test_output_is_as_large_as_the_input(size):
    with torch.device("meta"):
        assert UNet()(torch.empty(2, 3, *size)).shape == (2, 1, *size)


def test_the_default_network_has_31_million_weights():
    with torch.device("meta"):
        model = UNet()
    assert sum(weight.numel() for weight in model.parameters()) == 31_037_633
    assert [down.layers[3].out_channels for down in model.downs] == [64, 128, 256, 512]
    assert model.bottleneck.layers[3].out_channels == 1024


def test_padding_leaves_the_rest_of_the_image_alone():
    """Logits far from the padded edge are those of the same image at a size that needs no padding."""
    torch.manual_seed(0)
    model = UNet(features=(4, 8)).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model(image[..., :61, :59])[..., :32, :32], model(image)[..., :32, :32])


def test_an_up_convolution_is_pytorchs():
    ours, theirs = UpConv(5, 3, 2, stride=2), torch.nn.ConvTranspose2d(5, 3, 2, stride=2)
    theirs.load_state_dict(ours.state_dict())
    for layout in (torch.contiguous_format, torch.channels_last):
        gradients = []
        for layer in (ours, theirs):
            layer.zero_grad()
            x = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
            out = layer(x.requires_grad_())
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
            gradients.append((out, x.grad, *(weight.grad for weight in layer.parameters())))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)


def test_every_weight_learns():
    model = UNet(features=(4, 8))
    nn.init.ones_(model.head.weight)  # it starts at zero, which holds back what lies before it for one step
    model(torch.randn(2, 3, 20, 20)).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_channels_are_free():
    assert UNet(in_channels=1, out_channels=5, features=(4,))(torch.randn(1, 1, 16, 16)).shape == (1, 5, 16, 16)
    assert UNet(features=(4, 7, 7, 5))(torch.randn(2, 3, 16, 16)).shape == (2, 1, 16, 16)


def test_blocks_with_another_norm_are_not_folded():
    model = UNet(3, 1, (8, 16)).eval()
    model.downs[0].layers[1], model.downs[0].layers[4] = torch.nn.GroupNorm(1, 8), torch.nn.GroupNorm(1, 8)
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(1, 3, 32, 48)
    wanted = model(images)
    model.fold_batch_norm()
    torch.testing.assert_close(model(images), wanted, rtol=1e-3, atol=1e-4)

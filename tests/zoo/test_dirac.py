from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from foldexport.zoo.dirac import DiracConv1d, DiracConv2d, DiracConv3d, NCReLU, dirac_delta, tiled_dirac_delta

KINDS = [(DiracConv1d, F.conv1d, 1), (DiracConv2d, F.conv2d, 2), (DiracConv3d, F.conv3d, 3)]


def randomised(conv):
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_()
    return conv.eval()


@pytest.mark.parametrize("kind, convolve, spatial", KINDS)
@pytest.mark.parametrize("channels", [(4, 4), (3, 6), (6, 3)])
@pytest.mark.parametrize("padding, dilation, bias", [(0, 1, True), (1, 1, False), (2, 2, True)])
def test_forward_is_the_paper_s_equation(kind, convolve, spatial, channels, padding, dilation, bias):
    conv = randomised(kind(*channels, 3, padding=padding, dilation=dilation, bias=bias))
    per_filter = (-1, *[1] * (spatial + 1))
    rows = [row / max(row.norm().item(), 1e-12) for row in conv.weight.detach().flatten(1)]
    unit = torch.stack(rows).view_as(conv.weight)
    w_hat = conv.alpha.view(per_filter) * conv.delta + conv.beta.view(per_filter) * unit
    x = torch.randn(2, channels[0], *[7] * spatial)
    expected = convolve(x, w_hat, conv.bias, padding=padding, dilation=dilation)
    torch.testing.assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, convolve, spatial", KINDS)
def test_delta_is_the_identity_and_keys_are_the_published_ones(kind, convolve, spatial):
    conv = kind(5, 5, 3, padding=1)
    x = torch.randn(1, 5, *[6] * spatial)
    assert torch.equal(convolve(x, conv.delta, padding=1), x)
    assert list(conv.state_dict()) == ["weight", "alpha", "beta", "bias", "delta"]
    assert list(kind(5, 5, 3, bias=False).state_dict()) == ["weight", "alpha", "beta", "delta"]


def test_kernel_need_not_be_square():
    conv = randomised(DiracConv2d(4, 4, (3, 5), padding=(1, 2)))
    assert conv(torch.randn(1, 4, 8, 9)).shape == (1, 4, 8, 9)
    assert "kernel_size=(3, 5)" in repr(conv)


def test_a_filter_of_zeros_leaves_the_delta():
    conv = DiracConv2d(3, 3, 3, padding=1, bias=False)
    torch.nn.init.zeros_(conv.weight)
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(conv(x), x)


def test_delta_of_unequal_channels_has_as_many_ones_as_the_fewer():
    assert dirac_delta((4, 6, 3, 3)).sum() == 4
    assert dirac_delta((6, 4, 3)).sum() == 4


@pytest.mark.parametrize("shape", [(4, 8, 3, 3), (8, 4, 3, 3), (4, 4, 3, 3)])
def test_tiled_delta_repeats_the_identity(shape):
    delta = tiled_dirac_delta(shape)
    out_channels, in_channels = shape[:2]
    n = min(shape[:2])
    expected = torch.tensor([[float(o % n == i % n) for i in range(in_channels)] for o in range(out_channels)])
    assert torch.equal(delta[:, :, 1, 1], expected)
    assert delta.sum() == expected.sum()


def test_tiled_delta_refuses_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="41x40"):
        tiled_dirac_delta((41, 40, 3, 3))


def test_ncrelu_stacks_positive_and_negative_part():
    x = torch.tensor([[[1.0, -2.0]], [[0.0, 3.0]]])
    expected = torch.tensor([[[1.0, 0.0], [0.0, -2.0]], [[0.0, 3.0], [0.0, 0.0]]])
    assert torch.equal(NCReLU()(x), expected)

"""Compositions of convolutions against one run behind the other."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from foldexport.fold import conv as algebra
from foldexport.fold.conv import Conv, composition
from tests.fold.random_convs import RANKS, SPATIAL, convs, exact, inputs, same, tensor

PADDED = Conv(torch.ones(4, 4, 3, 3), padding=((1, 1), (1, 1)))


def check_composition(draw, first, second):
    x = inputs(draw, first, second)
    if first.spatial_rank and not first.transposed:  # the second must fit behind the first
        need = zip(second.reach, first.reach, first.stride, strict=True)
        more = [0 if second.transposed else 1 + s * (r2 + 1) + r1 for r2, r1, s in need]
        x = tensor(draw, 2, first.in_channels, *(n + m for n, m in zip(x.shape[2:], more, strict=True)))
    inner = first.output_size(x.shape[2:]) if first.spatial_rank else ()
    assume(not inner or min(inner) > 0 and min(second.output_size(inner)) > 0)
    merged = algebra.compose(first, second)
    assert same(merged(x), second(first(x)))
    assert merged.groups == math.gcd(first.groups, second.groups)
    sizes = x.shape[2:] if merged.spatial_rank else ()
    assert algebra.composed_cost(first, second, sizes) == algebra.cost(merged, sizes)
    assert not merged.spatial_rank or merged.output_size(x.shape[2:]) == second.output_size(inner)
    return merged


@exact
@given(data=st.data(), rank=RANKS)
def test_composition_without_padding_behind(data, rank):
    first = data.draw(convs(rank=rank))
    second = data.draw(convs(rank=rank, cin=first.out_channels, padding=((0, 0),) * rank))
    check_composition(data.draw, first, second)


@exact
@given(data=st.data(), rank=SPATIAL, stride=st.integers(1, 3))
def test_composition_of_1x1_and_padded(data, rank, stride):
    """The first may pad and stride: what lies outside its result is 0 all the same without a bias."""
    first = data.draw(convs(rank=rank, kernel=(1,) * rank, stride=(stride,) * rank, bias=False))
    second = data.draw(convs(rank=rank, cin=first.out_channels))
    check_composition(data.draw, first, second)


@exact
@given(data=st.data(), rank=SPATIAL, order=st.booleans())
def test_composition_of_1x1_and_transposed(data, rank, order):
    ones = {"kernel": (1,) * rank, "stride": (1,) * rank, "padding": ((0, 0),) * rank}
    if order:
        first = data.draw(convs(rank=rank, bias=False, **ones))
        second = data.draw(convs(rank=rank, cin=first.out_channels, transposed=True))
    else:
        first = data.draw(convs(rank=rank, transposed=True))
        second = data.draw(convs(rank=rank, cin=first.out_channels, **ones))
    check_composition(data.draw, first, second)


def test_depthwise_behind_depthwise_stays_depthwise():
    first = Conv(torch.randn(6, 1, 3, 3), torch.randn(6).double(), padding=((1, 1), (1, 1)), groups=6)
    second = Conv(torch.randn(12, 1, 2, 3), torch.randn(12).double(), (2, 1), groups=6)
    merged, x = algebra.compose(first, second), torch.randn(1, 6, 9, 9).double()
    assert merged.groups == 6 and merged.weight.shape == (12, 1, 4, 5)
    assert same(merged(x), second(first(x)))


def test_a_wider_step_of_the_second_stays_a_dilation():
    first = Conv(torch.randn(4, 4, 3).double(), stride=(2,), dilation=(2,))
    second = Conv(torch.randn(4, 4, 3).double(), dilation=(2,))
    merged = algebra.compose(first, second)
    assert (merged.kernel_size, merged.dilation, merged.stride) == ((7,), (2,), (2,))


def test_a_1x1_convolution_goes_behind_average_pooling():
    """``pool(conv(x)) = conv(pool(x))``, and as one strided convolution."""
    pool = algebra.average_pool(8, (2, 2), (2, 2), ((0, 0), (0, 0)))
    conv, x = Conv(torch.randn(4, 8, 1, 1), torch.randn(4).double()), torch.randn(1, 8, 6, 6).double()
    behind = algebra.average_pool(4, (2, 2), (2, 2), ((0, 0), (0, 0)))
    wanted = F.avg_pool2d(conv(x), 2)
    assert same(algebra.compose(conv, behind)(x), wanted)
    assert same(algebra.compose(pool, conv)(x), wanted)


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (PADDED, PADDED, "more than one tap"),
        (Conv(torch.ones(4, 4, 1, 1), torch.ones(4).double()), PADDED, "the bias of"),
        (Conv(torch.ones(4, 4, 1, 1), padding=((-1, 0), (0, 0))), PADDED, "crops"),
        (PADDED, Conv(torch.ones(4, 6, 1, 1)), "does not fit"),
        (PADDED, Conv(torch.ones(4, 4)), "does not fit"),
        (PADDED, Conv(torch.ones(4, 4, 2, 2), stride=(2, 2), transposed=True), "1x1"),
        (Conv(torch.ones(4, 4, 2, 2), stride=(2, 2), transposed=True), PADDED, "1x1"),
        (Conv(torch.ones(4, 4, 1, 1), torch.ones(4).double()),
         Conv(torch.ones(4, 4, 2, 2), stride=(2, 2), transposed=True), "the bias of"),
    ],
)  # fmt: skip
def test_compositions_that_are_refused(first, second, reason):
    with pytest.raises(ValueError, match=reason):
        algebra.compose(first, second)
    with pytest.raises(ValueError, match=reason):
        algebra.composed_cost(first, second, (9, 9))


def test_padding_on_one_axis_refuses_taps_on_that_axis_only():
    first = Conv(torch.randn(4, 4, 1, 3).double())
    x = torch.randn(1, 4, 7, 7).double()
    second = Conv(torch.randn(4, 4, 3, 2).double(), padding=((1, 2), (0, 0)))
    assert same(algebra.compose(first, second)(x), second(first(x)))
    with pytest.raises(ValueError, match="more than one tap"):
        algebra.compose(first, replace(second, padding=((1, 2), (0, 1))))


def test_a_border_of_the_bias_merges():
    """DBB pads the first branch's result with its own bias; that is what the composition without padding says."""
    first, x = Conv(torch.randn(4, 4, 1, 1).double()), torch.randn(1, 4, 5, 5).double()
    k, shift = torch.randn(4).double(), torch.randn(4).double()
    second = Conv(torch.randn(4, 4, 3, 3).double(), torch.randn(4).double())
    inner = F.pad(first(x) * k.reshape(-1, 1, 1), (1, 1, 1, 1)) + shift.reshape(-1, 1, 1)
    absorbed = algebra.absorb_padding(second.affine_input(k, shift), (1, 1), (1, 1))
    assert same(algebra.compose(first, absorbed)(x), second(inner))


def test_a_composition_that_forgets_the_stride_is_caught(monkeypatch):
    """Planted: the second's taps put next to each other although the first strides."""
    first = Conv(torch.randn(4, 4, 3).double(), stride=(2,))
    second = Conv(torch.randn(4, 4, 3).double())
    x, product = torch.randn(1, 4, 15).double(), composition._product

    def wrong(*args):
        return F.pad(product(*args[:-1], [(1, 1)]), (0, 2))

    assert same(algebra.compose(first, second)(x), second(first(x)))
    monkeypatch.setattr(composition, "_product", wrong)
    assert not same(algebra.compose(first, second)(x), second(first(x)))

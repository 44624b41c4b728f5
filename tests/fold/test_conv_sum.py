"""Sums of convolutions against the sum of their results."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from foldexport.fold import conv as algebra
from foldexport.fold.conv import Conv, summation
from tests.fold.random_convs import RANKS, convs, exact, inputs, same, twins


@exact
@given(data=st.data(), rank=RANKS, transposed=st.booleans())
def test_sum(data, rank, transposed):
    a = data.draw(convs(rank=rank, transposed=transposed and rank > 0))
    b = data.draw(twins(a))
    x = inputs(data.draw, a, b)
    assume(rank == 0 or min(a.output_size(x.shape[2:])) > 0)
    assert a.same_geometry(b)
    merged, sizes = algebra.add(a, b), x.shape[2:] if rank else ()
    assert same(merged(x), a(x) + b(x))
    assert merged.groups == math.gcd(a.groups, b.groups)
    assert algebra.added_cost(a, b, sizes) == algebra.cost(merged, sizes)


@pytest.mark.parametrize(
    ("kernels", "kernel", "dilation"),
    [
        ([(3, 1, 1), (1, 1, 0)], 3, 1),  # (k, dilation, lo)
        ([(3, 2, 2), (3, 2, 2)], 3, 2),
        ([(3, 2, 2), (1, 1, 0)], 3, 2),
        ([(3, 2, 2), (3, 1, 1)], 5, 1),
        ([(3, 4, 4), (3, 2, 2)], 5, 2),
        ([(3, 3, 3), (1, 1, 1)], 7, 1),
        ([(2, 1, 0), (2, 1, 1)], 3, 1),
        ([(2, 6, 0), (2, 4, 0)], 4, 2),
    ],
)
def test_the_window_of_a_sum_is_the_smallest(kernels, kernel, dilation):
    a, b = (
        Conv(torch.randn(4, 4, k).double(), dilation=(step,), padding=((lo, 12 - lo + step * (k - 1)),))
        for k, step, lo in kernels
    )
    merged = algebra.add(a, b)
    assert (merged.kernel_size, merged.dilation) == ((kernel,), (dilation,))
    x = torch.randn(1, 4, 20).double()
    assert same(merged(x), a(x) + b(x))


@pytest.mark.parametrize("stride", [1, 2])
def test_branches_of_published_blocks(stride):
    """RepVGG, ACNet and DBB's pooling branch: one 3x3 convolution, dense."""
    steps, one = (stride, stride), ((1, 1), (1, 1))
    x = torch.randn(2, 6, 9, 8).double()
    branches = [
        Conv(torch.randn(6, 6, 3, 3), torch.randn(6).double(), steps, padding=one),
        Conv(torch.randn(6, 6, 1, 1), torch.randn(6).double(), steps),
        algebra.identity(6, 2, stride).affine_output(torch.randn(6), torch.randn(6)),
        Conv(torch.randn(6, 6, 3, 1), None, steps, padding=((1, 1), (0, 0))),
        Conv(torch.randn(6, 6, 1, 3), None, steps, padding=((0, 0), (1, 1))),
        algebra.average_pool(6, (3, 3), steps, one),
    ]
    merged, wanted = branches[0], branches[0](x)
    for branch in branches[1:]:
        merged, wanted = algebra.add(merged, branch), wanted + branch(x)
    assert merged.kernel_size == (3, 3) and merged.padding == one and merged.groups == 1
    assert same(merged(x), wanted)
    assert same(branches[-1](x), F.avg_pool2d(x, 3, stride, 1))
    assert torch.equal(algebra.identity(6, 2, stride)(x), x[:, :, ::stride, ::stride])


def test_depthwise_branches_stay_depthwise():
    depthwise = Conv(torch.randn(8, 1, 3, 3), padding=((1, 1), (1, 1)), groups=8)
    assert algebra.add(depthwise, algebra.identity(8, 2)).groups == 8
    assert algebra.identity(5, 0).dense().shape == (5, 5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride": (2, 2)}, "strides"),
        ({"padding": ((1, 1), (0, 1))}, "different output sizes"),
        ({"weight": torch.zeros(6, 6, 3, 3)}, "channels"),
        ({"weight": torch.zeros(6, 4, 3), "stride": (1,), "padding": ((1, 1),), "dilation": (1,)}, "kinds"),
    ],
)
def test_sums_that_are_refused(change, reason):
    a = Conv(torch.zeros(6, 4, 3, 3), padding=((1, 1), (1, 1)))
    change = {"output_padding": ()} | change
    with pytest.raises(ValueError, match=reason):
        algebra.add(a, replace(a, **change))
    assert ("channels" in reason) == a.same_geometry(replace(a, **change))


def test_a_transposed_sum_may_crop_beyond_its_kernel():
    """Only one of the two is a convolution with the mirrored kernel; their sum is a transposed one all the same."""
    a = Conv(torch.randn(4, 4, 3).double(), padding=((1, 2),), transposed=True)
    b = Conv(torch.randn(4, 4, 2).double(), padding=((2, 0),), transposed=True)
    assert not algebra.untransposed(a).transposed and algebra.untransposed(b).transposed
    x = torch.randn(1, 4, 9).double()
    assert same(algebra.add(a, b)(x), a(x) + b(x))


def test_a_transposed_sum_that_no_layer_can_compute_is_refused():
    """Its finer step leaves no room for the output padding that both have."""
    a = Conv(torch.ones(2, 2, 5), stride=(2,), dilation=(3,), transposed=True, output_padding=(2,))
    b = Conv(torch.ones(2, 2, 4), stride=(2,), dilation=(4,), transposed=True, output_padding=(2,))
    with pytest.raises(ValueError, match="output padding of 2"):
        algebra.add(a, b)


@pytest.mark.parametrize("planted", ["offset", "dilation"])
def test_a_misaligned_sum_is_caught(monkeypatch, planted):
    """Planted: taps put at the start of the window, or next to each other."""

    def wrong(conv, axis, first, step):
        start = 0 if planted == "offset" else (-conv.padding[axis][0] - first) // step
        stride = 1 if planted == "dilation" else max(1, conv.dilation[axis] // step)
        return slice(start, start + stride * (conv.kernel_size[axis] - 1) + 1, stride)

    a = Conv(torch.randn(4, 4, 3).double(), dilation=(2,), padding=((2, 2),))
    b = Conv(torch.randn(4, 4, 3).double(), padding=((1, 1),))
    x = torch.randn(1, 4, 9).double()
    assert same(algebra.add(a, b)(x), a(x) + b(x))
    monkeypatch.setattr(summation, "_places", wrong)
    assert not same(algebra.add(a, b)(x), a(x) + b(x))

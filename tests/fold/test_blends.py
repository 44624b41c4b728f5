"""Sums of a value with a sum of itself are written flat: ``x + α ⊙ (f − x)`` is one addition, or one convolution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import foldexport
from foldexport.errors import EquivalenceError
from foldexport.fold import blends
from tests.fold.checks import assert_same, fold64, operators
from tests.fold.layers import conv, conv_bn
from tests.statistics import randomise

SHAPE = (8, 8, 8)


class Blended(nn.Module):
    """A stem, then ``blend(x, f(x), α)`` with α one number for each channel, in front of a ReLU and a convolution."""

    def __init__(self, branch: nn.Module, blend: Callable[[Tensor, Tensor, Tensor], Tensor], low: float = 0.2, high: float = 0.8):
        super().__init__()
        self.stem, self.branch, self.last = conv_bn(8, 8), branch, conv(8, 8)
        self.alpha = nn.Parameter(torch.empty(8, 1, 1).uniform_(low, high, generator=torch.Generator().manual_seed(0)))
        self.blend, self.relu = blend, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        return self.last(self.relu(self.blend(x, self.branch(x), self.alpha)))


ORDERS = {
    "x + α·(f − x)": lambda x, f, a: x + a * (f - x),
    "α·(f − x) + x": lambda x, f, a: a * (f - x) + x,
    "x − α·(x − f)": lambda x, f, a: x - a * (x - f),
    "f − α·(f − x)": lambda x, f, a: f - a * (f - x),
    "x − (3 − α·(x + f))": lambda x, f, a: x - (3 - a * (x + f)),
    "2·x + torch.sub(f, x, alpha=0.3)": lambda x, f, a: 2 * x + torch.sub(f, x, alpha=0.3),
    "x + (x + f)": lambda x, f, a: x + (x + f),
}


def built(branch: nn.Module, blend: Callable, **bounds: float) -> nn.Module:
    return randomise(Blended(branch, blend, **bounds), 0).double()


def nonlinear() -> nn.Module:
    return nn.Sequential(conv_bn(8, 8), nn.ReLU(), conv_bn(8, 8))


@pytest.mark.parametrize("order", list(ORDERS))
def test_a_blend_with_a_nonlinear_branch_is_one_addition(order: str):
    module = built(nonlinear(), ORDERS[order])
    folded = fold64(module, SHAPE)
    counts = operators(folded.counts_after)
    assert (counts["conv"], counts["add"], counts["mul"], counts["batch_norm"]) == (4, 1, 0, 0)
    assert_same(folded, module, SHAPE)


@pytest.mark.parametrize("order", list(ORDERS))
def test_a_blend_with_a_convolution_is_one_convolution(order: str):
    module = built(conv_bn(8, 8, groups=8), ORDERS[order])
    folded = fold64(module, SHAPE)
    counts = operators(folded.counts_after)
    assert (counts["conv"], sum(counts[kind] for kind in ("add", "mul", "batch_norm"))) == (3, 0)
    assert_same(folded, module, SHAPE)


def test_factors_of_both_signs_and_beyond_one():
    module = built(nonlinear(), ORDERS["x + α·(f − x)"], low=-2.0, high=2.0)
    folded = fold64(module, SHAPE)
    assert operators(folded.counts_after)["add"] == 1
    assert_same(folded, module, SHAPE)


def test_channels_where_the_value_read_twice_cancels():
    module = built(nonlinear(), ORDERS["x + α·(f − x)"])
    with torch.no_grad():
        module.alpha[::2] = 1.0
    folded = fold64(module, SHAPE)
    assert sum(operators(folded.counts_after).values()) <= sum(operators(folded.counts_before).values())
    assert_same(folded, module, SHAPE)


def test_a_value_that_cancels_everywhere_is_not_read():
    module = built(nonlinear(), ORDERS["x + α·(f − x)"], low=1.0, high=1.0)
    folded = fold64(module, SHAPE)
    assert operators(folded.counts_after)["add"] == 0
    assert_same(folded, module, SHAPE)


class Twice(nn.Module):
    """The inner sum is an output as well."""

    def __init__(self):
        super().__init__()
        self.branch = conv_bn(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = torch.relu(self.branch(x)) - x
        return inner, (x + 0.3 * inner).relu()


def test_an_inner_sum_that_is_read_elsewhere_stays():
    module = randomise(Twice(), 0).double()
    folded = fold64(module, SHAPE)
    assert operators(folded.counts_after)["add"] == 2
    assert_same(folded, module, SHAPE)


def test_a_gate_between_them_is_no_blend():
    module = built(nonlinear(), lambda x, f, a: x + torch.sigmoid(f) * (f - x))
    folded = fold64(module, SHAPE)
    assert operators(folded.counts_after)["add"] == 2
    assert_same(folded, module, SHAPE)


def test_a_share_of_the_inner_sum_that_is_lost_is_found(monkeypatch: pytest.MonkeyPatch):
    module = built(nonlinear(), ORDERS["x + α·(f − x)"])
    right = blends._shared
    monkeypatch.setattr(blends, "_shared", lambda shared, factor, *rest: right(shared, -factor, *rest))
    with pytest.raises(EquivalenceError):
        foldexport.fold(module, torch.randn(2, *SHAPE, dtype=torch.float64))

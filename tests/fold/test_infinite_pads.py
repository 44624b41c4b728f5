"""Constant pads of an infinity, which max pools read: their sign must survive a negative γ."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import foldexport
from tests.statistics import randomise


class PaddedPool(nn.Module):
    """A batch norm, a pad by an infinity, a max pool, as NASNet's cells write ``padding="same"``."""

    def __init__(self, before: nn.Module, channels: int, value: float) -> None:
        super().__init__()
        self.before, self.bn, self.value = before, nn.BatchNorm2d(channels), value
        self.head = nn.Conv2d(channels, 5, 3)

    def forward(self, x):
        y = F.pad(self.bn(self.before(x)), (0, 1, 1, 2), value=self.value)
        pooled = F.max_pool2d(y, 3, 2) if self.value < 0 else -F.max_pool2d(-y, 3, 2)
        return self.head(pooled)


@pytest.mark.parametrize("value", [-math.inf, math.inf], ids=["maximum", "minimum"])
def test_behind_a_convolution_nothing_is_left(value):
    network = randomise(PaddedPool(nn.Conv2d(3, 6, 3), 6, value), seed=1, example=torch.randn(2, 3, 16, 16))
    assert (network.bn.weight < 0).any() and (network.bn.weight > 0).any()
    folded = foldexport.fold(network, torch.randn(2, 3, 16, 16))
    turned = {"mul": 1} if value > 0 else {}  # the first of the two changes of sign that a minimum is written with
    assert folded.counts_after == {"conv": 2, "pad": 1, "max_pool": 1} | turned


def test_without_a_maker_that_turns_signs_the_factor_stays_in_front_of_the_pad():
    network = randomise(PaddedPool(nn.Identity(), 3, -math.inf), seed=2, example=torch.randn(2, 3, 16, 16))
    with torch.no_grad():
        network.bn.weight[0] = -0.7
    folded = foldexport.fold(network, torch.randn(2, 3, 16, 16))
    assert folded.counts_after == {"mul": 1, "pad": 1, "max_pool": 1, "conv": 1}
    assert ["pads" in one.reason for one in folded.ledger if one.status == "kept"] == [True]


def test_a_dead_channel_is_restored():
    """γ = 0: the channel is a constant, and padded with an infinity all the same."""
    network = randomise(PaddedPool(nn.Conv2d(3, 6, 3), 6, -math.inf), seed=3, example=torch.randn(2, 3, 16, 16))
    with torch.no_grad():
        network.bn.weight[2] = 0.0
    assert foldexport.fold(network, torch.randn(2, 3, 16, 16)).certificate.ok

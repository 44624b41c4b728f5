"""The largest weight and activation of a folded network, and the scale that a long trunk is given."""

from __future__ import annotations

import torch
from torch import nn

import foldexport
from foldexport.extremes import absurd
from tests.statistics import randomise


class Scaled(nn.Module):
    """``c·(x + f(x))``, as often as ``depth`` says, c = √½."""

    def __init__(self, depth: int, channels: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.branches = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth))
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.stem(x)
        for branch in self.branches:
            x = 0.5**0.5 * (x + branch(x.relu()))
        return self.head(x.mean((2, 3)))


def test_the_largest_weight_and_activation_are_named():
    module = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False)).eval()
    with torch.no_grad():
        module[0].weight.fill_(0.5)
        module[2].weight.fill_(100.0)
    found = foldexport.fold(module, torch.randn(2, 3, 4, 4)).extremes
    assert (found.weight.value, found.weight.layer) == (100.0, "2")
    assert found.activation.layer == "2"


def test_the_range_of_a_trunk_is_centred():
    """33 blocks of c = √½ span 2^16.5; from the middle no weight is more than about 2^8.25 times its own size."""
    module = randomise(Scaled(33), 0)
    folded = foldexport.fold(module, torch.randn(2, 3, 8, 8))
    assert "mul" not in folded.counts_after
    assert folded.extremes.weight.value < 2**10


def test_a_single_absurd_weight_is_named_with_its_place():
    torch.manual_seed(0)
    weight = torch.randn(16, 8, 3, 3)
    alike = {"a": weight, "b": weight * 1e9, "c": torch.zeros(9), "d": torch.full((9,), 1e20), "e": torch.tensor(1e20)}
    assert not list(absurd(alike))
    weight[3, 1, 0, 2] = -3e30
    (said,) = absurd({"fine": torch.randn(50), "conv.weight": weight})
    assert "`conv.weight` holds 3e+30 at [3, 1, 0, 2]" in said and "damaged" in said


def test_many_large_values_are_a_mask_and_no_accident():
    mask = torch.where(torch.arange(100) % 2 == 0, 1e9, 0.1)
    assert not list(absurd({"mask": mask}))
    assert list(absurd({"few": torch.where(torch.arange(400) < 2, 1e9, 0.1)}))[0].count("(2 such values)") == 1

"""One layer called several times: copied where that pays, shared again where the copies are equal, else kept shared."""

from __future__ import annotations

import torch
from torch import nn

from tests.fold.checks import assert_same, fold64, operators
from tests.statistics import randomise


class Levels(nn.Module):
    """One convolution on three sizes of its input, each with a batch norm of its own (as in detection heads)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))

    def forward(self, x):
        found = []
        for norm in self.norms:
            found.append(norm(self.conv(x)).relu())
            x = torch.nn.functional.max_pool2d(x, 2)
        return found


def test_copies_are_made_where_they_cost_less_than_they_save():
    module = randomise(Levels(8), 0)
    folded = fold64(module, (8, 32, 32))
    assert operators(folded.counts_after) == {"conv": 3, "relu": 3, "max_pool": 2}
    assert_same(folded, module, (8, 32, 32))


def test_one_weight_stays_where_copies_would_cost_more():
    module = randomise(Levels(64), 0)
    folded = fold64(module, (64, 8, 8))
    assert sum(layer.weight.numel() for layer in folded.module.modules() if isinstance(layer, nn.Conv2d)) == 64 * 64 * 9
    assert operators(folded.counts_after)["batch_norm"] == 3
    assert any("shared by several calls" in entry.reason for entry in folded.ledger if entry.module == "conv")
    assert_same(folded, module, (64, 8, 8))


def test_equal_copies_are_one_layer_again():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(self.conv(self.norm(self.conv(x)).relu()))

    module = randomise(Twice(), 0)
    folded = fold64(module, (8, 8, 8))
    layers = {id(layer) for layer in folded.module.modules() if isinstance(layer, nn.Conv2d)}
    assert len(layers) == 1 and operators(folded.counts_after)["conv"] == 2
    assert_same(folded, module, (8, 8, 8))

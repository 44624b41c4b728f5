"""An embedding of positions on a trunk: one addition stays where it stands, and what is behind it folds as ever."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

import foldexport
from tests.fold.layers import conv
from tests.statistics import randomise

IMAGE = (3, 8, 8)


class Block(nn.Module):
    """``x + mlp(bn(x))``: Visformer's (Chen et al. 2021)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.wide, self.narrow = conv(channels, 2 * channels, 1), conv(2 * channels, channels, 1)

    def forward(self, x):
        return x + self.narrow(torch.relu(self.wide(self.norm(x))))


class Embedded(nn.Module):
    """A stem with batch norm, positions of every channel (or a mask of them), and blocks on the trunk."""

    def __init__(self, masked: bool = False, blocks: int = 3) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 6), nn.BatchNorm2d(6)
        self.positions = nn.Parameter(torch.randn(1, 6, 8, 8))
        self.blocks, self.head = nn.Sequential(*(Block(6) for _ in range(blocks))), nn.Linear(6, 4)
        self.masked = masked

    def forward(self, x):
        x = self.norm(self.stem(x))
        x = x * self.positions if self.masked else x + self.positions
        return self.head(self.blocks(x).mean((2, 3)))


@pytest.mark.parametrize("masked", [False, True], ids=["added", "multiplied"])
def test_every_batch_norm_behind_it_folds(masked) -> None:
    folded = foldexport.fold(randomise(Embedded(masked), 0).double(), torch.randn(1, *IMAGE, dtype=torch.float64))
    kinds = [entry.rule for entry in folded.ledger if entry.status == "kept"]
    assert folded.certificate.ok and kinds == ["mul" if masked else "add"]
    assert "more than the channels" in next(entry.reason for entry in folded.ledger if entry.status == "kept")
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.module.modules())
    assert sum(entry.op == "call_function" and entry.target in (operator.add, operator.mul, torch.addcmul)
               for entry in folded.module.graph.nodes) == 3 + 1  # fmt: skip


def test_without_a_second_reader_it_goes_where_it_costs_nothing() -> None:
    """In front of a linear layer that sees every position it is a bias."""
    torch.manual_seed(0)

    class Flat(Embedded):
        def __init__(self) -> None:
            super().__init__(blocks=0)
            self.head = nn.Linear(6 * 64, 4)

        def forward(self, x):
            return self.head((self.norm(self.stem(x)) + self.positions).flatten(1))

    folded = foldexport.fold(randomise(Flat(), 0).double(), torch.randn(1, *IMAGE, dtype=torch.float64))
    assert not [entry for entry in folded.ledger if entry.status == "kept"]

"""Values with several readers of whom none says what it would like: they are made as they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import foldexport
from tests.statistics import randomise


class PaddedWindows(nn.Module):
    """A batch norm read by a skip connection and by a padded layer norm, as TinyViT writes its windows (Wu et al. 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.LayerNorm(6)

    def forward(self, x):
        y = self.bn(self.conv(x)).permute(0, 2, 3, 1)
        height, width = y.shape[1:3]
        windows = self.norm(F.pad(y, (0, 0, 0, 1, 0, 2)))
        return y + windows[:, :height, :width]


def test_a_batch_norm_in_front_of_a_skip_connection_and_a_pad():
    network = randomise(PaddedWindows(), seed=0, example=torch.randn(2, 3, 12, 12))
    folded = foldexport.fold(network, torch.randn(2, 3, 12, 12))
    left = {kind: folded.counts_after.get(kind, 0) for kind in ("batch_norm", "mul", "add")}
    assert left == {"batch_norm": 0, "mul": 0, "add": 1}


def test_arithmetic_on_sizes_is_no_operator():
    class Windows(nn.Module):
        def forward(self, x):
            return F.relu(x.reshape(2 * x.shape[0] * x.shape[1], -1))

    folded = foldexport.fold(Windows().eval(), torch.randn(2, 4, 6))
    assert "mul" not in folded.counts_after and "mul" not in folded.counts_before

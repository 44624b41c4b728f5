"""Layer scales of 1e-5, block after block: no trunk may carry their product."""

from __future__ import annotations

import torch
from torch import nn

import foldexport
from tests.statistics import randomise


class PoolMixer(nn.Module):
    """``x + γ₁(pool(x) − x)``, then ``x + γ₂·mlp(x)``: PoolFormer's block (Yu et al. 2022) with batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.scale_1, self.scale_2 = (nn.Parameter(1e-5 * torch.rand(channels, 1, 1)) for _ in range(2))
        self.mlp = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.BatchNorm2d(2 * channels), nn.GELU(),
                                 nn.Conv2d(2 * channels, channels, 1), nn.BatchNorm2d(channels))  # fmt: skip

    def forward(self, x):
        x = x + self.scale_1 * (self.pool(x) - x)
        return x + self.scale_2 * self.mlp(x)


def test_the_trunk_stays_where_it_is():
    network = nn.Sequential(nn.Conv2d(3, 6, 3, 2), *(PoolMixer(6) for _ in range(12)), nn.Conv2d(6, 4, 3))
    network = randomise(network, seed=0, example=torch.randn(2, 3, 20, 20))
    with torch.no_grad():
        for block in list(network)[1:-1]:
            block.scale_1.fill_(1e-5)
            block.scale_2.fill_(-1e-5)
    folded = foldexport.fold(network, torch.randn(2, 3, 20, 20))
    assert "batch_norm" not in folded.counts_after and folded.counts_after.get("mul", 0) <= 12
    assert folded.certificate.folded32 < 4 and folded.extremes.weight.value < 1e4


class LinearMixer(nn.Module):
    """``x + γ(mix(x) − norm(x))``: FastViT's token mixer (Vasu et al. 2023), both terms linear in the trunk."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix, self.norm = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels), nn.BatchNorm2d(channels)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 1e-5))
        self.mlp = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GELU(), nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        x = x + self.scale * (self.mix(x) - self.norm(x))
        return x + self.scale * self.mlp(x)


def test_mixers_that_are_linear_in_the_trunk():
    network = nn.Sequential(nn.Conv2d(3, 6, 3, 2), *(LinearMixer(6) for _ in range(12)), nn.Conv2d(6, 4, 3))
    network = randomise(network, seed=0, example=torch.randn(2, 3, 20, 20))
    with torch.no_grad():
        for block in list(network)[1:-1]:
            block.scale.fill_(1e-5)
    folded = foldexport.fold(network, torch.randn(2, 3, 20, 20))
    assert folded.certificate.folded32 < 4 and folded.extremes.weight.value < 1e4

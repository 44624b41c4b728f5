"""Layer scales of 1e-5, block after block: no trunk may carry their product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import foldexport
from foldexport.errors import EquivalenceError
from foldexport.fold.transfer import combine
from tests.statistics import randomise

SCALE = 1e-5
IMAGE = (2, 3, 20, 20)


class PoolMixer(nn.Module):
    """``pool(x) − x``: PoolFormer's (Yu et al. 2022)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x):
        return self.pool(x) - x


class LinearMixer(nn.Module):
    """``mix(x) − norm(x)``: FastViT's (Vasu et al. 2023), both terms linear in the trunk."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix, self.norm = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.mix(x) - self.norm(x)


class Block(nn.Module):
    """``x + γ·mixer(x)``, then ``x − γ·mlp(x)``."""

    def __init__(self, mixer: nn.Module, channels: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.scale_1, self.scale_2 = (nn.Parameter(torch.full((channels, 1, 1), SCALE)) for _ in range(2))
        self.mlp = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.BatchNorm2d(2 * channels), nn.GELU(),
                                 nn.Conv2d(2 * channels, channels, 1), nn.BatchNorm2d(channels))  # fmt: skip

    def forward(self, x):
        x = x + self.scale_1 * self.mixer(x)
        return x + self.scale_2 * self.mlp(x)


def network(mixer: type[nn.Module]) -> nn.Module:
    blocks = [Block(mixer(6), 6) for _ in range(12)]
    found = randomise(nn.Sequential(nn.Conv2d(3, 6, 3, 2), *blocks, nn.Conv2d(6, 4, 3)), seed=0, example=torch.randn(IMAGE))
    with torch.no_grad():
        for block in blocks:
            block.scale_1.fill_(SCALE)
            block.scale_2.fill_(-SCALE)
    return found


@pytest.mark.parametrize("mixer", [PoolMixer, LinearMixer], ids=["pool", "linear"])
def test_the_trunk_stays_where_it_is(mixer):
    folded = foldexport.fold(network(mixer), torch.randn(IMAGE))
    assert "batch_norm" not in folded.counts_after and folded.counts_after.get("mul", 0) <= 12
    assert folded.certificate.folded32 < 4 and folded.extremes.weight.value < 1e4


def test_a_trunk_that_carries_them_is_refused_in_float32_and_exact_in_float64(monkeypatch):
    """Planted: every sum takes the scale that is farther from 1, without end."""
    monkeypatch.setattr(combine, "_burden", lambda affine: -combine._distance(affine.scale))
    monkeypatch.setattr(combine, "TRUNK_LIMIT", 1e300)
    with pytest.raises(EquivalenceError, match="exact in float64, but not in float32: folded: inf times"):
        foldexport.fold(network(PoolMixer), torch.randn(IMAGE))
    folded = foldexport.fold(network(PoolMixer).double(), torch.randn(IMAGE).double())
    assert folded.certificate.ok and folded.extremes.weight.value > 1e38

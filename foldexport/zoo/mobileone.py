"""MobileOne: depthwise and pointwise convolutions, each trained as a sum of parallel branches with batch norm.

Vasu et al. 2023, "MobileOne: an improved one millisecond mobile backbone" (arXiv 2206.04040). A block computes ``ReLU(SE(Σ))``
with ``Σ = Σᵢ BNᵢ(Wᵢ·x) + BN(W₁·x) + BN(x)``: k convolutions, a 1x1 one where those are 3x3, and x itself where its sizes
agree; as deployed, ``Σ`` is one convolution with bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

STEM_WIDTH = 64  # the stem is no wider than this
SE_REDUCTION = 16
BLOCKS = (2, 8, 10, 1)


@dataclass(frozen=True)
class Variant:
    """Channels of stages 1 to 4 (tables 2 and 3); k, the ``branches``; how many of each stage's last blocks squeeze and excite."""

    widths: tuple[int, ...]
    branches: int = 1
    se: tuple[int, ...] = (0, 0, 0, 0)


VARIANTS = {
    "S0": Variant((48, 128, 256, 1024), branches=4),
    "S1": Variant((96, 192, 512, 1280)),
    "S2": Variant((96, 256, 640, 2048)),
    "S3": Variant((128, 320, 768, 2048)),
    "S4": Variant((192, 448, 896, 2048), se=(0, 0, 5, 1)),
}


class SqueezeExcitation(nn.Module):
    """``x·sigmoid(W₂·ReLU(W₁·mean(x)))`` with a mean over positions (Hu et al. 2018), ``[N, C, H, W]`` to the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // SE_REDUCTION, 1)
        self.expand = nn.Conv2d(channels // SE_REDUCTION, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.expand(squeezed))


class MobileOneBlock(nn.Module):
    """``ReLU(SE(Σ))``, ``[N, Cin, H, W]`` to ``[N, Cout, H/stride, W/stride]``; SE is the identity unless ``se``."""

    def __init__(
        self, reads: int, writes: int, kernel: int, stride: int, groups: int, branches: int, se: bool, deploy: bool
    ):  # fmt: skip
        super().__init__()
        self.se = SqueezeExcitation(writes) if se else None
        self.activation = nn.ReLU()
        self.deploy = deploy
        if deploy:
            self.reparam_conv = nn.Conv2d(reads, writes, kernel, stride, kernel // 2, groups=groups)
            return
        self.rbr_skip = nn.BatchNorm2d(reads) if reads == writes and stride == 1 else None
        self.rbr_conv = nn.ModuleList(_convolution(reads, writes, kernel, stride, groups) for _ in range(branches))
        self.rbr_scale = _convolution(reads, writes, 1, stride, groups) if kernel > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.reparam_conv(x) if self.deploy else self._branches(x)
        return self.activation(y if self.se is None else self.se(y))

    def _branches(self, x: Tensor) -> Tensor:
        y = self.rbr_conv[0](x)
        for branch in (*self.rbr_conv[1:], self.rbr_scale, self.rbr_skip):
            if branch is not None:
                y = y + branch(x)
        return y


def _convolution(reads: int, writes: int, kernel: int, stride: int, groups: int) -> nn.Sequential:
    branch = nn.Sequential()
    branch.add_module("conv", nn.Conv2d(reads, writes, kernel, stride, kernel // 2, groups=groups, bias=False))
    branch.add_module("bn", nn.BatchNorm2d(writes))
    return branch


class MobileOne(nn.Module):
    """Stem block, stages of depthwise and pointwise blocks, global average pool, linear: ``[N, 3, H, W]`` to ``[N, num_classes]``.

    Stem and stages each halve height and width. Each of a stage's ``blocks`` is two modules: depthwise 3x3, pointwise.
    """

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int], branches: int, se: Sequence[int], num_classes: int, deploy: bool
    ):  # fmt: skip
        super().__init__()
        channels = min(STEM_WIDTH, widths[0])
        self.stage0 = MobileOneBlock(3, channels, 3, 2, 1, 1, False, deploy)
        self.stages = len(blocks)
        for s, (count, width, gated) in enumerate(zip(blocks, widths, se, strict=True), 1):
            stage = nn.Sequential()
            for b in range(count):
                stride, gate = 2 if b == 0 else 1, b >= count - gated
                stage.append(MobileOneBlock(channels, channels, 3, stride, channels, branches, gate, deploy))
                stage.append(MobileOneBlock(channels, width, 1, 1, 1, branches, gate, deploy))
                channels = width
            self.add_module(f"stage{s}", stage)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage0(x)
        for s in range(1, self.stages + 1):
            x = getattr(self, f"stage{s}")(x)
        return self.linear(self.gap(x).flatten(1))


def mobileone(
    name: str = "S0", num_classes: int = 1000, deploy: bool = False, blocks: Sequence[int] | None = None,
    widths: Sequence[int] | None = None, branches: int | None = None, se: Sequence[int] | None = None,
) -> MobileOne:  # fmt: skip
    """An untrained network of the paper.

    ``name``: of `VARIANTS`, "S0" to "S4"; ``blocks`` (2, 8, 10, 1) and ``widths`` (channels) of each stage, ``branches``
    (the stem has one) and ``se``, how many of each stage's last blocks squeeze and excite, where they are not the
    variant's. ``deploy``: one convolution with bias in each block instead of its branches.

    Raises ValueError for what makes no network.
    """
    if name not in VARIANTS:
        raise ValueError(f"MobileOne {name!r}: the variants are {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    blocks, widths = tuple(blocks or BLOCKS), tuple(widths or variant.widths)
    # A variant's gates are of its own four stages.
    se = tuple(se or (variant.se if len(blocks) == len(variant.se) else (0,) * len(blocks)))
    branches = variant.branches if branches is None else branches
    if not len(blocks) == len(widths) == len(se):
        raise ValueError(f"blocks {blocks}, widths {widths}, se {se}: wanted a number for each stage in all of them")
    if min(*blocks, *widths, branches) < 1:
        raise ValueError(f"blocks {blocks}, widths {widths}, branches {branches}: each needs to be 1 or more")
    for count, width, gated in zip(blocks, widths, se):
        if not 0 <= gated <= count or (gated and min(width, *widths) < SE_REDUCTION):
            raise ValueError(
                f"se {se}: of each stage at most its {blocks} blocks, with {SE_REDUCTION} channels or more, squeeze and excite"
            )
    return MobileOne(blocks, widths, branches, se, num_classes, deploy)

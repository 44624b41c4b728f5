"""RepVGG: plain stacks of 3x3 convolutions and ReLU, trained with a 1x1 and an identity branch beside every convolution.

Ding et al. 2021, "RepVGG: making VGG-style ConvNets great again" (arXiv 2101.03697). A block computes ``ReLU(SE(Σ))`` with
``Σ = BN(W₃·x) + BN(W₁·x) + BN(x)``, the last term where its sizes agree; as deployed, ``Σ`` is one convolution with bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

STEM_WIDTH = 64  # the stem is no wider than this (section 3.4)
SE_REDUCTION = 16
GROUPED_LAYERS = range(2, 27, 2)  # the layers that -g2 and -g4 group, counted from the stem, which is 0


@dataclass(frozen=True)
class Variant:
    """Blocks and channels of stages 1 to 4 (table 2); ``groups`` of every second layer; squeeze-and-excitation or not."""

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    groups: int = 1
    se: bool = False


_A, _B, _D = (2, 4, 14, 1), (4, 6, 16, 1), (8, 14, 24, 1)
_B1, _B2, _B3 = (128, 256, 512, 2048), (160, 320, 640, 2560), (192, 384, 768, 2560)
VARIANTS = {
    "A0": Variant(_A, (48, 96, 192, 1280)),
    "A1": Variant(_A, (64, 128, 256, 1280)),
    "A2": Variant(_A, (96, 192, 384, 1408)),
    "B0": Variant(_B, (64, 128, 256, 1280)),
    "B1": Variant(_B, _B1),
    "B1g2": Variant(_B, _B1, groups=2),
    "B1g4": Variant(_B, _B1, groups=4),
    "B2": Variant(_B, _B2),
    "B2g2": Variant(_B, _B2, groups=2),
    "B2g4": Variant(_B, _B2, groups=4),
    "B3": Variant(_B, _B3),
    "B3g2": Variant(_B, _B3, groups=2),
    "B3g4": Variant(_B, _B3, groups=4),
    "D2se": Variant(_D, _B2, se=True),
}


class SqueezeExcitation(nn.Module):
    """``x·sigmoid(W₂·ReLU(W₁·mean(x)))`` with a mean over positions (Hu et al. 2018), ``[N, C, H, W]`` to the same."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.down = nn.Conv2d(channels, inner, 1)
        self.up = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = torch.relu(self.down(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.up(squeezed))


class RepVGGBlock(nn.Module):
    """``ReLU(SE(Σ))``, ``[N, Cin, H, W]`` to ``[N, Cout, H/stride, W/stride]``; SE is the identity unless ``se``."""

    def __init__(self, reads: int, writes: int, stride: int, groups: int, se: bool, deploy: bool):
        super().__init__()
        self.nonlinearity = nn.ReLU()
        self.se = SqueezeExcitation(writes, writes // SE_REDUCTION) if se else None
        self.deploy = deploy
        if deploy:
            self.rbr_reparam = nn.Conv2d(reads, writes, 3, stride, 1, groups=groups)
            return
        self.rbr_identity = nn.BatchNorm2d(reads) if reads == writes and stride == 1 else None
        self.rbr_dense = _convolution(reads, writes, 3, stride, groups)
        self.rbr_1x1 = _convolution(reads, writes, 1, stride, groups)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rbr_reparam(x) if self.deploy else self._branches(x)
        return self.nonlinearity(y if self.se is None else self.se(y))

    def _branches(self, x: Tensor) -> Tensor:
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return y if self.rbr_identity is None else y + self.rbr_identity(x)


def _convolution(reads: int, writes: int, kernel: int, stride: int, groups: int) -> nn.Sequential:
    branch = nn.Sequential()
    branch.add_module("conv", nn.Conv2d(reads, writes, kernel, stride, kernel // 2, groups=groups, bias=False))
    branch.add_module("bn", nn.BatchNorm2d(writes))
    return branch


class RepVGG(nn.Module):
    """Stem block, stages of `RepVGGBlock`, global average pool, linear: ``[N, 3, H, W]`` to ``[N, num_classes]``.

    ``groups``: of each block of the stages. The first block of every stage has stride 2, the stem ``stem_stride``.
    """

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int], groups: Sequence[int], se: bool, num_classes: int,
        stem_stride: int, deploy: bool,
    ):  # fmt: skip
        super().__init__()
        channels = min(STEM_WIDTH, widths[0])
        self.stage0 = RepVGGBlock(3, channels, stem_stride, 1, se, deploy)
        if stem_stride == 1:
            # No shape tells a stride: a network without the published one says so in its checkpoint.
            self.register_buffer("stem_stride", torch.tensor(stem_stride))
        self.stages, layer = len(blocks), 0
        for s, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
            stage = nn.Sequential()
            for b in range(count):
                stage.add_module(str(b), RepVGGBlock(channels, width, 2 if b == 0 else 1, groups[layer], se, deploy))
                channels, layer = width, layer + 1
            self.add_module(f"stage{s}", stage)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage0(x)
        for s in range(1, self.stages + 1):
            x = getattr(self, f"stage{s}")(x)
        return self.linear(self.gap(x).flatten(1))


def repvgg(
    name: str = "A0", num_classes: int | None = None, stem: str = "imagenet", deploy: bool = False,
    blocks: Sequence[int] | None = None, widths: Sequence[int] | None = None, groups: int | Sequence[int] | None = None,
    se: bool | None = None,
) -> RepVGG:  # fmt: skip
    """An untrained network of the paper.

    ``name``: of `VARIANTS`, "A0" to "D2se"; ``blocks`` and ``widths`` (channels) of each stage, ``groups`` and ``se``
    where they are not the variant's. ``groups``: of every second layer, as published, or of each block of the stages.
    ``stem``: "imagenet" (stride 2, as published) or "cifar" (stride 1). ``num_classes``: 1000, for CIFAR 10, unless
    given. ``deploy``: one convolution with bias in each block instead of its branches.

    Raises ValueError for what makes no network.
    """
    if name not in VARIANTS:
        raise ValueError(f"RepVGG {name!r}: the variants are {', '.join(VARIANTS)}")
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"stem {stem!r}: a stem is 'imagenet' or 'cifar'")
    variant = VARIANTS[name]
    blocks, widths = tuple(blocks or variant.blocks), tuple(widths or variant.widths)
    if len(blocks) != len(widths):
        raise ValueError(f"{len(blocks)} stages of blocks {blocks} but {len(widths)} of widths {widths}")
    if min(*blocks, *widths) < 1:
        raise ValueError(f"blocks {blocks}, widths {widths}: each stage needs a block and a channel")
    se = variant.se if se is None else se
    if se and min(widths) < SE_REDUCTION:
        raise ValueError(f"widths {widths}: squeeze-and-excitation needs {SE_REDUCTION} channels or more")
    grouped = groups_of_blocks(variant.groups if groups is None else groups, sum(blocks))
    classes = num_classes or (10 if stem == "cifar" else 1000)
    return RepVGG(blocks, widths, grouped, se, classes, 1 if stem == "cifar" else 2, deploy)


def groups_of_blocks(groups: int | Sequence[int], layers: int) -> tuple[int, ...]:
    """Groups of each block of the stages; raises ValueError for a sequence of another length."""
    if isinstance(groups, int):
        return tuple(groups if layer in GROUPED_LAYERS else 1 for layer in range(1, layers + 1))
    if len(groups) != layers:
        raise ValueError(f"groups {tuple(groups)}: {len(groups)} of them for {layers} blocks")
    return tuple(groups)

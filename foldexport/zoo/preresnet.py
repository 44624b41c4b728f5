"""Residual networks of "Identity mappings in deep residual networks" (He et al. 2016, arXiv 1603.05027).

Every order of activation of its figure 4 and every shortcut of its figure 2, for CIFAR (three stages, a 3x3 stem) and
ImageNet (four stages, a 7x7 stem and a max pool).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Figure 4, (a) to (e): where the batch norms and ReLUs stand around the convolutions and the addition.
ORDERS = {
    "original": "conv-bn-relu-conv-bn, addition, relu",
    "bn_after": "conv-bn-relu-conv, addition, bn, relu",
    "relu_before": "conv-bn-relu-conv-bn-relu, addition",
    "relu_only": "relu-conv-bn-relu-conv-bn, addition",
    "full": "bn-relu-conv-bn-relu-conv, addition",
}
# Figure 2, (a) to (f): what the shortcut of a block of equal sizes is.
SHORTCUTS = {
    "identity": "x + F(x)",
    "scaling": "s·x + r·F(x)",
    "exclusive_gating": "(1 − g(x))·x + g(x)·F(x)",
    "shortcut_gating": "(1 − g(x))·x + F(x)",
    "conv": "conv1x1(x) + F(x)",
    "dropout": "dropout(x) + F(x)",
}
# Where sizes differ: a 1x1 convolution of the block's first activation, of x itself, or x subsampled and padded with zeros.
PROJECTIONS = ("activation", "trunk", "pad")
EXPANSION = 4
IMAGENET_BLOCKS = {
    18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3),
}  # fmt: skip


class PreActBlock(nn.Module):
    """One residual unit, ``[N, channels[0], H, W]`` to ``[N, channels[-1], H/stride, W/stride]``.

    ``channels``: those of x, then those behind each convolution: two of 3x3, or 1x1, 3x3, 1x1.
    """

    def __init__(self, channels: Sequence[int], stride: int, order: str, shortcut: str, projection: str):
        super().__init__()
        self.order, self.stride = order, stride
        self.convolutions, self.channels = len(channels) - 1, (channels[0], channels[-1])
        self.relu = nn.ReLU()
        for i, (reads, writes) in enumerate(zip(channels[:-1], channels[1:], strict=True), 1):
            kernel = 3 if self.convolutions == 2 or i == 2 else 1
            strided = i == self.convolutions - 1
            self.add_module(f"conv{i}", nn.Conv2d(reads, writes, kernel, stride if strided else 1, kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(reads if order == "full" else writes))
        self._add_shortcut(channels[0], channels[-1], shortcut, projection)

    def _add_shortcut(self, reads: int, writes: int, shortcut: str, projection: str) -> None:
        """``self.shortcut`` reads the first activation, ``self.downsample`` reads x: the names that published code has."""
        self.kind = shortcut
        if self.stride > 1 or reads != writes:
            self.kind = "projection" if projection != "pad" else "pad"
            if projection == "activation":
                self.shortcut = nn.Sequential(nn.Conv2d(reads, writes, 1, self.stride, bias=False))
            if projection == "trunk":
                self.downsample = nn.Sequential(nn.Conv2d(reads, writes, 1, self.stride, bias=False))
            return
        if shortcut == "scaling":
            self.register_buffer("shortcut_scale", torch.tensor(0.5))
            self.register_buffer("residual_scale", torch.tensor(0.5))
        if shortcut in ("exclusive_gating", "shortcut_gating"):
            self.gate = nn.Conv2d(reads, reads, 1)
        if shortcut == "conv":
            self.conv_shortcut = nn.Conv2d(reads, reads, 1, bias=False)
        if shortcut == "dropout":
            self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        first = self._before(x, 1)
        y = self._after(self.conv1(first), 1)
        for i in range(2, self.convolutions + 1):
            y = self._after(getattr(self, f"conv{i}")(self._before(y, i)), i)
        if self.order == "relu_before":
            y = self.relu(y)
        y = self._sum(x, first, y)
        if self.order == "bn_after":
            y = getattr(self, f"bn{self.convolutions}")(y)
        return self.relu(y) if self.order in ("original", "bn_after") else y

    def _before(self, x: Tensor, i: int) -> Tensor:
        """What stands in front of convolution i."""
        if self.order == "full":
            return self.relu(getattr(self, f"bn{i}")(x))
        return self.relu(x) if self.order == "relu_only" or i > 1 else x

    def _after(self, y: Tensor, i: int) -> Tensor:
        """What stands behind convolution i, before the next ReLU or the addition."""
        if self.order == "full" or (self.order == "bn_after" and i == self.convolutions):
            return y
        return getattr(self, f"bn{i}")(y)

    def _sum(self, x: Tensor, first: Tensor, f: Tensor) -> Tensor:
        if self.kind == "projection":
            return (self.shortcut(first) if hasattr(self, "shortcut") else self.downsample(x)) + f
        if self.kind == "pad":
            reads, writes = self.channels
            return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, writes - reads)) + f
        if self.kind == "scaling":
            return self.shortcut_scale * x + self.residual_scale * f
        if self.kind == "exclusive_gating":
            g = torch.sigmoid(self.gate(x))
            return (1 - g) * x + g * f
        if self.kind == "shortcut_gating":
            return (1 - torch.sigmoid(self.gate(x))) * x + f
        if self.kind == "conv":
            return self.conv_shortcut(x) + f
        return (self.drop(x) if self.kind == "dropout" else x) + f


class PreActResNet(nn.Module):
    """Stem, stages of `PreActBlock`, global average pool, linear: ``[N, 3, H, W]`` to ``[N, num_classes]``.

    Behind the last block stand the batch norm and ReLU that its order lacks: both in "full", the ReLU in "relu_only".
    """

    def __init__(
        self, blocks: Sequence[int], width: int, bottleneck: bool, stem: str, stem_width: int, num_classes: int,
        order: str, shortcut: str, projection: str, last_norm: bool,
    ):  # fmt: skip
        super().__init__()
        self.order = order
        imagenet, first = stem == "imagenet", stem_width
        kernel = 7 if imagenet else 3
        self.conv1 = nn.Conv2d(3, first, kernel, 2 if imagenet else 1, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(first) if order != "full" else None
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet else None
        channels = first
        self.stages = len(blocks)
        for s, count in enumerate(blocks):
            stage, inner = nn.Sequential(), width * 2**s
            for b in range(count):
                inside = (inner, inner, inner * EXPANSION) if bottleneck else (inner, inner)
                stride = 2 if s > 0 and b == 0 else 1
                stage.add_module(str(b), PreActBlock((channels, *inside), stride, order, shortcut, projection))
                channels = inside[-1]
            self.add_module(f"layer{s + 1}", stage)
        self.bn = nn.BatchNorm2d(channels) if last_norm else None
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.bn1 is not None:
            x = self.relu(self.bn1(x))
        if self.maxpool is not None:
            x = self.maxpool(x)
        for s in range(self.stages):
            x = getattr(self, f"layer{s + 1}")(x)
        if self.bn is not None:
            x = self.bn(x)
        if self.bn is not None or self.order == "relu_only":
            x = self.relu(x)
        return self.fc(self.avgpool(x).flatten(1))


def preresnet(
    depth: int = 110, order: str = "full", shortcut: str = "identity", projection: str = "activation",
    width: int | None = None, num_classes: int | None = None, stem: str = "cifar", bottleneck: bool | None = None,
    blocks: Sequence[int] | None = None, stem_width: int | None = None, last_norm: bool | None = None,
) -> PreActResNet:  # fmt: skip
    """An untrained network of the paper.

    ``depth``: on CIFAR 6n + 2, of bottlenecks 9n + 2 (the paper's 164 and 1001; ``bottleneck`` says which, from 164 on it is
    taken for granted); on ImageNet 18, 34, 50, 101, 152 or 200. ``order``, ``shortcut``, ``projection``: of `ORDERS`,
    `SHORTCUTS`, `PROJECTIONS`. ``width``: channels of the first stage (16, ImageNet 64), doubled by every further stage;
    ``stem_width``: of the stem (the same). ``blocks``: of each stage, where they are not those of ``depth``. ``last_norm``:
    a batch norm and ReLU in front of the pooling; in the "full" order unless refused.

    Raises ValueError for what the paper does not define.
    """
    for name, value, allowed in (("order", order, ORDERS), ("shortcut", shortcut, SHORTCUTS),
                                 ("projection", projection, PROJECTIONS), ("stem", stem, ("cifar", "imagenet"))):  # fmt: skip
        if value not in allowed:
            raise ValueError(f"{name} {value!r}: it is one of {', '.join(allowed)}")
    if blocks is None:
        blocks, bottleneck = _blocks(depth, stem, bottleneck)
    width = width or (16 if stem == "cifar" else 64)
    return PreActResNet(
        tuple(blocks), width, bool(bottleneck), stem, stem_width or width, num_classes or (10 if stem == "cifar" else 1000),
        order, shortcut, projection, order == "full" if last_norm is None else last_norm,
    )  # fmt: skip


def _blocks(depth: int, stem: str, bottleneck: bool | None) -> tuple[tuple[int, ...], bool]:
    if stem == "imagenet":
        if depth not in IMAGENET_BLOCKS:
            raise ValueError(f"depth {depth}: on ImageNet it is one of {', '.join(map(str, IMAGENET_BLOCKS))}")
        return IMAGENET_BLOCKS[depth], depth >= 50 if bottleneck is None else bottleneck
    bottleneck = depth >= 164 if bottleneck is None else bottleneck
    n, rest = divmod(depth - 2, 9 if bottleneck else 6)
    if rest or n < 1:
        raise ValueError(f"depth {depth}: on CIFAR it is 6n + 2, of bottlenecks 9n + 2")
    return (n,) * 3, bottleneck

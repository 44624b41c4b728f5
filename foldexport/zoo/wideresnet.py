"""Wide residual networks (Zagoruyko & Komodakis 2016, arXiv 1605.07146): pre-activation, three groups, for CIFAR.

The wide bottlenecks that the paper trains on ImageNet (WRN-50-2-bottleneck) are post-activation: `foldexport.zoo.resnet`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

WIDTHS = (16, 32, 64)  # of width 1
PROJECTIONS = ("activation", "trunk")


class WideBlock(nn.Module):
    """``h(x) + W₂·ReLU(BN(W₁·ReLU(BN(x))))``, ``[N, reads, H, W]`` to ``[N, writes, H/stride, W/stride]``.

    h is x, or where channels change a 1x1 convolution of ``ReLU(BN(x))`` (``projection`` "activation") or of x ("trunk").
    ``strided``: which of the two convolutions strides.
    """

    def __init__(self, reads: int, writes: int, stride: int, projection: str, strided: int, bias: bool):
        super().__init__()
        strides = (stride, 1) if strided == 1 else (1, stride)
        self.bn0 = nn.BatchNorm2d(reads)
        self.conv0 = nn.Conv2d(reads, writes, 3, strides[0], 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(writes)
        self.conv1 = nn.Conv2d(writes, writes, 3, strides[1], 1, bias=bias)
        self.relu = nn.ReLU()
        changes = stride > 1 or reads != writes
        self.convdim = nn.Conv2d(reads, writes, 1, stride, bias=bias) if changes else None
        self.projection = projection

    def forward(self, x: Tensor) -> Tensor:
        first = self.relu(self.bn0(x))
        y = self.conv1(self.relu(self.bn1(self.conv0(first))))
        if self.convdim is None:
            return x + y
        return self.convdim(first if self.projection == "activation" else x) + y


class WideResNet(nn.Module):
    """3x3 stem, three groups of `WideBlock`, batch norm, ReLU, global average pool, linear: ``[N, 3, H, W]`` to
    ``[N, num_classes]``. ``sub_group0``: a second first group that is never called, as published files have it."""

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int], num_classes: int, projection: str, strided: int, bias: bool,
        sub_group: bool,
    ):  # fmt: skip
        super().__init__()
        channels = WIDTHS[0]
        self.conv0 = nn.Conv2d(3, channels, 3, padding=1, bias=bias)
        self.groups = len(blocks)
        for g, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            names = [f"group{g}", "sub_group0"] if g == 0 and sub_group else [f"group{g}"]
            for name in names:
                group = nn.Sequential()
                for b in range(count):
                    reads, stride = (channels, 2 if g > 0 else 1) if b == 0 else (width, 1)
                    group.add_module(f"block{b}", WideBlock(reads, width, stride, projection, strided, bias))
                self.add_module(name, group)
            channels = width
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        for g in range(self.groups):
            x = getattr(self, f"group{g}")(x)
        return self.fc(self.avgpool(self.relu(self.bn(x))).flatten(1))


def wideresnet(
    depth: int = 28, width: float = 10, num_classes: int = 10, projection: str = "activation", strided: int = 1,
    bias: bool = False, blocks: Sequence[int] | None = None, sub_group: bool = False,
) -> WideResNet:  # fmt: skip
    """An untrained WRN-``depth``-``width``.

    ``depth``: 6n + 4, in three groups of n blocks; ``blocks``: of each group, where they are others. ``width``: the groups have
    16, 32 and 64 times as many channels. ``projection``, of `PROJECTIONS`: what the 1x1 convolutions read; ``strided``: 1 or 2,
    the convolution of a block that strides. ``bias``: of the convolutions. ``sub_group``: with parameters of a group that the
    network does not call.

    Raises ValueError for what is not defined.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"projection {projection!r}: it is one of {', '.join(PROJECTIONS)}")
    if strided not in (1, 2):
        raise ValueError(f"strided {strided}: convolution 1 or 2 of a block strides")
    n, rest = divmod(depth - 4, 6)
    if blocks is None and (rest or n < 1):
        raise ValueError(f"depth {depth}: it is 6n + 4")
    blocks = (n,) * len(WIDTHS) if blocks is None else tuple(blocks)
    widths = tuple(int(channels * width) for channels in WIDTHS)
    if len(blocks) != len(WIDTHS) or min(*blocks, *widths, num_classes) < 1:
        raise ValueError(f"blocks {blocks}, width {width:g}, num_classes {num_classes}: three groups, at least 1 of each")
    return WideResNet(blocks, widths, num_classes, projection, strided, bias, sub_group)

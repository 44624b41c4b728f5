"""Diverse branch blocks, and the networks of their authors' code.

Ding et al. 2021, "Diverse branch block: building a convolution as an Inception-like unit" (arXiv 2103.13425).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldexport.zoo.acnet_blocks import ACBlock, sequence

BLOCKS = ("dbb", "acb")  # what a network's 3x3 convolutions are trained as
EXPANSION = 4
RESNET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BOTTLENECK_DEPTHS = (50, 101, 152)
DEPTHWISE_INTERNAL = 2  # times the channels between the 1x1 and the k×k of depthwise blocks, in the published networks


class IdentityConv1x1(nn.Conv2d):
    """``(W + I)·x``, 1x1: a convolution that starts as the identity; ``I[i, i mod C/g] = 1`` for C channels in g groups."""

    def __init__(self, channels: int, groups: int = 1):
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        identity = torch.eye(self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)
        kernel = self.weight + identity.repeat(self.groups, 1)[:, :, None, None]
        return F.conv2d(x, kernel, groups=self.groups)


class BNAndPad(nn.Module):
    """Batch norm, then a border of ``β − γ·μ/sqrt(σ² + ε)``, what it makes of zero; ``[N, C, H, W]`` to ``[N, C, H + 2p, W + 2p]``.

    So the k×k kernel behind it sees what it would see if the input in front of the 1x1 were padded (section 3.2, transform III).
    """

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        x, p, bn = self.bn(x), self.padding, self.bn
        if p == 0:
            return x
        border = bn.bias.detach() - bn.running_mean * bn.weight.detach() / torch.sqrt(bn.running_var + bn.eps)
        border = border.view(1, -1, 1, 1)
        x = F.pad(x, (p, p, p, p))
        x[:, :, :p] = border
        x[:, :, -p:] = border
        x[:, :, :, :p] = border
        x[:, :, :, -p:] = border
        return x


class DiverseBranchBlock(nn.Module):
    """The sum of four branches, each behind a batch norm; ``[N, Cin, H, W]`` to ``[N, Cout, H/stride, W/stride]``.

    Section 3.3: k×k; 1x1; 1x1 → k×k; 1x1 → average pool. Depthwise blocks have no 1x1 branch and a bare pool. ``internal``:
    channels inside the third branch, Cin unless given (of depthwise blocks 2·Cin); its 1x1 is an `IdentityConv1x1` where
    they are Cin. ``relu``: one behind the sum. ``deploy``: one convolution with bias instead.

    Raises ValueError for a kernel without a centre.
    """

    def __init__(
        self, reads: int, writes: int, kernel: int = 3, stride: int = 1, groups: int = 1, internal: int | None = None,
        relu: bool = False, deploy: bool = False,
    ):  # fmt: skip
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel {kernel}: a diverse branch block has an odd one")
        self.nonlinear = nn.ReLU() if relu else nn.Identity()
        self.deploy, padding = deploy, kernel // 2
        if deploy:
            self.dbb_reparam = nn.Conv2d(reads, writes, kernel, stride, padding, groups=groups)
            return
        depthwise = groups == writes
        self.dbb_origin = _conv_bn(reads, writes, kernel, stride, padding, groups)
        self.dbb_1x1 = None if depthwise else _conv_bn(reads, writes, 1, stride, 0, groups)
        self.dbb_avg = _average_branch(reads, writes, kernel, stride, groups, bare=depthwise)
        internal = internal or (DEPTHWISE_INTERNAL * reads if depthwise else reads)
        if internal == reads:
            first = {"idconv1": IdentityConv1x1(reads, groups)}
        else:
            first = {"conv1": nn.Conv2d(reads, internal, 1, groups=groups, bias=False)}
        self.dbb_1x1_kxk = sequence(
            **first,
            bn1=BNAndPad(internal, padding),
            conv2=nn.Conv2d(internal, writes, kernel, stride, groups=groups, bias=False),
            bn2=nn.BatchNorm2d(writes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlinear(self.dbb_reparam(x) if self.deploy else self._branches(x))

    def _branches(self, x: Tensor) -> Tensor:
        y = self.dbb_origin(x)
        if self.dbb_1x1 is not None:
            y = y + self.dbb_1x1(x)
        return y + self.dbb_avg(x) + self.dbb_1x1_kxk(x)


def _conv_bn(reads: int, writes: int, kernel: int, stride: int, padding: int, groups: int) -> nn.Sequential:
    conv = nn.Conv2d(reads, writes, kernel, stride, padding, groups=groups, bias=False)
    return sequence(conv=conv, bn=nn.BatchNorm2d(writes))


def _average_branch(reads: int, writes: int, kernel: int, stride: int, groups: int, bare: bool) -> nn.Sequential:
    """``bare``: the pool and its batch norm alone, with zeros around the pool's input."""
    if bare:
        return sequence(avg=nn.AvgPool2d(kernel, stride, kernel // 2), avgbn=nn.BatchNorm2d(writes))
    return sequence(
        conv=nn.Conv2d(reads, writes, 1, groups=groups, bias=False),
        bn=BNAndPad(writes, kernel // 2),
        avg=nn.AvgPool2d(kernel, stride),
        avgbn=nn.BatchNorm2d(writes),
    )


class ConvBN(nn.Module):
    """Convolution, batch norm and, with ``relu``, ReLU; ``deploy``: without the batch norm, with a bias."""

    def __init__(self, reads: int, writes: int, kernel: int, stride: int, relu: bool, deploy: bool):
        super().__init__()
        self.conv = nn.Conv2d(reads, writes, kernel, stride, kernel // 2, bias=deploy)
        self.bn = None if deploy else nn.BatchNorm2d(writes)
        self.nonlinear = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.nonlinear(x if self.bn is None else self.bn(x))


class ActivatedACBlock(ACBlock):
    """An `ACBlock` with a ReLU of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


@dataclass(frozen=True)
class Units:
    """What stands for a convolution with batch norm: a `ConvBN` for 1x1 and 7x7, else what ``block`` names."""

    block: str
    internal: int
    deploy: bool

    def __call__(self, reads: int, writes: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Module:
        if kernel == 1 or kernel >= 7:
            return ConvBN(reads, writes, kernel, stride, relu, self.deploy)
        if self.block == "acb":
            return (ActivatedACBlock if relu else ACBlock)(reads, writes, kernel, stride, kernel // 2, groups=groups)
        internal = self.internal * reads if groups == writes else None
        return DiverseBranchBlock(reads, writes, kernel, stride, groups, internal, relu, self.deploy)


class ResidualBlock(nn.Module):
    """``ReLU(f(x) + shortcut(x))``, f two 3x3 convolutions or 1x1, 3x3, 1x1."""

    def __init__(self, units: Units, reads: int, inner: int, stride: int, bottleneck: bool):
        super().__init__()
        writes = inner * EXPANSION if bottleneck else inner
        resized = stride > 1 or reads != writes
        self.shortcut = units(reads, writes, 1, stride, relu=False) if resized else nn.Identity()
        self.conv1 = units(reads, inner, 1) if bottleneck else units(reads, inner, 3, stride)
        self.conv2 = units(inner, inner, 3, stride) if bottleneck else units(inner, inner, 3, relu=False)
        self.conv3 = units(inner, writes, 1, relu=False) if bottleneck else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        if self.conv3 is not None:
            y = self.conv3(y)
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """7x7 stem, max pool, four stages, global average pool, linear: ``[N, 3, H, W]`` to ``[N, num_classes]``."""

    def __init__(self, units: Units, blocks: Sequence[int], width: int, num_classes: int, bottleneck: bool):
        super().__init__()
        self.stage0 = sequence(conv1=units(3, width, 7, 2), maxpool=nn.MaxPool2d(3, 2, 1))
        channels, self.stages = width, len(blocks)
        for s, count in enumerate(blocks):
            stage, inner = nn.Sequential(), width * 2**s
            for b in range(count):
                stage.add_module(str(b), ResidualBlock(units, channels, inner, 2 if s > 0 and b == 0 else 1, bottleneck))
                channels = inner * EXPANSION if bottleneck else inner
            self.add_module(f"stage{s + 1}", stage)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for s in range(self.stages + 1):
            x = getattr(self, f"stage{s}")(x)
        return self.linear(self.gap(x).flatten(1))


class MobileNet(nn.Module):
    """MobileNet v1 (Howard et al. 2017), ``[N, 3, H, W]`` to ``[N, num_classes]``."""

    PLAN = (2, 4, 4, 8, 8, 16, 16, 16, 16, 16, 16, 32, 32)  # channels in units of the width
    STRIDED = (1, 3, 5, 11)

    def __init__(self, units: Units, width: int, num_classes: int):
        super().__init__()
        self.conv1 = units(3, width, 3, 2)
        self.stem, channels = nn.Sequential(), width
        for b, factor in enumerate(self.PLAN):
            depthwise = units(channels, channels, 3, 2 if b in self.STRIDED else 1, groups=channels)
            pointwise = units(channels, factor * width, 1)
            self.stem.add_module(str(b), nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise)))
            channels = factor * width
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.gap(self.stem(self.conv1(x))).flatten(1))


def dbb_resnet(
    depth: int = 18, num_classes: int = 1000, width: int = 64, block: str = "dbb", deploy: bool = False,
    blocks: Sequence[int] | None = None,
) -> ResNet:  # fmt: skip
    """An untrained ResNet whose 3x3 convolutions are diverse branch blocks.

    ``depth``: 18 or 50 as published, 34, 101 or 152. ``width``: channels of the first stage. ``blocks``: of each stage,
    where they are not those of ``depth``. ``block``: "dbb", or "acb" for the asymmetric convolution blocks that the same
    code trains for comparison. ``deploy``: one convolution with bias in place of each block and of each batch norm.

    Raises ValueError for what the code does not build.
    """
    if depth not in RESNET_BLOCKS:
        raise ValueError(f"depth {depth}: a ResNet has {', '.join(map(str, RESNET_BLOCKS))}")
    units = _units(block, DEPTHWISE_INTERNAL, deploy)
    return ResNet(units, tuple(blocks or RESNET_BLOCKS[depth]), _checked(width), num_classes, depth in BOTTLENECK_DEPTHS)


def dbb_mobilenet(
    num_classes: int = 1000, width: int = 32, block: str = "dbb", internal: int = DEPTHWISE_INTERNAL, deploy: bool = False
) -> MobileNet:
    """An untrained MobileNet v1 whose 3x3 convolutions are diverse branch blocks.

    ``width``: channels of the first convolution. ``internal``: channels inside the 1x1 → 3x3 branch of depthwise blocks,
    in units of their own; 2 as published. ``block`` and ``deploy`` as of `dbb_resnet`.

    Raises ValueError for what the code does not build.
    """
    if internal < 1:
        raise ValueError(f"internal {internal}: the branch needs a channel for each of its block")
    return MobileNet(_units(block, internal, deploy), _checked(width), num_classes)


def _checked(width: int) -> int:
    if width < 1:
        raise ValueError(f"width {width}: a stage needs a channel")
    return width


def _units(block: str, internal: int, deploy: bool) -> Units:
    if block not in BLOCKS:
        raise ValueError(f"block {block!r}: the blocks are {', '.join(BLOCKS)}")
    if deploy and block != "dbb":
        raise ValueError(f"deploy with block {block!r}: the published code deploys dbb blocks only")
    return Units(block, internal, deploy)


def dbb(network: str = "resnet", **arguments) -> nn.Module:
    """`dbb_resnet` or `dbb_mobilenet`, by the name "resnet" or "mobilenet", of its arguments; raises ValueError as they do."""
    builders = {"resnet": (dbb_resnet, ("internal",)), "mobilenet": (dbb_mobilenet, ("depth", "blocks"))}
    if network not in builders:
        raise ValueError(f"network {network!r}: the networks are {', '.join(builders)}")
    builder, foreign = builders[network]
    if surplus := [name for name in foreign if arguments.get(name) is not None]:
        raise ValueError(f"{surplus[0]} {arguments[surplus[0]]}: a {network} has none to choose")
    return builder(**{name: value for name, value in arguments.items() if name not in foreign})

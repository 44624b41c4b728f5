"""ACNet: networks whose square kernels are trained with a vertical and a horizontal strip beside them.

Ding et al. 2019 (arXiv 1908.03930). The networks are those of the authors' code, for CIFAR and ImageNet, under its names;
every convolution of 3x3 or 5x5 taps is an `ACBlock`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from foldexport.zoo.acnet_blocks import RELEASES, Units, sequence

EXPANSION = 4  # channels behind a bottleneck, in units of those inside


class CifarQuick(nn.Module):
    """Three 5x5 convolutions and pools, two linear layers: ``[N, 3, 32, 32]`` to ``[N, num_classes]``."""

    def __init__(self, units: Units, width: int, num_classes: int):
        super().__init__()
        self.conv1 = units.conv_bn_relu(3, width, 5)
        self.conv2 = units.conv_bn_relu(width, width, 5)
        self.conv3 = units.conv_bn_relu(width, 2 * width, 5)
        self.maxpool, self.avgpool = nn.MaxPool2d(3, 2), nn.AvgPool2d(3, 2)
        self.fc1 = nn.Linear(3 * 3 * 2 * width, 64)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.avgpool(self.conv2(x))
        x = self.avgpool(self.conv3(x))
        return self.fc2(self.relu(self.fc1(x.flatten(1))))


class VGG(nn.Module):
    """The thirteen 3x3 convolutions of VGG-16 and two linear layers: ``[N, 3, 32, 32]`` to ``[N, num_classes]``."""

    PLAN = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))  # channels in units of the width; a max pool behind each group

    def __init__(self, units: Units, width: int, num_classes: int):
        super().__init__()
        self.stem, channels, layer = nn.Sequential(), 3, 0
        for g, group in enumerate(self.PLAN, 1):
            for factor in group:
                layer += 1
                self.stem.add_module(f"conv{layer}", units.conv_bn_relu(channels, factor * width, 3))
                channels = factor * width
            self.stem.add_module(f"maxpool{g}", nn.MaxPool2d(2))
        self.linear1 = nn.Linear(channels, 512)
        self.relu = nn.ReLU()
        self.linear2 = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.relu(self.linear1(self.stem(x).flatten(1))))


class WideBlock(nn.Module):
    """``conv2(conv1(x)) + proj(x)``, each a batch norm, ReLU and convolution; ``proj`` is the identity but in first blocks."""

    def __init__(self, units: Units, reads: int, writes: int, stride: int, first: bool):
        super().__init__()
        self.proj = units.bn_relu_conv(reads, writes, 1, stride) if first else nn.Identity()
        self.conv1 = units.bn_relu_conv(reads, writes, 3, stride)
        self.conv2 = units.bn_relu_conv(writes, writes, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + self.proj(x)


class WideResNet(nn.Module):
    """WRN (Zagoruyko & Komodakis 2016) as in the authors' code, with no ReLU behind the last batch norm."""

    STEM = 16

    def __init__(self, units: Units, blocks: Sequence[int], width: int, num_classes: int):
        super().__init__()
        self.conv1 = units.conv_bn(3, self.STEM, 3)
        channels = self.STEM
        for s, count in enumerate(blocks):
            stage, writes = nn.Sequential(), width * 2**s
            for b in range(count):
                stride = 2 if s > 0 and b == 0 else 1
                stage.add_module(f"block{b + 1}", WideBlock(units, channels, writes, stride, b == 0))
                channels = writes
            self.add_module(f"stage{s + 1}", stage)
        self.stages = len(blocks)
        self.last_bn = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(8)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for s in range(self.stages):
            x = getattr(self, f"stage{s + 1}")(x)
        return self.linear(self.avgpool(self.last_bn(x)).flatten(1))


class MobileNet(nn.Module):
    """MobileNet v1 (Howard et al. 2017), ``[N, 3, 224, 224]`` to ``[N, num_classes]``."""

    PLAN = (2, 4, 4, 8, 8, 16, 16, 16, 16, 16, 16, 32, 32)  # channels in units of the width
    STRIDED = (1, 3, 5, 11)

    def __init__(self, units: Units, width: int, num_classes: int):
        super().__init__()
        self.conv1 = units.conv_bn_relu(3, width, 3, 2)
        self.stem, channels = nn.Sequential(), width
        for b, factor in enumerate(self.PLAN):
            stride, writes = 2 if b in self.STRIDED else 1, factor * width
            depthwise = units.conv_bn_relu(channels, channels, 3, stride, groups=channels)
            block = sequence(depthwise=depthwise, pointwise=units.conv_bn_relu(channels, writes, 1))
            self.stem.add_module(str(b), block)
            channels = writes
        self.gap = nn.AvgPool2d(7)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.gap(self.stem(self.conv1(x))).flatten(1))


class Branch(nn.Module):
    """The two 3x3 convolutions of a residual block, or 1x1, 3x3, 1x1; no ReLU behind the last."""

    def __init__(self, units: Units, reads: int, inner: int, stride: int, bottleneck: bool):
        super().__init__()
        self.conv1 = units.conv_bn_relu(reads, inner, 1) if bottleneck else units.conv_bn_relu(reads, inner, 3, stride)
        self.conv2 = units.conv_bn_relu(inner, inner, 3, stride) if bottleneck else units.conv_bn(inner, inner, 3)
        self.conv3 = units.conv_bn(inner, inner * EXPANSION, 1) if bottleneck else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        return y if self.conv3 is None else self.conv3(y)


class ResidualBlock(Branch):
    """``ReLU(branch(x) + shortcut(x))``; a 1x1 convolution stands for the shortcut where the sizes differ."""

    def __init__(self, units: Units, reads: int, inner: int, stride: int, bottleneck: bool):
        super().__init__(units, reads, inner, stride, bottleneck)
        writes = inner * EXPANSION if bottleneck else inner
        resized = stride > 1 or reads != writes
        self.shortcut = units.conv_bn(reads, writes, 1, stride) if resized else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(super().forward(x) + self.shortcut(x))


class Stage(nn.Module):
    """A stage of "stagewise" networks: a projection, then the branches; with ``stem``, a convolution for the projection."""

    def __init__(self, units: Units, reads: int, inner: int, count: int, stride: int, bottleneck: bool, stem: bool):
        super().__init__()
        writes = inner * EXPANSION if bottleneck else inner
        self.conv1 = units.conv_bn(reads, writes, 3) if stem else None
        self.projection = None if stem else units.conv_bn(reads, writes, 1, stride)
        self.relu, self.count = nn.ReLU(), count
        for b in range(count):
            channels = reads if b == 0 and not stem else writes
            self.add_module(f"block{b}", Branch(units, channels, inner, stride if b == 0 else 1, bottleneck))

    def forward(self, x: Tensor) -> Tensor:
        if self.conv1 is not None:
            x = trunk = self.relu(self.conv1(x))
        else:
            trunk = self.projection(x)
        x = self.relu(trunk + self.block0(x))
        for b in range(1, self.count):
            x = self.relu(x + getattr(self, f"block{b}")(x))
        return x


class ResNet(nn.Module):
    """Stem, stages, average pool, linear. ``imagenet``: a 7x7 stem and a max pool, else 3x3 and, for CIFAR, three stages.

    ``stagewise``: stages of `Stage` instead of blocks; on CIFAR the first of them holds the stem.
    """

    def __init__(
        self, units: Units, blocks: Sequence[int], width: int, num_classes: int, imagenet: bool, bottleneck: bool, stagewise: bool
    ):  # fmt: skip
        super().__init__()
        channels, self.stages = 3, len(blocks)
        self.conv1 = self.maxpool = None
        if imagenet or not stagewise:
            self.conv1 = units.conv_bn_relu(3, width, 7 if imagenet else 3, 2 if imagenet else 1)
            self.maxpool, channels = nn.MaxPool2d(3, 2, 1) if imagenet else None, width
        for s, count in enumerate(blocks):
            inner, stride = width * 2**s, 2 if s > 0 else 1
            writes = inner * EXPANSION if bottleneck else inner
            if stagewise:
                stage = Stage(units, channels, inner, count, stride, bottleneck, stem=self.conv1 is None and s == 0)
            else:
                reads = [channels] + [writes] * (count - 1)
                stage = nn.Sequential(
                    *(ResidualBlock(units, c, inner, stride if b == 0 else 1, bottleneck) for b, c in enumerate(reads))
                )
            self.add_module(f"stage{s + 1}", stage)
            channels = writes
        self.gap = nn.AvgPool2d(7 if imagenet else 8)
        self.last = "fc" if imagenet and stagewise else "linear"
        self.add_module(self.last, nn.Linear(channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        if self.conv1 is not None:
            x = self.conv1(x)
        if self.maxpool is not None:
            x = self.maxpool(x)
        for s in range(self.stages):
            x = getattr(self, f"stage{s + 1}")(x)
        return getattr(self, self.last)(self.gap(x).flatten(1))


@dataclass(frozen=True)
class Network:
    """What `acnet` takes for granted: data set, channels of the first stage, depth; ``names``: those of the authors' code."""

    dataset: str
    width: int
    depth: int | None
    names: str


NETWORKS = {
    "resnet": Network("imagenet", 64, 18, "sres18, sres34; of 2019 also resnet50, resnet101, resnet152"),
    "stagewise": Network("imagenet", 64, 50, "sres50"),
    "mobilenet": Network("imagenet", 32, None, "smi1"),
    "cifar-quick": Network("cifar", 32, None, "cfqkbnc"),
    "vgg": Network("cifar", 64, None, "vc"),
    "wrn": Network("cifar", 128, 16, "wrnc16plain; of 2019 also 28 and 40 layers"),
    "cifar-stagewise": Network("cifar", 16, 56, "src56, src110"),
    "cifar-resnet": Network("cifar", 16, 56, "rc56, rc110, rc164 of 2019"),
}
IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BOTTLENECK_DEPTHS = (50, 101, 152)


def acnet(
    network: str = "resnet", depth: int | None = None, width: int | None = None, num_classes: int | None = None,
    release: int = 2020, deploy: bool = False, blocks: Sequence[int] | None = None,
) -> nn.Module:  # fmt: skip
    """An untrained network of the authors' code.

    ``network``: of `NETWORKS`. ``depth``: "resnet" 18, 34 (50, 101, 152 of bottlenecks), "stagewise" 50, 101, 152, the
    CIFAR ones 6n + 2 and "wrn" 6n + 4; the others have none. ``width``: channels of the first stage (of the first
    convolution where there are no stages). ``num_classes``: 10 for CIFAR, 1000 for ImageNet unless given. ``blocks``: of
    each stage, where they are not those of ``depth``. ``release``: of the code, 2020 or 2019, see `Units`. ``deploy``: one
    convolution with bias in place of each `ACBlock`.

    Raises ValueError for what the code does not build.
    """
    if network not in NETWORKS:
        raise ValueError(f"network {network!r}: the networks are {', '.join(NETWORKS)}")
    if release not in RELEASES:
        raise ValueError(f"release {release!r}: the releases are {', '.join(map(str, RELEASES))}")
    standard, units = NETWORKS[network], Units(release, deploy)
    width = standard.width if width is None else width
    if width < 1:
        raise ValueError(f"width {width}: a stage needs a channel")
    imagenet = standard.dataset == "imagenet"
    classes = num_classes or (1000 if imagenet else 10)
    if standard.depth is None:
        if depth or blocks:
            raise ValueError(f"a {network} has no {'depth' if depth else 'blocks'} to choose")
        return {"mobilenet": MobileNet, "cifar-quick": CifarQuick, "vgg": VGG}[network](units, width, classes)
    depth = depth or standard.depth
    regular = stage_blocks(network, depth)
    blocks = tuple(blocks or regular)
    if network == "wrn":
        return WideResNet(units, blocks, width, classes)
    bottleneck = imagenet and depth in BOTTLENECK_DEPTHS
    return ResNet(units, blocks, width, classes, imagenet, bottleneck, "stagewise" in network)


def stage_blocks(network: str, depth: int) -> tuple[int, ...]:
    """Blocks of each stage; raises ValueError for a depth that such networks do not have."""
    if NETWORKS[network].dataset == "imagenet":
        allowed = BOTTLENECK_DEPTHS if network == "stagewise" else tuple(IMAGENET_BLOCKS)
        if depth not in allowed:
            raise ValueError(f"depth {depth}: a {network} has {', '.join(map(str, allowed))}")
        return IMAGENET_BLOCKS[depth]
    rest = 4 if network == "wrn" else 2
    if depth < 6 + rest or (depth - rest) % 6:
        raise ValueError(f"depth {depth}: a {network} has 6n + {rest}")
    return ((depth - rest) // 6,) * 3

"""Residual networks of "Deep residual learning for image recognition" (He et al. 2015, arXiv 1512.03385).

Post-activation: ``ReLU(h(x) + F(x))``. ImageNet (four stages, a 7x7 stem and a max pool) and CIFAR (a 3x3 stem; three stages of
16-32-64 channels, section 4.2, or the four of ImageNet); ResNeXt (Xie et al. 2016, arXiv 1611.05431) and wide bottlenecks
(Zagoruyko & Komodakis 2016, arXiv 1605.07146, section 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

# What stands for h where sizes differ (section 3.3): option B, and option A with the new channels in either place.
SHORTCUTS = {
    "projection": "1x1 convolutions",
    "pad_both": "x subsampled, zeros on both sides of its channels",
    "pad_behind": "x subsampled, zeros behind its channels",
}
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BOTTLENECK_DEPTHS = (50, 101, 152)
STEMS = ("cifar", "imagenet")
HEADS = ("fc", "linear")
EXPANSION = 4
BASE_WIDTH = 64  # ``width_per_group`` that leaves a bottleneck as wide as its stage


@dataclass(frozen=True)
class Form:
    """What all blocks of a network share; ``bias`` and ``projection_bias``: of convolutions in F and in h."""

    shortcut: str
    stride_in_1x1: bool
    groups: int
    batch_norm: bool
    bias: bool
    projection_bias: bool


class ResidualBlock(nn.Module):
    """``ReLU(h(x) + F(x))``, ``[N, channels[0], H, W]`` to ``[N, channels[-1], H/stride, W/stride]``.

    ``F = BN(W₂ · ReLU(BN(W₁ · x)))`` of 3x3 convolutions, or of three, 1x1, 3x3 (grouped) and 1x1. ``channels``: those of x,
    then those behind each convolution.
    """

    def __init__(self, channels: Sequence[int], stride: int, form: Form):
        super().__init__()
        self.convolutions = len(channels) - 1
        bottleneck = self.convolutions == 3
        strided = 2 if bottleneck and not form.stride_in_1x1 else 1
        for i, (reads, writes) in enumerate(zip(channels[:-1], channels[1:], strict=True), 1):
            kernel = 3 if not bottleneck or i == 2 else 1
            groups = form.groups if bottleneck and i == 2 else 1
            step = stride if i == strided else 1
            self.add_module(f"conv{i}", nn.Conv2d(reads, writes, kernel, step, kernel // 2, groups=groups, bias=form.bias))
            self.add_module(f"bn{i}", nn.BatchNorm2d(writes) if form.batch_norm else None)
        self.relu = nn.ReLU()
        self.stride, self.channels, self.kind = stride, (channels[0], channels[-1]), "identity"
        if stride > 1 or channels[0] != channels[-1]:
            self.kind = form.shortcut
        self.downsample = _projection(*self.channels, stride, form) if self.kind == "projection" else None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.convolutions + 1):
            y = getattr(self, f"conv{i}")(y)
            norm = getattr(self, f"bn{i}")
            y = y if norm is None else norm(y)
            y = y if i == self.convolutions else self.relu(y)
        return self.relu(y + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.kind == "identity":
            return x
        if self.downsample is not None:
            return self.downsample(x)
        reads, writes = self.channels
        front = (writes - reads) // 2 if self.kind == "pad_both" else 0
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, front, writes - reads - front))


def _projection(reads: int, writes: int, stride: int, form: Form) -> nn.Sequential:
    convolution = nn.Conv2d(reads, writes, 1, stride, bias=form.projection_bias)
    return nn.Sequential(convolution, nn.BatchNorm2d(writes)) if form.batch_norm else nn.Sequential(convolution)


class ResNet(nn.Module):
    """Stem, stages of `ResidualBlock`, global average pool, linear: ``[N, 3, H, W]`` to ``[N, num_classes]``.

    ``inner``: the channels inside the blocks of the first stage; ``width`` those of the basic blocks that a stage of
    bottlenecks stands for, which write `EXPANSION` times as many. Both double with every stage. With ``num_classes`` 0 the
    output is what is pooled, ``[N, C]``.
    """

    def __init__(
        self, blocks: Sequence[int], bottleneck: bool, width: int, inner: int, stem_width: int, stem: str, num_classes: int,
        head: str, form: Form,
    ):  # fmt: skip
        super().__init__()
        imagenet = stem == "imagenet"
        kernel = 7 if imagenet else 3
        self.conv1 = nn.Conv2d(3, stem_width, kernel, 2 if imagenet else 1, kernel // 2, bias=form.bias)
        self.bn1 = nn.BatchNorm2d(stem_width) if form.batch_norm else None
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet else None
        self.stages, self.head, channels = len(blocks), head, stem_width
        for s, count in enumerate(blocks):
            stage = nn.Sequential()
            writes = width * 2**s
            inside = (inner * 2**s, inner * 2**s, writes * EXPANSION) if bottleneck else (writes, writes)
            for b in range(count):
                stage.add_module(str(b), ResidualBlock((channels, *inside), 2 if s > 0 and b == 0 else 1, form))
                channels = inside[-1]
            self.add_module(f"layer{s + 1}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.add_module(head, nn.Linear(channels, num_classes) if num_classes else None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.relu(x if self.bn1 is None else self.bn1(x))
        if self.maxpool is not None:
            x = self.maxpool(x)
        for s in range(self.stages):
            x = getattr(self, f"layer{s + 1}")(x)
        x = self.avgpool(x).flatten(1)
        head = getattr(self, self.head)
        return x if head is None else head(x)


def resnet(
    depth: int = 50, num_classes: int | None = None, stem: str = "imagenet", shortcut: str = "projection",
    groups: int = 1, width_per_group: float = BASE_WIDTH, stride_in_1x1: bool = False, width: int | None = None,
    stem_width: int | None = None, bottleneck: bool | None = None, blocks: Sequence[int] | None = None,
    batch_norm: bool = True, bias: bool = False, projection_bias: bool | None = None, head: str = "fc",
) -> ResNet:  # fmt: skip
    """An untrained network of the paper or its relatives.

    ``depth``: 18, 34, 50, 101 or 152, in four stages; with a CIFAR ``stem`` also 6n + 2, of ``bottleneck`` blocks 9n + 2, in
    three. ``blocks``: of each stage, where they are not those of ``depth``. ``groups`` and ``width_per_group``: of the 3x3 in a
    bottleneck, at 64 channels of its stage: (32, 4) is ResNeXt 32x4d, (1, 128) twice as wide. ``shortcut``: of `SHORTCUTS`.
    ``stride_in_1x1``: a bottleneck strides in its first convolution, as the paper has it, and not in its 3x3. ``width``:
    channels of the first stage (64; of three 16), ``stem_width`` of the stem (the same). ``batch_norm`` False and ``bias``
    True: a network whose batch norms were folded. ``head``: name of the last layer, of `HEADS`.

    Raises ValueError for what is not defined.
    """
    for name, value, allowed in (("stem", stem, STEMS), ("shortcut", shortcut, SHORTCUTS), ("head", head, HEADS)):
        if value not in allowed:
            raise ValueError(f"{name} {value!r}: it is one of {', '.join(allowed)}")
    blocks, bottleneck = (tuple(blocks), bool(bottleneck)) if blocks else _blocks(depth, stem, bottleneck)
    width = width or default_width(blocks, stem)
    inner = round(width * width_per_group / BASE_WIDTH) * groups
    if not bottleneck and (groups, width_per_group) != (1, BASE_WIDTH):
        raise ValueError(f"groups {groups}, width_per_group {width_per_group}: only bottlenecks have them")
    if min(groups, inner, width, *blocks) < 1:
        raise ValueError(f"width {width}, groups {groups}, width_per_group {width_per_group}, blocks {blocks}: all are at least 1")
    form = Form(shortcut, stride_in_1x1, groups, batch_norm, bias, bias if projection_bias is None else projection_bias)
    classes = (10 if stem == "cifar" else 1000) if num_classes is None else num_classes
    return ResNet(blocks, bottleneck, width, inner, stem_width or width, stem, classes, head, form)


def default_width(blocks: Sequence[int], stem: str) -> int:
    """Channels of the first stage: 16 in the three stages of CIFAR, else 64."""
    return 16 if stem == "cifar" and len(blocks) == 3 else 64


def _blocks(depth: int, stem: str, bottleneck: bool | None) -> tuple[tuple[int, ...], bool]:
    if depth in BLOCKS:
        return BLOCKS[depth], depth in BOTTLENECK_DEPTHS if bottleneck is None else bottleneck
    known = ", ".join(map(str, BLOCKS))
    if stem != "cifar":
        raise ValueError(f"depth {depth}: it is one of {known}")
    n, rest = divmod(depth - 2, 9 if bottleneck else 6)
    if rest or n < 1:
        raise ValueError(f"depth {depth}: it is one of {known}, or on CIFAR 6n + 2, of bottlenecks 9n + 2")
    return (n,) * 3, bool(bottleneck)

"""DiracNets: plain networks without skip connections (Zagoruyko & Komodakis 2017, arXiv 1706.00388)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn

from foldexport.zoo.dirac import DiracConv2d, NCReLU

BASE_WIDTHS = {"CIFAR": (16, 32, 64), "ImageNet": (64, 128, 256, 512)}
IMAGENET_BLOCKS = {18: (4, 4, 4, 4), 34: (6, 8, 12, 6)}


@dataclass(frozen=True)
class Plan:
    """What a DiracNet is made of: the numbers that a checkpoint's shapes give away."""

    dataset: str  # "CIFAR" or "ImageNet": the stem and the pooling
    widths: tuple[int, ...]  # channels of each group
    blocks: tuple[int, ...]  # blocks of each group
    num_classes: int
    version: int = 2

    @property
    def depth(self) -> int:
        """6n + 4 on CIFAR (three groups of 2n blocks); on ImageNet the convolutions and the linear layer."""
        return sum(self.blocks) + (4 if self.dataset == "CIFAR" else 2)

    @property
    def width(self) -> float | None:
        """The factor on the paper's channel counts, in the fewest decimals; None where the groups share none."""
        base = BASE_WIDTHS[self.dataset]
        candidates = [round(self.widths[-1] / base[-1], decimals) for decimals in range(6)]
        return next((w for w in candidates if self.widths == tuple(int(w * c) for c in base)), None)


def make_plan(
    dataset: str = "CIFAR", depth: int | None = None, width: float = 1, num_classes: int | None = None, version: int = 2
) -> Plan:
    """The paper's networks. CIFAR: depth 6n + 4, ``16·w, 32·w, 64·w`` channels; ImageNet: 18 or 34, ``64·w … 512·w``.

    Unless given, ``depth`` and ``num_classes`` are 16 and 10 on CIFAR, 18 and 1000 on ImageNet. Raises ValueError for a
    dataset, depth or version that the paper does not define.
    """
    if dataset not in BASE_WIDTHS:
        raise ValueError(f"dataset {dataset!r}: a DiracNet is made for 'CIFAR' or 'ImageNet'")
    if version not in (1, 2):
        raise ValueError(f"version {version}: a DiracNet is of version 1 or 2")
    widths = tuple(int(width * c) for c in BASE_WIDTHS[dataset])
    if min(widths) < 1:
        raise ValueError(f"width {width}: leaves a group without channels")
    if dataset == "CIFAR":
        depth = 16 if depth is None else depth
        n, rest = divmod(depth - 4, 6)
        if rest or n < 1:
            raise ValueError(f"depth {depth}: a CIFAR DiracNet has depth 6n + 4 (10, 16, 22, 28, 34, …)")
        return Plan(dataset, widths, (2 * n,) * 3, num_classes or 10, version)
    depth = 18 if depth is None else depth
    if depth not in IMAGENET_BLOCKS:
        raise ValueError(f"depth {depth}: an ImageNet DiracNet has depth 18 or 34")
    return Plan(dataset, widths, IMAGENET_BLOCKS[depth], num_classes or 1000, version)


def _block(version: int, in_channels: int, out_channels: int, folded: bool) -> nn.Sequential:
    """``bn(conv2d(relu(x), w_hat, padding=1))``, folded ``conv2d(relu(x), w, b, padding=1)``.

    In version 1 NCReLU stands for ReLU, so the convolution reads ``2·in_channels``.
    """
    layers: dict[str, nn.Module] = {"relu": nn.ReLU()} if version == 2 else {"ncrelu": NCReLU()}
    reads = in_channels if version == 2 else 2 * in_channels
    if folded:
        layers["conv"] = nn.Conv2d(reads, out_channels, 3, padding=1)
    else:
        layers["conv"] = DiracConv2d(reads, out_channels, 3, padding=1, bias=False, tiled=version == 1)
        layers["bn"] = nn.BatchNorm2d(out_channels)
    return nn.Sequential(OrderedDict(layers))


def _features(plan: Plan, folded: bool) -> nn.Sequential:
    """Everything before ``flatten`` and ``fc``, under the published names and in the published order."""
    imagenet, first = plan.dataset == "ImageNet", plan.widths[0]
    stem = {"stride": 2, "padding": 3} if imagenet else {"padding": 1}
    layers: dict[str, nn.Module] = {"conv": nn.Conv2d(3, first, 7 if imagenet else 3, bias=folded, **stem)}
    if not folded:
        layers["bn"] = nn.BatchNorm2d(first)
    if imagenet:
        layers["max_pool0"] = nn.MaxPool2d(3, 2, 1)
    else:
        layers["relu"] = nn.ReLU()
    in_channels = first
    for g, (width, count) in enumerate(zip(plan.widths, plan.blocks, strict=True)):
        if g > 0:
            layers[f"max_pool{g}"] = nn.MaxPool2d(2)
        group = nn.Sequential()
        for b in range(count):
            group.add_module(f"block{b}", _block(plan.version, in_channels, width, folded))
            in_channels = width
        layers[f"group{g}"] = group
    if plan.version == 2:
        layers["last_relu"] = nn.ReLU()
    # The paper's ImageNet network pools over whatever is left (7x7 at 224), its CIFAR network over 8x8.
    layers["avg_pool"] = nn.AdaptiveAvgPool2d(1) if imagenet else nn.AvgPool2d(8)
    return nn.Sequential(OrderedDict(layers))


class DiracNet(nn.Module):
    """The training graph: Dirac-parametrised convolutions, each behind a ReLU and before a batch norm.

    Input ``[N, 3, H, W]``, output ``[N, num_classes]``. Folding it gives the published folded names
    (``features.conv``, ``features.group0.block0.conv``, …, ``fc``).
    """

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan
        self.features = _features(plan, folded=False)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(plan.widths[-1], plan.num_classes)
        nn.init.kaiming_normal_(self.features.conv.weight)
        nn.init.kaiming_normal_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.features(x)))


class FoldedDiracNet(nn.Module):
    """The published folded network: a plain chain of convolutions with biases, ReLU and pooling."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan
        self.features = _features(plan, folded=True)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(plan.widths[-1], plan.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.features(x)))


def diracnet(
    dataset: str = "CIFAR", depth: int | None = None, width: float = 1, num_classes: int | None = None, version: int = 2
) -> DiracNet:
    """An untrained DiracNet of the paper; arguments and errors as `make_plan`."""
    return DiracNet(make_plan(dataset, depth, width, num_classes, version))

"""The networks of "Very deep convolutional networks for large-scale image recognition" (Simonyan & Zisserman 2014, 1409.1556).

Configurations A, B, D and E of its table 1, with and without batch norm, for ImageNet and, behind the same convolutions, the
smaller classifiers that CIFAR takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

# Convolutions of each of the five parts; a max pool stands behind each. The depth counts three linear layers.
CONFIGURATIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)
POOL = "M"
IMAGENET_POOLED = 7  # positions a side that the ImageNet classifier reads
# Places of the linear layers in the classifier: ReLU behind each but the last, dropout behind that or in front of them.
CLASSIFIERS = ((0, 3, 6), (1, 4, 6))


class VGG(nn.Module):
    """3x3 convolutions, each with its batch norm or none and a ReLU, max pools, and a classifier: ``[N, 3, H, W]`` to
    ``[N, num_classes]``.

    ``layers``: channels of each convolution, and "M" for a max pool. ``classifier``: places of its linear layers, empty where
    it is a single one. ``pooled``: positions a side that it reads; 7 are averaged from whatever comes, others are what comes.
    """

    def __init__(
        self, layers: Sequence[int | str], batch_norm: bool, bias: bool, classifier: Sequence[int], hidden: Sequence[int],
        pooled: int, num_classes: int,
    ):  # fmt: skip
        super().__init__()
        features: list[nn.Module] = []
        channels = 3
        for layer in layers:
            if layer == POOL:
                features.append(nn.MaxPool2d(2, 2))
                continue
            features.append(nn.Conv2d(channels, layer, 3, padding=1, bias=bias))
            features += [nn.BatchNorm2d(layer), nn.ReLU()] if batch_norm else [nn.ReLU()]
            channels = layer
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(pooled) if pooled == IMAGENET_POOLED else None
        sizes = (channels * pooled**2, *hidden, num_classes)
        linears = [nn.Linear(reads, writes) for reads, writes in zip(sizes[:-1], sizes[1:], strict=True)]
        self.classifier = _classifier(linears, tuple(classifier)) if classifier else linears[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if self.avgpool is not None:
            x = self.avgpool(x)
        return self.classifier(x.flatten(1))


def _classifier(linears: Sequence[nn.Module], places: tuple[int, ...]) -> nn.Sequential:
    modules: list[nn.Module] = [nn.Dropout() for _ in range(places[-1] + 1)]
    for place, linear in zip(places, linears, strict=True):
        modules[place] = linear
    for place in places[:-1]:
        modules[place + 1] = nn.ReLU()
    return nn.Sequential(*modules)


def vgg(
    depth: int = 16, batch_norm: bool = False, num_classes: int = 1000, classifier: Sequence[int] = CLASSIFIERS[0],
    hidden: Sequence[int] | None = None, pooled: int = IMAGENET_POOLED, layers: Sequence[int | str] | None = None,
    bias: bool = True,
) -> VGG:  # fmt: skip
    """An untrained network of the paper or its relatives.

    ``depth``: 11, 13, 16 or 19 (configurations A, B, D and E); ``layers``: channels and "M" for a max pool, where they are
    others. ``classifier``: places of the linear layers in the sequence, of `CLASSIFIERS` or one alone; empty for a single layer
    without a sequence. ``hidden``: their channels but for the last (4096 each). ``pooled``: positions a side that the
    classifier reads: 7 of an image of 224 pixels, 1 of 32. ``bias``: of the convolutions.

    Raises ValueError for what is not defined.
    """
    if layers is None:
        if depth not in CONFIGURATIONS:
            raise ValueError(f"depth {depth}: such networks have depth {', '.join(map(str, CONFIGURATIONS))}")
        layers = configuration(depth)
    places = tuple(classifier)
    if len(places) > 1 and places not in CLASSIFIERS:
        raise ValueError(f"classifier {places}: the linear layers are at {' or '.join(map(str, CLASSIFIERS))}, or one alone")
    hidden = (4096,) * max(len(places) - 1, 0) if hidden is None else tuple(hidden)
    if len(hidden) != max(len(places) - 1, 0):
        raise ValueError(f"hidden {hidden}: the classifier {places} has {max(len(places) - 1, 0)} hidden layers")
    if pooled < 1 or num_classes < 1 or not any(layer != POOL for layer in layers):
        raise ValueError(f"pooled {pooled}, num_classes {num_classes}, layers {tuple(layers)}: at least 1 of each")
    return VGG(tuple(layers), batch_norm, bias, places, hidden, pooled, num_classes)


def configuration(depth: int) -> tuple[int | str, ...]:
    """``(64, "M", 128, "M", 256, 256, "M", …)`` for depth 11."""
    return sum(((width,) * count + (POOL,) for width, count in zip(WIDTHS, CONFIGURATIONS[depth])), ())


def pixels(layers: Sequence[int | str], pooled: int) -> int:
    """Side of the image that comes to ``pooled`` positions a side."""
    return pooled * 2 ** sum(layer == POOL for layer in layers)


def side(positions: int) -> int:
    """Side of a square of positions; raises ValueError where there is none."""
    root = math.isqrt(positions)
    if root < 1 or root**2 != positions:
        raise ValueError(f"{positions} positions are no square")
    return root

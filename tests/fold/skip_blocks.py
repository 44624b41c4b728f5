"""Residual blocks of every kind, drawn at random: what stands before, in and behind the branch, and what the shortcut is."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fold.layers import Apply, conv
from tests.statistics import randomise

ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda c: nn.ReLU(),
    "relu6": lambda c: nn.ReLU6(),
    "clamp": lambda c: nn.Hardtanh(-0.3, 0.8),
    "above": lambda c: Apply(lambda x: x.clamp_min(-0.4), "max(x, -0.4)"),
    "below": lambda c: Apply(lambda x: x.clamp_max(0.5), "min(x, 0.5)"),
    "prelu": lambda c: nn.PReLU(c),
    "none": lambda c: nn.Identity(),
}
BEFORE = ("none", "relu", "bn", "bn-relu", "bn-clamp", "above", "bn-below", "prelu")
SHORTCUTS = ("conv1x1", "conv3x3", "pool", "pad", "subsample")


class Skip(nn.Module):
    """``behind(c · (±shortcut(x) ± branch(before(x))))``; the shortcut may read before(x) instead."""

    def __init__(self, before: nn.Module, branch: nn.Module, shortcut: nn.Module, behind: nn.Module, *,
                 signs: tuple[float, float] = (1.0, 1.0), from_activation: bool = False, scale: float = 1.0):  # fmt: skip
        super().__init__()
        self.before, self.branch, self.shortcut, self.behind = before, branch, shortcut, behind
        self.signs, self.from_activation, self.scale = signs, from_activation, scale

    def forward(self, x: Tensor) -> Tensor:
        first = self.before(x)
        skip, value = self.shortcut(first if self.from_activation else x), self.branch(first)
        if self.signs == (1.0, -1.0):
            total = skip - value
        elif self.signs == (-1.0, 1.0):
            total = value - skip
        else:
            total = value + skip
        return self.behind(self.scale * total if self.scale != 1 else total)


def option_a(extra: int) -> nn.Module:
    """Every second position, and channels of zeros (He et al. 2015)."""
    return Apply(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, extra)), "option A")


def before(kind: str, channels: int) -> nn.Module:
    parts = kind.split("-")
    return nn.Sequential(*(nn.BatchNorm2d(channels) if part == "bn" else ACTIVATIONS[part](channels) for part in parts))


def shortcut(kind: str, cin: int, cout: int, stride: int) -> nn.Module:
    if cin == cout and stride == 1 and kind not in ("conv1x1", "conv3x3"):
        return nn.Identity()
    if kind == "pad" and cout >= cin and stride == 2:
        return option_a(cout - cin)
    if kind == "pool" and stride == 2:
        return nn.Sequential(nn.AvgPool2d(2), conv(cin, cout, 1), nn.BatchNorm2d(cout))
    if kind == "subsample" and stride == 2:
        return nn.Sequential(nn.MaxPool2d(1, 2), conv(cin, cout, 1))
    kernel = 3 if kind == "conv3x3" else 1
    return nn.Sequential(conv(cin, cout, kernel, stride=stride), nn.BatchNorm2d(cout))


def branch(dice: random.Random, cin: int, cout: int, stride: int) -> nn.Sequential:
    """One to three convolutions, batch norms around them, an activation between each two and now and then at the end."""
    count = dice.randint(1, 3)
    strided = dice.randrange(count)
    layers: list[nn.Module] = []
    channels = cin
    for place in range(count):
        width = cout if place == count - 1 else dice.choice((4, 6, 8, channels))
        groups = dice.choice((1, 1, 1, 2, channels)) if width == channels else 1
        kernel, dilation = dice.choice(((1, 1), (3, 1), (3, 1), (5, 1), (3, 2)))
        padding = dilation * (kernel - 1) // 2
        step = stride if place == strided else 1
        layers.append(nn.Conv2d(channels, width, kernel, step, padding, dilation, groups, bias=dice.random() < 0.5))
        if dice.random() < 0.7:
            layers.append(nn.BatchNorm2d(width))
        if place < count - 1 or dice.random() < 0.2:
            layers.append(ACTIVATIONS[dice.choice((*ACTIVATIONS, "relu", "relu", "relu", "relu"))](width))
        channels = width
    return nn.Sequential(*layers)


def skip(dice: random.Random, cin: int) -> tuple[Skip, int]:
    """A block at random and the channels that it gives."""
    stride, cout = dice.choice(((1, cin), (1, cin), (1, 8), (2, 8), (2, cin)))
    kind = dice.choice(BEFORE)
    block = Skip(
        before(kind, cin), branch(dice, cin, cout, stride), shortcut(dice.choice(SHORTCUTS), cin, cout, stride),
        before(dice.choice(("none", "none", "relu", "bn-relu", "bn-below")), cout),
        signs=dice.choice(((1.0, 1.0), (1.0, 1.0), (1.0, -1.0), (-1.0, 1.0))), from_activation=dice.random() < 0.3,
        scale=dice.choice((1.0, 1.0, 0.7, -0.8)),
    )  # fmt: skip
    return block, cout


def network(seed: int, channels: int = 4) -> nn.Sequential:
    """A stem, two or three blocks, and a convolution or a pooled head."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    layers: list[nn.Module] = [conv(3, channels)]
    if dice.random() < 0.5:
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    if dice.random() < 0.3:
        layers.append(nn.MaxPool2d(3, 1, 1))
    for _ in range(dice.randint(1, 3)):
        block, channels = skip(dice, channels)
        layers.append(block)
    ends = ([conv(channels, 5)], [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)], [nn.ReLU(), conv(channels, 3, 1)])
    return randomise(nn.Sequential(*layers, *dice.choice(ends)), seed, zero=0.1 * (seed % 3 == 0), tiny=0.1 * (seed % 4 == 0))

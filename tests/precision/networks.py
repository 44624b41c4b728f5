"""Networks whose numbers lie where a half type cannot hold them, and how they are brought into one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import foldexport
from foldexport.api import Folded
from foldexport.precision.groups import Groups, groups_of
from foldexport.precision.ranges import Sizes, measure
from tests.statistics import randomise


class Trunk(nn.Module):
    """``x + f(relu(x))`` with a transition, a pool and a head: one of each that ties or absorbs."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.first = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.second = nn.Conv2d(channels, channels, 1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ConvTranspose2d(channels, 2 * channels, 2, stride=2, groups=2)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.activation = nn.PReLU(2 * channels)
        self.head = nn.Linear(2 * channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.second(self.first(x.relu()).relu())
        x = self.pool(F.leaky_relu(x, 0.1))
        y = self.depthwise(self.up(x))
        return self.head(self.activation(y).mean((2, 3)))


class Mixed(nn.Module):
    """Operators that pin a scale, follow it with numbers, or pass it on: a gate, clamps, a concatenation, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.gate = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).clamp(-0.5, 0.7), F.relu6(self.b(x))
        a = a * torch.sigmoid(self.gate(a.mean((2, 3), keepdim=True)))
        y = F.adaptive_avg_pool2d(F.silu(self.last(torch.cat([a, F.pad(b, (1, 1, 1, 1))[..., 1:-1, 1:-1]], 1))), 2)
        return self.fc(y.flatten(1)).softmax(1)


@functools.cache
def folded(network: Callable[[], nn.Module], size: int = 8) -> Folded:
    """The network with random weights, folded; the same one for every test."""
    return foldexport.fold(randomise(network(), 1), torch.randn(2, 3, size, size))


def program_of(found: Folded, *, per_channel: bool = False) -> tuple[fx.GraphModule, Groups, Sizes, list[tuple]]:
    """The float64 program, its groups, its ranges, and the inputs that they were measured on."""
    program = found.refold()
    inputs = [each for each, _ in found.certificate.references]
    sizes = measure(program.module, inputs)
    return program.module, groups_of(program.module, sizes.shapes, per_channel=per_channel), sizes, inputs


def roots(groups: Groups) -> list[int]:
    """Every group that may be scaled, but not the one of inputs and outputs."""
    return sorted({int(root) for node in groups.slots for root in groups.roots(node)} - {0})


class Far(nn.Module):
    """Convolutions whose middle values are 2^``exponent`` times too large, and smaller again behind."""

    def __init__(self, exponent: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.d = nn.Conv2d(4, 4, 3, padding=1)
        self.exponent = exponent

    def spread(self) -> Far:
        """To be called once the weights are drawn."""
        with torch.no_grad():
            self.a.weight.mul_(2.0**self.exponent)
            self.a.bias.mul_(2.0**self.exponent)
            self.c.weight.mul_(2.0**-self.exponent)
            self.b.bias.mul_(2.0**self.exponent)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())


@functools.cache
def far(exponent: int) -> Folded:
    return foldexport.fold(randomise(Far(exponent), 2).spread(), torch.randn(2, 3, 8, 8))


class Large(nn.Module):
    """The sigmoid pins what it reads, and the convolution before it is followed by a shrinking one that cannot move."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.large, self.after = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.softplus(self.large(F.silu(self.inside(x))) * 2.0**17)
        return self.after(F.silu(y * 2.0**-17))

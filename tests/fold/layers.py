"""Layers that PyTorch does not have, each from its equation, and small pieces that the blocks are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MODULES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def chain(**layers: nn.Module) -> nn.Sequential:
    """An `nn.Sequential` whose layers carry the given names."""
    sequence = nn.Sequential()
    for name, layer in layers.items():
        sequence.add_module(name, layer)
    return sequence


def conv(cin: int, cout: int, kernel: int | tuple[int, ...] = 3, *, bias: bool = False, **geometry) -> nn.Conv2d:
    """A 2d convolution, padded to "same" for odd kernels unless a padding is given."""
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    geometry.setdefault("padding", tuple(k // 2 for k in size))
    return nn.Conv2d(cin, cout, size, bias=bias, **geometry)


def conv_bn(cin: int, cout: int, kernel: int | tuple[int, ...] = 3, **geometry) -> nn.Sequential:
    """Convolution without bias, then batch norm."""
    return chain(conv=conv(cin, cout, kernel, **geometry), bn=nn.BatchNorm2d(cout))


class Apply(nn.Module):
    """A function of one or several tensors as a module."""

    def __init__(self, function: Callable[..., Tensor], name: str = ""):
        super().__init__()
        self.function = function
        self.name = name

    def extra_repr(self) -> str:
        return self.name

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*values)


class Sum(nn.Module):
    """``sum_i branch_i(x)``."""

    def __init__(self, **branches: nn.Module):
        super().__init__()
        self.names = tuple(branches)
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (getattr(self, name)(x) for name in self.names)
        for other in others:
            first = first + other
        return first


class Cat(Sum):
    """``cat_i branch_i(x)`` along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in self.names], 1)


class DiracConv(nn.Module):
    """``w_hat = alpha * delta + beta * normalize(w)``, ``[Cout, Cin, k, ...]`` (Zagoruyko & Komodakis 2017)."""

    def __init__(self, dims: int, cin: int, cout: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, *(3,) * dims))
        self.alpha = nn.Parameter(torch.randn(cout))
        self.beta = nn.Parameter(torch.randn(cout))
        self.register_buffer("delta", nn.init.dirac_(torch.empty_like(self.weight)))
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        column = (-1,) + (1,) * (self.dims + 1)
        unit = F.normalize(self.weight.flatten(1), eps=1e-12).reshape(self.weight.shape)
        weight = self.alpha.view(column) * self.delta + self.beta.view(column) * unit
        return CONVOLUTIONS[self.dims](x, weight, padding=1)


class WeightStandardisedConv(nn.Conv2d):
    """``W <- (W - mean(W)) / (std(W) + 1e-5)`` per output channel (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


class Normalise(nn.Module):
    """``(x - mean) / std`` per channel, the preprocessing of an image network."""

    def __init__(self, channels: int = 3):
        super().__init__()
        self.register_buffer("mean", torch.linspace(0.4, 0.5, channels).view(1, -1, 1, 1))
        self.register_buffer("std", torch.linspace(0.2, 0.3, channels).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Gate(nn.Module):
    """Squeeze and excitation, ``x * sigmoid(W2 relu(W1 mean(x)))`` (Hu et al. 2018)."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = self.reduce(F.adaptive_avg_pool2d(x, 1)).relu()
        return x * self.expand(squeezed).sigmoid()


class Shuffle(nn.Module):
    """Channel shuffle (Zhang et al. 2018): ``[N, g * c, H, W]`` read as ``[N, c * g, H, W]``."""

    def __init__(self, groups: int):
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        split = x.view(batch, self.groups, channels // self.groups, height, width)
        return split.transpose(1, 2).reshape(batch, channels, height, width)

"""Residual networks without batch norm, and the counterpart with it.

Civitelli et al. 2021 (arXiv 2112.12299): ``x' = c·(h(x) + f(x))`` with f pre-activation; and its relatives: SkipInit (De &
Smith 2020, arXiv 2002.10444) and ReZero (Bachlechner et al. 2020, arXiv 2003.04887), RescaleNet (Shao et al. 2020, "Is
normalization indispensable for training deep neural networks?"), NF-ResNet (Brock et al. 2021, arXiv 2101.08692).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# scheme: the residual sum. A 1x1 convolution stands for h where the sizes differ, and everywhere in the last three.
SCHEMES = {
    "idshort": "c·(x + f(x))",
    "learnscalar": "c·(αx + f(x))",
    "skipinit": "x + αf(x)",
    "rescale": "αx + βf(x)",
    "nf": "x + αf(x/β), weights standardised",
    "convshort": "c·(conv1x1(x) + f(x))",
    "batchnorm": "conv1x1(x) + f(x), batch norm in f",
}  # fmt: skip
SUM_SCALED = ("idshort", "learnscalar", "convshort")
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BOTTLENECK_DEPTHS = (50, 101)
EXPANSION = 4
RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))  # of unit variance behind a ReLU of a unit normal
NF_ALPHA = 0.2
INITIALISATIONS = ("backward", "fan_out", "brock")


class StandardizedConv2d(nn.Conv2d):
    """A convolution with ``W_hat = gain·(W − mean)/sqrt(var·n)`` per filter, n = Cin·kH·kW (NF-ResNet, section 4.1).

    ``gain`` is ``[Cout, 1, 1, 1]``; x ``[N, Cin, H, W]``. The variance is the biased one, floored at 1e-4/n.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n = self.weight[0].numel()
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        standardized = (self.weight - mean) * torch.rsqrt((variance * n).clamp(min=1e-4)) * self.gain
        return F.conv2d(x, standardized, self.bias, self.stride, self.padding)


class ResidualBlock(nn.Module):
    """``x' = c·(h(x) + f(x))`` or its scheme's sum; f is ReLU → convolution, two or (bottleneck) three times.

    ``channels``: those of x, then those behind each convolution of f. Input ``[N, channels[0], H, W]``, output
    ``[N, channels[-1], H/stride, W/stride]``. ``forward_std``: of x at initialisation, NF-ResNet's β.
    """

    def __init__(self, channels: Sequence[int], stride: int, scheme: str, c: float, position: tuple[int, int], forward_std: float):
        super().__init__()
        self.scheme = scheme
        self.activation = nn.ReLU()
        conv = StandardizedConv2d if scheme == "nf" else nn.Conv2d
        biased, last = scheme != "batchnorm", len(channels) - 2
        for i, (reads, writes) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
            kernel = 3 if last == 1 or i == 1 else 1
            strided = i == (0 if last == 1 else 1)
            if scheme == "batchnorm":
                self.add_module(f"norm{i + 1}", nn.BatchNorm2d(reads))
            self.add_module(f"conv{i + 1}", conv(reads, writes, kernel, stride if strided else 1, kernel // 2, bias=biased))
        self.convolutions = len(channels) - 1
        resized = stride > 1 or channels[0] != channels[-1]
        self.shortcut = None
        if resized or scheme in ("convshort", "batchnorm"):
            self.shortcut = conv(channels[0], channels[-1], 1, stride, bias=biased)
        self._add_scales(scheme, c, position, forward_std)

    def _add_scales(self, scheme: str, c: float, position: tuple[int, int], forward_std: float) -> None:
        """Learnt scalars as parameters; fixed ones as buffers, so that a checkpoint says all that the network is."""
        k, total = position
        if scheme in SUM_SCALED:
            self.register_buffer("sum_scale", torch.tensor(c))
        if scheme == "learnscalar" and self.shortcut is None:
            self.skip_scale = nn.Parameter(torch.tensor(1.0))
        if scheme == "skipinit":
            self.residual_scale = nn.Parameter(torch.tensor(0.0))
        if scheme == "rescale":
            self.skip_scale = nn.Parameter(torch.tensor(math.sqrt((k - 1 + total) / (k + total))))
            self.residual_scale = nn.Parameter(torch.tensor(math.sqrt(1 / (k + total))))
        if scheme == "nf":
            self.register_buffer("residual_scale", torch.tensor(NF_ALPHA))
            self.register_buffer("input_std", torch.tensor(forward_std))

    def forward(self, x: Tensor) -> Tensor:
        first = self._activated(x / self.input_std if self.scheme == "nf" else x, 1)
        y = self.conv1(first)
        for i in range(2, self.convolutions + 1):
            y = getattr(self, f"conv{i}")(self._activated(y, i))
        return self._sum(x, first, y)

    def _activated(self, x: Tensor, i: int) -> Tensor:
        if self.scheme == "batchnorm":
            x = getattr(self, f"norm{i}")(x)
        x = self.activation(x)
        return x * RELU_GAIN if self.scheme == "nf" else x

    def _sum(self, x: Tensor, first: Tensor, f: Tensor) -> Tensor:
        h = x
        if self.shortcut is not None:
            h = self.shortcut(first if self.scheme == "nf" else x)
        if hasattr(self, "skip_scale"):
            h = h * self.skip_scale
        if hasattr(self, "residual_scale"):
            f = f * self.residual_scale
        total = h + f
        return total * self.sum_scale if self.scheme in SUM_SCALED else total


class NFResNet(nn.Module):
    """A stem, four stages of `ResidualBlock`, ReLU, global average pool, linear: ``[N, 3, H, W]`` to ``[N, num_classes]``."""

    def __init__(self, blocks: Sequence[int], bottleneck: bool, scheme: str, width: int, num_classes: int, stem: str, c: float):
        super().__init__()
        self.scheme = scheme
        conv = StandardizedConv2d if scheme == "nf" else nn.Conv2d
        imagenet, biased = stem == "imagenet", scheme != "batchnorm"
        kernel = 7 if imagenet else 3
        self.conv1 = conv(3, width, kernel, 2 if imagenet else 1, kernel // 2, bias=biased)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet else None
        channels, k, variance = width, 0, 1.0
        self.stages = len(blocks)
        for s, count in enumerate(blocks):
            stage = nn.Sequential()
            for b in range(count):
                k += 1
                inner = width * 2**s
                inside = (inner, inner, inner * EXPANSION) if bottleneck else (inner, inner)
                stride = 2 if s > 0 and b == 0 else 1
                stage.add_module(
                    str(b), ResidualBlock((channels, *inside), stride, scheme, c, (k, sum(blocks)), math.sqrt(variance))
                )
                channels = inside[-1]
                # NF-ResNet: a block adds alpha² to the variance, and a transition's shortcut starts it again at 1.
                variance = (1.0 if b == 0 else variance) + NF_ALPHA**2
            self.add_module(f"layer{s + 1}", stage)
        self.norm = nn.BatchNorm2d(channels) if scheme == "batchnorm" else None
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.maxpool is not None:
            x = self.maxpool(x)
        for s in range(self.stages):
            x = getattr(self, f"layer{s + 1}")(x)
        if self.norm is not None:
            x = self.norm(x)
        return self.fc(self.avgpool(self.relu(x)).flatten(1))


def nfresnet(
    depth: int = 18, scheme: str = "idshort", width: int = 64, num_classes: int | None = None, stem: str = "cifar",
    c: float = math.sqrt(0.5), blocks: Sequence[int] | None = None, init: str = "backward",
) -> NFResNet:  # fmt: skip
    """A network of the paper, initialised by `initialise`.

    ``depth`` 18, 34, 50 or 101 (bottlenecks from 50 on); ``blocks``: blocks of each stage, where they are not the paper's.
    ``scheme``: of `SCHEMES`. ``width``: channels of the first stage (64). ``stem``: "cifar" (3x3) or "imagenet" (7x7 stride
    2 and a max pool). ``num_classes``: 10 for CIFAR, 1000 for ImageNet unless given. ``c``: the constant of the sum.
    Raises ValueError for what the paper does not define.
    """
    if depth not in BLOCKS:
        raise ValueError(f"depth {depth}: such networks have depth {', '.join(map(str, BLOCKS))}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r}: the schemes are {', '.join(SCHEMES)}")
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"stem {stem!r}: a stem is 'cifar' or 'imagenet'")
    if width < 1:
        raise ValueError(f"width {width}: the first stage needs a channel")
    classes = num_classes or (10 if stem == "cifar" else 1000)
    network = NFResNet(tuple(blocks or BLOCKS[depth]), depth in BOTTLENECK_DEPTHS, scheme, width, classes, stem, c)
    initialise(network, init)
    return network


def initialise(network: NFResNet, scheme: str) -> None:
    """Draws the convolutions' weights and standardises them, so that mean and variance are exactly as asked.

    A convolution of kernel k multiplies the variance of the gradient by ``n_out·Var[W]``, and the ReLU in front of it by ½;
    a shortcut has none in front. With ``g = 2``, for a shortcut 1:

    "backward" (Civitelli et al. 2021): gradients keep their variance, ``Var[W] = g/n_out`` over the whole tensor with
        ``n_out = k²·Cout/stride²``, the positions of the output that a position of the input reaches. At stride 1 that is
        the paper's k²·Cout (He et al. 2015, section 2.2), which counts positions that a stride leaves out.
    "fan_out": ``n_out = k²·Cout`` at any stride. Each transition then takes the gradient's variance down to a quarter.
    "brock" (Brock et al. 2021, section 4): activations keep theirs, ``Var[W] = γ²/n_in`` per filter, ``n_in = k²·Cin``,
        ``γ² = 2/(1 − 1/π)`` (`RELU_GAIN`), 1 for a shortcut and the stem. A convolution then multiplies the variance of the
        gradient by ``γ²/2 · n_out/n_in``, and a bottleneck, whose sizes cancel, by ``(γ²/2)³ = 3.2``: f's 3.2 and the
        shortcut's 1 make 2.1 of c² = ½ in every block of equal sizes. NF-ResNet's α² = 0.04 in front of f hides it.

    Biases are zero. Networks of weight-standardised convolutions, whose scale their gain decides, are drawn from a unit
    normal. Raises ValueError for another ``scheme``.
    """
    if scheme not in INITIALISATIONS:
        raise ValueError(f"init {scheme!r}: an initialisation is {', '.join(map(repr, INITIALISATIONS))}")
    for name, module in network.named_modules():
        if not isinstance(module, nn.Conv2d) or module.weight.is_meta:
            continue
        with torch.no_grad():
            nn.init.normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, StandardizedConv2d):
                continue
            over = (1, 2, 3) if scheme == "brock" else (0, 1, 2, 3)
            variance, mean = torch.var_mean(module.weight, dim=over, keepdim=True, correction=0)
            module.weight.sub_(mean).mul_(torch.sqrt(_wanted_variance(module, name, scheme) / variance))


def _wanted_variance(conv: nn.Conv2d, name: str, scheme: str) -> float:
    shortcut = name.endswith("shortcut")
    fan_in, fan_out = conv.weight[0].numel(), conv.weight[:, 0].numel()
    if scheme == "brock":
        return (1 if shortcut or name == "conv1" else RELU_GAIN**2) / fan_in
    reached = fan_out if scheme == "fan_out" else fan_out / conv.stride[0] ** 2
    return (1 if shortcut else 2) / reached

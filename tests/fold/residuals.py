"""Blocks with skip connections: pre- and post-activation, scaled, gated by a learnable scalar, dense."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fold.layers import chain, conv, conv_bn


class PreBranch(nn.Module):
    """``conv2(relu(conv1(relu(x))))``: the residual branch without batch norm."""

    def __init__(self, cin: int, cout: int | None = None):
        super().__init__()
        self.conv1 = conv(cin, cout or cin, bias=True)
        self.conv2 = conv(cout or cin, cout or cin, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x.relu()).relu())


class ScaledBlock(nn.Module):
    """``c * (h(x) + f(x))``, h the identity or a 1x1 convolution (Civitelli et al. 2021)."""

    def __init__(self, cin: int, cout: int, *, project: bool, scale: float = 0.5**0.5):
        super().__init__()
        self.shortcut = conv(cin, cout, 1, bias=True) if project else nn.Identity()
        self.branch = PreBranch(cin, cout)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (self.shortcut(x) + self.branch(x))


class AlphaBlock(nn.Module):
    """``alpha * x + f(x)`` or, ReZero (Bachlechner et al. 2020), ``x + alpha * f(x)``; alpha is learnt."""

    def __init__(self, channels: int, alpha: float, *, on_skip: bool):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([alpha]))
        self.branch = PreBranch(channels)
        self.on_skip = on_skip

    def forward(self, x: Tensor) -> Tensor:
        if self.on_skip:
            return self.alpha * x + self.branch(x)
        return x + self.alpha * self.branch(x)


def headed(channels: int, *blocks: nn.Module) -> nn.Sequential:
    """A stem convolution, the blocks, then ReLU, average pool and a linear head."""
    return chain(
        stem=conv(3, channels, bias=True),
        blocks=nn.Sequential(*blocks),
        relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        head=nn.Linear(channels, 5),
    )


class PreactivationBlock(nn.Module):
    """``x + conv2(relu(bn2(conv1(relu(bn1(x))))))`` (He et al. 2016)."""

    def __init__(self, channels: int, kernel: int = 3):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv(channels, channels, kernel)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


class PostactivationBlock(nn.Module):
    """``relu(x + bn2(conv2(relu(bn1(conv1(x))))))`` (He et al. 2015), activations in place as torchvision has them."""

    def __init__(self, channels: int):
        super().__init__()
        self.unit1 = conv_bn(channels, channels)
        self.unit2 = conv_bn(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit2(F.relu(self.unit1(x), inplace=True))
        out += x
        return F.relu(out, inplace=True)


class PaddedShortcut(nn.Module):
    """``relu(bn(conv(x)) + pad(pool(x)))``: a shortcut without parameters (option A of He et al. 2015)."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.unit = conv_bn(cin, cout, stride=2)
        self.extra = cout - cin

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, self.extra))
        return (self.unit(x) + shortcut).relu()


class DenseBlock(nn.Module):
    """Two layers of ``cat(x, conv3x3(relu(bn(conv1x1(relu(bn(x)))))))``, then bn, ReLU, 1x1 (Huang et al. 2017)."""

    def __init__(self, channels: int = 8, growth: int = 4):
        super().__init__()
        self.stem = conv(3, channels)
        widths = [channels, channels + growth, channels + 2 * growth]
        self.layers = nn.ModuleList(
            chain(
                bn1=nn.BatchNorm2d(width),
                relu1=nn.ReLU(),
                conv1=conv(width, 2 * growth, 1),
                bn2=nn.BatchNorm2d(2 * growth),
                relu2=nn.ReLU(),
                conv2=conv(2 * growth, growth),
            )
            for width in widths[:2]
        )
        self.transition = chain(bn=nn.BatchNorm2d(widths[2]), relu=nn.ReLU(), conv=conv(widths[2], 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        value = self.stem(x)
        for layer in self.layers:
            value = torch.cat([value, layer(value)], 1)
        return self.transition(value)


class ConvNeXtBlock(nn.Module):
    """``x + gamma * W2 gelu(W1 norm(dw(x)))`` with channels last inside (Liu et al. 2022)."""

    def __init__(self, channels: int):
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.up = nn.Linear(channels, 4 * channels)
        self.down = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.linspace(-0.5, 1.5, channels))

    def forward(self, x: Tensor) -> Tensor:
        value = self.norm(self.dw(x).permute(0, 2, 3, 1))
        value = self.gamma * self.down(F.gelu(self.up(value)))
        return x + value.permute(0, 3, 1, 2)

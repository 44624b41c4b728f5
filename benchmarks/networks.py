"""Networks to measure on, in plain PyTorch, with statistics that make every batch norm do something.

Usable as ``--arch benchmarks/networks.py:resnet50``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # width, blocks, stride: He et al. 2015, table 1


class Bottleneck(nn.Module):
    """``relu(bn(conv1×1(relu(bn(conv3×3(relu(bn(conv1×1(x)))))))) + shortcut(x))`` (He et al. 2015, figure 5)."""

    def __init__(self, cin: int, width: int, stride: int) -> None:
        super().__init__()
        cout = 4 * width
        self.conv1 = nn.Conv2d(cin, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, cout, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(cout)
        self.relu = nn.ReLU()
        self.downsample = None
        if stride > 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        value = self.relu(self.bn1(self.conv1(x)))
        value = self.relu(self.bn2(self.conv2(value)))
        value = self.bn3(self.conv3(value))
        return self.relu(value + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Residual network of bottlenecks, ``[N, 3, H, W]`` to ``[N, classes]`` (He et al. 2015, table 1)."""

    def __init__(self, stages: tuple[tuple[int, int, int], ...] = STAGES, classes: int = 1000) -> None:
        super().__init__()
        stem = stages[0][0]
        self.conv1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        blocks, channels = [], stem
        for width, count, stride in stages:
            for place in range(count):
                blocks.append(Bottleneck(channels, width, stride if place == 0 else 1))
                channels = 4 * width
        self.layers = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        value = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.avgpool(value).flatten(1))


class Block(nn.Module):
    """``relu(bn(conv(relu(bn(conv(x))))) + x)``: two layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        value = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(value)) + x)


def resnet50() -> ResNet:
    """25.6 million parameters, 4.1 billion multiply-adds at 224 × 224."""
    return ResNet()


def tiny_resnet() -> ResNet:
    """The same network with one bottleneck of 8 channels per stage."""
    return ResNet(((8, 1, 1), (8, 1, 2)), classes=10)


def chain(layers: int, channels: int = 16) -> nn.Sequential:
    """``layers`` times convolution, batch norm, ReLU."""
    parts: list[nn.Module] = []
    for place in range(layers):
        cin = channels if place else 3
        parts += [nn.Conv2d(cin, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*parts)


def residual(layers: int, channels: int = 16) -> nn.Sequential:
    """A convolution and ``layers // 2`` residual blocks of two layers."""
    stem = [nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*stem, *(Block(channels) for _ in range(layers // 2)))


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every weight and statistic anew, in place, and return the module in eval mode.

    Batch norm: ``μ ~ N(0, 0.5²)``, ``σ² ~ U[0.3, 3]``, ``|γ| ~ U[0.5, 1.5]`` of both signs, ``β ~ U[−1, 1]``; the last
    of a residual branch has a fifth of that γ, which keeps a trunk of many additions near one.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            layer.weight.copy_((2 / fan_in) ** 0.5 * torch.randn(layer.weight.shape, generator=generator))
        elif isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(0.5 * torch.randn(layer.running_mean.shape, generator=generator))
            layer.running_var.copy_(uniform(layer.running_var, 0.3, 3.0))
            layer.weight.copy_(uniform(layer.weight, 0.5, 1.5))
            layer.weight[torch.randperm(len(layer.weight), generator=generator)[::2]] *= -1
            layer.bias.copy_(uniform(layer.bias, -1.0, 1.0))
    for block in module.modules():
        if isinstance(block, Bottleneck | Block):
            (block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight.mul_(0.2)
    return module.eval()

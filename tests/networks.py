"""Whole networks in plain PyTorch, each from its paper: ``[N, 3, H, W]`` to ``[N, classes]``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv(cin: int, cout: int, kernel: int, stride: int = 1, *, bias: bool = False, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=bias)


def conv_bn(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(cin, cout, kernel, stride, groups=groups), nn.BatchNorm2d(cout))


class Head(nn.Sequential):
    """Global average pool and a linear layer."""

    def __init__(self, channels: int, classes: int):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Residual(nn.Module):
    """A residual block of He et al. 2015 (post-activation) or 2016 (pre-activation), basic or bottleneck."""

    def __init__(self, cin: int, width: int, stride: int, *, bottleneck: bool, preactivation: bool):
        super().__init__()
        cout = 4 * width if bottleneck else width
        plan = [(cin, width, 1, 1), (width, width, 3, stride), (width, cout, 1, 1)] if bottleneck else [
            (cin, width, 3, stride), (width, width, 3, 1)]
        self.preactivation = preactivation
        self.convs = nn.ModuleList(conv(i, o, k, s) for i, o, k, s in plan)
        self.bns = nn.ModuleList(nn.BatchNorm2d(i if preactivation else o) for i, o, _, _ in plan)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride > 1 or cin != cout:
            self.shortcut = conv(cin, cout, 1, stride) if preactivation else conv_bn(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self._pre(x) if self.preactivation else self._post(x)

    def _pre(self, x: Tensor) -> Tensor:
        # Where the shapes change, the shortcut reads the activated value (He et al. 2016, section 4).
        value = self.relu(self.bns[0](x))
        skip = x if self.shortcut is None else self.shortcut(value)
        value = self.convs[0](value)
        for bn, layer in zip(self.bns[1:], self.convs[1:]):
            value = layer(self.relu(bn(value)))
        value += skip
        return value

    def _post(self, x: Tensor) -> Tensor:
        value = x
        for index, (layer, bn) in enumerate(zip(self.convs, self.bns)):
            value = bn(layer(value))
            if index < len(self.convs) - 1:
                value = self.relu(value)
        value += x if self.shortcut is None else self.shortcut(x)
        return self.relu(value)


class ResNet(nn.Module):
    """ResNet for ImageNet: 7x7 stem, max pool, four stages."""

    def __init__(self, blocks: tuple[int, ...], *, bottleneck: bool, preactivation: bool, classes: int = 10):
        super().__init__()
        self.stem = conv(3, 64, 7, 2) if preactivation else nn.Sequential(conv_bn(3, 64, 7, 2), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        layers, channels = [], 64
        for stage, count in enumerate(blocks):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                width = 64 * 2**stage
                layers.append(Residual(channels, width, stride, bottleneck=bottleneck, preactivation=preactivation))
                channels = 4 * width if bottleneck else width
        self.blocks = nn.Sequential(*layers)
        self.last = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()) if preactivation else nn.Identity()
        self.head = Head(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.pool(self.stem(x)))))


def preactivation_resnet18() -> ResNet:
    return ResNet((2, 2, 2, 2), bottleneck=False, preactivation=True)


def preactivation_resnet50() -> ResNet:
    return ResNet((3, 4, 6, 3), bottleneck=True, preactivation=True)


def resnet18() -> ResNet:
    return ResNet((2, 2, 2, 2), bottleneck=False, preactivation=False)


def resnet50() -> ResNet:
    return ResNet((3, 4, 6, 3), bottleneck=True, preactivation=False)


class DenseLayer(nn.Module):
    """``cat(x, conv3x3(relu(bn(conv1x1(relu(bn(x)))))))`` (Huang et al. 2017)."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(4 * growth)
        self.conv1, self.conv2 = conv(channels, 4 * growth, 1), conv(4 * growth, growth, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: list[Tensor]) -> Tensor:
        value = self.conv1(self.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu(self.norm2(value)))


class DenseStage(nn.Module):
    """Every layer reads the concatenation of all values before it, as torchvision writes it."""

    def __init__(self, channels: int, growth: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(channels + i * growth, growth) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


def densenet121(growth: int = 32, classes: int = 10) -> nn.Sequential:
    """DenseNet-121: stages of 6, 12, 24 and 16 layers, halved by transitions."""
    channels, blocks = 2 * growth, (6, 12, 24, 16)
    layers: list[nn.Module] = [conv_bn(3, channels, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for stage, count in enumerate(blocks):
        layers.append(DenseStage(channels, growth, count))
        channels += count * growth
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        if stage < len(blocks) - 1:
            layers += [conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*layers, Head(channels, classes))


class NormalizerFreeBlock(nn.Module):
    """``c * (h(x) + f(x))``, ``h(x) = x``, ``alpha x`` or a 1x1 convolution; f a bottleneck of ReLU and convolution.

    (Civitelli et al. 2021; c = sqrt(1/2).)
    """

    def __init__(self, cin: int, width: int, stride: int, kind: str):
        super().__init__()
        cout = 4 * width
        self.conv1 = conv(cin, width, 1, bias=True)
        self.conv2 = conv(width, width, 3, stride, bias=True)
        self.conv3 = conv(width, cout, 1, bias=True)
        self.relu = nn.ReLU()
        self.alpha = None
        self.shortcut = None
        if kind == "ConvShort" or cin != cout or stride > 1:
            self.shortcut = conv(cin, cout, 1, stride, bias=True)
        elif kind == "LearnScalar":
            self.alpha = nn.Parameter(torch.empty(1).uniform_(0.6, 1.4))
        self.scale = 0.5**0.5

    def forward(self, x: Tensor) -> Tensor:
        value = self.conv3(self.relu(self.conv2(self.relu(self.conv1(self.relu(x))))))
        skip = x if self.shortcut is None else self.shortcut(x)
        if self.alpha is not None:
            skip = self.alpha * skip
        return self.scale * (skip + value)


def normalizer_free_resnet50(kind: str, classes: int = 10) -> nn.Sequential:
    """ResNet-50 for small images, 3x3 stem without stride; kind is IdShort, LearnScalar or ConvShort."""
    layers: list[nn.Module] = [conv(3, 64, 3, bias=True)]
    channels = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for index in range(count):
            layers.append(NormalizerFreeBlock(channels, width, 2 if stage > 0 and index == 0 else 1, kind))
            channels = 4 * width
    return nn.Sequential(*layers, nn.ReLU(), Head(channels, classes))


def plain(depth: int = 60, channels: int = 8, classes: int = 10) -> nn.Sequential:
    """``depth`` times convolution, batch norm, ReLU, without a skip connection."""
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [conv_bn(channels if index else 3, channels, 3), nn.ReLU()]
    return nn.Sequential(*layers, Head(channels, classes))


class RepVGGBlock(nn.Module):
    """``relu(bn(conv3x3(x)) + bn(conv1x1(x)) + bn(x))`` (Ding et al. 2021)."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.dense, self.pointwise = conv_bn(cin, cout, 3, stride), conv_bn(cin, cout, 1, stride)
        self.identity = nn.BatchNorm2d(cin) if cin == cout and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        total = self.dense(x) + self.pointwise(x)
        return (total if self.identity is None else total + self.identity(x)).relu()


def repvgg_a0(classes: int = 10) -> nn.Sequential:
    """RepVGG-A0 as it is trained: 1, 2, 4, 14, 1 blocks of 48, 48, 96, 192, 1280 channels."""
    layers, channels = [], 3
    for count, width in ((1, 48), (2, 48), (4, 96), (14, 192), (1, 1280)):
        for index in range(count):
            layers.append(RepVGGBlock(channels, width, 2 if index == 0 else 1))
            channels = width
    return nn.Sequential(*layers, Head(channels, classes))


class InvertedResidual(nn.Module):
    """``x + project(dw(expand(x)))``, ReLU6 behind the first two (Sandler et al. 2018)."""

    def __init__(self, cin: int, cout: int, stride: int, expand: int):
        super().__init__()
        inner = cin * expand
        layers = [conv_bn(cin, inner, 1), nn.ReLU6(inplace=True)] if expand > 1 else []
        layers += [conv_bn(inner, inner, 3, stride, groups=inner), nn.ReLU6(inplace=True), conv_bn(inner, cout, 1)]
        self.body = nn.Sequential(*layers)
        self.skip = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skip else self.body(x)


MOBILENET_V2 = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)


def mobilenet_v2(classes: int = 10) -> nn.Sequential:
    """MobileNetV2: rows of expansion, channels, blocks, stride."""
    layers: list[nn.Module] = [conv_bn(3, 32, 3, 2), nn.ReLU6(inplace=True)]
    channels = 32
    for expand, width, count, stride in MOBILENET_V2:
        for index in range(count):
            layers.append(InvertedResidual(channels, width, stride if index == 0 else 1, expand))
            channels = width
    layers += [conv_bn(channels, 1280, 1), nn.ReLU6(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(1280, classes))

"""Re-parametrisable blocks as their papers train them: several branches that one convolution can compute."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tests.fold.layers import Cat, chain, conv, conv_bn


class RepVGGBlock(nn.Module):
    """``relu(bn(conv3x3(x)) + bn(conv1x1(x)) + bn(x))``, the last where the shapes agree (Ding et al. 2021, RepVGG)."""

    def __init__(self, cin: int, cout: int, *, stride: int = 1, groups: int = 1):
        super().__init__()
        self.dense = conv_bn(cin, cout, 3, stride=stride, groups=groups)
        self.pointwise = conv_bn(cin, cout, 1, stride=stride, groups=groups)
        self.identity = nn.BatchNorm2d(cin) if cin == cout and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        total = self.dense(x) + self.pointwise(x)
        if self.identity is not None:
            total = total + self.identity(x)
        return total.relu()


class ACBlock(nn.Module):
    """``bn(conv3x3(x)) + bn(conv3x1(x)) + bn(conv1x3(x))`` (Ding et al. 2019, ACNet)."""

    def __init__(self, cin: int, cout: int, stride: int = 1):
        super().__init__()
        self.square = conv_bn(cin, cout, 3, stride=stride)
        self.vertical = conv_bn(cin, cout, (3, 1), stride=stride)
        self.horizontal = conv_bn(cin, cout, (1, 3), stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return (self.square(x) + self.vertical(x) + self.horizontal(x)).relu()


class BNAndPad(nn.Module):
    """Batch norm, then a border of the value that it gives to zero, ``beta - mu * gamma / sqrt(var + eps)``.

    As published for DBB: a zero pad whose four border slices are then overwritten in place.
    """

    def __init__(self, channels: int, pad: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        output, p = self.bn(x), self.pad
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        border = (self.bn.bias - self.bn.running_mean * scale).view(1, -1, 1, 1)
        output = F.pad(output, [p] * 4)
        output[:, :, :p, :] = border
        output[:, :, -p:, :] = border
        output[:, :, :, :p] = border
        output[:, :, :, -p:] = border
        return output


class IdentityConv1x1(nn.Conv2d):
    """A 1x1 convolution that starts as the identity: ``(W + I) x``."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 1, bias=False)
        self.register_buffer("eye", nn.init.dirac_(self.weight.new_empty(self.weight.shape)))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + self.eye)


class DiverseBranchBlock(nn.Module):
    """Four branches, each behind a batch norm of its own (Ding et al. 2021, Diverse Branch Block, figure 2)."""

    def __init__(self, cin: int, cout: int, kernel: int = 3, stride: int = 1):
        super().__init__()
        pad = kernel // 2
        self.dense = conv_bn(cin, cout, kernel, stride=stride)
        self.pointwise = conv_bn(cin, cout, 1, stride=stride)
        self.average = chain(
            conv=conv(cin, cout, 1),
            bn=BNAndPad(cout, pad),
            pool=nn.AvgPool2d(kernel, stride),
            avgbn=nn.BatchNorm2d(cout),
        )
        self.sequence = chain(
            idconv1=IdentityConv1x1(cin),
            bn1=BNAndPad(cin, pad),
            conv2=conv(cin, cout, kernel, stride=stride, padding=0),
            bn2=nn.BatchNorm2d(cout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.dense(x) + self.pointwise(x) + self.sequence(x) + self.average(x)).relu()


class MobileOneBlock(nn.Module):
    """``relu(bn(x) + bn(scale1x1(x)) + sum_k bn(conv_k(x)))`` (Vasu et al. 2023, MobileOne), ``copies`` of the last."""

    def __init__(self, cin: int, cout: int, kernel: int, *, stride: int = 1, groups: int = 1, copies: int = 4):
        super().__init__()
        self.skip = nn.BatchNorm2d(cin) if cin == cout and stride == 1 else None
        self.scale = conv_bn(cin, cout, 1, stride=stride, groups=groups) if kernel > 1 else None
        self.convs = nn.ModuleList(
            conv_bn(cin, cout, kernel, stride=stride, groups=groups) for _ in range(copies)
        )

    def forward(self, x: Tensor) -> Tensor:
        total = 0 if self.skip is None else self.skip(x)
        if self.scale is not None:
            total = total + self.scale(x)
        for branch in self.convs:
            total = total + branch(x)
        return total.relu()


def mobileone(cin: int, cout: int, stride: int = 1) -> nn.Sequential:
    """A depthwise block, then a pointwise one."""
    return chain(
        depthwise=MobileOneBlock(cin, cin, 3, stride=stride, groups=cin),
        pointwise=MobileOneBlock(cin, cout, 1),
    )


def inception(cin: int) -> nn.Module:
    """1x1, 1x1 -> 3x3 and average pool -> 1x1, each with batch norm and ReLU, concatenated (Szegedy et al. 2016)."""
    return Cat(
        point=chain(unit=conv_bn(cin, 8, 1), relu=nn.ReLU()),
        window=chain(reduce=conv_bn(cin, 4, 1), relu=nn.ReLU(), unit=conv_bn(4, 8, 3), relu2=nn.ReLU()),
        pooled=chain(pool=nn.AvgPool2d(3, 1, 1), unit=conv_bn(cin, 4, 1), relu=nn.ReLU()),
    )

"""Networks of `scale.py`: many bytes of weights, or many of activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide(width: int, depth: int) -> nn.Sequential:
    """``depth`` linear layers of ``width²`` weights, each with batch norm and ReLU, behind a convolution of 8×8 images."""
    layers = [nn.Conv2d(3, width // 64, 3, padding=1, bias=False), nn.BatchNorm2d(width // 64), nn.ReLU(), nn.Flatten()]
    for _ in range(depth):
        layers += [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


class UNet(nn.Module):
    """A U-Net of three levels (Ronneberger et al. 2015) with batch norm: two full-size maps of 32 channels are joined."""

    def __init__(self, width: int = 32, classes: int = 2) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = pair(3, width), pair(width, 2 * width), pair(2 * width, 4 * width)
        self.up2, self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join2, self.join1 = pair(4 * width, 2 * width), pair(2 * width, width)
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        third = self.down3(F.max_pool2d(second, 2))
        second = self.join2(torch.cat([second, self.up2(third)], 1))
        return self.out(self.join1(torch.cat([first, self.up1(second)], 1)))


def pair(channels_in: int, channels_out: int) -> nn.Sequential:
    """Two 3×3 convolutions, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for channels in (channels_in, channels_out):
        layers += [nn.Conv2d(channels, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()]
    return nn.Sequential(*layers)


def unet() -> UNet:
    return UNet()

"""Asymmetric convolution blocks, and what stands for a convolution in the networks of their authors.

Ding et al. 2019, "ACNet: strengthening the kernel skeletons for powerful CNN via asymmetric convolution blocks" (arXiv
1908.03930).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn

RELEASES = (2020, 2019)  # of the authors' code; they differ in the strips beside kernels larger than 3x3


class ACBlock(nn.Module):
    """``BN(W·x) + BN(Wᵥ·x) + BN(Wₕ·x)``, kernels k×k, L×1 and 1×L about one centre; ``[N, Cin, H, W]`` to ``[N, Cout, H', W']``.

    Section 3.2 and figure 2. A strip is padded by ``padding − dilation·(k − L)/2`` along its length and by
    ``padding − dilation·(k − 1)/2`` across; a negative one crops. ``strip``: L, as long as the kernel unless given.
    ``deploy``: one convolution with bias instead. Raises ValueError for kernels without a centre.
    """

    def __init__(
        self, reads: int, writes: int, kernel: int = 3, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1,
        strip: int | None = None, deploy: bool = False,
    ):  # fmt: skip
        super().__init__()
        strip = strip or kernel
        if kernel % 2 == 0 or strip % 2 == 0 or strip > kernel:
            raise ValueError(f"kernel {kernel} with strips of {strip}: both have an odd size, the strips no more than the kernel")
        self.deploy = deploy
        if deploy:
            self.fused_conv = nn.Conv2d(reads, writes, kernel, stride, padding, dilation, groups)
            return
        along, across = padding - dilation * (kernel - strip) // 2, padding - dilation * (kernel - 1) // 2
        self.crop_along, self.crop_across = max(-along, 0), max(-across, 0)
        along, across = max(along, 0), max(across, 0)
        shared = {"stride": stride, "dilation": dilation, "groups": groups, "bias": False}
        self.square_conv = nn.Conv2d(reads, writes, kernel, padding=padding, **shared)
        self.square_bn = nn.BatchNorm2d(writes)
        self.ver_conv = nn.Conv2d(reads, writes, (strip, 1), padding=(along, across), **shared)
        self.hor_conv = nn.Conv2d(reads, writes, (1, strip), padding=(across, along), **shared)
        self.ver_bn = nn.BatchNorm2d(writes)
        self.hor_bn = nn.BatchNorm2d(writes)

    def forward(self, x: Tensor) -> Tensor:
        if self.deploy:
            return self.fused_conv(x)
        vertical = self.ver_bn(self.ver_conv(_cropped(x, self.crop_along, self.crop_across)))
        horizontal = self.hor_bn(self.hor_conv(_cropped(x, self.crop_across, self.crop_along)))
        return self.square_bn(self.square_conv(x)) + vertical + horizontal


def _cropped(x: Tensor, rows: int, columns: int) -> Tensor:
    if rows:
        x = x[:, :, rows:-rows]
    return x[:, :, :, columns:-columns] if columns else x


@dataclass(frozen=True)
class Units:
    """What stands for a convolution in a network: its block and batch norm, or its deployed form.

    ``release`` 2020: strips as long as the kernel, none beside 7x7. 2019: strips of three taps beside every kernel.
    """

    release: int
    deploy: bool

    def block(self, reads: int, writes: int, kernel: int, stride: int = 1, groups: int = 1) -> ACBlock:
        strip = 3 if self.release == 2019 else kernel
        return ACBlock(reads, writes, kernel, stride, kernel // 2, 1, groups, strip, self.deploy)

    def plain(self, kernel: int) -> bool:
        return kernel == 1 or (kernel >= 7 and self.release == 2020)

    def conv_bn(self, reads: int, writes: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
        if not self.plain(kernel):
            return self.block(reads, writes, kernel, stride, groups)
        return sequence(conv=_conv(reads, writes, kernel, stride, groups), bn=nn.BatchNorm2d(writes))

    def conv_bn_relu(self, reads: int, writes: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
        if not self.plain(kernel):
            return sequence(acb=self.block(reads, writes, kernel, stride, groups), relu=nn.ReLU())
        return sequence(conv=_conv(reads, writes, kernel, stride, groups), bn=nn.BatchNorm2d(writes), relu=nn.ReLU())

    def bn_relu_conv(self, reads: int, writes: int, kernel: int, stride: int = 1) -> nn.Module:
        if not self.plain(kernel):
            return sequence(bn=nn.BatchNorm2d(reads), relu=nn.ReLU(), acb=self.block(reads, writes, kernel, stride))
        return sequence(bn=nn.BatchNorm2d(reads), relu=nn.ReLU(), conv=_conv(reads, writes, kernel, stride))


def _conv(reads: int, writes: int, kernel: int, stride: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(reads, writes, kernel, stride, kernel // 2, groups=groups, bias=False)


def sequence(**children: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(children))

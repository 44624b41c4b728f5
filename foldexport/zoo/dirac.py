"""Convolutions in the Dirac parametrisation (Zagoruyko & Komodakis 2017, arXiv 1706.00388, sections 3 and 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def dirac_delta(shape: tuple[int, ...]) -> Tensor:
    """The identity as a convolution weight: ``delta[o, o, centre] = 1`` for ``o < min(Cout, Cin)``, else 0.

    ``shape`` is ``[Cout, Cin, *k]``; DiracNets v2 (``torch.nn.init.dirac_`` of the weight's shape).
    """
    return nn.init.dirac_(torch.empty(shape))


def tiled_dirac_delta(shape: tuple[int, ...]) -> Tensor:
    """The square identity of ``n = min(Cout, Cin)`` channels, tiled to ``shape`` ``[Cout, Cin, *k]``; DiracNets v1.

    Raises ValueError where the larger channel count is not a multiple of the smaller one.
    """
    out_channels, in_channels, *kernel = shape
    n = min(out_channels, in_channels)
    if out_channels % n or in_channels % n:
        raise ValueError(f"a tiled delta of {out_channels}x{in_channels} channels; one must be a multiple of the other")
    return dirac_delta((n, n, *kernel)).repeat(out_channels // n, in_channels // n, *[1] * len(kernel))


def dirac_weight(weight: Tensor, alpha: Tensor, beta: Tensor, delta: Tensor) -> Tensor:
    """``w_hat = alpha·delta + beta·normalize(W)``, each filter of W scaled to unit length (eps 1e-12).

    ``weight``, ``delta`` and the result are ``[Cout, Cin, *k]``; ``alpha``, ``beta`` ``[Cout]`` (v2) or ``[1]`` (v1).
    """
    per_filter = (-1, *[1] * (weight.dim() - 1))
    normalized = F.normalize(weight.flatten(1), dim=1, eps=1e-12).view_as(weight)
    return alpha.view(per_filter) * delta + beta.view(per_filter) * normalized


class _DiracConv(nn.Module):
    """What DiracConv1d, 2d and 3d share; ``spatial_dims`` and ``convolve`` are theirs."""

    spatial_dims: int
    convolve: staticmethod

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        bias: bool = True,
        *,
        tiled: bool = False,
    ):
        """``tiled``: version 1, one alpha and one beta for all filters and a tiled delta."""
        super().__init__()
        kernel = (kernel_size,) * self.spatial_dims if isinstance(kernel_size, int) else tuple(kernel_size)
        shape = (out_channels, in_channels, *kernel)
        scales = 1 if tiled else out_channels
        self.padding, self.dilation = padding, dilation
        self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(shape)))
        self.alpha = nn.Parameter(torch.full((scales,), 5.0 if tiled else 1.0))
        self.beta = nn.Parameter(torch.full((scales,), 1e-3 if tiled else 0.1))
        self.register_buffer("delta", tiled_dirac_delta(shape) if tiled else dirac_delta(shape))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        w_hat = dirac_weight(self.weight, self.alpha, self.beta, self.delta)
        return self.convolve(x, w_hat, self.bias, padding=self.padding, dilation=self.dilation)

    def extra_repr(self) -> str:
        out_channels, in_channels, *kernel = self.weight.shape
        return (
            f"{in_channels}, {out_channels}, kernel_size={tuple(kernel)}, padding={self.padding}, "
            f"dilation={self.dilation}, bias={self.bias is not None}"
        )


class DiracConv1d(_DiracConv):
    """``conv1d(x, w_hat)`` of stride 1 with ``w_hat`` as in `dirac_weight`; x ``[N, Cin, L]``."""

    spatial_dims = 1
    convolve = staticmethod(F.conv1d)


class DiracConv2d(_DiracConv):
    """``conv2d(x, w_hat)`` of stride 1 with ``w_hat`` as in `dirac_weight`; x ``[N, Cin, H, W]``."""

    spatial_dims = 2
    convolve = staticmethod(F.conv2d)


class DiracConv3d(_DiracConv):
    """``conv3d(x, w_hat)`` of stride 1 with ``w_hat`` as in `dirac_weight`; x ``[N, Cin, D, H, W]``."""

    spatial_dims = 3
    convolve = staticmethod(F.conv3d)


class NCReLU(nn.Module):
    """``cat(max(x, 0), min(x, 0))`` along the channels: ``[N, C, …]`` to ``[N, 2C, …]`` (DiracNets v1)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.clamp(min=0), x.clamp(max=0)], dim=1)

"""Convolutions that other operators are, and merges that only put weights side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from foldexport.fold.conv.value import Conv


def identity(channels: int, spatial_rank: int, stride: int | Sequence[int] = 1) -> Conv:
    """``y = x`` at every ``stride``-th position: a depthwise 1x1 Dirac kernel; for a linear layer a unit matrix."""
    if spatial_rank == 0:
        return Conv(torch.eye(channels, dtype=torch.float64))
    weight = torch.ones(channels, 1, *(1,) * spatial_rank, dtype=torch.float64)
    return Conv(weight, stride=_each(stride, spatial_rank), groups=channels)


def average_pool(
    channels: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[tuple[int, int]]
) -> Conv:
    """Average pooling as a depthwise convolution with the weight ``1/Π kernel``.

    The same function only if no window is clipped at the border and padding is counted; the caller knows.
    """
    weight = torch.full((channels, 1, *kernel), 1.0 / math.prod(kernel), dtype=torch.float64)
    return Conv(weight, stride=tuple(stride), padding=tuple(padding), groups=channels)


def absorb_padding(conv: Conv, lo: Sequence[int], hi: Sequence[int]) -> Conv:
    """The convolution that reads x where ``conv`` reads x padded with ``lo``, ``hi`` zeros on each spatial axis.

    Negative ones crop. Raises ValueError for transposed and linear layers, and where cropping is followed by padding.
    """
    if conv.transposed or conv.spatial_rank == 0:
        raise ValueError(f"{conv!r} has no padding of its own that adds zeros to its input")
    if len(lo) != conv.spatial_rank or len(hi) != conv.spatial_rank:
        raise ValueError(f"padding {tuple(lo)}, {tuple(hi)} is not on the {conv.spatial_rank} spatial axes")
    padding = tuple(zip(lo, hi, strict=True))
    own = [side for pair in conv.padding for side in pair]
    outer = [side for pair in padding for side in pair]
    if any(side < 0 < mine for mine, side in zip(own, outer, strict=True)):
        raise ValueError(f"padding {padding} crops what {conv!r} then pads with zeros")
    return replace(conv, padding=tuple((a + c, b + d) for (a, b), (c, d) in zip(conv.padding, padding, strict=True)))


def concatenate(convs: Sequence[Conv]) -> Conv:
    """Convolutions of the same tensor as one, their output channels behind each other.

    Raises ValueError where kernel, stride, padding or dilation differ, or one has groups.
    """
    first = convs[0]
    for conv in convs:
        if conv.groups != 1:
            raise ValueError(f"{conv!r} has groups; its rows do not read every channel")
        if _window(conv) != _window(first):
            raise ValueError(f"{conv!r} and {first!r} do not have the same geometry")
        if conv.in_channels != first.in_channels:
            raise ValueError(f"{conv!r} and {first!r} do not read the same channels")
    axis = 1 if first.transposed else 0
    # raw weights stay raw where only output scales wait; they cost a vector
    raw = all(conv.in_scale is None and conv.weight.dtype == first.weight.dtype for conv in convs)
    weights = [conv.weight.detach() if raw else conv.dense() for conv in convs]
    out_scale = None
    if raw and any(conv.out_scale is not None for conv in convs):
        out_scale = torch.cat([_or_constant(conv.out_scale, conv, 1.0) for conv in convs])
    bias = None
    if any(conv.bias is not None for conv in convs):
        bias = torch.cat([_or_constant(conv.bias, conv, 0.0) for conv in convs])
    return replace(first, weight=torch.cat(weights, axis), bias=bias, in_scale=None, out_scale=out_scale)


def _window(conv: Conv) -> tuple:
    """Everything about a convolution but its channels."""
    return conv.kernel_size, conv.stride, conv.dilation, conv.padding, conv.transposed, conv.output_padding


def _or_constant(vector: Tensor | None, conv: Conv, constant: float) -> Tensor:
    return torch.full((conv.out_channels,), constant, dtype=torch.float64) if vector is None else vector


def _each(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)

"""The sum of two convolutions of the same tensor as one convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from foldexport.fold.conv.layout import regrouped, untransposed
from foldexport.fold.conv.value import Conv


def add(a: Conv, b: Conv) -> Conv:
    """``a(x) + b(x)`` as one convolution (RepVGG, Ding et al. 2021; DBB transform VI, Ding et al. 2021).

    Tap i of a kernel reads at the offset ``i·dilation − lo``. The merged kernel is the bounding window of both sets of
    offsets, on the coarsest grid that holds them: its dilation is the gcd of all differences. Groups that differ become
    block-diagonal over ``gcd(Ga, Gb)`` groups.

    Raises ValueError where strides, output sizes or channels differ.
    """
    plain = untransposed(a), untransposed(b)
    if plain[0].transposed == plain[1].transposed:
        a, b = plain
    _check_sum(a, b)
    groups = math.gcd(a.groups, b.groups)
    windows = [_merge_axis(a, b, axis) for axis in range(a.spatial_rank)]
    kernel = [size for _, _, size in windows]
    rows, columns = (a.in_channels, a.out_channels) if a.transposed else (a.out_channels, a.in_channels)
    weight = torch.zeros(rows, columns // groups, *kernel, dtype=torch.float64)
    for conv in (a, b):
        places = [_places(conv, axis, *windows[axis][:2]) for axis in range(conv.spatial_rank)]
        weight[(slice(None), slice(None), *places)] += regrouped(conv.dense(), conv.groups, groups)
    bias = b.bias if a.bias is None else a.bias if b.bias is None else a.bias + b.bias
    padding, extra = _sum_padding(a, windows)
    dilation = tuple(step for _, step, _ in windows)
    return Conv(weight, bias, a.stride, dilation, padding, groups, a.transposed, extra)


def _check_sum(a: Conv, b: Conv) -> None:
    if (a.in_channels, a.out_channels) != (b.in_channels, b.out_channels):
        raise ValueError(f"{a!r} and {b!r} differ in channels")
    if a.spatial_rank != b.spatial_rank or a.transposed != b.transposed:
        raise ValueError(f"{a!r} and {b!r} are of different kinds")
    if a.stride != b.stride:
        raise ValueError(f"strides {a.stride} and {b.stride} differ")
    if a.excess != b.excess:
        raise ValueError(f"{a!r} and {b!r} give different output sizes")


def _merge_axis(a: Conv, b: Conv, axis: int) -> tuple[int, int, int]:
    """``(first offset, step, number of taps)`` of the window that holds the taps of both."""
    starts = [-conv.padding[axis][0] for conv in (a, b)]
    ends = [start + conv.reach[axis] for start, conv in zip(starts, (a, b), strict=True)]
    steps = [conv.dilation[axis] for conv in (a, b) if conv.kernel_size[axis] > 1]
    step = math.gcd(starts[0] - starts[1], *steps) or 1
    first = min(starts)
    return first, step, (max(ends) - first) // step + 1


def _places(conv: Conv, axis: int, first: int, step: int) -> slice:
    """Where the taps of ``conv`` lie in a window that starts at offset ``first``."""
    start = (-conv.padding[axis][0] - first) // step
    stride = max(1, conv.dilation[axis] // step)
    return slice(start, start + stride * (conv.kernel_size[axis] - 1) + 1, stride)


def _sum_padding(a: Conv, windows: Sequence[tuple[int, int, int]]):
    """Padding and output padding with which the window gives the output size of ``a``."""
    padding, extra = [], []
    for (first, step, size), (lo, hi), reach in zip(windows, a.cropped, a.reach, strict=True):
        behind = hi + first + step * (size - 1) - (reach - lo)
        extra.append(max(-behind, 0) if a.transposed else 0)
        padding.append((-first, behind + extra[-1]))
    for most, step, stride in zip(extra, (window[1] for window in windows), a.stride, strict=True):
        if most >= max(stride, step) > 0:
            raise ValueError(f"the sum would need an output padding of {most}, not below its stride and dilation")
    return tuple(padding), tuple(extra)

"""The sum of two convolutions of the same tensor as one convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from foldexport.fold.conv.layout import add_blocks, untransposed
from foldexport.fold.conv.value import Conv, Cost, cost


def add(a: Conv, b: Conv) -> Conv:
    """``a(x) + b(x)`` as one convolution (RepVGG, Ding et al. 2021; DBB transform VI, Ding et al. 2021).

    Tap i of a kernel reads at the offset ``i·dilation − lo``. The merged kernel is the bounding window of both sets of
    offsets, on the coarsest grid that holds them: its dilation is the gcd of all differences. Groups that differ become
    block-diagonal over ``gcd(Ga, Gb)`` groups.

    Raises ValueError where strides, output sizes or channels differ.
    """
    a, b = _alike(a, b)
    frame, windows = _frame(a, b)
    weight = torch.zeros(frame.weight.shape, dtype=torch.float64)
    for conv in (a, b):
        places = [_places(conv, axis, *windows[axis][:2]) for axis in range(conv.spatial_rank)]
        add_blocks(weight[(slice(None), slice(None), *places)], conv.dense(), conv.groups, frame.groups)
    bias = b.bias if a.bias is None else a.bias if b.bias is None else a.bias + b.bias
    return replace(frame, weight=weight, bias=bias)


def added_cost(a: Conv, b: Conv, spatial_in: Sequence[int]) -> Cost:
    """The cost of ``add(a, b)``, without its weights; raises ValueError as it does."""
    return cost(_frame(*_alike(a, b))[0], spatial_in)


def _alike(a: Conv, b: Conv) -> tuple[Conv, Conv]:
    """Both as ordinary convolutions where that makes them, or leaves them, of one kind."""
    plain = untransposed(a), untransposed(b)
    return plain if plain[0].transposed == plain[1].transposed else (a, b)


def _frame(a: Conv, b: Conv) -> tuple[Conv, list[tuple[int, int, int]]]:
    """The sum without weights and bias, and the window of its taps on every axis."""
    _check_sum(a, b)
    groups = math.gcd(a.groups, b.groups)
    windows = [_merge_axis(a, b, axis) for axis in range(a.spatial_rank)]
    rows, columns = (a.in_channels, a.out_channels) if a.transposed else (a.out_channels, a.in_channels)
    shape = (rows, columns // groups, *(size for _, _, size in windows))
    padding, extra = _sum_padding(a, windows)
    frame = Conv(
        weight=torch.empty(shape, dtype=torch.float64, device="meta"),
        stride=a.stride,
        dilation=tuple(step for _, step, _ in windows),
        padding=padding,
        groups=groups,
        transposed=a.transposed,
        output_padding=extra,
    )
    return frame, windows


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

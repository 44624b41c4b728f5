"""One convolution behind another, with nothing nonlinear between them, as one convolution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from foldexport.fold.conv.layout import inputs_first, outputs_first, regrouped, untransposed
from foldexport.fold.conv.value import Conv, Cost, cost


def compose(first: Conv, second: Conv) -> Conv:
    """``second(first(x))`` as one convolution (DBB transforms III and IV, Ding et al. 2021).

        W[o, i, m] = Σ_c Σ_{k2·d2·s1 + k1·d1 = m·d} W2[o, c, k2] · W1[c, i, k1]      b = b2 + Σ W2·b1

    stride ``s1·s2``, lo ``lo1 + s1·lo2``, hi ``hi1 + s1·hi2``; d is the coarsest step that holds all taps.

    Raises ValueError where it would not be exact: the second pads zeros where the first has more than one tap or a
    bias; or one is transposed and the other not 1x1.
    """
    first, second = untransposed(first), untransposed(second)
    frame, steps = _frame(first, second)
    weight = _product(first, second, frame.groups, steps)
    if frame.transposed:
        weight = inputs_first(weight, frame.groups)
    return replace(frame, weight=weight, bias=_composed_bias(first, second))


def composed_cost(first: Conv, second: Conv, spatial_in: Sequence[int]) -> Cost:
    """The cost of ``compose(first, second)``, without its weights; raises ValueError as it does."""
    return cost(_frame(untransposed(first), untransposed(second))[0], spatial_in)


def _frame(first: Conv, second: Conv) -> tuple[Conv, list[tuple[int, int]]]:
    """The composition without weights and bias, and the steps of both kernels' taps on its grid."""
    _check_composition(first, second)
    groups = math.gcd(first.groups, second.groups)
    if first.transposed or second.transposed:
        wide = first if first.transposed else second
        shape = (first.in_channels, second.out_channels // groups, *wide.kernel_size)
        frame = replace(wide, weight=_unwritten(shape), bias=None, groups=groups, in_scale=None, out_scale=None)
        return frame, [(1, 1)] * wide.spatial_rank
    grids, steps, kernel = [], [], []
    for axis, stride in enumerate(first.stride):
        step1, step2 = first.dilation[axis], second.dilation[axis] * stride
        reach1, reach2 = first.reach[axis], second.reach[axis] * stride
        grid = math.gcd(*[step1] * (reach1 > 0), *[step2] * (reach2 > 0)) or 1
        grids.append(grid)
        steps.append((max(1, step1 // grid), max(1, step2 // grid)))
        kernel.append(1 + (reach1 + reach2) // grid)
    axes = zip(first.padding, second.padding, first.stride, strict=True)
    frame = Conv(
        weight=_unwritten((second.out_channels, first.in_channels // groups, *kernel)),
        stride=tuple(s1 * s2 for s1, s2 in zip(first.stride, second.stride, strict=True)),
        dilation=tuple(grids),
        padding=tuple((lo1 + s1 * lo2, hi1 + s1 * hi2) for (lo1, hi1), (lo2, hi2), s1 in axes),
        groups=groups,
    )
    return frame, steps


def _unwritten(shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.float64, device="meta")


def _check_composition(first: Conv, second: Conv) -> None:
    if first.spatial_rank != second.spatial_rank or first.out_channels != second.in_channels:
        raise ValueError(f"{second!r} does not fit behind {first!r}")
    if first.transposed or second.transposed:
        other = second if first.transposed else first
        if not other.is_pointwise:
            raise ValueError(f"{other!r} is not 1x1 with stride 1, so it does not merge with a transposed one")
    if not second.pads_zeros:
        return
    if first.bias is not None and bool(first.bias.any()):
        raise ValueError(f"{second!r} meets zero padding, where the bias of {first!r} is missing")
    if second.transposed:
        return  # its padding crops
    for axis, pair in enumerate(second.padding):
        if max(pair) > 0 and first.kernel_size[axis] > 1:
            raise ValueError(f"{second!r} pads zeros where {first!r} has more than one tap")
        if any(inner < 0 < outer for inner, outer in zip(first.padding[axis], pair, strict=True)):
            raise ValueError(f"{second!r} pads zeros where {first!r} crops")


def _composed_bias(first: Conv, second: Conv) -> Tensor | None:
    if first.bias is None or not bool(first.bias.any()):
        return second.bias
    answer = second.response(first.bias)
    return answer if second.bias is None else answer + second.bias


def _product(first: Conv, second: Conv, groups: int, steps: Sequence[tuple[int, int]]) -> Tensor:
    """The convolution of two kernels ``[Cout, Cin/groups, *k]``, their taps ``steps`` apart on the merged grid."""
    inner, outer = outputs_first(first), outputs_first(second)
    finer = first.groups
    if second.groups != groups:  # the second is finer than the result: the first is written out for whole groups
        inner, finer = regrouped(inner, first.groups, groups), second.groups
    inner, outer = (weight.reshape(*weight.shape[:2], -1) for weight in (inner, outer))
    size = [
        1 + s1 * (k1 - 1) + s2 * (k2 - 1)
        for (s1, s2), k1, k2 in zip(steps, first.kernel_size, second.kernel_size, strict=True)
    ]
    total = torch.zeros(outer.shape[0], first.in_channels // groups, *size, dtype=torch.float64)
    near, far, walked, whole = 0, 1, first.kernel_size, second.kernel_size
    if math.prod(walked) > math.prod(whole):  # one product for each tap of the smaller kernel
        near, far, walked, whole = 1, 0, whole, walked
    for index, tap in enumerate(itertools.product(*map(range, walked))):
        pair = (inner[..., index, None], outer) if near == 0 else (inner, outer[..., index, None])
        places = [
            slice(at * step[near], at * step[near] + step[far] * (size - 1) + 1, step[far])
            for at, step, size in zip(tap, steps, whole, strict=True)
        ]
        target = total[(slice(None), slice(None), *places)]
        target += _channel_product(*pair, finer, groups).reshape(target.shape)
    return total


def _channel_product(inner: Tensor, outer: Tensor, finer: int, groups: int) -> Tensor:
    """``Σ_c outer[o, c, A] · inner[c, i, B]`` as ``[Cout, Cin/groups, A, B]``.

    One operand has ``groups`` groups, the other may have a multiple: ``finer`` is the first's number where the second
    has ``groups``, else the second's. Blocks that are zero are never multiplied.
    """
    rows, (columns, taps_outer), taps_inner = outer.shape[0], outer.shape[1:], inner.shape[2]
    if columns * groups == inner.shape[0]:  # the second has `groups`: its columns fall into the parts of the first
        parts = finer // groups
        outer = outer.reshape(groups, rows // groups, parts, columns // parts, taps_outer)
        inner = inner.reshape(groups, parts, columns // parts, inner.shape[1], taps_inner)
        product = torch.einsum("gopcA,gpciB->gopiAB", outer, inner)
    else:
        outer = outer.reshape(finer, rows // finer, columns, taps_outer)
        inner = inner.reshape(finer, columns, inner.shape[1], taps_inner)
        product = torch.einsum("gocA,gciB->goiAB", outer, inner)
    return product.reshape(rows, -1, taps_outer, taps_inner)

"""What is known of the values of a stored tensor before anything runs: an interval for each channel.

    s[:, c] ∈ [lower_c, upper_c]        lower, upper: float64 [C], infinite where nothing is known

A value that comes from a ReLU is not negative; max and average pooling, positive factors, sums and convolutions with
weights of one sign keep that. Interval arithmetic (Moore 1966) carries it forwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from foldexport.fold.conv import Conv
from foldexport.fold.stored import Stored, channel_axis

Interval = tuple[Tensor, Tensor]


class Intervals:
    """Intervals of stored tensors, each computed when first asked for."""

    def __init__(self) -> None:
        self._known: dict[Stored, Interval] = {}

    def of(self, stored: Stored) -> Interval:
        """``(lower [C], upper [C])``; one entry for all channels where they are not on axis 1."""
        waiting = [stored]
        while waiting:
            current = waiting[-1]
            missing = [operand for operand in current.inputs if operand not in self._known]
            if missing and current.kind in _RULES:
                waiting.extend(missing)
                continue
            waiting.pop()
            if current not in self._known:
                self._known[current] = self._computed(current)
        return self._known[stored]

    def _computed(self, stored: Stored) -> Interval:
        rule = _RULES.get(stored.kind)
        found = None if rule is None else rule(stored, [self._known[operand] for operand in stored.inputs])
        return unknown(channels(stored)) if found is None else found


def channels(stored: Stored) -> int:
    """The length of axis 1; 1 where there is none."""
    return stored.shape[1] if stored.rank > 1 else 1


def unknown(size: int) -> Interval:
    """``(−∞, ∞)``."""
    infinite = torch.full((size,), math.inf, dtype=torch.float64)
    return -infinite, infinite


def mapped(interval: Interval, scale: Tensor, shift: Tensor) -> Interval:
    """The interval of ``scale ⊙ s + shift``."""
    ends = [_product(scale, end) + shift for end in interval]
    return torch.minimum(*ends), torch.maximum(*ends)


def convolved(conv: Conv, interval: Interval) -> Interval:
    """The interval of a convolution: ``Σ max(W, 0)·lower + min(W, 0)·upper + b``, zeros of its padding among the values."""
    lower, upper = interval
    if conv.pads_zeros:
        lower, upper = lower.clamp_max(0.0), upper.clamp_min(0.0)
    weight = conv.dense().flatten(2) if conv.spatial_rank else conv.dense().unsqueeze(-1)
    above, below = weight.clamp_min(0.0).sum(-1), weight.clamp_max(0.0).sum(-1)
    rows = conv.out_channels // conv.groups
    spread = [end.reshape(conv.groups, 1, -1).expand(-1, rows, -1).reshape(conv.out_channels, -1) for end in (lower, upper)]
    bias = 0.0 if conv.bias is None else conv.bias
    low = (_product(above, spread[0]) + _product(below, spread[1])).sum(-1) + bias
    high = (_product(above, spread[1]) + _product(below, spread[0])).sum(-1) + bias
    return low, high


def _product(factor: Tensor, end: Tensor) -> Tensor:
    """``factor · end``, where nothing times infinity is nothing."""
    return torch.where(factor == 0, 0.0, factor * end)


def _clamp(stored: Stored, inputs: list[Interval]) -> Interval | None:
    bounds = [along_channels(stored.attrs[end], stored) for end in ("lower", "upper")]
    if any(bound is None for bound in bounds):
        return None
    low, high = bounds
    return inputs[0][0].clamp(low, high), inputs[0][1].clamp(low, high)


def _leaky(stored: Stored, inputs: list[Interval]) -> Interval | None:
    slope = along_channels(stored.attrs["slope"], stored)
    if slope is None or bool((slope < 0).any()):
        return None
    lower, upper = inputs[0]
    return torch.where(lower < 0, _product(slope, lower), lower), torch.where(upper < 0, _product(slope, upper), upper)


def _affine(stored: Stored, inputs: list[Interval]) -> Interval | None:
    affine = stored.attrs["affine"]
    if stored.rank < 2 or not affine.varies_only_on(1):
        return None
    return mapped(inputs[0], *affine.vector(1, stored.shape[1]))


def _conv(stored: Stored, inputs: list[Interval]) -> Interval | None:
    conv = stored.conv
    if conv.transposed or channel_axis(stored) != 1 or inputs[0][0].numel() != conv.in_channels:
        return None
    return convolved(conv, inputs[0])


def _add(stored: Stored, inputs: list[Interval]) -> Interval | None:
    if any(operand.shape != stored.shape for operand in stored.inputs):
        return None
    (low, high), (other_low, other_high) = inputs
    return (low - other_high, high - other_low) if stored.attrs["minus"] else (low + other_low, high + other_high)


def _max_pool(stored: Stored, inputs: list[Interval]) -> Interval | None:
    return inputs[0] if inputs[0][0].numel() == channels(stored) else None


def _pool(stored: Stored, inputs: list[Interval]) -> Interval | None:
    """Averages and copies stay inside, bicubic weights do not; zeros of padding that is counted are among the values."""
    if "bicubic" in stored.op or inputs[0][0].numel() != channels(stored):
        return None
    lower, upper = inputs[0]
    return (lower, upper) if stored.attrs["keeps_constants"] else (lower.clamp_max(0.0), upper.clamp_min(0.0))


def _pad(stored: Stored, inputs: list[Interval]) -> Interval:
    value, (lower, upper) = stored.attrs["value"], inputs[0]
    size = channels(stored)
    if lower.numel() != size:
        lower, upper = lower.min().expand(size), upper.max().expand(size)
    return lower.clamp_max(value), upper.clamp_min(value)


def _view(stored: Stored, inputs: list[Interval]) -> Interval:
    """The same values in other places."""
    size = channels(stored)
    return inputs[0][0].min().expand(size), inputs[0][1].max().expand(size)


def _cat(stored: Stored, inputs: list[Interval]) -> Interval | None:
    if stored.attrs["axis"] != 1:
        return None
    return torch.cat([low for low, _ in inputs]), torch.cat([high for _, high in inputs])


def along_channels(part: Tensor, stored: Stored) -> Tensor | None:
    """A bound or slope ``[…]`` as ``[C]``; None where it varies along another axis."""
    part = part.reshape((1,) * (stored.rank - part.dim()) + tuple(part.shape))
    if stored.rank < 2 or any(size > 1 for axis, size in enumerate(part.shape) if axis != 1):
        return None
    return part.reshape(-1).expand(stored.shape[1])


_RULES: dict[str, Callable[[Stored, list[Interval]], Interval | None]] = {
    "clamp": _clamp,
    "leaky": _leaky,
    "affine": _affine,
    "conv": _conv,
    "add": _add,
    "max_pool": _max_pool,
    "pool": _pool,
    "pad": _pad,
    "view": _view,
    "cat": _cat,
}

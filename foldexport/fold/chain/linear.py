"""Operators that are convolutions of what they read, whatever they are called: what may lie on a shortcut.

A batch norm that could not be folded, average pooling without clipped windows, zero padding, further channels of zeros,
every second position: each is exact as a convolution, so a way of them is one convolution.
"""

from __future__ import annotations

import torch

from foldexport.fold import conv as algebra
from foldexport.fold import pooling
from foldexport.fold.conv import Conv
from foldexport.fold.merge import pool_as_conv
from foldexport.fold.pending import name_of
from foldexport.fold.stored import Stored, channel_axis
from foldexport.trace import bound


class Refused(Exception):
    """A skip connection stays; the message says why, in the user's own names."""


def named(stored: Stored) -> str:
    """The user's name of what makes a tensor."""
    return stored.module or stored.name


def pointwise_identity(stored: Stored) -> Conv:
    """``y = x``, with the channels of a tensor."""
    return algebra.identity(stored.shape[1], stored.rank - 2)


def is_zero(stored: Stored) -> bool:
    """Whether a tensor is made to hold nothing but zeros."""
    if stored.kind == "constant":
        return not bool(stored.attrs["value"].any())
    return stored.kind == "opaque" and stored.op in ("zeros_like", "new_zeros", "zeros")


def only_operand(stored: Stored) -> Stored | None:
    """The one tensor that an operator is a function of; zeros that a concatenation puts beside it do not count."""
    operands = list(dict.fromkeys(stored.inputs))
    if stored.kind == "cat":
        operands = [operand for operand in operands if not is_zero(operand)]
    return operands[0] if len(operands) == 1 else None


def bends(stored: Stored) -> bool:
    """Whether an operator is no convolution."""
    return _linear_or_reason(stored)[0] is None


def linear(stored: Stored) -> Conv:
    """One operator as a convolution of its operand. Raises Refused for what is none."""
    conv, reason = _linear_or_reason(stored)
    if conv is None:
        raise Refused(reason)
    return conv


def _linear_or_reason(stored: Stored) -> tuple[Conv | None, str]:
    rule = _LINEAR.get(stored.kind)
    conv = rule(stored) if rule is not None and only_operand(stored) is not None and stored.rank >= 2 else None
    if conv is not None:
        return conv, ""
    why = "its weight is shared by several calls" if stored.fixed else "is no convolution with an activation"
    return None, f"`{named(stored)}` ({stored.op or stored.kind}) on its way {why}"


def _convolution(stored: Stored) -> Conv | None:
    if stored.fixed or stored.conv.transposed or channel_axis(stored) != 1:
        return None
    return stored.conv


def _affine(stored: Stored) -> Conv | None:
    affine = stored.attrs["affine"]
    if not affine.varies_only_on(1):
        return None
    return pointwise_identity(stored).affine_output(*affine.vector(1, stored.shape[1]))


def _pool(stored: Stored) -> Conv | None:
    """Average pooling without clipped windows."""
    if stored.node is None or name_of(stored.node) != stored.op or not pooling.is_convolution(stored.node):
        return None
    return pool_as_conv(stored.node, stored.shape[1])


def _max_pool(stored: Stored) -> Conv | None:
    """Max pooling over windows of one value, which only subsamples."""
    if stored.node is None or name_of(stored.node) not in ("max_pool1d", "max_pool2d", "max_pool3d"):
        return None
    kernel, stride, padding = pooling.window(stored.node)
    if any(size != 1 for size in kernel) or any(padding):
        return None
    return algebra.identity(stored.shape[1], len(kernel), stride)


def _pad(stored: Stored) -> Conv | None:
    """Zeros around the space, or further channels."""
    operand, pads = stored.inputs[0], stored.attrs["pads"]
    sides = [(0, 0)] * (stored.rank - len(pads) // 2) + [tuple(pads[i : i + 2]) for i in range(0, len(pads), 2)][::-1]
    space, (before, after) = tuple(sides[2:]), sides[1]
    if any(sides[0]) or (any(any(pair) for pair in space) and (stored.attrs["value"] != 0 or before or after)):
        return None
    if not before and not after:
        return algebra.absorb_padding(pointwise_identity(operand), *zip(*space, strict=True)) if space else None
    channels = operand.shape[1]
    if min(before, after) < 0:
        return None
    weight = torch.zeros(before + channels + after, channels, dtype=torch.float64)
    weight[before : before + channels] = torch.eye(channels, dtype=torch.float64)
    bias = torch.full((len(weight),), float(stored.attrs["value"]), dtype=torch.float64)
    bias[before : before + channels] = 0.0
    return Conv(weight.reshape(*weight.shape, *(1,) * (stored.rank - 2)), bias if bool(bias.any()) else None)


def _slice(stored: Stored) -> Conv | None:
    """``x[..., start:end:step]`` on one axis of space: a Dirac kernel that crops and strides."""
    if stored.op != "slice" or stored.node is None:
        return None
    args, operand = bound(stored.node), stored.inputs[0]
    axis, size = args.get("dim", 0) % operand.rank, operand.shape[args.get("dim", 0) % operand.rank]
    start, end, step = args.get("start") or 0, args.get("end"), args.get("step", 1)
    static = all(isinstance(value, int) for value in (start, size if end is None else end, step))
    if axis < 2 or not static or start < 0:
        return None
    if axis in operand.dynamic and end is not None and 0 <= end < 2**62:
        return None
    crop = 0 if end is None or end >= size else end - size if end >= 0 else end
    channels, rank = operand.shape[1], operand.rank - 2
    padding = tuple((-start, crop) if place == axis - 2 else (0, 0) for place in range(rank))
    stride = tuple(step if place == axis - 2 else 1 for place in range(rank))
    weight = torch.ones(channels, 1, *(1,) * rank, dtype=torch.float64)
    return Conv(weight, stride=stride, padding=padding, groups=channels)


def _cat(stored: Stored) -> Conv | None:
    """One tensor several times, or beside zeros: rows of unit matrices and of nothing."""
    operand = only_operand(stored)
    if stored.attrs["axis"] != 1:
        return None
    size = operand.shape[1]
    eye = torch.eye(size, dtype=torch.float64)
    rows = [eye if each is operand else torch.zeros(each.shape[1], size, dtype=torch.float64) for each in stored.inputs]
    weight = torch.cat(rows)
    return Conv(weight.reshape(*weight.shape, *(1,) * (stored.rank - 2)))


_LINEAR = {
    "cat": _cat,
    "conv": _convolution,
    "affine": _affine,
    "pool": _pool,
    "max_pool": _max_pool,
    "pad": _pad,
    "view": _slice,
}

"""Convolutions of a wide tensor, put together from convolutions of some of its channels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foldexport.fold import conv as algebra
from foldexport.fold.chain.carrying import Rows
from foldexport.fold.chain.linear import Refused
from foldexport.fold.conv import Conv
from foldexport.fold.conv.layout import regrouped
from foldexport.fold.stored import Stored


def pointwise(matrix: Tensor, spatial_rank: int) -> Conv:
    """``y = matrix · x`` at every position; ``[Cout, Cin]``."""
    return Conv(matrix.reshape(*matrix.shape, *(1,) * spatial_rank))


def placed(conv: Conv, width: int, first: int) -> Conv:
    """The convolution of a tensor ``[N, width, …]`` whose channels from ``first`` on are what ``conv`` reads."""
    weight = regrouped(conv.dense(), conv.groups, 1)
    wide = torch.zeros(weight.shape[0], width, *weight.shape[2:], dtype=torch.float64)
    wide[:, first : first + weight.shape[1]] = weight
    return replace(conv, weight=wide, groups=1, in_scale=None, out_scale=None)


def stacked(first: Conv, second: Conv) -> Conv:
    """``[first(x); second(x)]``: the output channels of both behind each other, in the smallest window that holds both kernels.

    Raises Refused where they sample at different places.
    """
    total = first.out_channels + second.out_channels
    try:
        return algebra.add(_rows(first, total, 0), _rows(second, total, first.out_channels))
    except ValueError as error:
        raise Refused(f"no convolution holds both rows: {error}") from error


def _rows(conv: Conv, total: int, first: int) -> Conv:
    """The convolution with rows of zeros around its own."""
    weight = torch.zeros(total, *conv.weight.shape[1:], dtype=torch.float64)
    weight[first : first + conv.out_channels] = conv.dense()
    bias = None
    if conv.bias is not None:
        bias = torch.zeros(total, dtype=torch.float64)
        bias[first : first + conv.out_channels] = conv.bias
    return replace(conv, weight=weight, bias=bias, in_scale=None, out_scale=None)


def dirac_groups(conv: Conv, extra: int, in_order: bool, rows: Rows) -> Conv | None:
    """The convolution with further groups of Dirac kernels that hand ``extra`` channels on; None where groups do not fit.

    The groups must be as wide behind as before, and divide the carried channels. A convolution without groups becomes one
    with groups as well: Dirac rows over all channels would multiply by zero almost everywhere.
    """
    width = conv.in_channels // conv.groups
    if not in_order or not extra or conv.out_channels != conv.in_channels or extra % width:
        return None
    groups, size, rank = conv.groups + extra // width, conv.out_channels + extra, conv.spatial_rank
    if rank == 0:
        return None
    weight = torch.zeros(size, width, *conv.kernel_size, dtype=torch.float64)
    weight[: conv.out_channels] = conv.dense()
    bias = torch.cat([torch.zeros(conv.out_channels, dtype=torch.float64) if conv.bias is None else conv.bias, rows.offset])
    bias = bias if bool(bias.any()) else None
    branch = replace(conv, weight=weight, bias=bias, groups=groups, in_scale=None, out_scale=None)
    dirac = torch.zeros(size, width, *(1,) * rank, dtype=torch.float64)
    places = torch.arange(extra)
    dirac[conv.out_channels + places, places % width] = rows.scale.reshape(-1, *(1,) * rank)
    carry = Conv(dirac, stride=conv.stride, groups=groups)
    try:
        return algebra.add(branch, _fit(carry, conv))
    except ValueError:
        return None


def fitted(conv: Conv, like: Conv, stored: Stored, label: str) -> Conv:
    """The convolution with the far padding that gives the output size of ``like``, whatever the input size.

    Raises Refused where the two give different sizes at the size at hand: something would be cut off or made up.
    """
    sizes = stored.shape[2:]
    if conv.stride != like.stride or conv.output_size(sizes) != like.output_size(sizes):
        found, wanted = conv.output_size(sizes), like.output_size(sizes)
        raise Refused(f"`{label}` gives sizes {tuple(wanted)} where what is carried beside it has {tuple(found)}")
    return _fit(conv, like)


def _fit(conv: Conv, like: Conv) -> Conv:
    gaps = zip(conv.padding, conv.excess, like.excess, strict=True)
    return replace(conv, padding=tuple((lo, hi + wanted - found) for (lo, hi), found, wanted in gaps))

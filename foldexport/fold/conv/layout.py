"""Weight layouts: groups written out, transposed and ordinary convolutions in terms of each other."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from foldexport.fold.conv.value import Conv


def regrouped(weight: Tensor, before: int, after: int) -> Tensor:
    """``[R, C/before, *k]`` as block-diagonal ``[R, C/after, *k]``; ``after`` divides ``before``."""
    if before == after:
        return weight
    parts = before // after
    rows, columns, kernel = weight.shape[0] // before, weight.shape[1], weight.shape[2:]
    blocks = weight.new_zeros(after, parts, rows, parts, columns, *kernel)
    blocks.diagonal(dim1=1, dim2=3).copy_(weight.reshape(after, parts, rows, columns, *kernel).movedim(1, -1))
    return blocks.reshape(weight.shape[0], parts * columns, *kernel)


def outputs_first(conv: Conv) -> Tensor:
    """The dense weight as ``[Cout, Cin/G, *k]``, transposed or not."""
    weight = conv.dense()
    return _swapped(weight, conv.groups) if conv.transposed else weight


def inputs_first(weight: Tensor, groups: int) -> Tensor:
    """``[Cout, Cin/G, *k]`` in the layout of a transposed convolution."""
    return _swapped(weight, groups)


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """``[G·r, c, *k]`` as ``[G·c, r, *k]``: the two channel axes exchanged within each group."""
    rows, columns, kernel = weight.shape[0] // groups, weight.shape[1], weight.shape[2:]
    return weight.reshape(groups, rows, columns, *kernel).transpose(1, 2).reshape(groups * columns, rows, *kernel)


def untransposed(conv: Conv) -> Conv:
    """A transposed convolution of stride 1 as the convolution with the mirrored kernel; any other one unchanged.

    ``x[q − k·d + lo] = x[q + k'·d − (d(K−1) − lo)]`` with ``k' = K−1−k``.
    """
    if not conv.transposed or any(stride != 1 for stride in conv.stride):
        return conv
    padding = tuple((r - lo, r - hi) for r, (lo, hi) in zip(conv.reach, conv.cropped, strict=True))
    if any(min(pair) < 0 for pair in padding):
        return conv
    weight = _swapped(conv.weight.detach(), conv.groups).flip(list(range(2, conv.weight.dim())))
    return replace(conv, weight=weight, padding=padding, transposed=False, output_padding=())

"""Weight layouts: groups written out, transposed and ordinary convolutions in terms of each other."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from foldexport.fold.conv.value import Conv


def regrouped(weight: Tensor, before: int, after: int) -> Tensor:
    """``[R, C/before, *k]`` as block-diagonal ``[R, C/after, *k]``; ``after`` divides ``before``."""
    if before == after:
        return weight
    wide = weight.new_zeros(weight.shape[0], weight.shape[1] * (before // after), *weight.shape[2:])
    add_blocks(wide, weight, before, after)
    return wide


def add_blocks(wide: Tensor, weight: Tensor, before: int, after: int) -> None:
    """Add ``[R, C/before, *k]`` to the diagonal blocks of ``wide`` ``[R, C/after, *k]`` in place."""
    parts = before // after
    blocks = wide.unflatten(1, (parts, -1)).unflatten(0, (after, parts, -1)).diagonal(dim1=1, dim2=3)
    blocks += weight.unflatten(0, (after, parts, -1)).movedim(1, -1)


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

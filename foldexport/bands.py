"""2-d convolutions in float64, in bands of rows, so that their memory does not grow with the image.

PyTorch has no direct convolution in float64 on the CPU: it copies every window into a matrix first (``im2col``, Chellapilla
et al. 2006), of ``N·Cin/g·kh·kw·Hout·Wout`` numbers for the whole batch. For 128 channels of 1024×1024 and a 3×3 kernel that
is 9.7 GB, nine times the image itself. A band of output rows needs the columns of that band only, and gives the same sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

COLUMN_BYTES = 2**28  # of one band: 256 MiB
_BYTES = 8  # of a float64

aten = torch.ops.aten
_OVERLOADS = frozenset({aten.conv2d.default, aten.conv2d.padding, aten.convolution.default})


def convolution(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The result of a call of ATen's conv2d or convolution, or None where it is none that bands are for."""
    if target not in _OVERLOADS or not _wide(args[0]):
        return None
    names = ("input", "weight", "bias", "stride", "padding", "dilation")
    names += ("transposed", "output_padding", "groups") if target is aten.convolution.default else ("groups",)
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.pop("transposed", False):
        return None
    given.pop("output_padding", None)
    return conv2d(**given)


def layer(module: nn.Module, value: Any) -> Tensor | None:
    """The result of ``module(value)``, or None where the module is no convolution that bands are for."""
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros" or not _wide(value):
        return None
    return conv2d(value, module.weight, module.bias, module.stride, module.padding, module.dilation, module.groups)


def _wide(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float64 and value.device.type == "cpu" and value.dim() == 4


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """``F.conv2d`` on ``[N, Cin, H, W]`` in bands of output rows; None where one band holds them all.

    Row r of the output reads the rows ``r·s − p … r·s − p + d·(k − 1)`` of the input, those outside of it being zero.
    """
    (sh, sw), (dh, dw) = _pair(stride), _pair(dilation)
    count, (kh, kw) = len(input), weight.shape[2:]
    (top, bottom), (left, right) = _padding(padding, (dh * (kh - 1), dw * (kw - 1)))
    rows = (input.shape[2] + top + bottom - dh * (kh - 1) - 1) // sh + 1
    columns = (input.shape[3] + left + right - dw * (kw - 1) - 1) // sw + 1
    row_bytes = count * weight.shape[1] * kh * kw * columns * _BYTES
    if kh * kw == 1 or rows <= 1 or columns < 1 or rows * row_bytes <= COLUMN_BYTES:
        return None
    band = max(1, COLUMN_BYTES // row_bytes)
    output = input.new_empty(count, len(weight), rows, columns)
    for first in range(0, rows, band):
        last = min(first + band, rows) - 1
        start, end = first * sh - top, last * sh - top + dh * (kh - 1) + 1
        above = min(max(-start, 0), end - start)  # rows of zeros
        part = input[:, :, max(start, 0) : max(end, 0)]
        part = F.pad(part, (left, right, above, end - start - above - part.shape[2]))
        output[:, :, first : last + 1] = F.conv2d(part, weight, bias, (sh, sw), 0, (dh, dw), groups)
    return output


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def _padding(padding: int | str | Sequence[int], spans: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((top, bottom), (left, right)); "same" pads one more at the end, as ``torch.nn.functional.conv2d`` documents."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        return tuple((span // 2, span - span // 2) for span in spans)
    across, along = _pair(padding)
    return (across, across), (along, along)

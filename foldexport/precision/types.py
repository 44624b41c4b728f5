"""The reduced float types: their ranges, and how a value is rounded to one of them exactly once.

    type   significand   largest      smallest normal   smallest
    fp16   11 bits       65504        2^-14             2^-24
    bf16    8 bits       3.39e38      2^-126            2^-133

Source: IEEE 754-2019, binary16; bfloat16 is binary32 without its last 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NumberType:
    """A float type that an artifact can be written in.

    name: as users ask for it. digits: bits of the significand, the hidden one included. roundoff: ``2^-digits``, the largest
    relative error of one rounding (Higham 2002, section 2.2).
    """

    name: str
    dtype: torch.dtype
    digits: int

    @property
    def label(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def largest(self) -> float:
        return torch.finfo(self.dtype).max

    @property
    def smallest_normal(self) -> float:
        return torch.finfo(self.dtype).smallest_normal

    @property
    def roundoff(self) -> float:
        return 2.0**-self.digits


HALF = {
    "fp16": NumberType("fp16", torch.float16, 11),
    "bf16": NumberType("bf16", torch.bfloat16, 8),
}
PRECISIONS = ("fp32", *HALF, "int8")


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in ``dtype`` by one rounding to nearest, ties to even.

    PyTorch takes float64 to a half type through float32, which rounds twice. In between we round to odd instead: 24 bits are
    at least two more than the result has, so the second rounding then gives what one would have (Boldo & Melquiond 2008,
    "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd").
    """
    if value.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return value.to(dtype)
    single = value.to(torch.float32)
    back = single.to(torch.float64)
    beyond = back.abs() > value.abs()
    towards_zero = torch.where(beyond, torch.nextafter(single, torch.zeros_like(single)), single)
    odd = (towards_zero.view(torch.int32) | 1).view(torch.float32)
    exact = (back == value) | ~value.isfinite()
    return torch.where(exact, single, odd).to(dtype)


def to_digits(value: Tensor, kind: NumberType) -> Tensor:
    """A float32 value rounded to the significand of ``kind``, with float32's range: nothing overflows or vanishes."""
    dropped = 24 - kind.digits
    bits = value.contiguous().view(torch.int32)
    nearest = bits + ((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)
    cut = (nearest & -(1 << dropped)).view(torch.float32)
    return torch.where(value.isfinite(), cut, value)


def through(value: Tensor, kind: NumberType) -> Tensor:
    """The value as ``kind`` holds it, in its own type: beyond the range it is infinite, below it 0."""
    return value.to(kind.dtype).to(value.dtype)

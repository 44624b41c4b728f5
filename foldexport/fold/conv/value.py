"""A convolution as a value: weights, bias, geometry, and the affines on either side of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1 << 22  # weights cast to float64 at a time while they are summed: 32 MiB


@dataclass(frozen=True, eq=False, repr=False)
class Conv:
    """A convolution, transposed convolution or linear layer.

        y[n, o, p] = b[o] + Σ_{i,k} W[o, i, k] · x[n, g·Cin/G + i, p·stride + k·dilation − lo]

    Transposed, x[n, i, p] is spread over y[n, ·, p·stride + k·dilation − lo] instead, and ``hi`` is cropped, less
    ``output_padding``. Sources: torch.nn.Conv2d, torch.nn.ConvTranspose2d.

    weight: as stored by the user, in any float type: ``[Cout, Cin/G, *k]``, or transposed ``[Cin, Cout/G, *k]``.
        Without spatial axes, ``[out, in]``, it is a linear layer, whose channels are the last axis of x.
    bias: float64 ``[Cout]`` in final units, or None.
    padding: ``(lo, hi)`` for each spatial axis; a negative one crops the input.
    in_scale, out_scale: float64 ``[Cin]``, ``[Cout]``, factors that wait to be multiplied into the weights, once, by
        :meth:`dense`.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None

    def __post_init__(self) -> None:
        rank = self.spatial_rank
        defaults = {"stride": (1,) * rank, "dilation": (1,) * rank, "padding": ((0, 0),) * rank}
        defaults["output_padding"] = (0,) * rank
        for name, default in defaults.items():
            value = tuple(getattr(self, name)) or default
            if len(value) != rank:
                raise ValueError(f"{name} {value} does not have one entry for each of {rank} spatial axes")
            object.__setattr__(self, name, value)
        if rank == 0 and (self.groups != 1 or self.transposed):
            raise ValueError("a linear layer has neither groups nor a transposed form")
        if self.transposed and any(min(pair) < 0 for pair in self.padding):
            raise ValueError(f"padding {self.padding} of a transposed convolution is negative; use output_padding")
        if self.weight.shape[0] % self.groups:
            raise ValueError(f"{self.weight.shape[0]} channels cannot be cut into {self.groups} groups")

    def __repr__(self) -> str:
        kind = "linear" if self.spatial_rank == 0 else "conv_transpose" if self.transposed else "conv"
        text = f"{kind} {self.in_channels}→{self.out_channels}"
        if self.spatial_rank:
            text += f" k={self.kernel_size} stride={self.stride} padding={self.padding} dilation={self.dilation}"
        return text + (f" groups={self.groups}" if self.groups > 1 else "")

    # ── sizes ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def spatial_rank(self) -> int:
        return self.weight.dim() - 2

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def in_channels(self) -> int:
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def reach(self) -> tuple[int, ...]:
        """``d·(k−1)`` for each spatial axis: how far the last tap lies behind the first."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))

    @property
    def cropped(self) -> tuple[tuple[int, int], ...]:
        """Transposed: ``(lo, hi − output_padding)`` for each axis, what is cut off the full result."""
        return tuple((lo, hi - extra) for (lo, hi), extra in zip(self.padding, self.output_padding, strict=True))

    @property
    def excess(self) -> tuple[int, ...]:
        """What sets the output size: ``lo + hi − reach − 1``, transposed ``reach + 1 − lo − hi + output_padding``."""
        if self.transposed:
            return tuple(reach + 1 - lo - hi for reach, (lo, hi) in zip(self.reach, self.cropped, strict=True))
        return tuple(lo + hi - reach - 1 for reach, (lo, hi) in zip(self.reach, self.padding, strict=True))

    @property
    def pads_zeros(self) -> bool:
        """Whether some output value misses taps at the border, so that a constant input gives no constant output.

        A convolution does with any padding. A transposed one does unless on every axis the stride is 1 and both sides
        are cropped by at least ``d·(k−1)``; with a larger stride even a 1x1 kernel leaves values that no tap reaches.
        """
        if self.transposed:
            complete = zip(self.stride, self.cropped, self.reach, strict=True)
            return not all(stride == 1 and min(cut) >= reach for stride, cut, reach in complete)
        return any(max(pair) > 0 for pair in self.padding)

    @property
    def is_pointwise(self) -> bool:
        """Whether it is a 1x1 convolution with stride 1 and no padding (or linear): every position by itself."""
        plain = not any(self.reach) and all(stride == 1 for stride in self.stride)
        return plain and not self.transposed and not any(any(pair) for pair in self.padding)

    def output_size(self, spatial_in: Sequence[int]) -> tuple[int, ...]:
        """Output sizes for input sizes; a linear layer keeps them, whatever they are."""
        if self.spatial_rank == 0:
            return tuple(spatial_in)
        sizes = zip(spatial_in, self.stride, self.excess, strict=True)
        if self.transposed:
            return tuple((n - 1) * stride + excess for n, stride, excess in sizes)
        return tuple((n + excess) // stride + 1 for n, stride, excess in sizes)

    def n_weights(self) -> int:
        """The number of weights, bias not counted."""
        return self.weight.numel()

    def macs(self, spatial_in: Sequence[int]) -> int:
        """Multiply-adds for one sample (for one position of a linear layer, times its ``spatial_in``)."""
        return self.n_weights() * math.prod(spatial_in if self.transposed else self.output_size(spatial_in))

    def same_geometry(self, other: Conv) -> bool:
        """Whether both give the same output size and sample at the same places for every input size."""
        mine = (self.spatial_rank, self.transposed, self.stride, self.excess)
        return mine == (other.spatial_rank, other.transposed, other.stride, other.excess)

    # ── affines on either side ──────────────────────────────────────────────────────────────────────────────────────

    def scale_input(self, a: float | Tensor) -> Conv:
        """The convolution that reads s where this one reads ``a ⊙ s``; a ``[Cin]``."""
        return self._with_scale("in_scale", a, self.in_channels)

    def shift_input(self, t: float | Tensor) -> Conv:
        """The convolution that reads s where this one reads ``s + t``: ``b ← b + Σ_{i,k} W·t``; t ``[Cin]``.

        Raises ValueError where zero padding meets a shift that is not 0.
        """
        t = _channels(t, self.in_channels, "input")
        if not bool(t.any()):
            return self
        if self.pads_zeros:
            raise ValueError(f"{self!r} meets zero padding, where the shift of its input is missing")
        return self.shift_output(self.response(t))

    def affine_input(self, a: float | Tensor, t: float | Tensor) -> Conv:
        """The convolution that reads s where this one reads ``a ⊙ s + t``; raises as :meth:`shift_input`."""
        return self.shift_input(t).scale_input(a)

    def scale_output(self, p: float | Tensor) -> Conv:
        """``p ⊙ y``; p ``[Cout]``, zeros allowed."""
        p = _channels(p, self.out_channels, "output")
        bias = None if self.bias is None else self.bias * p
        return replace(self._with_scale("out_scale", p, self.out_channels), bias=bias)

    def shift_output(self, q: float | Tensor) -> Conv:
        """``y + q``; q ``[Cout]``."""
        q = _channels(q, self.out_channels, "output")
        if not bool(q.any()):
            return self
        return replace(self, bias=q if self.bias is None else self.bias + q)

    def affine_output(self, p: float | Tensor, q: float | Tensor) -> Conv:
        """``p ⊙ y + q``."""
        return self.scale_output(p).shift_output(q)

    def _with_scale(self, name: str, factor: float | Tensor, channels: int) -> Conv:
        factor = _channels(factor, channels, name)
        if bool((factor == 1).all()):
            return self
        before = getattr(self, name)
        return replace(self, **{name: factor if before is None else before * factor})

    def response(self, t: Tensor) -> Tensor:
        """``Σ_{i,k} W[o, i, k]·t[i]``, float64 ``[Cout]``: what a constant input t adds to b, away from padding."""
        if self.in_scale is not None:
            t = t * self.in_scale
        rows = self.weight.shape[0]
        group_of_row = torch.arange(rows) // max(1, rows // self.groups)
        total = torch.zeros(self.groups, self.out_channels // self.groups, dtype=torch.float64)
        for index in torch.arange(rows).split(_rows_at_a_time(self.weight)):
            sums, group = _tap_sums(self.weight.detach()[index[0] : index[-1] + 1]), group_of_row[index]
            if self.transposed:
                total.index_add_(0, group, sums * t[index, None])
            else:
                total.view(-1)[index] = (sums * t.reshape(self.groups, -1)[group]).sum(-1)
        total = total.reshape(-1)
        return total if self.out_scale is None else total * self.out_scale

    # ── the weights ─────────────────────────────────────────────────────────────────────────────────────────────────

    def dense(self) -> Tensor:
        """The weight in float64 with both scales multiplied in; not to be written to, it may be the user's own."""
        if self.in_scale is None and self.out_scale is None:
            return self.weight.detach().to(torch.float64)
        weight = self.weight.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        rows, columns = (self.in_scale, self.out_scale) if self.transposed else (self.out_scale, self.in_scale)
        # [G, rows/G, columns/G, k]: rows are stored whole, columns within their group
        grouped = weight.view(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
        if rows is not None:
            grouped *= rows.reshape(self.groups, -1, 1, 1)
        if columns is not None:
            grouped *= columns.reshape(self.groups, 1, -1, 1)
        return weight

    def __call__(self, x: Tensor) -> Tensor:
        """Run it in float64: the reference that every piece of algebra is compared with. x ``[N, Cin, *spatial]``."""
        x, weight = x.to(torch.float64), self.dense()
        if self.spatial_rank == 0:
            return F.linear(x, weight, self.bias)
        if not self.transposed:
            run = (F.conv1d, F.conv2d, F.conv3d)[self.spatial_rank - 1]
            x = F.pad(x, _pad_order(self.padding))
            return run(x, weight, self.bias, self.stride, 0, self.dilation, self.groups)
        run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.spatial_rank - 1]
        full = run(x, weight, None, self.stride, 0, 0, self.groups, self.dilation)
        y = F.pad(full, [-cut for cut in _pad_order(self.cropped)])
        return y if self.bias is None else y + self.bias.reshape(-1, *(1,) * self.spatial_rank)


class Cost(NamedTuple):
    """What one sample costs: multiply-adds, and bytes of weights, input and output in float32."""

    macs: int
    bytes_moved: int


def cost(conv: Conv, spatial_in: Sequence[int]) -> Cost:
    """The cost of one convolution at these input sizes."""
    values = conv.in_channels * math.prod(spatial_in) + conv.out_channels * math.prod(conv.output_size(spatial_in))
    return Cost(conv.macs(spatial_in), 4 * (conv.n_weights() + values))


def _channels(value: float | Tensor, size: int, what: str) -> Tensor:
    """A number or tensor as a float64 vector ``[size]``."""
    value = torch.as_tensor(value, dtype=torch.float64).detach()
    if value.numel() not in (1, size):
        raise ValueError(f"{value.numel()} values for {size} {what} channels")
    return value.reshape(-1).expand(size)


def _pad_order(padding: Sequence[tuple[int, int]]) -> list[int]:
    """``F.pad`` wants the last axis first."""
    return [side for pair in reversed(padding) for side in pair]


def _rows_at_a_time(weight: Tensor) -> int:
    """How many rows of a weight are small in float64."""
    return max(1, _CHUNK // max(1, weight.numel() // max(1, weight.shape[0])))


def _tap_sums(rows: Tensor) -> Tensor:
    """``Σ_k W[·, ·, k]`` in float64."""
    rows = rows.to(torch.float64)
    return rows.flatten(2).sum(-1) if rows.dim() > 2 else rows

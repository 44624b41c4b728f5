"""Pending affines: what the fold remembers beside a stored tensor instead of emitting an operator.

    v = a ⊙ s + t        a, t: float64, of v's rank, size 1 on every axis along which they are constant

Nothing here loops over channels; the neutral affine costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Affine:
    """``v = scale ⊙ s + shift``.

    scale, shift: float64 tensors of v's rank on the CPU; each has size 1 or v's own size on every axis, and the two
        need not have the same sizes. They are never written to, so they may be shared.
    """

    scale: Tensor
    shift: Tensor

    # ── makers ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def identity(rank: int) -> Affine:
        """``(1, 0)``."""
        return _identity(rank)

    @staticmethod
    def of(scale: float | Tensor, shift: float | Tensor, rank: int) -> Affine:
        """From numbers or tensors of any type, aligned from the right as broadcasting does.

        Raises ValueError where a tensor has more axes than ``rank``.
        """
        return Affine(_aligned(scale, rank), _aligned(shift, rank))

    @staticmethod
    def of_vectors(scale: float | Tensor, shift: float | Tensor, axis: int, rank: int) -> Affine:
        """From vectors ``[C]`` (or numbers) along one axis."""
        return Affine(_along(scale, axis, rank), _along(shift, axis, rank))

    @staticmethod
    def cat(affines: Sequence[Affine], sizes: Sequence[int], axis: int) -> Affine:
        """The affine of a concatenation along ``axis`` of tensors with these sizes there."""
        if all(affine.is_identity for affine in affines):
            return Affine.identity(affines[0].rank)
        axis = axis % affines[0].rank
        return Affine(
            _cat([affine.scale for affine in affines], sizes, axis),
            _cat([affine.shift for affine in affines], sizes, axis),
        )

    # ── what it is ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def rank(self) -> int:
        """The number of axes of v."""
        return self.scale.dim()

    @cached_property
    def has_unit_scale(self) -> bool:
        """Whether the scale is exactly 1 everywhere."""
        return bool((self.scale == 1).all())

    @cached_property
    def has_zero_shift(self) -> bool:
        """Whether the shift is exactly 0 everywhere."""
        return not bool(self.shift.any())

    @property
    def is_identity(self) -> bool:
        """Whether it is exactly ``(1, 0)``."""
        return self.has_zero_shift and self.has_unit_scale

    @cached_property
    def _axes(self) -> tuple[int, ...]:
        exact = self.compressed()
        sizes = zip(exact.scale.shape, exact.shift.shape, strict=True)
        return tuple(axis for axis, pair in enumerate(sizes) if pair != (1, 1))

    def axes(self) -> tuple[int, ...]:
        """Axes along which the values of scale or shift really differ."""
        return self._axes

    def varies_only_on(self, axis: int) -> bool:
        """Whether it is constant along every other axis."""
        return not set(self._axes) - {axis % self.rank}

    def uniform_scale(self) -> float | None:
        """The one value of the scale, or None where it has several."""
        if self.scale.numel() == 0:
            return None
        first = self.scale.reshape(-1)[0]
        return float(first) if self.scale.numel() == 1 or bool((self.scale == first).all()) else None

    def equals(self, other: Affine) -> bool:
        """Whether both map every tensor alike, compared exactly."""
        if self is other:
            return True
        return bool((self.scale == other.scale).all()) and bool((self.shift == other.shift).all())

    def vector(self, axis: int, size: int) -> tuple[Tensor, Tensor]:
        """``(scale [size], shift [size])`` along ``axis``.

        Raises ValueError where it varies on another axis.
        """
        if not self.varies_only_on(axis):
            raise ValueError(f"the affine varies on axes {self.axes()}, wanted axis {axis % self.rank} alone")
        return _vector(self.scale, axis, size), _vector(self.shift, axis, size)

    # ── algebra ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def then(self, outer: Affine) -> Affine:
        """``outer(self(s)) = (A·a) ⊙ s + (A·t + T)``."""
        if outer.is_identity:
            return self
        if self.is_identity:
            return outer
        if outer.has_unit_scale:
            return self.shifted(outer.shift)
        scale = outer.scale if self.has_unit_scale else outer.scale * self.scale
        if self.has_zero_shift:
            return Affine(scale, outer.shift)
        shift = outer.scale * self.shift
        return Affine(scale, shift if outer.has_zero_shift else shift + outer.shift)

    def scaled(self, factor: float | Tensor) -> Affine:
        """``k·v``: ``(k·a, k·t)``; the factor is a number or a tensor that broadcasts against v."""
        factor = _aligned(factor, self.rank)
        return Affine(factor * self.scale, self.shift if self.has_zero_shift else factor * self.shift)

    def shifted(self, amount: float | Tensor) -> Affine:
        """``v + u``: ``(a, t + u)``."""
        amount = _aligned(amount, self.rank)
        return Affine(self.scale, amount if self.has_zero_shift else self.shift + amount)

    def negated(self) -> Affine:
        """``−v``."""
        return Affine(-self.scale, self.shift if self.has_zero_shift else -self.shift)

    def inverse(self) -> Affine:
        """``s`` from ``v``: ``(1/a, −t/a)``. Raises ValueError where a = 0."""
        if self.is_identity:
            return self
        zeros = int((self.scale == 0).sum())
        if zeros:
            raise ValueError(f"{zeros} of {self.scale.numel()} scales are 0; wanted an invertible affine")
        return Affine(1.0 / self.scale, self.shift if self.has_zero_shift else -self.shift / self.scale)

    def apply(self, s: Tensor) -> Tensor:
        """``a ⊙ s + t`` in the type of a floating-point ``s``; ``s`` itself where there is nothing to do."""
        kind = s.dtype if s.is_floating_point() else torch.float64
        value = s if self.has_unit_scale else s * self.scale.to(kind)
        return value if self.has_zero_shift else value + self.shift.to(kind)

    # ── maps along axes ─────────────────────────────────────────────────────────────────────────────────────────────

    def slice(self, axis: int, index: int | range | slice | Tensor) -> Affine:
        """The affine of ``v`` indexed along one axis; an integer takes the axis away, as ``select`` does."""
        axis = axis % self.rank
        return Affine(_sliced(self.scale, axis, index), _sliced(self.shift, axis, index))

    def permute(self, dims: Sequence[int]) -> Affine:
        """The affine of ``v.permute(dims)``."""
        return Affine(self.scale.permute(*dims), self.shift.permute(*dims))

    def unsqueeze(self, axis: int) -> Affine:
        """The affine of ``v.unsqueeze(axis)``."""
        return Affine(self.scale.unsqueeze(axis), self.shift.unsqueeze(axis))

    def squeeze(self, axes: int | Iterable[int]) -> Affine:
        """The affine without ``axes``, along which it is constant; ValueError where it is not."""
        gone = {axis % self.rank for axis in ([axes] if isinstance(axes, int) else axes)}
        if gone & set(self._axes):
            raise ValueError(f"the affine varies on axes {self._axes}; axes {sorted(gone)} cannot be dropped")
        kept = [axis for axis in range(self.rank) if axis not in gone]
        parts = [_narrowed(tensor, gone) for tensor in (self.scale, self.shift)]
        return Affine(*(part.reshape([part.shape[axis] for axis in kept]) for part in parts))

    def expand(self, rank: int) -> Affine:
        """The affine of ``v.expand(...)`` to ``rank`` axes, new ones in front; axes that grow need nothing."""
        return self if rank == self.rank else Affine(_aligned(self.scale, rank), _aligned(self.shift, rank))

    def compressed(self) -> Affine:
        """The same affine with size 1 on every axis along which a part is exactly constant."""
        scale, shift = compress(self.scale), compress(self.shift)
        return self if scale is self.scale and shift is self.shift else Affine(scale, shift)


@cache
def _identity(rank: int) -> Affine:
    with torch.inference_mode(False):
        sizes = (1,) * rank
        return Affine(torch.ones(sizes, dtype=torch.float64), torch.zeros(sizes, dtype=torch.float64))


def _aligned(value: float | Tensor, rank: int) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((1,) * rank, float(value), dtype=torch.float64)
    if value.dim() > rank:
        raise ValueError(f"a constant of shape {tuple(value.shape)} has more axes than the tensor's {rank}")
    value = value.detach().to(torch.float64)
    return value if value.dim() == rank else value.reshape((1,) * (rank - value.dim()) + tuple(value.shape))


def _along(value: float | Tensor, axis: int, rank: int) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return _aligned(value, rank)
    sizes = [1] * rank
    sizes[axis] = value.numel()
    return value.detach().to(torch.float64).reshape(sizes)


def compress(tensor: Tensor) -> Tensor:
    """The tensor with every axis along which it is exactly constant reduced to size 1; itself where nothing is."""
    for axis, size in enumerate(tensor.shape):
        if size > 1:
            first = tensor.narrow(axis, 0, 1)
            tensor = first if bool((tensor == first).all()) else tensor
    return tensor


def _narrowed(tensor: Tensor, axes: Iterable[int]) -> Tensor:
    for axis in axes:
        tensor = tensor.narrow(axis, 0, 1)
    return tensor


def _vector(tensor: Tensor, axis: int, size: int) -> Tensor:
    axis = axis % tensor.dim()
    others = [other for other, length in enumerate(tensor.shape) if length != 1 and other != axis]
    return _narrowed(tensor, others).reshape(-1).expand(size)


def _sliced(tensor: Tensor, axis: int, index: int | range | slice | Tensor) -> Tensor:
    constant = tensor.shape[axis] == 1
    if isinstance(index, int):
        return tensor.select(axis, 0 if constant else index)
    if constant:
        return tensor
    if isinstance(index, slice):
        index = range(*index.indices(tensor.shape[axis]))
    if isinstance(index, range):
        if index.step == 1:
            return tensor.narrow(axis, index.start, len(index))
        index = torch.tensor(list(index))
    return tensor.index_select(axis, index)


def _cat(tensors: Sequence[Tensor], sizes: Sequence[int], axis: int) -> Tensor:
    """Concatenate along one axis, other axes broadcast; size 1 where all values along the axis agree."""
    if all(tensor.shape[axis] == 1 for tensor in tensors):
        first = tensors[0]
        if all(tensor.shape == first.shape and bool((tensor == first).all()) for tensor in tensors[1:]):
            return first
    shape = [max(lengths) for lengths in zip(*(tensor.shape for tensor in tensors), strict=True)]
    expanded = []
    for tensor, size in zip(tensors, sizes, strict=True):
        shape[axis] = size
        expanded.append(tensor.expand(shape))
    return torch.cat(expanded, dim=axis)

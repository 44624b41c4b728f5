"""What a reader can require of a pending affine ``v = a ⊙ s + t``, and the forms that would do.

A need lists targets ``(a', t')`` that meet it, the best first; the last one is what a restored operator would deliver, so it
changes as little as possible (one addition or one multiplication where that is enough).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foldexport.fold.affine import Affine


def unit(affine: Affine) -> Affine:
    """``(1, 0)`` of the same rank."""
    return Affine.identity(affine.rank)


def _zero_shift(affine: Affine) -> Affine:
    return Affine(affine.scale, torch.zeros_like(affine.shift))


@dataclass(frozen=True)
class Exact:
    """``(1, 0)``: graph outputs and opaque operators."""

    def met(self, affine: Affine) -> bool:
        return affine.is_identity

    def targets(self, affine: Affine) -> list[Affine]:
        return [unit(affine)]


@dataclass(frozen=True)
class ZeroShift:
    """``t = 0``: zero padding, gates, leaky slopes. The scale is free, along `axis` only if that is given."""

    axis: int | None = None

    def met(self, affine: Affine) -> bool:
        return affine.has_zero_shift and (self.axis is None or affine.varies_only_on(self.axis))

    def targets(self, affine: Affine) -> list[Affine]:
        dead = bool(((affine.scale == 0) & (affine.shift != 0)).any())
        scale_fits = self.axis is None or Affine.of(affine.scale, 0.0, affine.rank).varies_only_on(self.axis)
        if dead or not scale_fits:
            return [unit(affine)]
        live = Affine(torch.where(affine.scale == 0, 1.0, affine.scale), torch.zeros_like(affine.shift))
        return [unit(affine), live if bool((affine.scale == 0).any()) else _zero_shift(affine)]


@dataclass(frozen=True, eq=False)
class ShiftOf:
    """``t = level``, one number for each channel: padding with that level is then zero padding of the stored tensor."""

    level: torch.Tensor

    def met(self, affine: Affine) -> bool:
        return torch.equal(*torch.broadcast_tensors(affine.shift, self.level))

    def targets(self, affine: Affine) -> list[Affine]:
        live = torch.where(affine.scale == 0, 1.0, affine.scale)
        return [Affine(*torch.broadcast_tensors(live, self.level))]


@dataclass(frozen=True)
class AlongAxis:
    """The affine varies along one axis at most: linear and convolution weights can then absorb it."""

    axis: int

    def met(self, affine: Affine) -> bool:
        return affine.varies_only_on(self.axis)

    def targets(self, affine: Affine) -> list[Affine]:
        return [unit(affine)]


@dataclass(frozen=True)
class NonNegative:
    """``a ≥ 0``: max pooling (``a > 0`` where its indices are used), constant along `space`."""

    space: tuple[int, ...] = ()
    strict: bool = False

    def met(self, affine: Affine) -> bool:
        signs = (affine.scale > 0) if self.strict else (affine.scale >= 0)
        return bool(signs.all()) and not any(axis in self.space for axis in affine.axes())

    def targets(self, affine: Affine) -> list[Affine]:
        if any(axis in self.space for axis in affine.axes()):
            return [unit(affine)]
        dead = bool((affine.scale == 0).any())
        if dead and self.strict:
            return [unit(affine)]
        size = torch.where(affine.scale == 0, 1.0, affine.scale.abs())
        positive = Affine(*torch.broadcast_tensors(size, affine.shift))
        return [unit(affine), positive]


EXACT = Exact()
ZERO_SHIFT = ZeroShift()

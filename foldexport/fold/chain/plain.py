"""Clamps with one bound as plain ReLUs: what changes in front of them is taken back behind.

    max(s, L) = relu(s − L) + L,      min(s, U) = U − relu(U − s)

A large bound is a scale as well, ``max(s, L) = |L|·relu((s − L)/|L|) + L``: γ = 1e-8 must not make activations of 1e8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foldexport.fold.chain.network import Network
from foldexport.fold.chain.regions import Stage
from foldexport.fold.conv import Conv
from foldexport.fold.stored import Stored

LARGE = 2.0**10  # a bound beyond this is scaled to 1
LOST = 2.0**-20  # of a bound: what is left in front of the ReLU must not be smaller, or the bound's rounding drowns it


#: ``(scale [C], shift [C])`` → ``[C]``: the RMS of ``scale ⊙ s + shift``, s what the clamp reads.
RootMeanSquares = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Plain:
    """``clamp(s) = back_scale · relu(scale · s + shift) + back_shift``, each ``[C]``."""

    scale: Tensor
    shift: Tensor
    back_scale: Tensor
    back_shift: Tensor

    def drowns(self, rms: RootMeanSquares) -> bool:
        """Whether some channel of what the ReLU is to read is all but nothing beside the bound that was taken off it.

        A value that lies 1e-9 from its bound keeps the bound's rounding, and has no digits of its own left.
        """
        return bool(((self.scale != 0) & (rms(self.scale, self.shift) < LOST * self.shift.abs())).any())


def one_bound(lower: Tensor, upper: Tensor, dead: Tensor) -> Plain | None:
    """The plain form of bounds ``[C]``; None where a channel has two, or none and is not dead.

    Channels held at a constant c by both bounds are ``relu(0·s + c)``. Dead channels, that nobody reads, may hold anything.
    """
    one, none = torch.ones_like(lower), torch.zeros_like(lower)
    constant, below, above = lower == upper, torch.isfinite(lower), torch.isfinite(upper)
    if bool((below & above & ~constant).any()) or bool((~below & ~above & ~dead).any()):
        return None
    level = torch.where(constant, lower, torch.where(below, lower, torch.where(above, upper, none)))
    sign = torch.where(constant, torch.where(lower < 0, -one, one), torch.where(above & ~below, -one, one))
    size = torch.where(level.abs() > LARGE, level.abs(), one)
    return Plain(
        scale=torch.where(constant, none, sign / size),
        shift=torch.where(constant, level.abs(), -sign * level) / size,
        back_scale=sign * size,
        back_shift=torch.where(constant, none, level),
    )


def plain_bounds(stage: Stage, follows: Conv | None, network: Network, rms: RootMeanSquares) -> Plain | None:
    """The plain form of a stage's clamp, if what reads it can take the rest."""
    found = one_bound(stage.lower, stage.upper, dead_channels(stage.activated, follows, network))
    if found is None or (bool(found.shift.any()) and found.drowns(rms)):
        return None
    padded = follows is not None and follows.pads_zeros
    return None if padded and bool(found.back_shift.any()) else found


def dead_channels(stored: Stored, follows: Conv | None, network: Network) -> Tensor:
    """Channels that their reader multiplies by zero, and that no value of the training graph depends on; ``[C]``."""
    size = stored.shape[1]
    if follows is None or follows.groups > 1 or follows.in_channels != size:
        return torch.zeros(size, dtype=torch.bool)
    dead = (follows.dense().transpose(0, 1).flatten(1) == 0).all(1)
    for claim in network.claims.get(stored, ()):
        if claim.channels is not None or not claim.affine.varies_only_on(1):
            return torch.zeros(size, dtype=torch.bool)
        dead = dead & (claim.affine.vector(1, size)[0] == 0)
    return dead

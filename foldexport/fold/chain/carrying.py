"""What travels beside a branch: which channels of a wide tensor hold the shortcut, and how the shortcut comes back from them.

    o = matrix · W[:, places] + shift         matrix: float64 [C, K], shift [C], o the value that is carried

An activation must not change what it lets through. ReLU leaves a channel alone that is known to lie on one side, so that one
is carried as ``s − lower`` or ``upper − s``; of any other both halves are, ``s = relu(s) − relu(−s)``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from foldexport.fold.affine import Affine
from foldexport.fold.chain.intervals import Interval, mapped, unknown
from foldexport.fold.chain.network import Claim, Network
from foldexport.fold.records import Image
from foldexport.fold.stored import Stored, difference


@dataclass(frozen=True, eq=False)
class Carried:
    """The value of ``origin`` as it lies in a wide tensor.

    places: channels of the wide tensor, ``[K]``. interval: what they are known to lie in.
    index, scale, offset: each is ``scale ⊙ o[:, index, ::stride] + offset``, cut at zero where ``rectified``; ``[K]``.
    ahead: steps that o has not been taken at yet; its positions are those of the training graph where all are 1.
    """

    origin: Stored
    places: Tensor
    matrix: Tensor
    shift: Tensor
    interval: Interval
    index: Tensor
    scale: Tensor
    offset: Tensor
    stride: tuple[int, ...]
    ahead: tuple[int, ...]
    rectified: bool = False

    @property
    def count(self) -> int:
        return self.places.numel()

    def only(self, chosen: Tensor) -> Carried:
        """Some of the channels, as far as what they hold is concerned."""
        return dataclasses.replace(self, index=self.index[chosen], scale=self.scale[chosen], offset=self.offset[chosen])

    def claims(self, network: Network, places: Tensor) -> list[Claim]:
        """What the certificate may hold these channels to."""
        if any(step != 1 for step in self.ahead):
            return []
        images = (_image(claim, self, places) for claim in network.whole(self.origin))
        return [claim for claim in images if claim is not None]


@dataclass(frozen=True, eq=False)
class Wide:
    """A wide tensor: its first ``branch`` channels s are the branch's value ``affine(s)``, and something is carried in it."""

    stored: Stored
    branch: int
    affine: Affine
    carried: Carried

    @property
    def width(self) -> int:
        return self.stored.shape[1]


def whole(origin: Stored, interval: Interval, ahead: tuple[int, ...] = ()) -> Carried:
    """All channels of a tensor as they are."""
    size, rank = origin.shape[1], origin.rank - 2
    every, one, none = torch.arange(size), torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    eye = torch.eye(size, dtype=torch.float64)
    return Carried(origin, every, eye, none, interval, every, one, none, (1,) * rank, ahead or (1,) * rank)


def projected(origin: Stored, ahead: tuple[int, ...]) -> Carried:
    """What a projection makes, of which nothing is known."""
    return whole(origin, unknown(origin.shape[1]), ahead)


@dataclass(frozen=True, eq=False)
class Rows:
    """How the next wide tensor carries on: new channel j is ``scale_j · (old channel source_j) + offset_j``; ``[J]``."""

    source: Tensor
    scale: Tensor
    offset: Tensor


def kept(carried: Carried) -> Rows:
    """Every channel as it is: what carries it on does not bend."""
    return Rows(
        torch.arange(carried.count), torch.ones(carried.count, dtype=torch.float64), torch.zeros(carried.count, dtype=torch.float64)
    )


def reach(network: Network, carried: Carried, max_sigma: float) -> Tensor:
    """``[K]``: the largest shift that a channel takes without harm to float32, ``max_sigma`` times its RMS."""
    low, high = carried.interval
    if not bool(((low < 0) & low.isfinite()).any()) and not bool(((high > 0) & high.isfinite()).any()):
        return torch.zeros(carried.count, dtype=torch.float64)
    return max_sigma * network.rms(carried.origin, carried.scale, carried.offset, carried.index)


def one_sided(carried: Carried, largest: Tensor) -> Rows:
    """Channels that a ReLU leaves alone, or both halves of those that it would cut.

    largest: how far a channel may be shifted to one side, ``[K]``; 0 where zero padding on the shortcut forbids it.
    """
    source, scale, offset = [], [], []
    ends = (carried.interval[0].tolist(), carried.interval[1].tolist(), largest.tolist())
    for channel, (low, high, most) in enumerate(zip(*ends, strict=True)):
        if low >= -most:
            rows = [(1.0, max(0.0, -low))]
        elif high <= most:
            rows = [(-1.0, max(0.0, high))]
        else:
            rows = [(1.0, 0.0), (-1.0, 0.0)]
        for sign, amount in rows:
            source.append(channel)
            scale.append(sign)
            offset.append(amount)
    firsts = sorted(range(len(source)), key=lambda row: row > 0 and source[row] == source[row - 1])  # second halves last
    vectors = (torch.tensor([part[row] for row in firsts], dtype=torch.float64) for part in (scale, offset))
    return Rows(torch.tensor([source[row] for row in firsts], dtype=torch.long), *vectors)


def carried_on(carried: Carried, rows: Rows, first: int, steps: tuple[int, ...], *, rectified: bool) -> Carried:
    """The same value behind one more convolution, its channels from ``first`` on; ``steps`` is that convolution's stride.

    ``s = scale·(e − offset)`` for a channel with one row, ``s = e⁺ − e⁻`` for one with two halves.
    """
    matrix = carried.matrix[:, rows.source] * rows.scale
    halves = torch.bincount(rows.source, minlength=carried.count)[rows.source] > 1
    shift = carried.shift - (matrix * torch.where(halves, 0.0, rows.offset)).sum(1)
    interval = mapped(tuple(end[rows.source] for end in carried.interval), rows.scale, rows.offset)
    if rectified:
        interval = tuple(end.clamp_min(0.0) for end in interval)
    subsampled = all(step == 1 for step in carried.ahead)
    return dataclasses.replace(
        carried,
        places=torch.arange(first, first + len(rows.source)), matrix=matrix, shift=shift, interval=interval,
        index=carried.index[rows.source], scale=carried.scale[rows.source] * rows.scale,
        offset=carried.offset[rows.source] * rows.scale + rows.offset,
        stride=tuple(a * b for a, b in zip(carried.stride, steps, strict=True)) if subsampled else carried.stride,
        ahead=carried.ahead if subsampled else tuple(a // b for a, b in zip(carried.ahead, steps, strict=True)),
        rectified=carried.rectified or rectified,
    )  # fmt: skip


def _image(claim: Claim, carried: Carried, places: Tensor) -> Claim | None:
    """The image of a training value that ``places`` of a wide tensor hold: ``o = (v − t)/a`` put into its equation."""
    a, t = claim.affine.vector(1, carried.origin.shape[1])
    known = a != 0
    if claim.usable is not None:
        known = known & claim.usable.reshape(-1).expand(known.numel())
    live = known[carried.index]
    if not bool(live.any()):
        return None
    index = carried.index[live]
    scale = carried.scale[live] / a[index]
    offset = difference(carried.offset[live], scale * t[index])
    terms = carried.offset[live].abs() + (scale * t[index]).abs()
    image = Image(index, scale, offset, carried.stride, carried.rectified, terms)
    return Claim(claim.node, Affine.identity(carried.origin.rank), None, places[live], image)

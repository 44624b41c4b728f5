"""Where a branch begins with its activation, ``f(x) = …(act(k·x + t))``: a pre-activation trunk.

A 1×1 convolution makes what the activation bends, and beside it what carries x through:

    relu([m; E]·x + [n; o])         m·x + n: what the branch reads

x comes back from both halves of itself, ``x = relu(x) − relu(−x)``; or, the branch's own half serving as one of them, from
``x = (relu(m·x + n) − relu(−m·x − n) − n)/m``, where that keeps float32 healthy: ``|n/m|`` within a few RMS of x.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foldexport.fold.affine import Affine
from foldexport.fold.chain import carrying
from foldexport.fold.chain.activation import activated, claims_of
from foldexport.fold.chain.carrying import Carried, Rows, Wide
from foldexport.fold.chain.intervals import mapped, unknown
from foldexport.fold.chain.network import Network
from foldexport.fold.chain.plain import Plain, plain_bounds
from foldexport.fold.chain.regions import Stage
from foldexport.fold.chain.stacking import pointwise
from foldexport.fold.conv import Conv

LARGEST = 2.0**10  # a factor m beyond this, or below its inverse, is not undone again


@dataclass(frozen=True)
class Wanted:
    """grouping: the stage behind may hand channels on in groups of their own.    shifts: carried channels may be shifted.
    max_sigma: RMS of x that a shift may measure."""

    grouping: bool
    shifts: bool
    max_sigma: float


def applies(stage: Stage) -> bool:
    """Whether an activation stands in front of the first convolution, with nothing but an affine before it."""
    return stage.activated is not None and (stage.conv is None or _factors(stage.conv) is not None)


def _factors(conv: Conv) -> Tensor | None:
    """The weights ``[C]`` of a convolution that multiplies every channel by its own; None for any other."""
    if conv.in_channels != conv.out_channels or not conv.is_pointwise:
        return None
    if conv.spatial_rank > 0:
        return conv.dense().reshape(-1) if conv.groups == conv.in_channels else None
    factors = conv.dense().diagonal()
    return factors if torch.equal(conv.dense(), torch.diag(factors)) else None


def enter(network: Network, wide: Wide, stage: Stage, follows: Conv | None, wanted: Wanted) -> Wide:
    """The first wide tensor: what the branch reads, and x carried beside it."""
    p, q = _affine(stage, wide.branch)
    plain = None
    if stage.lower is not None:
        plain = plain_bounds(stage, follows, network, lambda a, b: network.rms(wide.stored, a * p, a * q + b))
    if plain is None:
        rows = carrying.kept(wide.carried)
        made = carrying.carried_on(wide.carried, rows, wide.branch, _ones(wide), rectified=False)
        return _emitted(network, wide, stage, (p, q), made, None)
    if _inactive(wide, stage, (p, q), follows):
        return Wide(wide.stored, wide.branch, Affine.of_vectors(p, q, 1, wide.stored.rank), wide.carried)
    m, n = plain.scale * p, plain.scale * q + plain.shift
    most = carrying.reach(network, wide.carried, wanted.max_sigma if wanted.shifts else 0.0)
    rows = carrying.one_sided(wide.carried, most)
    alone = wanted.grouping and _groups(follows, wide.branch, len(rows.source))
    halves = torch.bincount(rows.source, minlength=wide.branch) > 1
    shared = halves & _healthy(network, wide, m, n, wanted) if not alone else torch.zeros_like(halves)
    made = _with_shared(wide.carried, rows, shared, m, n)
    return _emitted(network, wide, stage, (m, n), made, plain)


def _ones(wide: Wide) -> tuple[int, ...]:
    return (1,) * (wide.stored.rank - 2)


def _affine(stage: Stage, size: int) -> tuple[Tensor, Tensor]:
    if stage.conv is None:
        return torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    bias = torch.zeros(size, dtype=torch.float64) if stage.conv.bias is None else stage.conv.bias
    return _factors(stage.conv), bias


def _inactive(wide: Wide, stage: Stage, affine: tuple[Tensor, Tensor], follows: Conv | None) -> bool:
    """Whether the activation changes nothing, and what reads it can take the affine in front of it."""
    low, high = mapped(wide.carried.interval, *affine)
    passes = bool((low >= stage.lower).all()) and bool((high <= stage.upper).all())
    return passes and (follows is None or not follows.pads_zeros or not bool(affine[1].any()))


def _groups(follows: Conv | None, size: int, extra: int) -> bool:
    """Whether the convolution behind can hand so many channels on in groups of its own size (`stacking.dirac_groups`)."""
    if follows is None or follows.spatial_rank == 0 or follows.in_channels != follows.out_channels:
        return False
    return extra % (size // follows.groups) == 0


def _healthy(network: Network, wide: Wide, m: Tensor, n: Tensor, wanted: Wanted) -> Tensor:
    """Channels from whose halves x may be had back."""
    sound = (m.abs() <= LARGEST) & (m.abs() >= 1 / LARGEST)
    if not bool(n.any()):
        return sound
    if not wanted.shifts:
        return sound & (n == 0)
    return sound & ((n == 0) | (n.abs() <= wanted.max_sigma * m.abs() * network.rms(wide.stored)))


def _with_shared(carried: Carried, rows: Rows, shared: Tensor, m: Tensor, n: Tensor) -> Carried:
    """x behind the activation: its own halves, or of shared channels the branch's half and the other one."""
    size = shared.numel()
    own = torch.nonzero(shared).flatten()
    rest = ~shared[rows.source]
    source = torch.cat([own, own, rows.source[rest]])
    scale = torch.cat([m[own], -m[own], rows.scale[rest]])
    offset = torch.cat([n[own], -n[own], rows.offset[rest]])
    places = torch.cat([own, torch.arange(size, size + len(own) + int(rest.sum()))])
    matrix = torch.zeros(size, len(source), dtype=torch.float64)
    matrix[source, torch.arange(len(source))] = 1.0 / scale
    alone = torch.bincount(rows.source, minlength=size) == 1
    shift = torch.where(shared, -n / torch.where(shared, m, 1.0), 0.0)
    singles = rest & alone[rows.source]
    shift[rows.source[singles]] = -(rows.scale * rows.offset)[singles]
    interval = tuple(end.clamp_min(0.0) for end in unknown(len(source)))
    stride = carried.stride
    return Carried(carried.origin, places, matrix, shift, interval, source, scale, offset, stride, carried.ahead)


def _emitted(network: Network, wide: Wide, stage: Stage, affine: tuple[Tensor, Tensor], made: Carried, plain: Plain | None) -> Wide:
    """The 1×1 convolution in front of the activation, and the activation."""
    size, rank = wide.branch, wide.stored.rank
    beside = made.places >= size
    weight = torch.zeros(size + int(beside.sum()), size, dtype=torch.float64)
    weight[torch.arange(size), torch.arange(size)] = affine[0]
    weight[made.places[beside], made.index[beside]] = made.scale[beside]
    bias = torch.cat([affine[1], made.offset[beside]])
    conv = pointwise(weight, rank - 2)
    conv = Conv(conv.weight, bias if bool(bias.any()) else None)
    reads = replace(carrying.whole(wide.stored, wide.carried.interval), scale=affine[0], offset=affine[1])
    claims = claims_of(network, stage.made, size, plain) + reads.claims(network, torch.arange(size))
    claims += made.only(beside).claims(network, made.places[beside])
    shape = (wide.stored.shape[0], len(weight), *wide.stored.shape[2:])
    stored = network.emit(stage.activated, "conv", wide.stored, claims, conv=conv, shared=None, shape=shape)
    stored.op, stored.module = "conv", stage.activated.module.rpartition(".")[0]
    return activated(network, stage, Wide(stored, size, Affine.identity(rank), made), plain)

"""Reserve and merge (RMNet, Meng et al. 2021, arXiv 2111.00687): a skip connection becomes part of its branch.

    relu(W₁·x)           →  relu([W₁; E]·x)             E: Dirac rows, the carried channels behind those of the branch
    relu(W₂·y)           →  relu([W₂ 0; 0 E]·[y; e])
    W₃·z + P·x + b       →  [W₃  P·M]·[z; e] + b         M: how x comes back from e (`Carried`), P: the projection

Every convolution keeps its stride; a Dirac row reads where its centre lies, so e is x at every ``stride``-th position, which
is all that a 1×1 projection of that stride reads. A larger projection is applied while e still is all of x, and its result
is carried on instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from foldexport.fold import conv as algebra
from foldexport.fold.affine import Affine
from foldexport.fold.chain import carrying, entry
from foldexport.fold.chain.activation import activated, claims_of
from foldexport.fold.chain.carrying import Carried, Rows, Wide
from foldexport.fold.chain.linear import Refused
from foldexport.fold.chain.network import Network
from foldexport.fold.chain.plain import plain_bounds
from foldexport.fold.chain.regions import Region, Stage
from foldexport.fold.chain.stacking import dirac_groups, fitted, placed, pointwise, stacked
from foldexport.fold.conv import Conv
from foldexport.fold.stored import Stored


@dataclass(frozen=True, eq=False)
class Turned:
    """The tensor that takes the place of a sum; what was carried beside the branch, in how many channels, as halves or as it is."""

    stored: Stored
    origin: Stored
    channels: int
    halves: bool


@dataclass(frozen=True)
class _How:
    """projecting: the projection is applied in this stage.    max_sigma: RMS that a shift of a carried channel may measure."""

    projecting: bool
    max_sigma: float


def turn(network: Network, region: Region, max_sigma: float) -> Turned:
    """The sum made without a skip connection; the graph changes by new tensors only. Raises Refused.

    max_sigma: see `entry.Wanted`.
    """
    _check(region)
    if region.last is not None and region.last.groups > 1:
        region.stages.append(Stage(region.last, region.last_made))
        region.last, region.last_made = None, None
    projecting = _projecting_at(region, network)
    interval = network.intervals.of(region.fork)
    carried = carrying.whole(region.fork, interval)
    wide = Wide(region.fork, region.fork.shape[1], Affine.identity(region.fork.rank), carried)
    for place, stage in enumerate(region.stages):
        follows = region.stages[place + 1].conv if place + 1 < len(region.stages) else region.last
        if place == 0 and entry.applies(stage):
            grouping = len(region.stages) > 1 and projecting != 1
            wide = entry.enter(network, wide, stage, follows, entry.Wanted(grouping, not region.shortcut.pads_zeros, max_sigma))
        else:
            wide = _widened(network, region, wide, stage, follows, _How(place == projecting, max_sigma))
    halves = wide.carried.count > wide.carried.matrix.shape[0]
    return Turned(_joined(network, region, wide), wide.carried.origin, wide.carried.count, halves)


def _check(region: Region) -> None:
    strides = [stage.conv.stride for stage in region.stages if stage.conv is not None]
    strides += [region.last.stride] if region.last is not None else []
    total = tuple(math.prod(axis) for axis in zip(*strides, strict=True)) if strides else region.shortcut.stride
    if total != region.shortcut.stride:
        raise Refused(f"its branch strides by {total}, its shortcut by {region.shortcut.stride}")


def _projecting_at(region: Region, network: Network) -> int | None:
    """The stage at which the projection is applied; None for the sum itself.

    A kernel of more than one tap needs x at every position; and where the projection is much narrower than x, carrying its
    result is cheaper.
    """
    conv, first = region.shortcut, int(bool(region.stages) and entry.applies(region.stages[0]))
    known = network.intervals.of(region.fork)
    halves = 1 + int(not bool(torch.isfinite(torch.maximum(known[0], -known[1])).all()))
    places = [place for place, stage in enumerate(region.stages) if place >= first and _is_dense(stage.conv)]
    if region.projected is not None and 2 * conv.out_channels < halves * conv.in_channels and places:
        return places[0]
    strided = [place for place, stage in enumerate(region.stages) if stage.conv and any(step > 1 for step in stage.conv.stride)]
    if not strided or (not any(conv.reach) and not any(any(pair) for pair in conv.padding)):
        return None
    return max((place for place in places if place <= strided[0]), default=strided[0])


def _is_dense(conv: Conv | None) -> bool:
    return conv is not None and conv.groups == 1


def _widened(network: Network, region: Region, wide: Wide, stage: Stage, follows: Conv | None, how: _How) -> Wide:
    """One stage with the carried channels beside it."""
    conv = _taking(stage.conv or _nothing(wide), wide.affine, stage.label)
    plain = None
    if stage.lower is not None:
        reads = stage.made if stage.made is not None else stage.activated.inputs[0]
        plain = plain_bounds(stage, follows, network, lambda scale, shift: network.rms(reads, scale, shift))
    carried, base = _carry(region, wide, conv, how.projecting, stage.label)
    rows = carrying.kept(carried)
    if plain is not None:
        shifts = carried.origin is not region.fork or not region.shortcut.pads_zeros
        rows = carrying.one_sided(carried, carrying.reach(network, carried, how.max_sigma if shifts else 0.0))
        conv = conv.affine_output(plain.scale, plain.shift)
    steps = (1,) * len(conv.stride) if how.projecting else conv.stride
    made = carrying.carried_on(carried, rows, conv.out_channels, steps, rectified=False)
    grouped = None if how.projecting else dirac_groups(conv, wide.width - wide.branch, _in_order(wide, rows), rows)
    if grouped is None and conv.groups > 1:
        raise Refused(f"`{stage.label}` has {conv.groups} groups, and what is carried past it does not lie in groups of that size")
    joined = grouped or stacked(placed(conv, wide.width, 0), _chosen(base, rows))
    claims = claims_of(network, stage.made, conv.out_channels, plain) + made.claims(network, made.places)
    stored = network.emit(stage.made or stage.activated, "conv", wide.stored, claims, conv=joined, shared=None,
                          shape=_shape(wide.stored, joined))  # fmt: skip
    stored.op = "conv"
    return activated(network, stage, Wide(stored, conv.out_channels, Affine.identity(stored.rank), made), plain)


def _nothing(wide: Wide) -> Conv:
    return algebra.identity(wide.branch, wide.stored.rank - 2)


def _taking(conv: Conv, affine: Affine, label: str) -> Conv:
    """The convolution that reads what the wide tensor holds of the branch."""
    if affine.is_identity:
        return conv
    try:
        return conv.affine_input(*affine.vector(1, conv.in_channels))
    except ValueError as error:
        raise Refused(f"`{label}` cannot take what is pending before it: {error}") from error


def _carry(region: Region, wide: Wide, conv: Conv, projecting: bool, label: str) -> tuple[Carried, Conv]:
    """What is carried on, before signs: and the convolution of the wide tensor that makes it."""
    carried = wide.carried
    if not projecting:
        base = Conv(torch.eye(wide.width, dtype=torch.float64)[carried.places].reshape(-1, wide.width, *(1,) * len(conv.stride)))
        base = replace(base, stride=conv.stride)
        return carried, fitted(base, conv, wide.stored, label)
    steps = tuple(a // b for a, b in zip(region.shortcut.stride, carried.stride, strict=True))
    ahead = tuple(a // b for a, b in zip(steps, conv.stride, strict=True))
    if any(a * b != c for a, b, c in zip(ahead, conv.stride, steps, strict=True)):
        raise Refused(f"the projection strides by {steps}, `{label}` by {conv.stride}")
    projection = replace(_projection(region, wide), stride=conv.stride)
    return carrying.projected(region.projected, ahead), fitted(projection, conv, wide.stored, label)


def _projection(region: Region, wide: Wide) -> Conv:
    """The shortcut as a convolution of the wide tensor."""
    carried, conv = wide.carried, region.shortcut
    if carried.origin is region.projected and region.projected is not None:
        conv = algebra.identity(region.projected.shape[1], len(conv.stride), carried.ahead)
    else:
        conv = replace(conv, stride=tuple(a // b for a, b in zip(conv.stride, carried.stride, strict=True)))
    back = torch.zeros(carried.matrix.shape[0], wide.width, dtype=torch.float64).index_copy(1, carried.places, carried.matrix)
    if bool(carried.shift.any()):
        conv = conv.shift_input(carried.shift)
    return algebra.compose(pointwise(back, len(conv.stride)), conv)


def _chosen(base: Conv, rows: Rows) -> Conv:
    """Rows of a convolution, each with its scale and offset."""
    bias = torch.zeros(base.out_channels, dtype=torch.float64) if base.bias is None else base.bias
    bias = bias[rows.source] * rows.scale + rows.offset
    weight = base.dense()[rows.source] * rows.scale.reshape(-1, *(1,) * (base.weight.dim() - 1))
    return replace(base, weight=weight, bias=bias if bool(bias.any()) else None, in_scale=None, out_scale=None)


def _in_order(wide: Wide, rows: Rows) -> bool:
    """Whether the carried channels lie behind those of the branch and each goes on alone."""
    places = torch.arange(wide.branch, wide.width)
    return torch.equal(wide.carried.places, places) and torch.equal(rows.source, torch.arange(len(places)))


def _joined(network: Network, region: Region, wide: Wide) -> Stored:
    """The last convolution, which adds what was carried back."""
    total = region.total
    last = region.last or algebra.identity(wide.branch, total.rank - 2)
    branch_sign, shortcut_sign = region.signs
    last = _taking(last, wide.affine, region.stages[-1].label if region.stages else "")
    reads = placed(last if branch_sign > 0 else last.scale_output(branch_sign), wide.width, 0)
    shortcut = fitted(_projection(region, wide), reads, wide.stored, region.last_made.name if region.last_made else total.name)
    conv = stacked_sum(reads, shortcut if shortcut_sign > 0 else shortcut.scale_output(shortcut_sign))
    claims = list(network.claims.get(total, ()))
    stored = network.emit(region.last_made or total, "conv", wide.stored, claims, conv=conv, shared=None, shape=total.shape)
    stored.op = "conv"
    return stored


def stacked_sum(first: Conv, second: Conv) -> Conv:
    """Both convolutions of one tensor added up. Raises Refused where they do not fit."""
    try:
        return algebra.add(first, second)
    except ValueError as error:
        raise Refused(f"branch and shortcut do not add up: {error}") from error


def _shape(stored: Stored, conv: Conv) -> tuple[int, ...]:
    return (stored.shape[0], conv.out_channels, *conv.output_size(stored.shape[2:]))

"""Skip connections: where a sum's two operands part, and what lies on either way.

    total = last(stage_n(… stage_1(fork))) + shortcut(fork)        a stage is a convolution and an activation

Everything on the shortcut must be linear: then it is one convolution. Whatever does not have this form stays as it is, with
the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from foldexport.fold import conv as algebra
from foldexport.fold.chain.intervals import along_channels
from foldexport.fold.chain.linear import Refused, bends, is_zero, linear, named, only_operand
from foldexport.fold.chain.network import Network
from foldexport.fold.conv import Conv
from foldexport.fold.stored import Stored


@dataclass(eq=False)
class Stage:
    """One convolution of the branch and the activation behind it; either may be missing.

    made: what the convolution makes (claims of it are those of its wider successor); activated: what the activation makes.
    lower, upper: bounds of a clamp, ``[C]``; slope: of a leaky activation, ``[C]``.
    """

    conv: Conv | None = None
    made: Stored | None = None
    activated: Stored | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None
    slope: Tensor | None = None

    @property
    def label(self) -> str:
        stored = self.made or self.activated
        return named(stored) if stored is not None else ""


@dataclass(eq=False)
class Region:
    """A skip connection that can be taken out.

    stages: of the branch; last: the convolution that the sum reads, None where it reads the last activation itself.
    shortcut: from the fork to the sum; projected: what it makes, None for the identity.
    signs: with which the sum takes branch and shortcut.
    """

    total: Stored
    fork: Stored
    shortcut: Conv
    stages: list[Stage] = field(default_factory=list)
    last: Conv | None = None
    last_made: Stored | None = None
    projected: Stored | None = None
    signs: tuple[float, float] = (1.0, 1.0)


def find(network: Network, total: Stored) -> Region:
    """The skip connection that ends in an addition. Raises Refused."""
    if any(operand.shape != total.shape for operand in total.inputs):
        raise Refused("its operands have different shapes")
    if total.rank < 2 or any(operand.kind == "constant" for operand in total.inputs):
        raise Refused("it adds no two feature maps")
    ways = [_way(operand) for operand in total.inputs]
    seen = set(ways[1])
    fork = next((stored for stored in ways[0] if stored in seen), None)
    if fork is None:
        raise Refused(_no_fork(ways))
    if fork.rank != total.rank:
        raise Refused(f"`{named(fork)}`, from which both of its ways come, has another number of axes")
    ways = [way[: way.index(fork)][::-1] for way in ways]
    inner = {stored for way in ways for stored in way}
    for stored in inner:
        _require_private(network, stored, inner | {total})
    return _region(total, fork, ways)


def _way(stored: Stored) -> list[Stored]:
    """A tensor and what it was made from, as long as that is one tensor."""
    way = [stored]
    while (operand := only_operand(way[-1])) is not None:
        way.append(operand)
    return way


def _require_private(network: Network, stored: Stored, inner: set[Stored]) -> None:
    """Raises Refused where something else than the skip connection reads a tensor on its way, beyond its shape."""
    if any(output is stored for output in network.outputs):
        raise Refused(f"`{named(stored)}` on its way is an output of the network too")
    for reader in network.readers(stored):
        if reader not in inner and not (is_zero(reader) and inner.issuperset(network.readers(reader))):
            raise Refused(f"`{named(stored)}` on its way is read by `{named(reader)}` too")


def _no_fork(ways: list[list[Stored]]) -> str:
    blocked = [way for way in ways if way[-1].inputs]
    if not blocked:
        return "its operands come from different inputs of the network"
    end = min(blocked, key=len)[-1]
    what = {"mul": "a gate", "cat": "a concatenation", "add": "a sum that stays"}.get(end.op, "an operator on several values")
    return f"{what} lies on its way: {end.op or end.kind} in `{named(end)}` depends on several values"


def _region(total: Stored, fork: Stored, ways: list[list[Stored]]) -> Region:
    """The branch is the way with activations on it, or the longer one; the shortcut must be linear."""
    sides = sorted((0, 1), key=lambda side: (any(bends(stored) for stored in ways[side]), len(ways[side])))
    bend = next((stored for stored in ways[sides[0]] if bends(stored)), None)
    if bend is not None:
        raise Refused(f"both of its ways bend: `{named(bend)}` ({bend.op or bend.kind}) lies on the shortcut too")
    short, long = ways[sides[0]], ways[sides[1]]
    signs = (1.0, -1.0 if total.attrs["minus"] else 1.0)
    projected = short[-1] if short else None
    region = Region(total, fork, _shortcut(fork, short), projected=projected, signs=(signs[sides[1]], signs[sides[0]]))
    if region.shortcut.output_size(fork.shape[2:]) != total.shape[2:]:
        raise Refused("the sizes along its shortcut are not those of convolutions")
    _branch(region, long)
    return region


def _shortcut(fork: Stored, way: list[Stored]) -> Conv:
    total = algebra.identity(fork.shape[1], fork.rank - 2)
    for stored in way:
        total = _composed(total, linear(stored), stored)
    return total


def _composed(first: Conv, second: Conv, stored: Stored) -> Conv:
    try:
        return algebra.compose(first, second)
    except ValueError as error:
        raise Refused(f"`{named(stored)}` cannot be composed with what lies before it: {error}") from error


def _branch(region: Region, way: list[Stored]) -> None:
    """Cut the branch into stages: an activation ends one, and so does a convolution behind a convolution."""
    pending: Conv | None = None
    made: Stored | None = None
    source = region.fork
    for stored in way:
        stage = _activation(stored)
        if stage is not None:
            stage.conv, stage.made = pending, made
            region.stages.append(stage)
            pending, made, source = None, None, stored
            continue
        step = linear(stored)
        joined = step if pending is None else _joined(pending, step, source)
        if joined is None:
            region.stages.append(Stage(pending, made))
            source = made
        pending, made = joined or step, stored
    region.last, region.last_made = pending, made


def _joined(first: Conv, second: Conv, source: Stored) -> Conv | None:
    """Both as one convolution where that costs no more multiply-adds."""
    sizes = source.shape[2:]
    try:
        dear = algebra.composed_cost(first, second, sizes).macs > first.macs(sizes) + second.macs(first.output_size(sizes))
        return None if dear else algebra.compose(first, second)
    except ValueError:
        return None


def _activation(stored: Stored) -> Stage | None:
    if stored.kind == "clamp":
        bounds = [along_channels(stored.attrs[end], stored) for end in ("lower", "upper")]
        if any(bound is None for bound in bounds):
            raise Refused(f"the bounds of `{named(stored)}` vary over space")
        return Stage(activated=stored, lower=bounds[0], upper=bounds[1])
    if stored.kind == "leaky":
        slope = along_channels(stored.attrs["slope"], stored)
        if slope is None:
            raise Refused(f"the slope of `{named(stored)}` varies over space")
        return Stage(activated=stored, slope=slope)
    return None

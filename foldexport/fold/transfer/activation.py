"""Clamps and leaky slopes.

    clamp(a·s + t, lo, hi) = a·clamp(s, (lo − t)/a, (hi − t)/a) + t        bounds swapped where a < 0

so a clamp passes any pending affine through per-channel bounds. In this order: a plain ReLU by having the maker of ``s`` take the
affine, one-sided clamp, two-sided clamp.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from foldexport.fold.affine import Affine
from foldexport.fold.emitter import Fold
from foldexport.fold.needs import EXACT, ZERO_SHIFT
from foldexport.fold.pending import name_of
from foldexport.fold.stored import Pending, Stored
from foldexport.trace import bound

INFINITY = math.inf
MAX_ADDED = 2.0**100  # one that an addition of its own may restore: what matters is that float32 holds it
MAX_SHIFT = 2.0**20  # a shift that an open maker may take for one reader alone; beyond that float32 range is at risk


def bounds(fold: Fold, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """``(lo, hi)`` of a clamp, float64, scalars as 0-d tensors; None if a bound depends on the input."""
    name, args = name_of(node), bound(node)
    if name == "threshold" and (args["threshold"] != 0 or args["value"] != 0):
        return None
    pairs = {
        "relu": (0.0, INFINITY),
        "relu6": (0.0, 6.0),
        "threshold": (0.0, INFINITY),
        "hardtanh": (args.get("min_val", -1.0), args.get("max_val", 1.0)),
        "clamp": (args.get("min"), args.get("max")),
        "clamp_min": (args.get("min"), None),
        "clamp_max": (None, args.get("max")),
    }
    lower, upper = pairs[name]
    ends = []
    for end, default in ((lower, -INFINITY), (upper, INFINITY)):
        if end is None:
            end = default
        if isinstance(end, fx.Node):
            if end not in fold.constants:
                return None
            end = fold.constants.value(end)
        ends.append(torch.as_tensor(end, dtype=torch.float64))
    return ends[0], ends[1]


def clamp(fold: Fold, node: fx.Node) -> bool:
    """ReLU, ReLU6, hardtanh, clamp with constant bounds."""
    found = bounds(fold, node)
    source = bound(node).get("self", bound(node).get("input"))
    if found is None or not fold.is_variable(source):
        return False
    rank = len(fold.pending(source).stored.shape)
    lower, upper = (end.reshape((1,) * (rank - end.dim()) + tuple(end.shape)) for end in found)
    pending = prepared(fold, node, source, plain=not bool(lower.any()))
    emit_clamp(fold, node, pending, lower, upper)
    return True


def prepared(fold: Fold, node: fx.Node, source: fx.Node, plain: bool) -> Pending:
    """The operand, moved towards ``(1, 0)`` as far as its maker can; shifted by one addition if readers need that."""
    pending = fold.pending(source)
    affine = pending.affine
    if affine.is_identity:
        return pending
    if pending.stored.open:
        for target in _targets(affine, plain):
            changed = fold.retargeted(pending, target)
            if changed is not None:
                fold.absorbed(pending.carried, fold.maker(pending.stored))
                return changed
    live = affine.scale != 0
    if fold.analysis.wish(node).wants_exact:
        return fold.satisfy(pending, EXACT, node, f"`{fold.label(node)}` is read exactly as it is")
    must_be_zero = fold.analysis.wish(node).wants_zero_shift
    if must_be_zero and bool((live & (affine.shift != 0)).any()):
        why = f"its shift meets the zero padding behind `{fold.label(node)}`"
        # dead channels stay as they are: the bounds of the clamp make their constant
        target = Affine(*torch.broadcast_tensors(affine.scale, torch.where(live, 0.0, affine.shift)))
        if bool((live & (affine.shift.abs() > MAX_ADDED * affine.scale.abs())).any()):
            return fold.satisfy(pending, EXACT, node, why)
        return fold.satisfy(pending, _Targets([target]), node, why)
    return pending


class _Targets:
    """A need with its only targets given: used where the consumer has already chosen."""

    def __init__(self, targets: list[Affine]) -> None:
        self._targets = targets

    def met(self, affine: Affine) -> bool:
        return False

    def targets(self, affine: Affine) -> list[Affine]:
        return self._targets


def _targets(affine: Affine, plain: bool) -> list[Affine]:
    """Forms of the operand worth asking its maker for, the best first.

    ``(1, 0)``; then ``(|a|, 0)`` and ``(a, 0)``, which make a plain clamp at zero of it; then the same shift on the sound channels
    only. A bound other than zero is no plainer for having the shift removed.
    """
    found = [Affine.identity(affine.rank)]
    live = affine.scale != 0
    if not plain:
        return found
    sound = live & (affine.shift.abs() <= MAX_SHIFT * affine.scale.abs())
    shift = torch.where(sound, 0.0, affine.shift)
    for scale in (affine.scale.abs(), affine.scale):
        scale = torch.where(live, scale, 1.0)
        found.append(Affine(*torch.broadcast_tensors(scale, torch.zeros_like(shift))))
    dead_kept = torch.where(live, affine.scale, 1.0)
    if not bool(live.all()):
        return found
    found.append(Affine(*torch.broadcast_tensors(dead_kept, shift)))
    return found


def emit_clamp(fold: Fold, node: fx.Node, pending: Pending, lower: Tensor, upper: Tensor) -> None:
    """Emit ``clamp(s, lo', hi')`` and the affine that makes it ``clamp(a·s + t, lo, hi)``."""
    a, t = pending.affine.scale, pending.affine.shift
    dead = a == 0
    safe = torch.where(dead, 1.0, a)
    ends = ((lower - t) / safe, (upper - t) / safe)
    low, high = torch.where(a < 0, ends[1], ends[0]), torch.where(a < 0, ends[0], ends[1])
    scale, shift = torch.broadcast_tensors(a, t)
    if bool(dead.any()):
        low, high, scale, shift = _dead_channels(fold, node, dead, (low, high), (scale, shift), torch.clamp(t, lower, upper))
    if _already_within(pending.stored, low, high):
        fold.ledger.note(node, fold.label(node), "repeated activation").into = pending.stored.module or fold.maker(pending.stored)
        fold.pass_on(node, Pending.of(pending.stored, Affine(scale, shift), pending.carried))
        return
    stored = fold.emit(node, "clamp", [pending.stored], lower=low, upper=high)
    fold.put(node, stored, Affine(scale, shift), pending.carried)


def _already_within(stored: Stored, low: Tensor, high: Tensor) -> bool:
    """Whether a clamp makes ``s`` and holds it inside these bounds already: ReLU behind ReLU does nothing."""
    if stored.kind != "clamp" or bool((stored.since(0).scale <= 0).any()):
        return False
    change = stored.since(0)
    lower, upper = (change.scale * stored.attrs[end] + change.shift for end in ("lower", "upper"))
    return bool((lower >= low).all()) and bool((upper <= high).all())


def _dead_channels(fold: Fold, node: fx.Node, dead: Tensor, ends, affine, constant: Tensor):
    """Channels with a = 0 hold the constant ``clamp(t, lo, hi)``.

    It stays pending as a shift with scale 0, unless readers need a zero shift: then the bounds themselves make it,
    ``lo' = hi' = constant`` with ``(1, 0)``.
    """
    low, high, scale, shift = torch.broadcast_tensors(*ends, *affine)
    dead, constant = dead.expand_as(low), constant.expand_as(low)
    if fold.analysis.wish(node).wants_zero_shift and bool((dead & (constant != 0)).any()):
        low, high = torch.where(dead, constant, low), torch.where(dead, constant, high)
        return low, high, torch.where(dead, 1.0, scale), torch.where(dead, 0.0, shift)
    one_sided = torch.where(dead & torch.isinf(low), low, torch.where(dead, 0.0, low))
    above = torch.where(dead, INFINITY, high) if not bool(torch.isfinite(high[~dead]).any()) else torch.where(dead, 0.0, high)
    below = -INFINITY if not bool(torch.isfinite(low[~dead]).any()) else 0.0
    one_sided = torch.where(dead, below, one_sided)
    return one_sided, above, scale, torch.where(dead, constant, shift)


def leaky(fold: Fold, node: fx.Node) -> bool:
    """Leaky ReLU and PReLU with constant slope α: ``f(a·s) = a·f(s)`` for a > 0.

    For a < 0 and α > 0: ``f(a·s) = (a·α)·g(s)`` with ``g`` of slope 1/α.
    """
    args = bound(node)
    source, slope = args.get("self", args.get("input")), args.get("weight", args.get("negative_slope"))
    if not fold.is_variable(source) or (isinstance(slope, fx.Node) and slope not in fold.constants):
        return False
    why = f"`{fold.label(node)}` bends at zero"
    pending = fold.demand(node, source, ZERO_SHIFT, why)
    rank = pending.stored.rank
    slopes = _slopes(fold, slope, rank)
    a = pending.affine.scale
    if bool((a < 0).any()) and bool((slopes.expand(torch.broadcast_shapes(slopes.shape, a.shape))[
            (a < 0).expand(torch.broadcast_shapes(slopes.shape, a.shape))] <= 0).any()):  # fmt: skip
        pending = fold.satisfy(pending, EXACT, node, f"`{fold.label(node)}` has no positive slope to invert")
        a = pending.affine.scale
    negative = a < 0
    stored_slopes = torch.where(negative, 1.0 / torch.where(negative, slopes, 1.0), slopes)
    scale = torch.where(negative, a * slopes, a)
    stored = fold.emit(node, "leaky", [pending.stored], slope=stored_slopes)
    fold.put(node, stored, Affine.of(scale, 0.0, rank), pending.carried)
    return True


def _slopes(fold: Fold, slope, rank: int) -> Tensor:
    if not isinstance(slope, fx.Node):
        return torch.full((1,) * rank, 0.01 if slope is None else float(slope), dtype=torch.float64)
    vector = fold.constants.value(slope)
    return vector.reshape((1, -1) + (1,) * (rank - 2)) if rank > 1 else vector.reshape(-1)

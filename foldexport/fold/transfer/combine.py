"""Operators on two or more variables: sums, gates, concatenations, maxima."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from foldexport.fold.affine import Affine
from foldexport.fold.emitter import Fold, same
from foldexport.fold.merge import merge_concatenation, merge_sum
from foldexport.fold.needs import EXACT, ZERO_SHIFT
from foldexport.fold.pending import dynamic_axes, name_of, shape_of
from foldexport.fold.stored import Pending, can
from foldexport.fold.transfer.activation import INFINITY, emit_clamp, prepared
from foldexport.trace import bound

CLOSE = 1e-14  # relative: scales that are equal but for the order of their products
EXTREME = 2.0**40  # a pending scale beyond this, or its inverse, is not multiplied with another
WITHIN_REACH = 10.0  # octaves from 1: a single number as a trunk's scale
TRUNK_LIMIT = 2.0**96  # and beyond this it is no longer carried by sums: float32 ends at 2^128


def add(fold: Fold, node: fx.Node) -> bool:
    """``v ± α·w``: equal scales, then ``(a, t_v ± α·t_w)``; branches of one tensor merge first."""
    if (blend := fold.analysis.blends.get(node)) is not None:
        fold.ledger.note(node, fold.label(node), "flat sum")
        return _put_sum(fold, node, _through(fold.pending(blend.one), blend.one_outer),
                        _through(fold.pending(blend.other), blend.other_outer))  # fmt: skip
    args = bound(node)
    left, right = args["self"], args["other"]
    if not all(isinstance(x, fx.Node) and _float(x) for x in (left, right)):
        return False
    if not (fold.is_variable(left) or fold.is_variable(right)):
        return False
    rank = len(shape_of(node))
    if len(shape_of(left)) != rank or len(shape_of(right)) != rank:
        return False
    alpha = float(args.get("alpha", 1)) * (-1.0 if name_of(node) == "sub" else 1.0)
    first, second = (fold.exactly.get(x) or fold.pending(x) for x in (left, right))
    return _put_sum(fold, node, first, _through(second, Affine.of(alpha, 0.0, rank)))


def _through(pending: Pending, outer: Affine) -> Pending:
    return Pending(pending.stored, pending.affine.then(outer), pending.epoch, pending.carried)


def _put_sum(fold: Fold, node: fx.Node, first: Pending, second: Pending) -> bool:
    why = f"the sum `{fold.label(node)}` would carry a scale that float32 cannot hold"
    first, second = (fold.satisfy(p, EXACT, node, why) if _extreme(p.affine.scale, TRUNK_LIMIT) else p for p in (first, second))
    total = _sum(fold, node, first, second)
    if total.stored.node is node:
        fold.put(node, total.stored, total.affine, total.carried)
    else:
        fold.values[node] = total
    return True


def _float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _sum(fold: Fold, node: fx.Node, first: Pending, second: Pending) -> Pending:
    if first.stored.shape == second.stored.shape == shape_of(node):
        terms = merge_sum(fold, node, first, second)
        if terms is not None:
            total = terms[0]
            for term in terms[1:]:
                total = plain_sum(fold, node, total, term)
            return total
    return plain_sum(fold, node, first, second)


def plain_sum(fold: Fold, node: fx.Node, first: Pending, second: Pending) -> Pending:
    """An addition of stored tensors whose scales were made equal; a term that is a constant only shifts the other."""
    for constant, other in ((first, second), (second, first)):
        if not bool(constant.affine.scale.any()) and other.stored.shape == shape_of(node):
            fold.absorbed(constant.carried, fold.maker(other.stored))
            shift = Affine.of(1.0, constant.affine.shift, constant.affine.rank)
            return Pending(other.stored, other.affine.then(shift), other.epoch, (*other.carried, *constant.carried))
    if first.stored is second.stored:
        total = Affine.of(first.affine.scale + second.affine.scale, first.affine.shift + second.affine.shift, first.affine.rank)
        return Pending(first.stored, total, first.epoch, (*first.carried, *second.carried))
    first, second, scale = equalised(fold, node, first, second)
    minus = not _equal(first.affine.scale, second.affine.scale)
    stored = fold.emit(node, "add", [first.stored, second.stored], minus=minus)
    shift = first.affine.shift + second.affine.shift
    return Pending.of(stored, Affine(*torch.broadcast_tensors(scale, shift)).compressed(), (*first.carried, *second.carried))


def equalised(fold: Fold, node: fx.Node, first: Pending, second: Pending) -> tuple[Pending, Pending, Tensor]:
    """Bring both operands to one scale: both to 1 if their makers can, else the one that can to the other's scale."""
    if _equal(first.affine.scale, second.affine.scale) and not _both_free(fold, first, second):
        return first, second, first.affine.scale
    makeable = [pending.stored.open for pending in (first, second)]
    if all(makeable):
        ones = [Affine.identity(p.affine.rank) for p in (first, second)]
        if _able(first, ones[0]) and _able(second, ones[1]):
            first, second = _moved(fold, first, ones[0]), _moved(fold, second, ones[1])
            return first, second, first.affine.scale
    for movable, fixed, swap in ((second, first, False), (first, second, True)):
        if swap and _equal(first.affine.scale, -second.affine.scale):
            break  # a subtraction
        target = _target(movable, fixed.affine.scale)
        if target is not None and movable.stored.open and _able(movable, target):
            moved = _moved(fold, movable, target)
            return (moved, fixed, fixed.affine.scale) if swap else (fixed, moved, fixed.affine.scale)
    if _equal(first.affine.scale, -second.affine.scale):
        return first, second, first.affine.scale
    return _restored(fold, node, first, second)


def _both_free(fold: Fold, first: Pending, second: Pending) -> bool:
    """Whether something is still pending that both makers could take: a fresh sum then starts at (1, 0)."""
    if first.affine.is_identity and second.affine.is_identity:
        return False
    ones = Affine.identity(first.affine.rank)
    return all(p.stored.open and _able(p, ones) for p in (first, second))


def _able(pending: Pending, target: Affine) -> bool:
    if bool((target.scale == 0).any()):
        return False
    a, t = pending.affine.scale, pending.affine.shift
    return can(pending.stored, Affine(*torch.broadcast_tensors(a / target.scale, (t - target.shift) / target.scale)))


def _moved(fold: Fold, pending: Pending, target: Affine) -> Pending:
    if pending.affine.is_identity and target.is_identity:
        return pending
    moved = fold.retargeted(pending, target)
    fold.absorbed(pending.carried, fold.maker(pending.stored))
    return moved


def _target(movable: Pending, scale: Tensor) -> Affine | None:
    """``(scale, t)`` for the operand that moves; where its own channels are dead the shift goes along unchanged."""
    if scale.dim() != movable.affine.rank:
        return None
    sizes = movable.stored.shape
    if any(s not in (1, size) for s, size in zip(scale.shape, sizes, strict=True)):
        return None
    return Affine(*torch.broadcast_tensors(scale, movable.affine.shift))


def _equal(a: Tensor, b: Tensor) -> bool:
    a, b = torch.broadcast_tensors(a, b)
    return bool(((a - b).abs() <= CLOSE * torch.maximum(a.abs(), b.abs())).all())


def _restored(fold: Fold, node: fx.Node, first: Pending, second: Pending) -> tuple[Pending, Pending, Tensor]:
    """One multiplication on the operand that can take the other's scale; both to 1 when neither scale fits the other."""
    why = f"the operands of `{fold.label(node)}` carry different factors"
    ways = [(second, first, False), (first, second, True)]
    ways.sort(key=lambda way: _burden(way[1].affine))
    for movable, fixed, swap in ways:
        target = _target(movable, fixed.affine.scale)
        if target is not None and not bool((target.scale == 0).any()):
            moved = fold.restore(movable, target, node, why)
            return (moved, fixed, fixed.affine.scale) if swap else (fixed, moved, fixed.affine.scale)
    first, second = (fold.satisfy(p, EXACT, node, why) for p in (first, second))
    return first, second, first.affine.scale


def gate(fold: Fold, node: fx.Node) -> bool:
    """``v × w`` of two variables: both shifts 0, then ``(a_v·a_w, 0)``."""
    args = bound(node)
    operands = (args["self"], args["other"])
    if not all(isinstance(x, fx.Node) and fold.is_variable(x) for x in operands):
        return False
    rank = len(shape_of(node))
    if any(len(shape_of(x)) != rank for x in operands):
        return False
    reason = "both factors depend on the network's input"
    fold.ledger.kept(node, fold.label(node), "gate", reason)
    why = f"the product `{fold.label(node)}` would mix a shift with the other factor"
    need = ZERO_SHIFT
    if _extreme(fold.pending(operands[0]).affine.scale * fold.pending(operands[1]).affine.scale):
        need, why = EXACT, f"the product `{fold.label(node)}` would multiply scales until they overflow"
    first = fold.demand(node, operands[0], need, why)
    second = first if operands[0] is operands[1] else fold.demand(node, operands[1], need, why)
    stored = fold.call(node, "opaque", {operands[0]: first.stored, operands[1]: second.stored})
    scale = first.affine.scale * second.affine.scale
    fold.put(node, stored, Affine.of(scale, 0.0, rank), (*first.carried, *second.carried))
    return True


def _extreme(scale: Tensor, limit: float = EXTREME) -> bool:
    """Whether a scale other than 0 has left the range in which it can wait: products of products square it each time."""
    size = scale[scale != 0].abs()
    return bool(((size > limit) | (size < 1 / limit)).any())


def _burden(affine: Affine) -> tuple[bool, bool, float]:
    """What a sum at this scale would ask of its readers, smallest first: nothing of a 1, little of one positive number, which
    norms take into their ε, more of a vector. Among equals the scale nearer to 1: a layer scale of 1e-5 that the trunk takes,
    block after block, would end in an overflow."""
    factor, distance = affine.uniform_scale(), _distance(affine.scale)
    plain = factor is not None and factor > 0 and distance <= WITHIN_REACH
    return not affine.has_unit_scale, not plain, distance


def _distance(scale: Tensor) -> float:
    """How far a scale is from 1, in octaves; 0 for signs."""
    size = scale[scale != 0].abs()
    return float(size.log2().abs().max()) if size.numel() else 0.0


def maximum(fold: Fold, node: fx.Node) -> bool:
    """maximum and minimum: with a constant a clamp; of two variables with equal affines and a > 0 they pass it."""
    args = bound(node)
    left, right = args["self"], args["other"]
    if fold.is_variable(left) and fold.is_variable(right):
        a, b = fold.pending(left), fold.pending(right)
        if a.stored.shape != b.stored.shape or not same(a.affine, b.affine) or not bool((a.affine.scale > 0).all()):
            return False
        stored = fold.call(node, "opaque", {left: a.stored, right: b.stored})
        fold.put(node, stored, a.affine, (*a.carried, *b.carried))
        return True
    return _with_constant(fold, node, left, right)


def _with_constant(fold: Fold, node: fx.Node, left: fx.Node, right: fx.Node) -> bool:
    source, other = (left, right) if fold.is_variable(left) else (right, left)
    if other not in fold.constants or shape_of(source) != shape_of(node):
        return False
    value = fold.constants.value(other).double()
    rank = len(shape_of(node))
    value = value.reshape((1,) * (rank - value.dim()) + tuple(value.shape))
    infinite = torch.full((1,) * rank, INFINITY, dtype=torch.float64)
    lower, upper = (value, infinite) if name_of(node) == "maximum" else (-infinite, value)
    if any(axis in dynamic_axes(node) for axis, size in enumerate(value.shape) if size != 1):
        return False
    emit_clamp(fold, node, prepared(fold, node, source, plain=not bool(value.any())), lower, upper)
    return True


def concatenate(fold: Fold, node: fx.Node) -> bool:
    """cat: along the concatenated axis the affines are concatenated too; along other axes they must be equal there."""
    args = bound(node)
    tensors, rank = args["tensors"], len(shape_of(node))
    if any(len(shape_of(x)) != rank for x in tensors):
        return False
    axis = args.get("dim", 0) % rank
    if axis in dynamic_axes(node) or not any(fold.is_variable(x) for x in tensors):
        return _equal_affines(fold, node, tensors)
    pendings = [fold.pending(x) for x in tensors]
    if axis == 1 and len(pendings) > 1 and len({p.stored for p in pendings}) == len(pendings):
        merged = merge_concatenation(pendings)
        if merged is not None:
            stored = fold.emit(node, "conv", [merged[0]], conv=merged[1], shared=None)
            stored.op, stored.module = "conv", pendings[0].stored.module
            entry = fold.ledger.note(node, fold.label(node), "merge by concatenation")
            entry.into = stored.module or stored.name
            fold.absorbed(tuple(k for p in pendings for k in p.carried), entry.into)
            fold.put(node, stored)
            return True
    sizes = [shape_of(x)[axis] for x in tensors]
    affine = Affine.cat([p.affine for p in pendings], sizes, axis).compressed()
    given = {x: p.stored for x, p in zip(tensors, pendings, strict=True)}
    if len(given) != len(set(tensors)) or any(fold.pending(x).stored is not given[x] for x in given):
        return False
    stored = fold.emit(node, "cat", [given[x] for x in tensors], axis=axis)
    fold.put(node, stored, affine, tuple(k for p in pendings for k in p.carried))
    return True


def _equal_affines(fold: Fold, node: fx.Node, tensors) -> bool:
    if not all(fold.is_variable(x) for x in tensors):
        return False
    pendings = [fold.pending(x) for x in tensors]
    first = pendings[0].affine
    varied = bound(node).get("dim", 0) % len(shape_of(node))
    if varied in first.axes() or not all(same(first, p.affine) for p in pendings[1:]):
        return False
    stored = fold.call(node, "opaque", {x: p.stored for x, p in zip(tensors, pendings, strict=True)})
    fold.put(node, stored, first, pendings[0].carried)
    return True


def stack(fold: Fold, node: fx.Node) -> bool:
    """stack: opaque, unless every operand carries the same affine."""
    args = bound(node)
    tensors = args["tensors"]
    if not all(fold.is_variable(x) for x in tensors):
        return False
    pendings = [fold.pending(x) for x in tensors]
    if not all(same(pendings[0].affine, p.affine) for p in pendings[1:]):
        return False
    axis = args.get("dim", 0) % len(shape_of(node))
    affine = Affine(*(half.unsqueeze(axis) for half in (pendings[0].affine.scale, pendings[0].affine.shift)))
    stored = fold.call(node, "opaque", {x: p.stored for x, p in zip(tensors, pendings, strict=True)})
    fold.put(node, stored, affine, pendings[0].carried)
    return True

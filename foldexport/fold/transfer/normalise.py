"""Normalisation by the input's own statistics: it stays, and only a positive factor passes through its ε.

    norm(c·s; ε) = norm(s; ε/c²)            for one scalar c > 0

γ and β of the operator stay inside it: they cost nothing there, and what comes behind may still be folded into them.
"""

from __future__ import annotations

import torch
from torch import fx

from foldexport.fold.affine import Affine
from foldexport.fold.emitter import Fold
from foldexport.fold.needs import EXACT
from foldexport.fold.pending import name_of, shape_of
from foldexport.fold.stored import Pending
from foldexport.trace import bound


def _operand(fold: Fold, node: fx.Node, source: fx.Node) -> tuple[Pending, float]:
    """The operand at ``(1, 0)`` or at one positive scalar c with zero shift; returns c beside it."""
    pending = fold.pending(source)
    factor = pending.affine.uniform_scale()
    if factor is not None and factor > 0 and pending.affine.has_zero_shift:
        return pending, factor
    why = f"`{fold.label(node)}` takes the statistics of its own input"
    found = fold.satisfy(pending, EXACT, node, why)
    if found.stored is not pending.stored:
        fold.exactly[source] = found
    return found, 1.0


def _constants(fold: Fold, args: dict) -> tuple | None:
    found = []
    for key in ("weight", "bias"):
        value = args.get(key)
        if value is not None and value not in fold.constants:
            return None
        found.append(None if value is None else fold.constants.value(value))
    return tuple(found)


def layer_norm(fold: Fold, node: fx.Node) -> bool:
    """layer_norm over the last axis."""
    args = bound(node)
    vectors = _constants(fold, args)
    if vectors is None or len(args["normalized_shape"]) != 1 or not fold.is_variable(args["input"]):
        return False
    rank = len(shape_of(node))
    return _emit(fold, node, args["input"], args["eps"], vectors, axis=rank - 1, kind="layer_norm", groups=None)


def group_norm(fold: Fold, node: fx.Node) -> bool:
    """group_norm."""
    args = bound(node)
    vectors = _constants(fold, args)
    if vectors is None or not fold.is_variable(args["input"]):
        return False
    return _emit(fold, node, args["input"], args["eps"], vectors, axis=1, kind="group_norm", groups=args["num_groups"])


def _emit(fold: Fold, node: fx.Node, source: fx.Node, eps: float, vectors, axis: int, kind: str, groups: int | None) -> bool:
    pending, factor = _operand(fold, node, source)
    fold.absorbed(pending.carried, fold.label(node))
    rank, size = len(shape_of(node)), shape_of(node)[axis]
    shape = [size if i == axis else 1 for i in range(rank)]
    weight = torch.ones(shape, dtype=torch.float64) if vectors[0] is None else vectors[0].reshape(shape)
    bias = torch.zeros(shape, dtype=torch.float64) if vectors[1] is None else vectors[1].reshape(shape)
    stored = fold.emit(node, "norm", [pending.stored], norm=kind, groups=groups, eps=eps / factor**2, axis=axis,
                       affine=Affine(weight, bias), plain=vectors[0] is None and vectors[1] is None)  # fmt: skip
    reason = "it normalises by the statistics of its own input, which are not known before it runs"
    fold.ledger.kept(node, fold.label(node), kind, reason)
    fold.put(node, stored)
    return True


def batch_statistics(fold: Fold, node: fx.Node) -> bool:
    """Batch or instance norm on the statistics of the input itself: kept, with the reason."""
    name = name_of(node)
    what = "batch" if name == "batch_norm" else "instance"
    reason = f"it uses the statistics of the {what} (no running statistics are stored), so there is no constant to fold"
    fold.ledger.kept(node, fold.label(node), name, reason)
    return False

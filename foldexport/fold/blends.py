"""Sums of a value with a sum of itself: ``x + α ⊙ (f − x)``, written flat.

    B ⊙ x + b  ±  (A ⊙ (p ± q) + a)      with q = D ⊙ x + d      becomes      A ⊙ p + C ⊙ x + c,

one addition in place of two and of what stands between them. It is how gated residual branches are written (EfficientViM's
``x + sigmoid(α)·(f(x) − x)``, Lee et al. 2025), and exponential averages. Exact for every A; only where nobody else reads the inner
sum, which then is no value of the folded network any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from foldexport.fold.affine import Affine
from foldexport.fold.pending import name_of, shape_of
from foldexport.trace import bound

if TYPE_CHECKING:
    from foldexport.fold.analysis import Analysis, View

SUMS = ("add", "sub")


@dataclass(frozen=True, eq=False)
class Blend:
    """``node = one_outer(one) + other_outer(other)``: two values of the training graph and what each goes through."""

    one: fx.Node
    one_outer: Affine
    other: fx.Node
    other_outer: Affine


def operands_of(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """``(v, w, α)`` of ``v + α·w`` where both are nodes; None for anything else."""
    if node.op != "call_function" or name_of(node) not in SUMS:
        return None
    args = bound(node)
    left, right = args["self"], args["other"]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    return left, right, float(args.get("alpha", 1)) * (1.0 if name_of(node) == "add" else -1.0)


def find_blend(analysis: Analysis, node: fx.Node) -> Blend | None:
    """The flat form of a sum that reads one of its own inner sum's operands again; None where it does not."""
    found = operands_of(node)
    if found is None or any(x not in analysis.views or shape_of(x) != shape_of(node) for x in found[:2]):
        return None
    left, right, alpha = found
    for inner, beside, inner_factor, beside_factor in ((right, left, alpha, 1.0), (left, right, 1.0, alpha)):
        blend = _opened(analysis, node, inner, inner_factor, beside, beside_factor)
        if blend is not None:
            return blend
    return None


def _opened(
    analysis: Analysis, node: fx.Node, inner: fx.Node, inner_factor: float, beside: fx.Node, beside_factor: float
) -> Blend | None:
    """The blend where ``inner`` is an affine of a sum that nobody else reads, one of whose operands shares ``beside``'s root."""
    view, again = analysis.views[inner], analysis.views[beside]
    parts = operands_of(view.root)
    if parts is None or view.root in analysis.blends or again.root is view.root or not _read_by_alone(view.root, node):
        return None
    if any(x not in analysis.views or shape_of(x) != shape_of(node) for x in parts[:2]) or shape_of(again.root) != shape_of(node):
        return None
    p, q, factor = parts
    outer = _times(view.affine, inner_factor)
    for one, one_factor, shared, shared_factor in ((p, 1.0, q, factor), (q, factor, p, 1.0)):
        if analysis.views[shared].root is again.root and analysis.views[one].root is not again.root:
            through = _shared(analysis.views[shared], shared_factor, outer, again, beside_factor)
            return Blend(one, Affine(*torch.broadcast_tensors(one_factor * outer.scale, _zero(outer.scale))), again.root, through)
    return None


def _shared(shared: View, shared_factor: float, outer: Affine, again: View, beside_factor: float) -> Affine:
    """What the value read twice goes through: its share of the inner sum, the inner sum's own shift, and its share beside it."""
    inner = _times(shared.affine, shared_factor).then(outer)
    direct = _times(again.affine, beside_factor)
    return Affine(*torch.broadcast_tensors(inner.scale + direct.scale, inner.shift + direct.shift)).compressed()


def _times(affine: Affine, factor: float) -> Affine:
    return affine if factor == 1.0 else Affine(factor * affine.scale, factor * affine.shift)


def _zero(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor)


def _read_by_alone(root: fx.Node, reader: fx.Node) -> bool:
    """Whether every value on the way from ``root`` to ``reader`` is read once."""
    current = root
    while current is not reader:
        if len(current.users) != 1:
            return False
        current = next(iter(current.users))
    return True

"""Operators without a rule: every floating-point operand is wanted exactly as the training graph has it."""

from __future__ import annotations

import torch
from torch import fx

from foldexport.fold.needs import EXACT
from foldexport.fold.passes import Fold, why_exact
from foldexport.fold.pending import name_of
from foldexport.fold.analysis import SHAPE_READERS


def opaque(fold: Fold, node: fx.Node) -> bool:
    """Emit the operator as it is on ``(1, 0)`` operands; its result has nothing pending."""
    given = {}
    shape_only = name_of(node) in SHAPE_READERS
    for operand in node.all_input_nodes:
        if not fold.is_variable(operand):
            continue
        if shape_only:
            given[operand] = fold.pending(operand).stored
            continue
        given[operand] = fold.demand(node, operand, EXACT, why_exact(fold, node)).stored
    stored = fold.call(node, "opaque", given)
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        fold.values[node] = [_element(fold, node, stored, i, v) for i, v in enumerate(value)]
    elif isinstance(value, torch.Tensor) and value.is_floating_point():
        fold.put(node, stored)
    else:
        fold.values[node] = stored
    return True


def _element(fold: Fold, node: fx.Node, stored, index: int, value):
    """One result of an operator with several: its own stored tensor, read through ``getitem``."""
    import operator

    from foldexport.fold.passes import Operand
    from foldexport.fold.stored import Pending

    if not isinstance(value, torch.Tensor):
        return value
    shape = tuple(s if isinstance(s, int) else int(s.node.hint) for s in value.shape)
    dynamic = frozenset(i for i, s in enumerate(value.shape) if not isinstance(s, int))
    part = fold.emit(node, "opaque", [stored], suffix=f"_{index}", shape=shape, dynamic=dynamic,
                     call=(operator.getitem, (Operand(0), index), {}))  # fmt: skip
    part.reads = 2
    return Pending.of(part) if value.is_floating_point() else part

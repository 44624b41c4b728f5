"""Operators without a rule: every floating-point operand is wanted exactly as the training graph has it."""

from __future__ import annotations

import torch
from torch import fx

from foldexport.fold.emitter import Fold, why_exact
from foldexport.fold.needs import EXACT
from foldexport.fold.pending import name_of
from foldexport.fold.stored import Pending
from foldexport.fold.wishes import SHAPE_READERS


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
        parts = fold.parts(node, stored)
        floats = [isinstance(v, torch.Tensor) and v.is_floating_point() for v in value]
        fold.values[node] = [Pending.of(part) if real else part for part, real in zip(parts, floats, strict=True)]
    elif isinstance(value, torch.Tensor) and value.is_floating_point():
        fold.put(node, stored)
    else:
        fold.values[node] = stored
    return True

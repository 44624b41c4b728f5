"""Pass 2: the training graph forwards, one transfer function per operator, into stored tensors.

Operators that emit nothing only change the pending affine of their operand; every other one is looked up in the transfer table.
At the end the recorded retargets are pushed down into weights and bounds, and every value is known in final terms.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from foldexport.fold.affine import Affine
from foldexport.fold.analysis import Analysis, analyse
from foldexport.fold.constants import Constants
from foldexport.fold.conv import Conv
from foldexport.fold.emitter import Fold, why_exact
from foldexport.fold.ledger import FOLDED, Ledger
from foldexport.fold.needs import EXACT
from foldexport.fold.pending import REPORTED, is_float, name_of
from foldexport.fold.records import Record
from foldexport.fold.stored import MAX_CARRIED, ROUNDING, Pending, Stored, push_down, rebase
from foldexport.fold.transfer import TRANSFER, opaque
from foldexport.fold.transfer.views import take_part
from foldexport.fold.wishes import MAX_SIGMA
from foldexport.trace import Graph


@dataclass(eq=False)
class FoldedGraph:
    """Stored tensors in execution order, the outputs, and every surviving value in final terms.

    undone: affine operators that had to be restored behind the place where they stood.
    parts: what tensors that hold several values side by side store (:mod:`foldexport.fold.chain`).
    """

    order: list[Stored]
    inputs: list[Stored]
    outputs: list[Any]
    values: list[tuple[fx.Node, Stored, Affine, Tensor | None]]
    ledger: Ledger
    graph: Graph
    undone: frozenset[fx.Node] = frozenset()
    parts: list[tuple[Stored, Record]] = field(default_factory=list)


def run(fold: Fold) -> FoldedGraph:
    """Every operator of the training graph, forwards."""
    graph = fold.analysis.graph
    inputs = []
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            inputs.append(fold.emit(node, "input", []))
            fold.values[node] = Pending.of(inputs[-1]) if is_float(node) else inputs[-1]
        elif node.op == "call_function" and node in fold.analysis.live:
            _step(fold, node)
    outputs = _outputs(fold, next(n for n in graph.fx.nodes if n.op == "output"))
    return _finish(fold, inputs, outputs)


def _step(fold: Fold, node: fx.Node) -> None:
    rule = fold.analysis.rules.get(node)
    if rule is not None:
        source, outer = rule
        pending = _before_other_axes(fold, source, outer)
        carried = pending.carried
        if name_of(node) in REPORTED:
            fold.ledger.note(node, fold.label(node), name_of(node))
            carried = (*carried, node)
        value = Pending(pending.stored, settled(pending.affine, outer), pending.epoch, carried[-MAX_CARRIED:])
        fold.values[node] = _restored_once(fold, node, value)
        return
    if node.target is operator.getitem:
        take_part(fold, node)
        return
    transfer = TRANSFER.get(name_of(node)) if is_float(node) or isinstance(node.meta.get("val"), tuple | list) else None
    if transfer is None or not transfer(fold, node):
        opaque(fold, node)


def _restored_once(fold: Fold, node: fx.Node, value: Pending) -> Pending:
    """A value that some reader needs exactly, and whose maker cannot give it, is restored here, for all its readers."""
    reader = node if node in fold.stay else fold.analysis.exact_reads.get(node)
    if reader is None or (value.stored.open and node not in fold.stay):
        return value
    current = value.current()
    if current.affine.is_identity:
        return value
    why = why_exact(fold, reader)
    if reader is node:
        many = len(value.affine.axes()) > 1
        why = "it varies over more than the channels" if many else "folding it would take more operators than it saves"
    return fold.satisfy(current, EXACT, reader, why)


def _before_other_axes(fold: Fold, source: fx.Node, outer: Affine) -> Pending:
    """The operand of an affine operator, as recorded: in terms of its stored tensor as it was then.

    An affine along other axes would spoil what the open maker can still take: it takes that first.
    """
    pending = fold.pending(source)
    mine = set(pending.affine.axes())
    if pending.stored.open and mine and set(outer.axes()) - mine:
        changed = fold.retargeted(pending, Affine.identity(pending.affine.rank))
        if changed is not None:
            fold.absorbed(pending.carried, fold.maker(pending.stored))
            return changed
    return fold.values[source]


def _outputs(fold: Fold, node: fx.Node) -> list[Any]:
    outputs = []
    for value in node.args[0]:
        if not isinstance(value, fx.Node):
            outputs.append(value)
        elif is_float(value):
            outputs.append(fold.demand(node, value, EXACT, why_exact(fold, node)).stored)
        else:
            outputs.append(fold.constant(value) if value in fold.constants else fold.values[value])
    return outputs


def _finish(fold: Fold, inputs: list[Stored], outputs: list[Any]) -> FoldedGraph:
    push_down(fold.order)
    alive = reachable([o for o in outputs if isinstance(o, Stored)])
    values = []
    for node, pending in fold.values.items():
        if isinstance(pending, Pending) and pending.stored in alive:
            affine, usable = rebase(pending.affine, pending.stored.since(pending.epoch))
            values.append((node, pending.stored, affine, usable))
    order = sorted_by_use([s for s in fold.order if s in alive or s.kind == "input"])
    for entry in fold.ledger.with_status(FOLDED):
        entry.into = entry.into or "the values that read it"
    fold.ledger.arrange({node: i for i, node in enumerate(fold.analysis.graph.fx.nodes)})
    return FoldedGraph(order, inputs, outputs, values, fold.ledger, fold.analysis.graph, frozenset(fold.undone))


def settled(inner: Affine, outer: Affine) -> Affine:
    """``outer(inner(s))`` where what cancels but for rounding is exactly zero, and what multiplies to one is exactly one.

    A maker that took ``z = −β/k`` leaves ``k·z + β``, which is zero in exact arithmetic and must not cost an operator.
    """
    total = inner.then(outer)
    if total.is_identity:
        return total
    terms = (outer.scale * inner.shift).abs() + outer.shift.abs()
    shift = torch.where(total.shift.abs() <= ROUNDING * terms, 0.0, total.shift)
    scale = torch.where((total.scale - 1).abs() <= ROUNDING, 1.0, total.scale)
    return Affine(*torch.broadcast_tensors(scale, shift))


def reachable(outputs: list[Stored]) -> set[Stored]:
    """Everything that the outputs need."""
    seen: set[Stored] = set()
    stack = list(outputs)
    while stack:
        stored = stack.pop()
        if stored not in seen:
            seen.add(stored)
            stack.extend(stored.inputs)
    return seen


def sorted_by_use(order: list[Stored]) -> list[Stored]:
    """Topological order that keeps the order of emission where it can (merges emit behind what they read)."""
    placed: set[Stored] = set()
    result: list[Stored] = []
    for start in order:
        stack = [start]
        while stack:
            stored = stack[-1]
            waiting = [operand for operand in stored.inputs if operand not in placed]
            if stored in placed:
                stack.pop()
            elif waiting:
                stack.extend(waiting)
            else:
                placed.add(stored)
                result.append(stack.pop())
    return result


def fold_graph(graph: Graph, max_sigma: float = MAX_SIGMA, stay: frozenset[fx.Node] = frozenset()) -> FoldedGraph:
    """Fold a training graph: analyse backwards, then emit forwards.

    max_sigma: how many standard deviations of its channel a shift may have to be absorbed upstream; smaller values keep
    more clamps. stay: affine operators that are restored where they stand unless their maker takes them.
    """
    constants = Constants(graph)
    analysis = analyse(graph, constants, max_sigma)
    stay |= scattered(analysis)
    folded = run(Fold(analysis, stay=stay))
    dear = costly_copies(folded.order)
    return run(Fold(analysis, pinned=dear, stay=stay)) if dear else folded


def scattered(analysis: Analysis) -> frozenset[fx.Node]:
    """Affine operators along several axes whose value is read more than once: an embedding of positions added to a trunk.

    No convolution takes such an affine, so it would come out at every reader: it is cheapest where it stands.
    """
    return frozenset(
        node for node, (_, outer) in analysis.rules.items()
        if len(outer.axes()) > 1 and analysis.reads.get(analysis.views[node].root, 0) > 1
    )  # fmt: skip


def costly_copies(order: list[Stored]) -> frozenset[str]:
    """Shared parameters whose folded copies would cost more bytes than folding them saves.

    A copy costs the bytes of the weight; folding one call saves what a batch norm would move, its operand in and out.
    """
    calls: dict[str, list[Stored]] = {}
    for stored in order:
        if stored.kind == "conv" and stored.attrs.get("shared"):
            calls.setdefault(stored.attrs["shared"], []).append(stored)
    dear = set()
    for name, users in calls.items():
        kinds = _distinct([s.conv for s in users])
        saved = sum(2 * math.prod(s.shape[1:]) for s in users)
        if kinds > 1 and (kinds - 1) * users[0].conv.n_weights() > saved:
            dear.add(name)
    return frozenset(dear)


def _distinct(convs: list[Conv]) -> int:
    """How many different sets of folded weights there are."""
    groups: list[Conv] = []
    for conv in convs:
        if not any(_alike(conv, other) for other in groups):
            groups.append(conv)
    return len(groups)


def _alike(a: Conv, b: Conv) -> bool:
    pairs = ((a.in_scale, b.in_scale), (a.out_scale, b.out_scale), (a.bias, b.bias))
    return all((x is None and y is None) or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)

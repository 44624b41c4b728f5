"""Pass 2: the training graph forwards, one transfer function per operator, into stored tensors.

:class:`Fold` is what the transfer functions work with: it knows the pending affine of every value, emits stored tensors,
grants the wishes of pass 1, and meets a consumer's demand in this order: (1) another tensor from an open maker,
(2) the consumer's own form, which its transfer function knows, (3) one restored operator, with the reason in the ledger.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from foldexport.fold.affine import Affine
from foldexport.fold.analysis import MAX_SIGMA, Analysis, Wish, analyse
from foldexport.fold.constants import Constants
from foldexport.fold.ledger import FOLDED, Ledger
from foldexport.fold.needs import EXACT
from foldexport.fold.pending import REPORTED, dynamic_axes, is_float, name_of, shape_of
from foldexport.fold.stored import MAX_CARRIED, ROUNDING, Pending, Stored, can, push_down, rebase
from foldexport.trace import Graph

WIDE_RANGE = 1.0  # octaves of trunk scale from which its starting scale is chosen


@dataclass(frozen=True)
class Operand:
    """In the arguments of a stored call: the input at this index."""

    index: int


@dataclass(eq=False)
class FoldedGraph:
    """Stored tensors in execution order, the outputs, and every surviving value in final terms.

    undone: affine operators that had to be restored behind the place where they stood.
    """

    order: list[Stored]
    inputs: list[Stored]
    outputs: list[Any]
    values: list[tuple[fx.Node, Stored, Affine, Tensor | None]]
    ledger: Ledger
    graph: Graph
    undone: frozenset[fx.Node] = frozenset()


@dataclass(eq=False)
class Fold:
    """The state of the forward pass."""

    analysis: Analysis
    ledger: Ledger = field(default_factory=Ledger)
    order: list[Stored] = field(default_factory=list)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()
    stay: frozenset[fx.Node] = frozenset()
    undone: set[fx.Node] = field(default_factory=set)
    _restored: dict[Stored, list[tuple[Affine, Stored]]] = field(default_factory=dict)
    _constants: dict[fx.Node, Stored] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        views = self.analysis.views
        self._left_alone = {views[node].root for node in self.stay if node in views}

    # ── looking ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def constants(self) -> Constants:
        return self.analysis.constants

    def pending(self, node: fx.Node) -> Pending:
        """The value of a floating-point node in terms of its stored tensor as it is now."""
        if node in self.constants:
            return Pending.of(self.constant(node))
        return self.values[node].current()

    def is_variable(self, node: object) -> bool:
        return is_float(node) and node not in self.constants

    def label(self, node: fx.Node) -> str:
        """The user's name for an operator: its module, else the operator at the top level."""
        return node.meta.get("module") or node.name

    # ── emitting ───────────────────────────────────────────────────────────────────────────────────────────────────

    def emit(self, node: fx.Node, kind: str, inputs: list[Stored], *, suffix: str = "", **attrs) -> Stored:
        """A new stored tensor with the shape of ``node``; ``shape=`` and ``dynamic=`` override it."""
        plain = not isinstance(node.meta.get("val"), Tensor)
        shape = attrs.pop("shape", None)
        if shape is None:
            shape = () if plain else shape_of(node)
        dynamic = attrs.pop("dynamic", None)
        if dynamic is None:
            dynamic = frozenset() if plain else dynamic_axes(node)
        stored = Stored(
            self._unique(node.name + suffix), kind, inputs, tuple(shape), dynamic, attrs,
            module=node.meta.get("module", ""), op=name_of(node), node=node,
            reads=self.analysis.reads.get(node, 1),
        )  # fmt: skip
        self.order.append(stored)
        return stored

    def _unique(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self._names:
            candidate, count = f"{name}_{count}", count + 1
        self._names.add(candidate)
        return candidate

    def call(self, node: fx.Node, kind: str, given: dict[fx.Node, Stored], **attrs) -> Stored:
        """Emit the ATen call of ``node`` itself, its tensor operands replaced by stored ones."""
        inputs: list[Stored] = []

        def place(argument: fx.Node):
            if argument in given:
                stored = given[argument]
            elif argument in self.constants:
                value = self.constants.value(argument)
                if not isinstance(value, Tensor):
                    return value
                stored = self.constant(argument)
            else:
                stored = self.values[argument]
                stored = stored.stored if isinstance(stored, Pending) else stored
            if stored not in inputs:
                inputs.append(stored)
            return Operand(inputs.index(stored))

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), place)
        return self.emit(node, kind, inputs, call=(node.target, args, dict(kwargs)), **attrs)

    def constant(self, node: fx.Node) -> Stored:
        """A constant of the training graph as a stored tensor (a buffer of the folded module)."""
        if node not in self._constants:
            value = self.constants.value(node)
            stored = self.emit(node, "constant", [], value=value, shape=tuple(value.shape), dynamic=frozenset())
            stored.reads = 2
            self._constants[node] = stored
        return self._constants[node]

    def put(self, node: fx.Node, stored: Stored, affine: Affine | None = None, carried: tuple = ()) -> None:
        """``node = affine(stored)``; a stored tensor with several readers takes its wish now, before the first reads it."""
        pending = Pending.of(stored, affine, carried)
        if stored.node is node and not stored.open:
            pending = self._grant(node, pending)
        self.values[node] = pending

    def pass_on(self, node: fx.Node, pending: Pending) -> None:
        """``node`` is a value that exists already: its readers read that tensor too."""
        stored, fresh = pending.stored, pending.stored.open
        stored.reads += self.analysis.reads.get(node, 1) - 1
        self.values[node] = self._grant(node, pending) if fresh and not stored.open else pending

    # ── wishes ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _grant(self, node: fx.Node, pending: Pending) -> Pending:
        """Take the wish that saves most, once; what cannot be had is left as it is."""
        through = self.analysis.common.get(node)
        if through is not None and not through.is_identity and can(pending.stored, pending.affine.then(through)):
            return self._taken_whole(pending, through)
        if node in self._left_alone:
            return pending
        wish = self.analysis.wish(node)
        a, t = pending.affine.scale, pending.affine.shift
        shift = None if wish.shift is None else torch.where(wish.mask, wish.shift, t)
        for scale in [*self._scales(wish, a), a]:
            for target_shift in [t] if shift is None else [shift, t]:
                changed = self.retargeted(pending, Affine(*torch.broadcast_tensors(scale, target_shift)))
                if changed is not None:
                    return changed
        return pending

    def _taken_whole(self, pending: Pending, through: Affine) -> Pending:
        """Every reader sees the root through one affine: its maker takes it, and the readers find ``(1, 0)``."""
        pending.stored.retarget(pending.affine.then(through))
        return pending

    def _scales(self, wish: Wish, a: Tensor) -> list[Tensor]:
        """Scales worth asking for: an exact one; else the middle of the range that additions will see, with the wished signs."""
        if wish.scale is not None:
            return [wish.scale]
        if wish.high - wish.low <= WIDE_RANGE:
            return [] if wish.sign is None else [wish.sign * a.abs()]
        middle = torch.full((1,) * a.dim(), 2.0 ** round(-(wish.high + wish.low) / 2), dtype=torch.float64)
        return [middle] if wish.sign is None else [wish.sign * middle, middle]

    def retargeted(self, pending: Pending, target: Affine) -> Pending | None:
        """Let the maker of ``s`` make ``s' = (v − t')/a'``, that is ``p = a/a'``, ``q = (t − t')/a'``; None if it cannot."""
        stored, affine = pending.stored, pending.affine
        if bool((target.scale == 0).any()):
            return None
        change = Affine(*torch.broadcast_tensors(affine.scale / target.scale, (affine.shift - target.shift) / target.scale))
        if not can(stored, change):
            return None
        stored.retarget(change)
        return Pending.of(stored, target, () if target.is_identity else pending.carried)

    # ── demands ────────────────────────────────────────────────────────────────────────────────────────────────────

    def demand(self, node: fx.Node, value: fx.Node, need, why: str) -> Pending:
        """The operand ``value`` of ``node`` in a form that meets ``need`` (see :mod:`foldexport.fold.needs`)."""
        return self.satisfy(self.pending(value), need, node, why)

    def satisfy(self, pending: Pending, need, node: fx.Node, why: str) -> Pending:
        if need.met(pending.affine):
            return pending
        targets = need.targets(pending.affine)
        if pending.stored.open:
            for target in targets:
                changed = self.retargeted(pending, target)
                if changed is not None:
                    self.absorbed(pending.carried, self.maker(pending.stored))
                    return changed
        return self._restore(pending, targets[-1], node, why)

    def _restore(self, pending: Pending, target: Affine, node: fx.Node, why: str) -> Pending:
        """One operator that brings a value into the form a reader needs; shared by readers that need the same."""
        stored, affine = pending.stored, pending.affine
        scale = torch.where(affine.scale == target.scale, 1.0, affine.scale / target.scale)
        gap = torch.where(affine.shift == target.shift, 0.0, (affine.shift - target.shift) / target.scale)
        change = Affine(*torch.broadcast_tensors(scale, gap)).compressed()
        self.undone.update(pending.carried)
        known = self._restored.setdefault(stored, [])
        for other, made in known:
            if same(other, change):
                return Pending.of(made, target)
        maker = pending.carried[-1] if pending.carried else node
        made = self.emit(maker, "affine", [stored], suffix="_kept" if maker is node else "", affine=change,
                         shape=stored.shape, dynamic=stored.dynamic)  # fmt: skip
        made.reads = 2
        known.append((change, made))
        reason = f"{why}, and {self._why_closed(stored)}"
        for key in pending.carried[-1:]:
            self.ledger.kept(key, self.label(key), name_of(key), reason)
        if not pending.carried:
            self.ledger.kept((stored, node), self.label(node), "restore", reason)
        return Pending.of(made, target)

    def _why_closed(self, stored: Stored) -> str:
        name = self.maker(stored)
        if stored.kind == "input":
            return f"it applies to the network's input {name}, which has no layer in front to absorb it"
        if not stored.open:
            return f"`{name}` that makes the tensor has {stored.reads} readers"
        return f"`{name}` ({stored.op or stored.kind}) that makes the tensor cannot absorb it"

    def maker(self, stored: Stored) -> str:
        """The user's name of the layer that makes a stored tensor, looking through what only passes values on."""
        while stored.kind in ("max_pool", "pool", "view", "clamp", "leaky") and stored.inputs and stored.open:
            stored = stored.inputs[0]
        if stored.kind == "add":
            for operand in reversed(stored.inputs):
                if operand.kind == "conv" and operand.open:
                    return operand.module or operand.name
        return stored.module or stored.name

    def absorbed(self, carried: tuple, into: str) -> None:
        """Write into the ledger where the carried operators went."""
        for key in carried:
            self.ledger.folded(key, into)

    # ── driving ────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self, table: dict, opaque) -> FoldedGraph:
        graph = self.analysis.graph
        inputs = []
        for node in graph.fx.nodes:
            if node.op == "placeholder":
                inputs.append(self.emit(node, "input", []))
                self.values[node] = Pending.of(inputs[-1]) if is_float(node) else inputs[-1]
            elif node.op == "call_function" and node in self.analysis.live:
                self._step(node, table, opaque)
        outputs = self._outputs(next(n for n in graph.fx.nodes if n.op == "output"))
        return self._finish(inputs, outputs)

    def _step(self, node: fx.Node, table: dict, opaque) -> None:
        rule = self.analysis.rules.get(node)
        if rule is not None:
            source, outer = rule
            pending = self._before_other_axes(source, outer)
            carried = pending.carried
            if name_of(node) in REPORTED:
                self.ledger.note(node, self.label(node), name_of(node))
                carried = (*carried, node)
            value = Pending(pending.stored, settled(pending.affine, outer), pending.epoch, carried[-MAX_CARRIED:])
            self.values[node] = self._restored_once(node, value)
            return
        if node.target is operator.getitem:
            self.values[node] = self.values[node.args[0]][node.args[1]]
            return
        transfer = table.get(name_of(node)) if is_float(node) or isinstance(node.meta.get("val"), tuple | list) else None
        if transfer is None or not transfer(self, node):
            opaque(self, node)

    def _restored_once(self, node: fx.Node, value: Pending) -> Pending:
        """A value that some reader needs exactly, and whose maker cannot give it, is restored here, for all its readers."""
        reader = node if node in self.stay else self.analysis.exact_reads.get(node)
        if reader is None or (value.stored.open and node not in self.stay):
            return value
        current = value.current()
        if current.affine.is_identity:
            return value
        why = "folding it would take more operators than it saves" if reader is node else why_exact(self, reader)
        return self.satisfy(current, EXACT, reader, why)

    def _before_other_axes(self, source: fx.Node, outer: Affine) -> Pending:
        """The operand of an affine operator, as recorded: in terms of its stored tensor as it was then.

        An affine along other axes would spoil what the open maker can still take: it takes that first.
        """
        pending = self.pending(source)
        mine = set(pending.affine.axes())
        if pending.stored.open and mine and set(outer.axes()) - mine:
            changed = self.retargeted(pending, Affine.identity(pending.affine.rank))
            if changed is not None:
                self.absorbed(pending.carried, self.maker(pending.stored))
                return changed
        return self.values[source]

    def _outputs(self, node: fx.Node) -> list[Any]:
        outputs = []
        for value in node.args[0]:
            if not isinstance(value, fx.Node):
                outputs.append(value)
            elif is_float(value):
                outputs.append(self.demand(node, value, EXACT, why_exact(self, node)).stored)
            else:
                outputs.append(self.constant(value) if value in self.constants else self.values[value])
        return outputs

    def _finish(self, inputs: list[Stored], outputs: list[Any]) -> FoldedGraph:
        push_down(self.order)
        alive = reachable([o for o in outputs if isinstance(o, Stored)])
        values = []
        for node, pending in self.values.items():
            if isinstance(pending, Pending) and pending.stored in alive:
                affine, usable = rebase(pending.affine, pending.stored.since(pending.epoch))
                values.append((node, pending.stored, affine, usable))
        order = sorted_by_use([s for s in self.order if s in alive or s.kind == "input"])
        for entry in self.ledger.with_status(FOLDED):
            entry.into = entry.into or "the values that read it"
        self.ledger.arrange({node: i for i, node in enumerate(self.analysis.graph.fx.nodes)})
        return FoldedGraph(order, inputs, outputs, values, self.ledger, self.analysis.graph, frozenset(self.undone))


def why_exact(fold: Fold, reader: fx.Node) -> str:
    """Why a reader needs a value as the training graph has it."""
    if reader.op == "output":
        return "it is an output of the network"
    return f"{name_of(reader) or reader.name} `{fold.label(reader)}` needs its exact value"


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


def same(a: Affine, b: Affine) -> bool:
    """Equal up to broadcasting."""
    return all(
        torch.equal(*torch.broadcast_tensors(x, y)) for x, y in ((a.scale, b.scale), (a.shift, b.shift)) if _fits(x, y)
    ) and _fits(a.scale, b.scale)


def _fits(x: Tensor, y: Tensor) -> bool:
    return x.dim() == y.dim() and all(i == j or 1 in (i, j) for i, j in zip(x.shape, y.shape, strict=True))


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
    from foldexport.fold.transfer import TRANSFER, opaque

    constants = Constants(graph)
    analysis = analyse(graph, constants, max_sigma)
    folded = Fold(analysis, stay=stay).run(TRANSFER, opaque)
    dear = costly_copies(folded.order)
    return Fold(analysis, pinned=dear, stay=stay).run(TRANSFER, opaque) if dear else folded


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


def _distinct(convs: list) -> int:
    """How many different sets of folded weights there are."""
    groups: list = []
    for conv in convs:
        if not any(_alike(conv, other) for other in groups):
            groups.append(conv)
    return len(groups)


def _alike(a, b) -> bool:
    pairs = ((a.in_scale, b.in_scale), (a.out_scale, b.out_scale), (a.bias, b.bias))
    return all((x is None and y is None) or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)

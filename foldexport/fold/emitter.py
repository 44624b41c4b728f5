"""What a transfer function works with: the pending affine of every value, and how stored tensors come to be.

:class:`Fold` emits stored tensors, grants the wishes of pass 1, and meets a consumer's demand in this order: (1) another tensor
from an open maker, (2) the consumer's own form, which its transfer function knows, (3) one restored operator, with the reason
in the ledger.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from foldexport.fold.affine import Affine
from foldexport.fold.analysis import Analysis
from foldexport.fold.constants import Constants
from foldexport.fold.ledger import Ledger
from foldexport.fold.pending import dynamic_axes, hint, is_float, name_of, shape_of
from foldexport.fold.stored import Pending, Stored, can
from foldexport.fold.wishes import Wish

WIDE_RANGE = 1.0  # octaves of trunk scale from which its starting scale is chosen


@dataclass(frozen=True)
class Operand:
    """In the arguments of a stored call: the input at this index."""

    index: int


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
    exactly: dict[fx.Node, Pending] = field(default_factory=dict)  # values restored for a norm, for the sums that read them too
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

    def parts(self, node: fx.Node, whole: Stored) -> list[Any]:
        """The results of an operator with several, each a stored tensor of its own that ``getitem`` reads."""
        found = []
        for index, value in enumerate(node.meta["val"]):
            if not isinstance(value, Tensor):
                found.append(value)
                continue
            dynamic = frozenset(i for i, size in enumerate(value.shape) if not isinstance(size, int))
            part = self.emit(node, "opaque", [whole], suffix=f"_{index}", shape=tuple(map(hint, value.shape)), dynamic=dynamic,
                             call=(operator.getitem, (Operand(0), index), {}))  # fmt: skip
            part.op, part.reads = "getitem", 2
            found.append(part)
        return found

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
            pending = self.grant(node, pending)
        self.values[node] = pending

    def pass_on(self, node: fx.Node, pending: Pending) -> None:
        """``node`` is a value that exists already: its readers read that tensor too."""
        stored, fresh = pending.stored, pending.stored.open
        stored.reads += self.analysis.reads.get(node, 1) - 1
        self.values[node] = self.grant(node, pending) if fresh and not stored.open else pending

    # ── wishes ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def grant(self, node: fx.Node, pending: Pending) -> Pending:
        """Take the wish that saves most, once; what cannot be had is left as it is."""
        through = self.analysis.common.get(node)
        if through is not None and not through.is_identity and can(pending.stored, pending.affine.then(through)):
            return self._taken_whole(pending, through)
        if node in self._left_alone:
            return pending
        wish = self.analysis.wish(node)
        a, t = pending.affine.scale, pending.affine.shift
        shift = None if wish.shift is None else torch.where(wish.mask, wish.shift, t)
        if shift is None and not self._scales(wish, a):  # nobody said anything: the value itself suits every reader
            changed = self.retargeted(pending, Affine.identity(pending.affine.rank))
            if changed is not None:
                return changed
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
        return self.restore(pending, targets[-1], node, why)

    def restore(self, pending: Pending, target: Affine, node: fx.Node, why: str) -> Pending:
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


def why_exact(fold: Fold, reader: fx.Node) -> str:
    """Why a reader needs a value as the training graph has it."""
    if reader.op == "output":
        return "it is an output of the network"
    return f"{name_of(reader) or reader.name} `{fold.label(reader)}` needs its exact value"


def same(a: Affine, b: Affine) -> bool:
    """Equal up to broadcasting."""
    return all(
        torch.equal(*torch.broadcast_tensors(x, y)) for x, y in ((a.scale, b.scale), (a.shift, b.shift)) if _fits(x, y)
    ) and _fits(a.scale, b.scale)


def _fits(x: Tensor, y: Tensor) -> bool:
    return x.dim() == y.dim() and all(i == j or 1 in (i, j) for i, j in zip(x.shape, y.shape, strict=True))

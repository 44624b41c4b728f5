"""Running the folded network on the training graph's own values, one operator at a time.

Every operator of the folded network reads *references*: the training graph's values in stored form,
``s = (v − shift) / scale``. Its own result is compared with what the training graph holds there, so no operator can
hide behind what comes after it, and no error travels. Both networks advance together, and a value lives only as long as
one of them still reads it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from foldexport import bands
from foldexport.errors import FoldexportError
from foldexport.fold.rebuild import Program
from foldexport.fold.records import Record
from foldexport.interpret import Instead, evaluate, steps

if TYPE_CHECKING:
    from foldexport.trace import Graph

NUDGE = 2.0**-26  # relative change of inputs that shows how an operator magnifies rounding


class Runner(fx.Interpreter):
    """The folded network node by node, under the float rule of the training graph's interpreter."""

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.dtype = dtype

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and len(n.args) == 1:
            banded = bands.layer(self.fetch_attr(n.target), self.env[n.args[0]])
            return super().run_node(n) if banded is None else banded
        if n.op != "call_function":
            return super().run_node(n)
        return evaluate(n, *self.fetch_args_kwargs_from_env(n), self.dtype)

    def run_on(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """The node's result when its inputs have these values."""
        saved, self.env = self.env, values
        try:
            return self.run_node(node)
        finally:
            self.env = saved


@dataclass(eq=False)
class Visit:
    """One operator of the folded network, evaluated on references.

    computed: what it gave; None when it raised, with the reason in `refusal`, or when an input is not known.
    records, values: its claims ``v = scale ⊙ s + shift``, and the training graph's values of those names.
    references: its inputs in stored form; offsets: the size at which an input rounded beyond its own:
        ``|shift / scale|`` where it was recovered, that of its terms where an operator without records computed it.
    exact: no input was recovered, so that the operator read the very bits that the training graph has.
    """

    node: fx.Node
    computed: Any
    refusal: str
    records: list[Record]
    values: dict[str, Any]
    references: dict[fx.Node, Any]
    offsets: dict[fx.Node, Tensor]
    exact: bool


@dataclass(eq=False)
class Schedule:
    """When each folded operator runs and how long each training value is kept.

    A folded operator is due once the training graph has made every value that its own records and those of everything
    before it name. Linear in the size of both graphs. The folded network's outputs get one record more each: that they
    are the training graph's outputs as they stand.

    Raises :class:`FoldexportError` when the program does not fit the graph at all (names, number of outputs).
    """

    graph: Graph
    program: Program
    records: dict[str, list[Record]] = field(init=False)
    due: list[tuple[int, fx.Node]] = field(init=False)
    last_need: dict[str, int] = field(init=False)
    last_reader: dict[fx.Node, fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        self.records = {name: list(records) for name, records in self.program.records.items()}
        for stored, value in output_pairs(self.graph, self.program):
            if isinstance(stored, fx.Node) and isinstance(value, fx.Node):
                self._claim_output(stored, value)
        place = {node.name: index for index, node in enumerate(self.graph.fx.nodes)}
        need: dict[fx.Node, int] = {}
        for node in self.program.module.graph.nodes:
            own = [self._place(place, node, record) for record in self.records.get(node.name, ())]
            need[node] = max([-1, *own, *(need[source] for source in node.all_input_nodes)])
        self.due = sorted(((when, node) for node, when in need.items()), key=lambda pair: pair[0])
        self.last_need, self.last_reader = {}, {}
        for when, node in self.due:
            for record in self.records.get(node.name, ()):
                self.last_need[record.value] = max(when, self.last_need.get(record.value, -1))
            for source in node.all_input_nodes:
                self.last_reader[source] = node

    def _claim_output(self, stored: fx.Node, value: fx.Node) -> None:
        own = self.records.setdefault(stored.name, [])
        if not any(record.value == value.name and is_identity(record) for record in own):
            one = torch.ones((), dtype=torch.float64)
            own.insert(0, Record(value.name, one, torch.zeros_like(one), None))

    @staticmethod
    def _place(place: dict[str, int], node: fx.Node, record: Record) -> int:
        if record.value not in place:
            raise FoldexportError(f"folded operator {node.name!r} records {record.value!r}, which was never traced")
        return place[record.value]


def output_pairs(graph: Graph, program: Program) -> list[tuple[Any, Any]]:
    """(folded, training) leaves of the two output nodes, in order."""
    folded = pytree.tree_leaves(program.module.graph.output_node().args[0])
    training = pytree.tree_leaves(graph.fx.output_node().args[0])
    if len(folded) != len(training):
        raise FoldexportError(f"the folded network has {len(folded)} outputs, the training graph {len(training)}")
    return list(zip(folded, training, strict=True))


class Lockstep:
    """The two networks side by side on one set of inputs; iterate once, inside ``torch.no_grad()``.

    watch: names of training values to keep in `watched`, for the comparison from end to end. instead: as for `interpret.steps`,
    changes values of the training graph.
    """

    def __init__(
        self, schedule: Schedule, inputs: tuple, watch: frozenset[str] = frozenset(), instead: Instead | None = None
    ) -> None:
        self.schedule, self.inputs, self.watch, self._instead = schedule, inputs, watch, instead
        self.watched: dict[str, Any] = {}
        self._values: dict[str, Any] = {}
        self._references: dict[fx.Node, Any] = {}
        self._offsets: dict[fx.Node, Tensor] = {}
        self._exact: set[fx.Node] = set()
        self._runner = Runner(schedule.program.module)
        placeholders = schedule.program.module.graph.find_nodes(op="placeholder")
        self._placed = dict(zip(placeholders, inputs, strict=True))

    def __iter__(self) -> Iterator[Visit]:
        """Visits in an order that respects the folded graph; raises what the training graph raises."""
        place = {node: index for index, node in enumerate(self.schedule.graph.fx.nodes)}
        expiry: dict[int, list[str]] = defaultdict(list)
        pending, due = 0, self.schedule.due
        for node, value in steps(self.schedule.graph, self.inputs, torch.float64, instead=self._instead):
            if node.name in self.watch:
                self.watched[node.name] = value
            if node.name in self.schedule.last_need:
                self._values[node.name] = value
                expiry[self.schedule.last_need[node.name]].append(node.name)
            del value  # the training graph frees it after its own last reader
            while pending < len(due) and due[pending][0] <= place[node]:
                yield from self._visit(due[pending][1])
                pending += 1
            for name in expiry.pop(place[node], ()):
                self._values.pop(name, None)
        for _, node in due[pending:]:
            yield from self._visit(node)

    def nudged(self, visit: Visit, seed: int) -> Any:
        """The operator's result when its inputs move by ``±NUDGE`` of the sizes that they rounded at."""
        generator = torch.Generator().manual_seed(seed)
        inputs = {
            source: pytree.tree_map(lambda value, at=source: _nudge(value, visit.offsets.get(at), generator), held)
            for source, held in visit.references.items()
        }
        return self._runner.run_on(visit.node, inputs) if inputs else visit.computed

    def _visit(self, node: fx.Node) -> Iterator[Visit]:
        sources = node.all_input_nodes
        inputs = {source: self._references[source] for source in sources}
        records = self.schedule.records.get(node.name, [])
        values = {record.value: self._values[record.value] for record in records if record.value in self._values}
        computed, refusal = self._evaluate(node, inputs)
        offsets = {source: self._offsets[source] for source in sources if source in self._offsets}
        exact = all(source in self._exact for source in sources)
        visit = Visit(node, computed, refusal, records, values, inputs, offsets, exact)
        yield visit
        self._references[node] = reference(computed, records, values)
        if records and not is_identity(records[-1]):
            self._offsets[node] = _offset(records, computed)
        elif records or exact:
            self._exact.add(node)
        if not records and inputs and is_inexact(computed):
            self._offsets[node] = (self.nudged(visit, 0) - computed).abs().div_(NUDGE)
        for source in sources:
            if self.schedule.last_reader[source] is node:
                self._references.pop(source, None)
                self._offsets.pop(source, None)

    def _evaluate(self, node: fx.Node, inputs: dict[fx.Node, Any]) -> tuple[Any, str]:
        if node.op == "placeholder":
            return self._placed[node], ""
        if any(value is None for value in inputs.values()):
            return None, ""
        try:
            return self._runner.run_on(node, inputs), ""
        except Exception as error:  # an operator may raise anything; that it cannot run here is the finding
            return None, first_line(error)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_inexact(value: object) -> bool:
    """Whether a value is a tensor of real or complex numbers, for which rounding is defined."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def is_identity(record: Record) -> bool:
    """Whether the stored tensor is the training value itself, on every channel."""
    whole = record.is_whole and record.usable is None
    return whole and bool((record.scale == 1).all()) and bool((record.shift == 0).all())


def reference(computed: Any, records: list[Record], values: dict[str, Any]) -> Any:
    """``s = (v − shift) / scale``, channel by channel from the last record that knows the channel.

    A record knows a channel when it is usable there and its scale is not 0. Channels that none knows, and operators
    without records, keep what the folded operator itself computed. None when that is missing or of another shape.
    Records of some channels are put together.
    """
    result = computed
    for record in records:
        value = values.get(record.value)
        if not isinstance(value, Tensor):
            continue
        if not record.is_whole:
            result = _with_part(result, record, value)
            continue
        if isinstance(result, Tensor) and value.shape != result.shape:
            result = None
        if is_identity(record) or not is_inexact(value):
            result = value
            continue
        known = record.scale != 0 if record.usable is None else (record.scale != 0) & record.usable
        if not bool(known.any()):
            continue
        whole = bool(known.all())
        if whole or result is not None:
            stored = (value - record.shift).div_(torch.where(known, record.scale, 1.0))
            result = stored if whole else torch.where(known, stored, result)
    return result


def _with_part(result: Any, record: Record, value: Tensor) -> Any:
    """``result`` with the channels of one record as the training graph has them; None where they do not fit."""
    if not isinstance(result, Tensor):
        return None
    own, seen = record.part(result), record.seen(value)
    if own.shape != seen.shape:
        return None
    known = record.scale != 0 if record.usable is None else (record.scale != 0) & record.usable
    stored = torch.where(known, (seen - record.shift) / torch.where(known, record.scale, 1.0), own)
    return stored if record.channels is None else result.index_copy(1, record.channels, stored)


def _offset(records: list[Record], computed: Any) -> Tensor:
    """The size at which a stored tensor was rounded beyond its own: by its last record, or channel by channel by its parts."""
    if records[-1].is_whole or not isinstance(computed, Tensor):
        return _shift_size(records[-1])
    total = torch.zeros((1, computed.shape[1]) + (1,) * (computed.dim() - 2), dtype=torch.float64)
    for record in records:
        size = _shift_size(record) if record.image is None else _shift_size(record) + record.image.offsets(computed.dim())
        channels = torch.arange(computed.shape[1]) if record.channels is None else record.channels
        total = total.index_copy(1, channels, size.expand_as(record.part(total)))
    return total


def _shift_size(record: Record) -> Tensor:
    """``|shift / scale|`` where the record knows the channel, else 0."""
    scale = torch.where(record.scale == 0, 1.0, record.scale)
    return torch.where(record.scale == 0, 0.0, record.shift / scale).abs()


def _nudge(value: Any, offset: Tensor | None, generator: torch.Generator) -> Any:
    if not is_inexact(value):
        return value
    sign = torch.randint(0, 2, value.shape, generator=generator).mul_(2).sub_(1)
    size = value.abs() if offset is None else value.abs() + offset
    return torch.where(value.isfinite(), value + NUDGE * sign * size, value)

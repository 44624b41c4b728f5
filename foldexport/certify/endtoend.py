"""The whole folded network against the training graph in float64: at the outputs, and before what would hide an error.

Softmax and sigmoid saturate, so a final one is also compared at its input. Behind an operator that jumps (argmax,
top-k, NMS, floor, comparisons) the last digit decides, so its inputs are compared and what follows is counted.
"""

from __future__ import annotations

import math
import operator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from foldexport.certify.lockstep import Runner, Schedule, first_line, is_identity, is_inexact
from foldexport.extremes import Peak
from foldexport.trace.views import packet_name

if TYPE_CHECKING:
    from foldexport.fold.records import Record
    from foldexport.probes import Probe

TOLERANCE = 1e-9  # of the output's peak
NOISE_DIGITS = 2.0**-19  # float64 roundoff over float32 roundoff (2^-29), times 1024
INFORMATIVE = 1e-6  # of peak: outputs that differ less over all probes cannot show a mistake above TOLERANCE
MAGNIFIED = 1024.0  # times what one roundoff at every operator does to the outputs
BLIND = 1e-3  # of peak: a larger bound shows nothing
MAX_TIES = 16  # near-ties listed

_FINAL = frozenset({"softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid", "logsigmoid", "log_sigmoid"})
_JUMPS = frozenset(
    ("floor", "ceil", "round", "trunc", "fix", "sign", "sgn", "frac", "remainder", "fmod", "floor_divide")
    + ("heaviside", "hardshrink", "topk", "sort", "argsort", "nms", "fake_quantize_per_tensor_affine")
)
_SHAPE_ONLY = ("zeros_like", "ones_like", "full_like", "empty_like", "new_", "sym_", "_assert", "is_same_size")


@dataclass(frozen=True)
class TopOne:
    """Agreement of the class with the largest score, over samples whose margin exceeds twice their error.

    ties: (sample, margin) of the others, at most sixteen of them.
    """

    agree: int
    judged: int
    samples: int
    ties: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class EndToEnd:
    """Outcome of the comparison of outputs.

    error: largest difference over the peak, at `worst` (a value of the training graph); bound: what is allowed.
    blind: outputs that hardly depend on the input, so that their agreement shows nothing.
    agreement: share of equal entries for outputs behind an operator that jumps.
    """

    error: float
    bound: float
    worst: str
    blind: list[str]
    agreement: dict[str, float]
    top1: dict[str, TopOne]
    refusal: str = ""

    @property
    def ok(self) -> bool:
        return not self.refusal and self.error <= self.bound

    @property
    def informative(self) -> bool:
        """Whether every output moves with the input by enough to show a mistake."""
        return not self.blind

    def explain(self) -> str:
        """Why it is not ok, for an error message."""
        if self.refusal:
            return f"the folded network cannot run: {self.refusal}"
        found = f"the folded network's '{self.worst}' differs from the training graph's by {self.error:.3g} of its peak"
        return f"{found}, allowed {self.bound:.3g}, although every operator agrees on its own: the wiring differs"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok, "informative": self.informative}


@dataclass(eq=False)
class _Point:
    """A value that is compared; `group` is the output it stands for."""

    group: str
    errors: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    prints: list[Tensor] = field(default_factory=list)


class EndToEndRun:
    """Collects probes, one run of the folded network each."""

    def __init__(self, schedule: Schedule) -> None:
        """`watch` names the training values whose references :meth:`add` needs."""
        self._schedule = schedule
        outputs = schedule.graph.fx.output_node().all_input_nodes
        behind, frontier = beyond_jumps(schedule.graph.fx)
        self._points = {node.name: _Point(node.name) for node in frontier}
        for node in outputs:
            if node in behind or not is_inexact(node.meta.get("val")):
                continue
            self._points[node.name] = _Point(node.name)
            if packet_name(node.target) in _FINAL and isinstance(node.args[0], fx.Node):
                self._points.setdefault(node.args[0].name, _Point(node.name))
        self._counted = {node.name: [0, 0] for node in outputs if node.name not in self._points}
        self._top1: dict[str, TopOne] = {}
        self._refusal = ""
        self.largest = Peak(0.0, "")
        self.compared = frozenset(self._points)
        self.watch = self.compared | frozenset(node.name for node in outputs)

    def add(self, probe: Probe, reference: dict[str, Any]) -> None:
        """Run the folded network on a probe and compare with the training graph's watched values."""
        runner = _Capture(self._schedule, self.watch)
        try:
            runner.run(*probe.inputs)
        except Exception as error:  # whatever an operator raises, the folded network does not run where it should
            self._refusal = self._refusal or f"{first_line(error)} (probe '{probe.name}')"
            return
        self.largest = max(self.largest, runner.largest, key=lambda peak: peak.value)
        for name, found in runner.captured.items():
            wanted = reference.get(name)
            if name in self._points and is_inexact(wanted):
                self._compare(name, found, wanted)
            elif name in self._counted and isinstance(wanted, Tensor):
                self._counted[name][0] += int(_equal(found, wanted).sum())
                self._counted[name][1] += wanted.numel()

    def _compare(self, name: str, found: Tensor, wanted: Tensor) -> None:
        point = self._points[name]
        point.errors.append(_largest_difference(found, wanted))
        finite = torch.where(wanted.isfinite(), wanted, 0.0)
        point.peaks.append(float(finite.abs().amax()) if wanted.numel() else 0.0)
        rows = finite.reshape(len(finite), -1) if finite.dim() else finite.reshape(1, 1)
        point.prints.append(rows[:, :: max(1, rows.shape[1] // 4096)].clone())
        scores = wanted.dim() == 2 and wanted.shape[1] > 1 and wanted.is_floating_point()
        if scores and point.group == name and found.shape == wanted.shape:
            self._top1[name] = _joined(self._top1.get(name), top_one(wanted, found))

    def result(self, noise: float | None = None, moved: dict[str, float] | None = None) -> EndToEnd:
        """noise: the training graph's own float32 noise; a network that magnifies rounding is allowed as much more.

        moved: how far one roundoff at every operator moves the training graph's values (`sensitivity`), where that was
        measured; a network that it moves by a thousandth of the peak cannot be judged by its outputs.
        """
        points = {name: point for name, point in self._points.items() if point.errors}
        own = max((value / _peak(points[name]) for name, value in (moved or {}).items() if name in points), default=0.0)
        bound = max(TOLERANCE, NOISE_DIGITS * (noise or 0.0), MAGNIFIED * own)
        errors = {name: _relative(point) for name, point in points.items()}
        worst = max(errors, key=errors.__getitem__, default="")
        spread: dict[str, float] = {}
        for point in self._points.values():
            spread[point.group] = max(spread.get(point.group, 0.0), _spread(point))
        blind = [group for group, value in spread.items() if value < INFORMATIVE or bound > BLIND]
        agreement = {name: equal / total for name, (equal, total) in self._counted.items() if total}
        return EndToEnd(errors.get(worst, 0.0), bound, worst, blind, agreement, self._top1, self._refusal)


class _Capture(Runner):
    """A run of the folded network that keeps the training values of some names."""

    def __init__(self, schedule: Schedule, names: frozenset[str]) -> None:
        super().__init__(schedule.program.module)
        self.captured: dict[str, Tensor] = {}
        self.largest, self._labels = Peak(0.0, ""), schedule.program.labels
        self._wanted: dict[str, tuple[str, Record]] = {}
        for node, records in schedule.records.items():
            for record in records:
                known = self._wanted.get(record.value)
                complete = record.is_whole and record.usable is None
                if record.value in names and complete and (known is None or not is_identity(known[1])):
                    self._wanted[record.value] = (node, record)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op.startswith("call") and is_inexact(result) and result.numel():
            self.largest = self.largest.or_larger(result, self._labels.get(n.name, n.name))
        for value, (node, record) in self._wanted.items():
            if node == n.name and isinstance(result, Tensor):
                exact = is_identity(record) or not is_inexact(result)
                self.captured[value] = result if exact else record.scale * result + record.shift
        return result


def beyond_jumps(graph: fx.Graph) -> tuple[set[fx.Node], list[fx.Node]]:
    """(nodes behind an operator that jumps, the real inputs of the first such operators).

    An operator jumps when its name says so, or when it makes integers or booleans of real numbers.
    """
    behind: set[fx.Node] = set()
    frontier: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if any(source in behind for source in node.all_input_nodes):
            behind.add(node)
        elif _jumps(node):
            behind.add(node)
            sources = node.all_input_nodes
            if node.target is operator.getitem:
                sources = sources[0].all_input_nodes
            frontier.update((source, None) for source in sources if is_inexact(source.meta.get("val")))
    return behind, list(frontier)


def _jumps(node: fx.Node) -> bool:
    name = packet_name(node.target)
    if name in _JUMPS or node.kwargs.get("rounding_mode"):
        return True
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or is_inexact(value) or name.startswith(_SHAPE_ONLY):
        return False
    return any(_holds_real(source.meta.get("val")) for source in node.all_input_nodes)


def _holds_real(value: Any) -> bool:
    return any(map(is_inexact, value)) if isinstance(value, tuple | list) else is_inexact(value)


def top_one(reference: Tensor, found: Tensor) -> TopOne:
    """Top-1 agreement of scores ``[N, K]``: a sample counts when ``best − second > 2·max |found − reference|``."""
    best = reference.topk(2, dim=1).values
    margin = best[:, 0] - best[:, 1]
    clear = margin > 2 * (found - reference).abs().amax(1)
    agree = int((reference.argmax(1) == found.argmax(1))[clear].sum())
    ties = [(index, float(margin[index])) for index in torch.nonzero(~clear).flatten().tolist()]
    return TopOne(agree, int(clear.sum()), len(reference), ties[:MAX_TIES])


def _joined(first: TopOne | None, second: TopOne) -> TopOne:
    """Both counts; samples are numbered through."""
    if first is None:
        return second
    ties = first.ties + [(index + first.samples, margin) for index, margin in second.ties]
    return TopOne(
        first.agree + second.agree, first.judged + second.judged, first.samples + second.samples, ties[:MAX_TIES]
    )


def _equal(found: Any, wanted: Tensor) -> Tensor:
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return torch.zeros(wanted.shape, dtype=torch.bool)
    return torch.isclose(found, wanted, rtol=1e-6, atol=0.0, equal_nan=True) if is_inexact(wanted) else found == wanted


def _largest_difference(found: Tensor, wanted: Tensor) -> float:
    """Infinite for another shape or what is not a number; equal infinities do not differ."""
    if found.shape != wanted.shape:
        return math.inf
    difference = torch.where(found == wanted, 0.0, found - wanted).abs()
    return float(torch.where(difference.isnan(), math.inf, difference).amax()) if difference.numel() else 0.0


def _relative(point: _Point) -> float:
    """Largest error over the largest peak of all probes."""
    return max(point.errors) / _peak(point)


def _peak(point: _Point) -> float:
    """The largest of all probes, the unit of its errors; 1 where the reference is 0 throughout."""
    return max(point.peaks) or 1.0


def _spread(point: _Point) -> float:
    """Largest difference between the first sample and any other, over the peak; samples of one shape only."""
    rows = [row for block in point.prints for row in block if row.shape == point.prints[0].shape[1:]]
    if len(rows) < 2:
        return 0.0
    return max(float((row - rows[0]).abs().amax()) for row in rows[1:]) / _peak(point)

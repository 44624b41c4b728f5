"""Where an artifact that failed its proof goes wrong first, by the user's module name.

Values inside the artifact are compared with those of the exported module run in float64 on the same input. A value v of peak
p = max|v| diverges where

    max|y − v| / p  >  max(64 · n, 1e-6),      n = RMS((v_t − v) / p),

v_t the module's own value in the artifact's number type t. The place is the first value that diverges while all that it is
computed from pass by the rule of outputs (``FAIL_ABOVE`` times the noise of the largest of N values), found by search over a
few values at a time: O(log n) runs for n values, and never more than ``AT_ONCE`` of them held, whatever the network's size.
"""

from __future__ import annotations

import copy
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from foldexport.exporters.inner import Inner, Operator
from foldexport.interpret import cast
from foldexport.precision.half import with_type
from foldexport.precision.types import HALF, NumberType, to_digits
from foldexport.precision.walk import walk
from foldexport.verify import FAIL_ABOVE, NOISE_FLOOR, output_error
from foldexport.verify.alignment import align, module_operators, traced

AT_ONCE = 8  # inner values in one run of the artifact
NOISES = 64.0  # times the module's own noise at a value
FLOOR = 1e-6  # of the value's peak
REFINEMENTS = 8  # searches in a branch that turned out to be where the error comes from


@dataclass(frozen=True)
class Judged:
    """One inner value: its error, what is allowed and what is above suspicion (all of its peak), its peak."""

    error: float = 0.0
    allowed: float = 0.0
    peak: float = 0.0
    clean: float = 0.0
    incomparable: bool = False

    @property
    def wrong(self) -> bool:
        return not self.incomparable and not self.error <= self.allowed

    @property
    def suspect(self) -> bool:
        """Of a value that one which diverges is computed from."""
        return not self.incomparable and not self.error <= self.clean


@dataclass(frozen=True)
class Place:
    """Where an artifact differs first.

    layer: the user's name of it. operator: its kind, empty where the layer's name says it. weights: of the layer.
    reduced: the layer works in the half type. runs: of the artifact.
    """

    layer: str
    operator: str
    judged: Judged
    weights: tuple[str, ...] = ()
    reduced: bool = False
    runs: int = 0


def clause(
    exporter: Any, path: Path, module: nn.Module, inputs: Sequence[Any], *,
    unit: str = "float32", dtype: torch.dtype = torch.float32, missing: Sequence[str] = (),
) -> str:  # fmt: skip
    """In words, where the artifact at ``path`` goes wrong on ``inputs``, and what helps; never raises.

    module: as it was exported. unit, dtype: the number type of the artifact, and of what it is fed. missing: the weights that
    are not in it bit for bit. Empty where the exporter cannot show inner values.
    """
    if not hasattr(exporter, "inner"):
        return ""
    try:
        place = locate(exporter.inner(path), module, inputs, kind=HALF.get(unit), dtype=dtype)
    except Exception as error:  # the artifact is broken in ways nobody foresaw: its failure stands, and must be told
        lines = str(error).strip().splitlines()
        return f"the place was not found ({(lines[0] if lines else type(error).__name__)[:200]})"
    if place is None and missing:
        layers = ", ".join(f"`{layer}`" for layer in list(dict.fromkeys(name.rpartition(".")[0] or name for name in missing))[:3])
        return f"of {layers}, though no inner value shows it"
    return described(place, HALF.get(unit), missing) if place is not None else "no inner value stands out: rounding adds up"


def failing(
    exporter: Any, path: Path, runs: Sequence[tuple[Sequence[Any], Sequence[Tensor]]], levels: Sequence[float], dtype: torch.dtype
) -> int | None:
    """The first of the runs (inputs, the training graph's outputs) on which the artifact is too far off; never raises.

    None where none is: its weights differ, and no output shows it. A run that the artifact does not survive is one.
    """
    loaded = None
    for place, (inputs, wanted) in enumerate(runs):
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        arrays = [(value.to(dtype) if value.is_floating_point() else value).numpy(force=True) for value in tensors]
        try:
            loaded = loaded or exporter.load(path)
            outputs = loaded(*arrays)
            for output, reference, level in zip(outputs, wanted, levels, strict=True):
                if np.shape(output) != tuple(reference.shape):
                    return place
                if reference.is_floating_point():
                    if output_error(np.asarray(output), reference.numpy(force=True), max(NOISE_FLOOR, level))[1] > FAIL_ABOVE:
                        return place
                elif not np.array_equal(output, reference.numpy(force=True)):
                    return place
        except Exception:  # it does not run, which the comparison has said already
            return place
    return None


def locate(
    artifact: Inner, module: nn.Module, inputs: Sequence[Any], *, kind: NumberType | None = None, dtype: torch.dtype = torch.float32
) -> Place | None:
    """The first value of the artifact that differs from the module's; None where none does.

    inputs: one probe. kind: the half type of the artifact, None for float32. Raises ValueError where the two graphs have no
    value in common.
    """
    graph = traced(module)
    mine = module_operators(graph)
    found = align(mine, artifact)
    nodes = {node.name: node for node in graph.graph.nodes}
    made = {operator.output: operator for operator in mine.operators}
    order = [operator.output for operator in mine.operators if operator.output in found]
    if not order:
        raise ValueError("no value inside the file is known by name")
    search = _Search(artifact, _Values(graph, kind), found, tuple(inputs), dtype)
    ends = [name for name in dict.fromkeys(mine.outputs) if name in found and name in made]
    wrong = next((name for name in ends if search.judge([name])[name].wrong), None)
    if wrong is None:  # an error may die out on its way to the outputs
        picks = search.judge([order[at] for at in _spread(len(order), AT_ONCE)])
        wrong = next((name for name, judged in picks.items() if judged.wrong), None)
    if wrong is None:
        return None
    before = _ancestors(mine, found)
    for _ in range(REFINEMENTS):
        reached = _closure(wrong, before)
        wrong = _first([name for name in order if name in reached], wrong, search.judge)
        sources = [name for name in before[wrong] if name in made]
        judged: dict[str, Judged] = {}
        for at in range(0, len(sources), AT_ONCE):
            judged |= search.judge(sources[at : at + AT_ONCE])
        bad = next((name for name in order if name in judged and judged[name].suspect), None)
        if bad is None:
            break
        wrong = bad
    node, operator = nodes[wrong], made[wrong]
    reduced = kind is not None and node.meta.get("works_in", kind.dtype) == kind.dtype
    kindly = "" if node.op == "call_module" else operator.kind
    return Place(layer_of(node, operator), kindly, search.judged[wrong], operator.weights, reduced, search.runs)


def layer_of(node: fx.Node, operator: Operator) -> str:
    """What an operator is called: its layer where that has weights, else the user's module, else itself.

    ``--keep-fp32`` takes these names (foldexport.precision.kept).
    """
    layer = str(node.target) if node.op == "call_module" else ""
    return layer if operator.weights and layer else (node.meta.get("module") or layer or node.name)


def described(place: Place, kind: NumberType | None, missing: Sequence[str] = ()) -> str:
    """The place, the size of the error, and what helps."""
    operator = f" ({place.operator})" if place.operator and place.operator != place.layer else ""
    judged = place.judged
    size = f"max error {judged.error:.1e} of its peak" if math.isfinite(judged.error) else "not finite"
    size = size if judged.peak else "another shape"
    text = f"first differs in `{place.layer}`{operator} ({size})"
    weights = [name for name in place.weights if name in missing]
    if weights:
        names = " and ".join(f"`{name}`" for name in weights)
        return f"{text}: its weight{'s' if len(weights) > 1 else ''} {names} differ{'' if len(weights) > 1 else 's'}"
    if kind is not None and place.reduced and not missing:  # whose names the message has already
        beyond = f", its largest value {judged.peak:.1e} is beyond {kind.name}'s {kind.largest:g}"
        beyond = beyond if judged.peak > kind.largest else ""
        return f"{text}{beyond}: keep it in float32 with --keep-fp32 {shlex.quote(place.layer)}"
    return text


class _Search:
    """Judges values of the artifact, a few in one run, each once."""

    def __init__(self, artifact: Inner, values: _Values, names: dict[str, str], inputs: tuple, dtype: torch.dtype) -> None:
        self.artifact, self.values, self.names, self.inputs = artifact, values, names, inputs
        self.judged: dict[str, Judged] = {}
        self.runs = 0
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        self.arrays = [(value.to(dtype) if value.is_floating_point() else value).numpy(force=True) for value in tensors]

    def judge(self, points: Sequence[str]) -> dict[str, Judged]:
        """Judgements of at most ``AT_ONCE`` values."""
        new = [point for point in points if point not in self.judged]
        if new:
            self.runs += 1
            results = self.artifact.run([self.names[point] for point in new], self.arrays)
            exact, low = self.values.exact(self.inputs, new), self.values.low(self.inputs, new)
            for point, result in zip(new, results, strict=True):
                self.judged[point] = _judged(np.asarray(result), exact.get(point), low.get(point))
        return {point: self.judged[point] for point in points}


def _judged(result: np.ndarray, exact: Any, low: Any) -> Judged:
    if not isinstance(exact, Tensor) or not exact.is_floating_point() or not exact.numel() or not bool(exact.isfinite().all()):
        return Judged(incomparable=True)
    if tuple(result.shape) != tuple(exact.shape):
        return Judged(incomparable=result.size == exact.numel(), error=math.inf)
    wanted = exact.numpy(force=True)
    peak = float(np.abs(wanted).max()) or 1.0
    noise = (low.double() - exact) / peak
    rms = float(noise.square().mean().sqrt()) if bool(noise.isfinite().all()) else 0.0
    error = np.abs(result.astype(np.float64) - wanted).max() / peak
    clean = min(NOISES, FAIL_ABOVE * max(1.0, math.sqrt(2.0 * math.log(exact.numel())))) * rms
    clean = max(clean, FLOOR)
    return Judged(float(error) if np.isfinite(error) else math.inf, max(NOISES * rms, FLOOR), peak, clean)


def _first(order: Sequence[str], wrong: str, judge: Callable[[Sequence[str]], dict[str, Judged]]) -> str:
    """The first wrong value up to ``wrong``, which is one; a right value counts for all before it."""
    open_ = list(order[: order.index(wrong)])
    while open_:
        picks = [open_[at] for at in _spread(len(open_), AT_ONCE)]
        judged = judge(picks)
        bad = next((pick for pick in picks if judged[pick].wrong), None)
        end = open_.index(bad) if bad is not None else len(open_)
        right = [open_.index(pick) for pick in picks if open_.index(pick) < end and not judged[pick].incomparable]
        skipped = {pick for pick in picks if judged[pick].incomparable}
        open_ = [name for name in open_[max(right, default=-1) + 1 : end] if name not in skipped]
        wrong = bad or wrong
    return wrong


def _spread(count: int, most: int) -> list[int]:
    """Places that cut ``count`` values into equal parts."""
    return list(range(count)) if count <= most else [(count * (each + 1)) // (most + 1) for each in range(most)]


def _ancestors(module: Inner, found: dict[str, str]) -> dict[str, list[str]]:
    """Per value the nearest values behind it that the artifact has too."""
    near: dict[str, list[str]] = {name: [] for name in module.inputs}
    for operator in module.operators:
        reached = [each for name in operator.inputs for each in ([name] if name in found else near.get(name, []))]
        near[operator.output] = list(dict.fromkeys(reached))
    return near


def _closure(name: str, before: dict[str, list[str]]) -> set[str]:
    reached, waiting = set(), [name]
    while waiting:
        each = waiting.pop()
        if each not in reached:
            reached.add(each)
            waiting += before.get(each, [])
    return reached


class _Values:
    """The module's own values: in float64 with its weights as they are, and in the artifact's number type."""

    def __init__(self, module: fx.GraphModule, kind: NumberType | None) -> None:
        self._kind = kind
        self._double = _in(module, torch.float64)
        self._single = _in(module, torch.float32) if kind is None else None

    def exact(self, inputs: tuple, keep: Sequence[str]) -> dict[str, Any]:
        return _kept(self._double, inputs, torch.float64, keep)

    def low(self, inputs: tuple, keep: Sequence[str]) -> dict[str, Any]:
        if self._single is not None:
            return _kept(self._single, inputs, torch.float32, keep)
        return _kept(self._double, inputs, torch.float64, keep, self._rounded)

    def _rounded(self, node: fx.Node, value: Any) -> Any:
        """Rounded to the type's digits, in float64's range: the noise of a layer that overflows is not infinite."""
        if node.meta.get("works_in", self._kind.dtype) != self._kind.dtype:
            return value
        return pytree.tree_map(self._cut, value)

    def _cut(self, value: Any) -> Any:
        real = isinstance(value, Tensor) and value.is_floating_point()
        return to_digits(value.float(), self._kind).double() if real else value


def _kept(module: fx.GraphModule, inputs: tuple, dtype: torch.dtype, keep: Sequence[str], change: Any = None) -> dict[str, Any]:
    with torch.no_grad():
        return {node.name: value for node, value in walk(module, inputs, dtype, change) if node.name in keep}


def _in(module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """A copy with every real tensor, and every cast to a real type, in ``dtype``."""
    result = copy.deepcopy(module)
    result._apply(lambda tensor: cast(tensor, dtype))
    for node in result.graph.nodes:
        if node.op in ("call_function", "call_method"):
            node.args, node.kwargs = with_type(node, dtype)
    return result.eval()

"""Where an artifact that failed its proof goes wrong first, by the user's module name.

Values inside the artifact are compared with those of the exported module run in float64 on the same input. A value v of peak
p = max|v| diverges where

    max|y − v| / p  >  max(64 · n, 1e-6),      n = RMS((v_t − v) / p),

v_t the module's own value in the artifact's number type t. The place is the first value that diverges while all that it is
computed from pass by the rule of outputs (``FAIL_ABOVE`` times the noise of the largest of N values), found by search over a
few values at a time: O(log n) runs for n values, and never more than ``AT_ONCE`` of them held, whatever the network's size.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from foldexport.exporters.graph_inner import module_operators
from foldexport.exporters.inner import Inner, Operator
from foldexport.precision.types import HALF, NumberType
from foldexport.verify import FAIL_ABOVE, NOISE_FLOOR, output_error
from foldexport.verify.alignment import align, traced
from foldexport.verify.judgement import NOISES, Judged, Values, forms, judgement
from foldexport.verify.naming import named

AT_ONCE = 8  # inner values in one run of the artifact
DEEP = 8  # layers with weights, from which on outputs may hide what is wrong in the first one
SURE = re.compile("conv|linear|addmm", re.IGNORECASE)  # layers that a format has as one operator, found by their weights
HIDDEN = 1e-5  # of its peak: a value of a file that passes, whatever its noise
MANY = 32  # inner values in one run of a file whose samples are small
SMALL = 3 * 256 * 256  # input elements of such a sample
REFINEMENTS = 8  # searches in a branch that turned out to be where the error comes from


@dataclass(frozen=True)
class Place:
    """Where an artifact differs first.

    layer: the user's name of it. operator: its kind, empty where the layer's name says it. weights: of the layer.
    reduced: the layer works in the half type. runs: of the artifact. last: of several layers whose values before the last are
    nowhere in the artifact, that one.
    """

    layer: str
    operator: str
    judged: Judged
    weights: tuple[str, ...] = ()
    reduced: bool = False
    runs: int = 0
    last: str = ""


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
    return described(place, HALF.get(unit), missing) if place is not None else "no inner value stands out"


def hidden(exporter: Any, path: Path, module: nn.Module, inputs: Sequence[Any], dtype: torch.dtype = torch.float32) -> str:
    """In words, where an artifact whose outputs pass is wrong inside; empty where it is not, or is not looked into. Never raises.

    Weights are compared bit by bit, and outputs of shallow networks show the rest: a clamp's bound, a stride, an operator. In deep
    ones an error of the first layer may die out. A value counts as wrong beyond 64 times its own noise, the largest too, where
    something that is computed from it is wrong as well, and among what is wrong is a convolution or linear layer that reads a wrong
    value: these are found by their weights, while half of a clamp in two operators may be taken for all of it.
    """
    if not hasattr(exporter, "inner") or sum(each.numel() for each in inputs if isinstance(each, Tensor)) > SMALL:
        return ""
    try:
        graph = traced(module)
        mine = module_operators(graph)
        if sum(bool(operator.weights) for operator in mine.operators) < DEEP:
            return ""
        tensors = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
        artifact = named(exporter.inner(path), mine, dict(tensors))
        found = align(mine, artifact)
        order = [operator.output for operator in mine.operators if operator.output in found]
        search = _Search(artifact, Values(graph, None), found, tuple(inputs), dtype)
        for at in range(0, len(order), MANY):
            search.judge(order[at : at + MANY])
        wrong = {name for name in order if _beyond_doubt(search.judged[name])}
        made, before = {operator.output: operator for operator in mine.operators}, _ancestors(mine, found)
        read = {each for name in order if name in wrong for each in before[name]}
        certain = any(SURE.search(made[name].kind) and made[name].weights and wrong & set(before[name]) for name in wrong)
        first = next((name for name in order if certain and name in wrong and name in read), None)
        if first is None:
            return ""
        node = next(node for node in graph.graph.nodes if node.name == first)
        kindly = "" if node.op == "call_module" else made[first].kind
        return described(Place(layer_of(node, made[first]), kindly, search.judged[first]), None)
    except Exception:  # what is looked at here is beyond what the file has to show
        return ""


def _beyond_doubt(judged: Judged) -> bool:
    return judged.wrong and judged.peak > 0 and judged.error > max(HIDDEN, NOISES * judged.noise) and math.isfinite(judged.error)


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
    tensors = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    artifact = named(artifact, mine, dict(tensors))
    found = align(mine, artifact)
    nodes = {node.name: node for node in graph.graph.nodes}
    made = {operator.output: operator for operator in mine.operators}
    order = [operator.output for operator in mine.operators if operator.output in found]
    if not order:
        raise ValueError("no value inside the file is known by name")
    search = _Search(artifact, Values(graph, kind), found, tuple(inputs), dtype)
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
    several = _unseen(wrong, made, found)
    node, operator = nodes[several[0].output], several[0]
    reduced = kind is not None and node.meta.get("works_in", kind.dtype) == kind.dtype
    kindly = "" if node.op == "call_module" else operator.kind
    layer, last = layer_of(node, operator), layer_of(nodes[wrong], made[wrong])
    weights = tuple(name for each in several for name in each.weights)
    return Place(layer, kindly, search.judged[wrong], weights, reduced, search.runs, last if last != layer else "")


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
    weights = [name for name in place.weights if name in missing]
    if weights:
        names = " and ".join(f"`{name}`" for name in weights)
        layer = weights[0].rpartition(".")[0] if place.last else place.layer
        verb = "differ" if len(weights) > 1 else "differs"
        operator = "" if place.last else operator  # which is the first one's
        return f"first differs in `{layer}`{operator} ({size}): its weight{'s' if len(weights) > 1 else ''} {names} {verb}"
    end = f" to `{place.last}`" if place.last else ""
    text = f"first differs in `{place.layer}`{operator}{end} ({size})"
    if kind is not None and place.reduced and not missing:  # whose names the message has already
        beyond = f", its largest value {judged.peak:.1e} is beyond {kind.name}'s {kind.largest:g}"
        beyond = beyond if judged.peak > kind.largest else ""
        return f"{text}{beyond}: keep it in float32 with --keep-fp32 {shlex.quote(place.layer)}"
    return text


class _Search:
    """Judges values of the artifact, a few in one run, each once."""

    def __init__(self, artifact: Inner, values: Values, names: dict[str, str], inputs: tuple, dtype: torch.dtype) -> None:
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
                seen = forms(np.asarray(result), self.artifact.channels_last)
                self.judged[point] = judgement(seen, exact.get(point), low.get(point))
        return {point: self.judged[point] for point in points}


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


def _unseen(name: str, made: dict[str, Operator], found: dict[str, str]) -> list[Operator]:
    """The operators between a value and the nearest behind it that the artifact has too, in order; its own is the last."""
    between, waiting = {name}, list(made[name].inputs)
    while waiting:
        each = waiting.pop()
        if each in made and each not in found and each not in between:
            between.add(each)
            waiting += made[each].inputs
    return [operator for operator in made.values() if operator.output in between]


def _closure(name: str, before: dict[str, list[str]]) -> set[str]:
    reached, waiting = set(), [name]
    while waiting:
        each = waiting.pop()
        if each not in reached:
            reached.add(each)
            waiting += before.get(each, [])
    return reached

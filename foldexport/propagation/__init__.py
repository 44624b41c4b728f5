"""Signal propagation: the variance of activations and gradients along a network and along what it folds to.

At each point (:mod:`foldexport.propagation.points`), over samples, channels and positions,

    Var[v]              the value of the training graph
    Var[∂L/∂v]          its gradient, L = Σ ⟨u, output⟩ with u of independent elements of mean 0 and variance 1
    Var[s], Var[∂L/∂s]  what the folded network stores there instead: v = a ⊙ s + t, so ∂L/∂s = a ⊙ ∂L/∂v
    |a|, |t|            the pending affine: the median over channels, of the scale also the smallest and the largest

These are the plots of Civitelli et al. 2021 (arXiv 2112.12299, figure 2), after Brock et al. 2021 (arXiv 2101.08692,
section 3). A gradient that comes in with unit variance makes the curves comparable between networks and needs no labels; where
the logits are small, cross entropy with random labels gives the same curve but for a factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from foldexport import probes
from foldexport.errors import FoldexportError
from foldexport.fold.passes import fold_graph
from foldexport.fold.rebuild import Program, Record, rebuild
from foldexport.fold.wishes import MAX_SIGMA
from foldexport.propagation.points import LAYER, SUM, points
from foldexport.propagation.run import Moments, Network
from foldexport.trace import Graph

__all__ = ["LAYER", "SUM", "Pending", "Propagation", "Signal", "measure", "points", "program_of"]

SAMPLES = 32
LARGE_SAMPLES = 8  # where a sample is larger than `probes.SMALL_SAMPLE`


@dataclass(frozen=True)
class Signal:
    """Variance of the value and of its gradient, one per point; NaN where a network has none."""

    activation: list[float]
    gradient: list[float]


@dataclass(frozen=True)
class Pending:
    """The pending affine of a point over its channels; NaN where the folded network does not hold the value.

    scale, shift: medians of |a| and |t|. smallest, largest: of |a|.
    """

    scale: float = math.nan
    shift: float = math.nan
    smallest: float = math.nan
    largest: float = math.nan


@dataclass(frozen=True)
class Propagation:
    """What :func:`measure` found.

    kind: what a point is, `SUM` or `LAYER`.        names: of the points, the user's own, in the order of execution.
    training, folded: of the two networks; folded and pending are None where only the training graph was measured.
    samples: how many inputs.
    """

    kind: str
    names: list[str]
    samples: int
    training: Signal
    folded: Signal | None = None
    pending: list[Pending] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not known is None."""
        return _known(asdict(self))


def measure(
    graph: Graph, program: Program | None = None, *, data: Sequence | None = None, seed: int = 0
) -> Propagation:
    """Both networks forwards and backwards in float64 on the same inputs.

    data: the user's own inputs, one array per input with the batch first, of which 32 samples are taken; otherwise 32 normal
    samples (8 of large inputs) are drawn from ``seed``. Without a program only the training graph is measured.

    Raises UsageError for data that does not match the inputs.
    """
    kind, places = points(graph)
    values = [place.value.name for place in places]
    records = _records(program) if program is not None else {}
    stored = [records[name][0] if name in records else "" for name in values]
    training = Network.training(graph)
    folded = Network.folded(program) if program is not None else None
    at_training, at_folded = _Tally(values), _Tally(stored)
    samples = 0
    for place, probe in enumerate(_inputs(graph, data, seed)):
        samples += probe.samples
        at_training.add(training, probe.inputs, seed + place)
        if folded is not None:
            at_folded.add(folded, probe.inputs, seed + place)
    names = [place.name for place in places]
    if folded is None:
        return Propagation(kind, names, samples, at_training.signal())
    pending = [_pending(records[name][1]) if name in records else Pending() for name in values]
    return Propagation(kind, names, samples, at_training.signal(), at_folded.signal(), pending)


def program_of(graph: Graph, operators: Mapping[str, int]) -> Program:
    """The folded network with these operator counts, in float64, together with what it stores of each value.

    `foldexport.fold` keeps the fold that grows no operator and adds no noise; the counts say which of its attempts that was.
    Raises FoldexportError where none has them.
    """
    for max_sigma in (MAX_SIGMA, 0.0):
        first = fold_graph(graph, max_sigma)
        for stay in (None, first.undone, frozenset(graph.fx.nodes)):
            rebuilt = rebuild(first if stay is None else fold_graph(graph, max_sigma, stay))
            if rebuilt.counts == dict(operators):
                return rebuilt.program
    raise FoldexportError(f"no fold of the network has the operators {dict(operators)}")


class _Tally:
    """Moments of values and gradients at some nodes of one network, "" where it has none."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._values = {name: Moments() for name in names if name}
        self._gradients = {name: Moments() for name in names if name}

    def add(self, network: Network, inputs: Sequence[Any], seed: int) -> None:
        values, gradients = network.differentiate(inputs, frozenset(self._values), seed)
        for moments, found in ((self._values, values), (self._gradients, gradients)):
            for name, tensor in found.items():
                moments[name].add(tensor)

    def signal(self) -> Signal:
        none = Moments()
        return Signal(*(
            [moments.get(name, none).variance for name in self._names] for moments in (self._values, self._gradients)
        ))  # fmt: skip


def _records(program: Program) -> dict[str, tuple[str, Record]]:
    """Training value → the folded node that stores it, and how."""
    return {record.value: (node, record) for node, found in program.records.items() for record in found}


def _pending(record: Record) -> Pending:
    if record.usable is not None:
        return Pending()
    scale, shift = record.scale.abs(), record.shift.abs()
    return Pending(*(float(value) for value in (scale.median(), shift.median(), scale.min(), scale.max())))


def _inputs(graph: Graph, data: Sequence | None, seed: int) -> Iterator[probes.Probe]:
    """A few samples at a time: autograd keeps every activation of a run."""
    if data is not None:
        most = min(SAMPLES, *(len(array) for array in data))
        for start in range(0, most, probes.USER_SAMPLES):
            part = [array[start : min(most, start + probes.USER_SAMPLES)] for array in data]
            yield probes.make(graph, seed=seed, data=part)[-1]
        return
    drawn = 0
    wanted = LARGE_SAMPLES if _sample_elements(graph) > probes.SMALL_SAMPLE else SAMPLES
    while drawn < wanted:
        for probe in probes.noise_probes(graph, seed=seed + drawn):
            drawn += probe.samples
            yield probe


def _sample_elements(graph: Graph) -> int:
    first = next(value for value in graph.example if isinstance(value, torch.Tensor))
    return sum(value.numel() for value in graph.example) // max(1, first.shape[0] if first.dim() else 1)


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _known(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_known(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

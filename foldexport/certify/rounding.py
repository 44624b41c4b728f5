"""Float32 error of the folded network, in units of the training graph's own float32 error.

Exact algebra can still ruin float32: a shift β/γ absorbed upstream where γ is tiny adds a huge number and takes it off
again. In float64 such a fold is perfect, so rounding is measured on its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from foldexport.certify.endtoend import beyond_jumps
from foldexport.certify.lockstep import Lockstep, Runner, Schedule, is_inexact
from foldexport.interpret import cast, outputs

if TYPE_CHECKING:
    from foldexport.fold.rebuild import Program
    from foldexport.probes import Probe
    from foldexport.trace import Graph

WARN = 4.0  # multiples of the training graph's noise
REFUSE = 8.0
HOPELESS = 1000.0  # three digits of seven: no unlucky sample among forty explains it
MAX_BLAMED = 8
COPIED_BYTES = 2**29  # of float64 weights; a larger network is not copied, but cast layer by layer in every run

Run = Callable[[tuple], Sequence[Any]]


@dataclass(frozen=True)
class Multiple:
    """One network's error in low precision.

    error: largest difference over the probe's peak; multiple: the error in units of the training graph's own noise at
    the worst output, None when no output can be judged; see :func:`rounding`.
    """

    error: float
    multiple: float | None


@dataclass(frozen=True)
class Blame:
    """Where float32 hurts: an operator, its worst channel, and its error over the value's peak in units of 2^-24."""

    module: str
    operator: str
    value: str
    channel: int | None
    error_units: float


@dataclass(eq=False)
class Rounding:
    """What :func:`rounding` measured.

    levels: the training graph's noise in `dtype`, one number per output, a fraction of the peak; noise: the largest.
    multiples: the networks' errors in those units. worst: filled by :meth:`blame`.
    """

    dtype: str
    noise: float
    levels: list[float]
    samples: int
    multiples: dict[str, Multiple]
    worst: list[Blame] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """One line for each network above four times the noise, with the worst channel's name where it is known."""
        lines = []
        for name, found in self.multiples.items():
            if found.multiple is None or found.multiple <= WARN:
                continue
            worst = self.worst[0] if self.worst and name == "folded" else None
            channel = "" if worst is None or worst.channel is None else f" channel {worst.channel}"
            where = "" if worst is None else f"; worst: '{worst.module}'{channel}"
            lines.append(f"{name}: {found.multiple:.1f} times the network's own {self.dtype} noise{where}")
        return lines

    def blame(self, schedule: Schedule, probe: Probe) -> None:
        """Fill `worst` when the folded network is above the warning."""
        multiple = self.multiples["folded"].multiple
        if multiple is not None and not multiple <= WARN:
            self.worst = worst_conditioned(schedule, probe)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def rounding(
    graph: Graph,
    runs: dict[str, Run],
    probes: list[Probe],
    dtype: torch.dtype = torch.float32,
    known: Sequence[tuple[tuple, list]] = (),
    further: Iterable[Probe] = (),
    low: Run | None = None,
) -> Rounding:
    """Errors of the training graph and of other networks in ``dtype``, against the training graph in float64.

    With r the float64 reference of an output, ``e = (y − r) / max |r|`` on each probe, and both taken over all probes,

        n = max(RMS(e of the training graph), floor),    q(N) = max(1, √(2 ln N))  for N elements,
        multiple = max( RMS(e) / n,  max |e| / max(n·q(N), max |e| of the training graph) ),

    with a floor of half a unit in the last place (2^-24 for float32). q(N) is what the largest of N normal errors is
    expected to reach (Cramér 1946, §28.6), so that one bad channel among many counts in full. Outputs that are not real
    numbers, or that lie behind an operator that jumps, are left out.

    runs: name -> network, which takes a probe's inputs (floats in float64) and gives its outputs, flat, in order.
    probes: eight samples or more; those whose reference is not finite are left out. known: inputs, by identity, and the
    training graph's outputs on them in float64 where they have been computed already.
    further: probes drawn one by one while a network is above `WARN` but not hopeless. On networks with gates and few
    pixels one sample in ten can round ten times worse than the others, in whichever network happens to meet it: eight
    samples then say little.
    low: how the training graph runs in a half type; the floor then is an eighth of the type's epsilon, about the RMS error
    of an output that is rounded once.
    """
    behind, _ = beyond_jumps(graph.fx)
    leaves = pytree.tree_leaves(graph.fx.output_node().args[0])
    judged = [place for place, leaf in enumerate(leaves) if leaf not in behind and is_inexact(_meta(leaf))]
    own = {place: Errors() for place in judged}
    others = {name: {place: Errors() for place in judged} for name in runs}
    floor = torch.finfo(dtype).eps / (2 if low is None else 8)
    samples = 0
    for place, probe in enumerate(chain(probes, further)):
        if place >= len(probes) and not _undecided(others, own, _levels(own, len(leaves), floor)):
            break
        computed = [leaves for inputs, leaves in known if inputs is probe.inputs]
        wanted = computed[0] if computed else outputs(graph, probe.inputs, torch.float64)
        if not all(bool(wanted[place].isfinite().all()) for place in judged):
            continue
        samples += probe.samples
        found = outputs(graph, probe.inputs, dtype) if low is None else low(probe.inputs)
        for place in judged:
            own[place].add(wanted[place], found[place])
        for name, run in runs.items():
            found = run(probe.inputs)
            for place in judged:
                others[name][place].add(wanted[place], found[place])
    levels = _levels(own, len(leaves), floor)
    multiples = {name: _multiple(errors, own, levels) for name, errors in others.items()}
    return Rounding(str(dtype).split(".")[1], max(levels, default=floor), levels, samples, multiples)


@dataclass(eq=False)
class Errors:
    """Running RMS and maximum of ``(found − wanted) / max |wanted|``."""

    squares: float = 0.0
    count: int = 0
    largest: float = 0.0

    def add(self, wanted: Tensor, found: Any) -> None:
        """One output of one probe; what is not finite or of another shape counts as infinite."""
        if wanted.numel() == 0:
            return
        error = torch.full((), math.inf)
        if isinstance(found, Tensor) and found.shape == wanted.shape:
            error = (found.to(wanted.dtype) - wanted).abs() / (float(wanted.abs().max()) or 1.0)
            error = torch.where(error.isfinite(), error, math.inf)
        self.squares += float(error.square().sum())
        self.count += wanted.numel()
        self.largest = max(self.largest, float(error.max()))

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0


def _levels(own: dict[int, Errors], outputs: int, floor: float) -> list[float]:
    """The training graph's noise per output, never below the floor."""
    return [max(floor, own[place].rms) if place in own else floor for place in range(outputs)]


def _undecided(others: dict[str, dict[int, Errors]], own: dict[int, Errors], levels: list[float]) -> bool:
    """Whether a network is above the warning, by less than what only a ruined fold reaches."""
    return any(WARN < (_multiple(errors, own, levels).multiple or 0.0) < HOPELESS for errors in others.values())


def _multiple(errors: dict[int, Errors], own: dict[int, Errors], levels: list[float]) -> Multiple:
    ratios = []
    for place, found in errors.items():
        if found.count:
            expected = levels[place] * max(1.0, math.sqrt(2.0 * math.log(found.count)))
            ratios.append(max(found.rms / levels[place], found.largest / max(expected, own[place].largest)))
    return Multiple(max((found.largest for found in errors.values()), default=0.0), max(ratios, default=None))


def folded_in(program: Program, dtype: torch.dtype) -> Run:
    """The folded network, cast to ``dtype``, as a run."""
    narrow = narrowed(program.module, dtype)

    def run(inputs: tuple) -> list[Any]:
        given = [value.to(dtype) if is_inexact(value) and not value.is_complex() else value for value in inputs]
        return pytree.tree_leaves(narrow().run(*given))

    return run


@torch.no_grad()
def worst_conditioned(schedule: Schedule, probe: Probe) -> list[Blame]:
    """The operators that lose most in float32 on their own, worst first.

    Each folded operator reads the float32 rounding of its float64 references; its error, ``scale·(s32 − s64)``, is
    taken over the peak of the training value. What it reads counts, so a huge shift is blamed on its readers too.
    """
    runner = narrowed(schedule.program.module, torch.float32)()
    twins = {node.name: node for node in runner.module.graph.nodes}
    found = []
    for visit in Lockstep(schedule, probe.inputs):
        if visit.node.op in ("placeholder", "output") or not visit.records or not is_inexact(visit.computed):
            continue
        record = visit.records[-1]
        twin = twins[visit.node.name]
        inputs = {twins[source.name]: _single(value) for source, value in visit.references.items()}
        error = (record.scale * record.part(runner.run_on(twin, inputs).to(visit.computed.dtype) - visit.computed)).abs()
        peak = float(record.seen(visit.values[record.value]).abs().max()) or 1.0
        axis = 1 if error.dim() > 1 else None
        per_channel = error.transpose(0, axis).flatten(1).amax(1) if axis else error.amax().reshape(1)
        channel = int(per_channel.argmax())
        label = schedule.program.labels.get(visit.node.name) or visit.node.name
        units = float(per_channel[channel]) / peak * 2**24
        found.append(Blame(label, visit.node.name, record.value, channel if axis else None, units))
    return sorted(found, key=lambda blame: -blame.error_units)[:MAX_BLAMED]


class Narrow(Runner):
    """A run of a float64 network in another type, each layer's weights cast when it is called and dropped behind it."""

    def call_module(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        layer = self.fetch_attr(target)
        state = {name: cast(value, self.dtype) for name, value in (*layer.named_parameters(), *layer.named_buffers())}
        return torch.func.functional_call(layer, state, args, kwargs)

    def get_attr(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return cast(super().get_attr(target, args, kwargs), self.dtype)


def narrowed(module: fx.GraphModule, dtype: torch.dtype) -> Callable[[], Runner]:
    """Makes runs of a float64 network in ``dtype``: of one copy of it, or of itself where a copy would fill the memory."""
    if sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers())) > COPIED_BYTES:
        return lambda: Narrow(module, dtype)
    copied = _rounded(module, dtype)
    return lambda: Runner(copied, dtype)


def _rounded(module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """A copy with its real tensors in ``dtype``; the float64 ones are not copied on the way."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = cast(buffer, dtype).clone()
    return copy.deepcopy(module, memo)


def _single(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: cast(leaf, torch.float32) if isinstance(leaf, Tensor) else leaf, value)


def _meta(leaf: Any) -> Any:
    return leaf.meta.get("val") if hasattr(leaf, "meta") else None

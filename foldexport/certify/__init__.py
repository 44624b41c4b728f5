"""The proof that a fold changed nothing, in float64: every value of the training graph, then the outputs.

A comparison of outputs alone is blind: in a plain network of 60 layers with random statistics a mistake of +0.5 in the
first bias moves the output by 1e-16 of its peak. So the local certificate decides: each folded operator is fed the
training graph's own values and its result is compared, channel by channel, with what the training graph has there
(`local.py`). By induction over the folded graph the outputs are then equal too. The comparison from end to end
(`endtoend.py`) and the float32 rounding (`rounding.py`) come second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from foldexport.certify.agreement import disagreement
from foldexport.certify.endtoend import EndToEnd, EndToEndRun
from foldexport.certify.local import Finding, findings_on
from foldexport.certify.lockstep import Lockstep, Schedule, first_line, is_inexact
from foldexport.certify.rounding import Rounding, folded_in, rounding
from foldexport.certify.sensitivity import moved_by_rounding
from foldexport.certify.unvisited import failures_on, failures_revived, scaled
from foldexport.errors import EquivalenceError, UsageError
from foldexport.extremes import Peak
from foldexport.probes import first_sample

if TYPE_CHECKING:
    from foldexport.fold.rebuild import Program
    from foldexport.probes import Probe
    from foldexport.trace import Graph

@dataclass(eq=False)
class Certificate:
    """What was compared and how close it came.

    failures: every operator that does not give its value, in the order of the folded network; worst: the value that
        came closest to its bound, or exceeded it most.
    n_values, n_nodes: values of the training graph that were compared, and operators of the folded network that made
        them. silent: user's module -> channels that are 0 on every probe, whose readers were hardly tried.
    trace: why the training graph is not the user's module, empty where it is or was not compared.
    reduced: probes of huge inputs that were judged at smaller ones instead, see `foldexport.probes.HUGE_SAMPLE`.
    dropped: (probe, reason) of probes whose reference is not finite; skipped: of shapes that the network does not take.
    largest: the largest activation of the folded network on the probes.
    references: inputs of every probe, and the training graph's outputs on them in float64; artifacts are compared with
        the same numbers.
    """

    failures: list[Finding] = field(default_factory=list)
    worst: Finding | None = None
    n_values: int = 0
    n_nodes: int = 0
    probes: list[tuple[str, list[list[int]]]] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    reduced: list[str] = field(default_factory=list)
    end_to_end: EndToEnd | None = None
    rounding: Rounding | None = None
    trace: str = ""
    silent: dict[str, int] = field(default_factory=dict)
    revived: list[str] = field(default_factory=list)
    seconds: float = 0.0
    largest: Peak = Peak(0.0, "")
    references: list[tuple[tuple, list]] = field(default_factory=list, repr=False)

    @property
    def ok(self) -> bool:
        """The proof holds: some probe was usable, no operator differs, and the outputs agree."""
        outputs = self.end_to_end is None or self.end_to_end.ok
        return bool(self.probes) and not self.failures and not self.trace and outputs

    @property
    def noise32(self) -> float | None:
        """Float32 error of the training graph itself, as a fraction of the output's peak."""
        return None if self.rounding is None else self.rounding.noise

    @property
    def folded32(self) -> float | None:
        """Float32 error of the folded network in multiples of `noise32`."""
        return None if self.rounding is None else self.rounding.multiples["folded"].multiple

    @property
    def sizes(self) -> str:
        """What was proved at which size, where huge inputs made it less than everything; empty otherwise."""
        if not self.reduced:
            return ""
        shapes = {name: ", ".join("x".join(map(str, shape)) for shape in each) for name, each in self.probes}
        normal = f"normal at {shapes['normal']}, " if "normal" in shapes else ""
        return f"{normal}{' and '.join(self.reduced)} at {shapes[self.reduced[0]]}"

    def require(self) -> Certificate:
        """This certificate; raises :class:`EquivalenceError`, naming operators, when the proof does not hold."""
        if self.ok:
            return self
        if self.failures:
            more = {finding.module for finding in self.failures[1:]} - {self.failures[0].module}
            rest = f"\nso do {len(more)} more operators: {', '.join(sorted(more)[:5])}" if more else ""
            raise EquivalenceError(f"{self.failures[0]}{rest}")
        if not self.probes:
            names = "; ".join(f"{name}: {reason}" for name, reason in self.dropped)
            raise EquivalenceError(f"no probe can be judged ({names}): give inputs that the network is made for")
        raise EquivalenceError(self.trace or self.end_to_end.explain())

    def summary(self) -> str:
        """One line for the console."""
        if not self.ok:
            return f"not proved: {self.failures[0] if self.failures else 'see the report'}"
        parts = [f"{self.n_values} values in {self.n_nodes} operators equal on {len(self.probes)} probes"]
        parts += [self.sizes] if self.sizes else []
        parts += [f"outputs within {self.end_to_end.error:.1e} of peak"] if self.end_to_end else []
        if self.end_to_end is not None and not self.end_to_end.informative:
            parts.append("which says little here: the outputs hardly depend on the input")
        parts += [f"{self.folded32:.1f}× float32 noise"] if self.folded32 is not None else []
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite become strings."""
        record = {
            "ok": self.ok,
            "worst": None if self.worst is None else {**asdict(self.worst), "ratio": self.worst.ratio},
            "failures": [asdict(finding) for finding in self.failures],
            "n_values": self.n_values,
            "n_nodes": self.n_nodes,
            "probes": [{"name": name, "shapes": shapes} for name, shapes in self.probes],
            "reduced": self.reduced,
            "dropped": [{"name": name, "reason": reason} for name, reason in self.dropped],
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "end_to_end": None if self.end_to_end is None else self.end_to_end.to_dict(),
            "rounding": None if self.rounding is None else self.rounding.to_dict(),
            "trace": self.trace,
            "silent": self.silent,
            "revived": self.revived,
            "seconds": self.seconds,
        }
        return _json(record)


@torch.no_grad()
def certify(
    graph: Graph,
    program: Program,
    probes: list[Probe],
    *,
    noise_probes: list[Probe] | None = None,
    further_noise: Iterable[Probe] = (),
    module: nn.Module | None = None,
    progress: Callable[[str], None] | None = None,
) -> Certificate:
    """Compare the folded network with its training graph, value by value, in float64.

    For every record ``v = scale ⊙ s + shift`` of every folded operator, and every channel c,

        max_c |scale·s + shift − v| ≤ TOLERANCE · max(max_c |v|, CHANNEL_FLOOR · max |v|),

    with s computed from the training graph's own values in stored form. A channel near this bound or above is looked at
    again and allowed what float64 itself rounds, at most 6e-14 of the terms that really enter
    (:func:`foldexport.certify.local.recovery_rounding`, :func:`foldexport.certify.local.operator_rounding`). Channels run
    along the one axis that the record varies on, else along axis 1, or the last one for linear layers and layer norms. Integers and
    booleans must be equal where their operator read exact bits.

    noise_probes: normal samples for the float32 rounding (`probes.noise_probes`); without them, and for a fold that is
    wrong, it is not measured. further_noise: more of them, drawn while the folded network is above the warning.
    module: the user's own module; its trace is then compared with it too (`agreement.py`).
    progress: called with the name of each step as it begins.

    Returns a certificate that may not hold; `Certificate.require` raises. Raises what the training graph raises on a
    probe that is not optional, :class:`FoldexportError` when program and graph do not fit together.
    """
    began = time.perf_counter()
    tell = progress or (lambda step: None)
    proof = _Proof(graph, program, module)
    for probe in probes:
        tell(f"probe {probe.name}")
        if not proof.judge(probe) and probe.instead is not None:
            proof.judge(probe.instead)
    certificate = proof.certificate
    if certificate.probes and not certificate.failures:
        tell("what probes leave unvisited")
        proof.visit(probes)
    if noise_probes and certificate.probes and not certificate.failures:
        tell("float32 rounding")
        certificate.rounding = rounding(
            graph, {"folded": folded_in(program, torch.float32)}, noise_probes, known=certificate.references, further=further_noise,
        )  # fmt: skip
        certificate.rounding.blame(proof.schedule, noise_probes[0])
    tell("outputs")
    proof.conclude(probes)
    certificate.seconds = time.perf_counter() - began
    return certificate


class _Proof:
    """What the probes of one certificate share."""

    def __init__(self, graph: Graph, program: Program, module: nn.Module | None) -> None:
        self.schedule, self.certificate = Schedule(graph, program), Certificate()
        self._graph, self._module = graph, module
        self._outputs = EndToEndRun(self.schedule)
        self._proved: dict[str, set[str]] = {}
        self._peaks: dict[str, Tensor] = {}

    def judge(self, probe: Probe) -> bool:
        """The local certificate on one probe, then the whole folded network; whether the probe was taken."""
        certificate = self.certificate
        run = Lockstep(self.schedule, probe.inputs, self._outputs.watch)
        resized = probe.optional or probe.resized
        try:
            findings, peaks = findings_on(run, probe, self.schedule)
            untraced = self._disagreement(probe) if resized else ""
        except Exception as error:  # a network may refuse a shape it was not traced for in any way it likes
            if not resized:
                raise
            untraced = f"the network does not take {probe.shapes}: {first_line(error)}"
        if untraced and not probe.optional:
            raise UsageError(f"height and width cannot be free: {untraced}. Pass --dynamic batch")
        if untraced:
            self._skip(probe, untraced)
            return False
        infinite = _not_finite(self._graph, run.watched)
        if infinite:
            certificate.dropped.append((probe.name, infinite))
            return True
        failures = [finding for finding in findings if not finding.error <= finding.bound]
        if failures and probe.optional:
            self._skip(probe, f"the fold holds for the traced sizes only: {failures[0]}")
            return False
        certificate.probes.append((probe.name, probe.shapes))
        if probe.instead is not None:
            certificate.reduced.append(probe.name)
        certificate.failures += failures
        for value, peak in peaks.items():
            known = self._peaks.get(value, peak)
            self._peaks[value] = torch.maximum(known, peak) if known.shape == peak.shape else known
        for finding in findings:
            self._proved.setdefault(finding.operator, set()).add(finding.value)
        certificate.worst = max([*findings, *filter(None, [certificate.worst])], key=lambda f: f.ratio, default=None)
        self._outputs.add(probe, run.watched)
        leaves = pytree.tree_leaves(self._graph.fx.output_node().args[0])
        found = [run.watched[leaf.name] if isinstance(leaf, torch.fx.Node) else leaf for leaf in leaves]
        certificate.references.append((probe.inputs, found))
        return True

    def visit(self, probes: list[Probe]) -> None:
        """The local certificate on what the probes leave unvisited (`unvisited.py`), on one sample of the cheapest probe."""
        taken = [probe for probe in probes if probe.name in ("normal", "second size") and self._was_judged(probe)]
        if not taken:
            return
        certificate, watch = self.certificate, self._outputs.watch
        base = first_sample(self._graph, min(taken, key=lambda probe: sum(map(_elements, probe.inputs)) / probe.samples))

        def usable(watched: dict[str, Any]) -> bool:
            return not _not_finite(self._graph, watched)

        for probe in scaled(base):
            certificate.failures += failures_on(self.schedule, probe, watch, usable)
        found, certificate.revived = failures_revived(self.schedule, base, watch, usable, self._peaks)
        certificate.failures += found

    def _was_judged(self, probe: Probe) -> bool:
        return any(inputs is probe.inputs for inputs, _ in self.certificate.references)

    def _skip(self, probe: Probe, why: str) -> None:
        """Record a shape that is not taken, but where the same probe follows at the traced sizes."""
        if probe.instead is None:
            self.certificate.skipped.append((probe.name, why))

    def conclude(self, probes: list[Probe]) -> None:
        """What only all probes together can say."""
        certificate = self.certificate
        certificate.silent = _silent(self._graph, self._peaks)
        certificate.n_nodes = len(self._proved)
        certificate.n_values = len(set().union(*self._proved.values()))
        if certificate.probes:
            certificate.end_to_end = self._outputs.result(certificate.noise32)
            if not certificate.end_to_end.ok and not certificate.failures:
                certificate.end_to_end = self._outputs.result(certificate.noise32, self._moved())
            certificate.largest = self._outputs.largest
            certificate.trace = next(filter(None, map(self._disagreement, compared_with_module(self._graph, probes))), "")

    def _moved(self) -> dict[str, float]:
        """How far rounding moves the values that are compared, over all probes."""
        largest: dict[str, float] = {}
        for inputs, _ in self.certificate.references:
            for name, distance in moved_by_rounding(self._graph, inputs, self._outputs.compared).items():
                largest[name] = max(largest.get(name, 0.0), distance)
        return largest

    def _disagreement(self, probe: Probe) -> str:
        if self._module is None:
            return ""
        return disagreement(self._graph, self._module, probe, self.certificate.noise32 or 0.0)


def _not_finite(graph: Graph, watched: dict[str, Any]) -> str:
    """Why a probe is of no use: the name of an output whose reference is not finite."""
    for node in graph.fx.output_node().all_input_nodes:
        value = watched.get(node.name)
        if is_inexact(value) and not bool(value.isfinite().all()):
            return f"the training graph's output '{node.name}' is not finite"
    return ""


def _elements(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else 0


def compared_with_module(graph: Graph, probes: list[Probe]) -> list[Probe]:
    """What the user's module is called on: values of both signs, then those of an image, one sample where the batch is free.

    Probes of other sizes were compared as they were judged.
    """
    named = {probe.name: probe for probe in reversed(probes) if not probe.optional and not probe.resized}
    chosen = [named[name] for name in ("normal", "uniform") if name in named] or probes[:1]
    return [first_sample(graph, probe) for probe in chosen]


def _silent(graph: Graph, peaks: dict[str, Tensor]) -> dict[str, int]:
    """Channels that no probe brought to life, by the module of the training graph that makes them."""
    silent: dict[str, int] = {}
    for node in graph.fx.nodes:
        count = int((peaks[node.name] == 0).sum()) if node.name in peaks else 0
        if count:
            silent[node.meta.get("module") or node.name] = count
    return silent


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

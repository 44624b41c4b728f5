"""Each artifact, run by its own runtime, against the training graph in float64.

Errors are measured in the training graph's own float32 noise n32: the RMS over elements of (float32 − float64)/peak.
For an output y of N elements with reference r, peak = max|r| over the probe and e = (y − r)/peak,

    multiple = max( RMS(e) / n32,  max|e| / (n32 · q(N)) ),      q(N) = max(1, √(2 ln N))

q(N) is what the largest of N normal errors is expected to reach (Cramér 1946, §28.6), so an artifact that rounds like
the training graph has a multiple near 1 whatever its size, while one wrong element, or one wrong channel, still counts
in full through the maximum. (The maximum alone over n32 reads 7 to 9 on a faultless 32×32×32 output.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foldexport.errors import EquivalenceError
from foldexport.exporters.weights import WeightMatch

WARN_ABOVE = 4.0  # times the training graph's float32 noise
FAIL_ABOVE = 8.0
NOISE_FLOOR = 2.0**-24  # half a unit in the last place of float32
UNTOLD = 1e-2  # of peak: a network whose own float32 noise is larger has outputs that prove little
DISCRETE_DIFFERENCES = 1e-4  # share of an integer output (a map of classes) that near-ties may change

Runtime = Callable[..., list[np.ndarray]]


@dataclass(frozen=True)
class Tolerance:
    """What the user allows instead of ``FAIL_ABOVE`` times the noise: ``max|y − r| ≤ absolute + relative · peak``."""

    absolute: float = 0.0
    relative: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.absolute:g}"] if self.absolute else []
        parts += [f"{self.relative:g} of peak"] if self.relative or not self.absolute else []
        return " + ".join(parts)


@dataclass
class Top1:
    """Agreement of the largest class score, for outputs ``[N, K]``.

    counted: samples whose margin (first minus second score of the reference) is beyond what rounding may close.
    agree: those of them with the same class.
    near_ties: the samples that are not counted, with probe, sample, classes, margin.
    """

    agree: int = 0
    counted: int = 0
    near_ties: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.agree == self.counted


@dataclass
class Comparison:
    """What one artifact was found to compute.

    max_error: largest |y − r|/peak over all probes and outputs, inf where an output is not finite.
    noise_multiple: the largest multiple, see the module.
    worst: where that is, "output 'output', channel 3".
    probes: runs; batches: their batch sizes.
    weights_identical: (n, total) bit-identical weights, None where they were not compared.
    ok: False fails the artifact.
    message: the failure or the warning, empty where there is neither.
    unit: the number type whose noise is the unit, "float32", "fp16", "bf16".
    not_run: why it could not be run here, "built, not run: no GPU (…)", else empty; instead: what was proved of it instead.
    device: where it ran.
    An artifact that was not run is not proven, whatever else holds of it: its mark is a dash.
    """

    format: str
    runtime: str
    max_error: float = 0.0
    noise_multiple: float = 0.0
    worst: str = ""
    probes: int = 0
    batches: tuple[int, ...] = ()
    top1: Top1 | None = None
    weights_identical: tuple[int, int] | None = None
    ok: bool = True
    message: str = ""
    unit: str = "float32"
    not_run: str = ""
    instead: tuple[str, ...] = ()
    device: str = "cpu"

    @property
    def proven(self) -> bool:
        """Whether its own runtime computed the training graph's outputs."""
        return self.ok and not self.not_run

    @property
    def mark(self) -> str:
        return "✗" if not self.ok else "–" if self.not_run else "✓"

    @property
    def warning(self) -> str:
        """The message of an artifact that passes with a warning."""
        return self.message if self.ok else ""

    @property
    def error(self) -> str:
        """The largest error, and what it is in units of noise; int8 is judged by accuracy, not by noise."""
        multiple = "" if self.unit == "int8" else f" ({self.noise_multiple:.1f}× {self.unit} noise)"
        return f"max error {self.max_error:.1e} of peak{multiple}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite, or was not measured, becomes None."""
        record = asdict(self)
        for name in ("max_error", "noise_multiple"):
            record[name] = record[name] if math.isfinite(record[name]) and not self.not_run else None
        return record | {"proven": self.proven}

    def __str__(self) -> str:
        """The proof line: what passed or failed, by how much."""
        parts = [f"{self.mark} {self.format}", self.runtime]
        if self.not_run:
            parts += [self.not_run, *self.instead]
        if self.probes:
            parts.append(self.error)
        if self.top1 is not None:
            ties = f" ({len(self.top1.near_ties)} near-ties)" if self.top1.near_ties else ""
            parts.append(f"top-1 {self.top1.agree}/{self.top1.counted}{ties}")
        if self.weights_identical is not None:
            how = "to half a step" if self.unit == "int8" else "bit-identical"
            parts.append("weights {}/{} {}".format(*self.weights_identical, how))
        return "  ".join(parts)


def compare(
    references: Sequence[Sequence[Tensor]],
    runtime: Runtime,
    probes: Sequence[Sequence[Any]],
    n32: float | Sequence[float],
    *,
    format: str,
    label: str,
    output_names: Sequence[str] | None = None,
    weights: WeightMatch | None = None,
    dtype: torch.dtype = torch.float32,
    tolerance: Tolerance | None = None,
    unit: str = "float32",
    factors: Sequence[Sequence[float]] | None = None,
) -> Comparison:
    """Run the artifact on every probe and compare with the training graph.

    references: per probe, per output, the float64 values.     runtime: the loaded artifact, ``*arrays -> [arrays]``.
    probes: per probe, the inputs; floating ones are handed over in ``dtype``, what is not a tensor is left out.
    n32: the training graph's own noise, one number or one per output.      label: "onnxruntime 1.31.1".
    weights: of :func:`~foldexport.exporters.weights.match_weights`; a missing weight fails whatever the outputs say.
    tolerance: judges the error in place of the noise; weights and classes are judged as ever.
    unit: whose noise n32 is; "float32", or the half type that the artifact is in.
    factors: per probe, per output, the noise there in units of n32, 1 or more; None for 1 everywhere.

    Never raises for a wrong artifact: a runtime that fails on a probe, a wrong shape, NaN, a missing weight are found.
    """
    found = Comparison(format, label, unit=unit)
    if weights is not None:
        found.weights_identical = (weights.identical, weights.total)
        _judge_weights(found, weights)
    for place, (wanted, inputs) in enumerate(zip(references, probes, strict=True)):
        outputs = _run(found, runtime, inputs, dtype)
        if outputs is None or not _shapes_agree(found, outputs, wanted, output_names):
            return found
        found.probes += 1
        found.batches += (_batch(inputs),)
        for index, (output, reference) in enumerate(zip(outputs, wanted, strict=True)):
            name = output_names[index] if output_names else _default_name(index, len(outputs))
            noise = max(NOISE_FLOOR, n32 if isinstance(n32, (int, float)) else n32[index])
            noise *= factors[place][index] if factors else 1.0
            _compare_output(found, np.asarray(output), reference.numpy(force=True), noise, name, place)
            _judge_tolerance(found, np.asarray(output), reference.numpy(force=True), tolerance, name)
    _judge_error(found, tolerance is None)
    _own_up(found, max([n32] if isinstance(n32, (int, float)) else n32, default=0.0))
    return found


def unrun(
    reason: str, *, format: str, label: str, instead: Sequence[str], weights: WeightMatch | None = None, unit: str = "float32",
    made: str = "built",
) -> Comparison:
    """The comparison of an artifact that cannot be run on this machine: its weights, and what else was proved of it.

    reason: why not, "no GPU (cuInit: …)". instead: in words for the proof line, "its ONNX file passed: …". made: what was done.
    """
    found = Comparison(format, label, not_run=f"{made}, not run: {reason}", instead=tuple(instead), unit=unit)
    if weights is not None:
        found.weights_identical = (weights.identical, weights.total)
        _judge_weights(found, weights)
    return found


def require(comparison: Comparison) -> Comparison:
    """The comparison if it passed.

    Raises :class:`EquivalenceError` (exit 4) with what was found, where, and what was allowed.
    """
    if comparison.ok:
        return comparison
    raise EquivalenceError(
        f"{comparison.format}, run by {comparison.runtime}: {comparison.message}; no file was written."
    )


def output_error(output: np.ndarray, reference: np.ndarray, n32: float) -> tuple[float, float, tuple[int, ...]]:
    """(max|e|, multiple, index of the largest error) of one output; see the module for the equations.

    A value that is not finite gives (inf, inf, its index). A reference of zeros is measured absolutely.
    """
    if reference.size == 0:
        return 0.0, 0.0, ()
    error = np.abs(output.astype(np.result_type(reference, np.float64)) - reference)
    worst = np.unravel_index(int(np.argmax(np.where(np.isfinite(error), error, np.inf))), error.shape)
    if not np.isfinite(error).all():
        return math.inf, math.inf, tuple(map(int, worst))
    error = error / (np.abs(reference).max() or 1.0)
    largest = float(error.max())
    expected_largest = max(1.0, math.sqrt(2.0 * math.log(error.size)))
    multiple = max(math.sqrt(float(np.mean(error**2))) / n32, largest / (n32 * expected_largest))
    return largest, multiple, tuple(map(int, worst))


def _run(found: Comparison, runtime: Runtime, inputs: Sequence[Any], dtype: torch.dtype) -> list[np.ndarray] | None:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    arrays = [(value.to(dtype) if value.is_floating_point() else value).numpy(force=True) for value in tensors]
    try:
        return runtime(*arrays)
    except Exception as error:  # each runtime has exceptions of its own; all mean that the artifact does not run
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        shapes = ", ".join("x".join(map(str, array.shape)) for array in arrays)
        _fail(found, f"it does not run on an input of {shapes}: {lines[-1][:300] if lines else type(error).__name__}")
        return None


def _shapes_agree(
    found: Comparison, outputs: Sequence[Any], wanted: Sequence[Tensor], names: Sequence[str] | None
) -> bool:
    if len(outputs) != len(wanted):
        _fail(found, f"it has {len(outputs)} outputs, the training graph {len(wanted)}")
        return False
    for index, (output, reference) in enumerate(zip(outputs, wanted, strict=True)):
        if tuple(np.shape(output)) != tuple(reference.shape):
            name = names[index] if names else _default_name(index, len(outputs))
            _fail(
                found,
                f"output {name!r} has shape {list(np.shape(output))}, the training graph's {list(reference.shape)}",
            )
            return False
    return True


def _compare_output(
    found: Comparison, output: np.ndarray, reference: np.ndarray, n32: float, name: str, probe: int
) -> None:
    if reference.dtype.kind not in "fc":
        differing = int(np.sum(output != reference))
        if differing > DISCRETE_DIFFERENCES * reference.size:
            _fail(found, f"output {name!r} ({reference.dtype}) differs in {differing} of {reference.size} values")
        return
    largest, multiple, index = output_error(output, reference, n32)
    found.max_error = max(found.max_error, largest)
    if multiple > found.noise_multiple or not found.worst:
        found.noise_multiple = max(found.noise_multiple, multiple)
        channel = f", channel {index[1]}" if len(index) >= 2 else ""
        found.worst = f"output {name!r}{channel}"
    if reference.ndim == 2 and reference.shape[1] >= 2 and math.isfinite(largest):
        found.top1 = found.top1 or Top1()
        _count_top1(found.top1, output, reference, n32, probe)


def _count_top1(top1: Top1, output: np.ndarray, reference: np.ndarray, n32: float, probe: int) -> None:
    """Two scores that each move by ``WARN_ABOVE`` times the noise may close a margin of twice that."""
    closed_by_rounding = 2.0 * WARN_ABOVE * n32 * np.abs(reference).max()
    for sample, scores in enumerate(reference):
        second, first = np.argsort(scores, kind="stable")[-2:]
        margin = float(scores[first] - scores[second])
        if margin <= closed_by_rounding:
            tie = {"probe": probe, "sample": sample, "classes": [int(first), int(second)], "margin": margin}
            top1.near_ties.append(tie)
            continue
        top1.counted += 1
        top1.agree += int(np.argmax(output[sample]) == first)


def _judge_weights(found: Comparison, weights: WeightMatch) -> None:
    if weights.ok:
        return
    names = ", ".join(weights.missing[:3]) + (", …" if len(weights.missing) > 3 else "")
    count = f"{weights.total - weights.identical} of {weights.total}"
    _fail(found, f"{count} weights differ from the module's in their bits: {names}")


def _judge_tolerance(
    found: Comparison, output: np.ndarray, reference: np.ndarray, allowed: Tolerance | None, name: str
) -> None:
    if allowed is None or not found.ok or reference.size == 0 or reference.dtype.kind not in "fc":
        return
    error, peak = float(np.abs(output - reference).max()), float(np.abs(reference).max())
    if not error <= allowed.absolute + allowed.relative * peak:
        _fail(found, f"output {name!r} differs by {error:.1e} at a peak of {peak:.3g} (allowed: {allowed})")


def _judge_error(found: Comparison, by_noise: bool = True) -> None:
    size = f"error {found.max_error:.1e} of peak, {found.noise_multiple:.1f} times the training graph's {found.unit} noise"
    if by_noise and not found.noise_multiple <= FAIL_ABOVE:
        _fail(found, f"{size} ({FAIL_ABOVE:g} allowed), at {found.worst}")
    elif found.top1 is not None and not found.top1.ok:
        _fail(found, f"{found.top1.counted - found.top1.agree} of {found.top1.counted} clear top-1 classes differ")
    elif found.ok and found.noise_multiple > WARN_ABOVE:
        found.message = f"{size} (above {WARN_ABOVE:g}), at {found.worst}"


def _own_up(found: Comparison, noise: float) -> None:
    """Say where the training graph itself rounds so badly that agreement of outputs means nothing."""
    if found.ok and noise > UNTOLD and found.unit != "int8":  # which is judged by its accuracy
        equal = ", its weights are equal bit for bit" if found.weights_identical else ""
        found.message = f"the network itself loses {noise:.1%} of peak to {found.unit}: its outputs prove little{equal}"


def _fail(found: Comparison, message: str) -> None:
    found.ok = False
    found.message = f"{found.message}; {message}" if found.message else message


def _batch(inputs: Sequence[Any]) -> int:
    return next((value.shape[0] for value in inputs if isinstance(value, Tensor) and value.dim()), 1)


def _default_name(index: int, count: int) -> str:
    return "output" if count == 1 else f"output_{index}"

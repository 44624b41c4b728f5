"""Each artifact, run by its own runtime, against the training graph in float64.

Errors are measured in the training graph's own float32 noise n32: the RMS over elements of (float32 − float64)/peak.
For an output y of N elements with reference r, peak = max|r| over the probe and e = (y − r)/peak,

    multiple = max( RMS(e) / n32,  max|e| / (n32 · q(N)) ),      q(N) = max(1, √(2 ln N))

q(N) is what the largest of N normal errors is expected to reach (Cramér 1946, §28.6), so an artifact that rounds like
the training graph has a multiple near 1 whatever its size, while one wrong element, or one wrong channel, still counts
in full through the maximum. (The maximum alone over n32 reads 7 to 9 on a faultless 32×32×32 output.)

Where this is above 4, the probe itself may be badly conditioned: it is read again in the noise that the training graph has
there, measured in three ways (`foldexport.verify.reference`), which on most inputs is n32 again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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
LEFT_OUT = 64.0  # times the noise: a probe on which the network itself loses as much shows nothing, and is not counted
UNTOLD = 1e-2  # of peak: a network whose own float32 noise is larger has outputs that prove little
LITTLE = "its outputs prove little"  # said of such a network
DISCRETE_DIFFERENCES = 1e-4  # share of an integer output (a map of classes) that near-ties may change
DISCRETE_NOISE = 8.0  # times the share that the training graph's own run in the type changes, where that is more
DISCRETE_MOST = 0.25  # a share beyond which agreement would show nothing

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
    units: run -> the noise that it was read in per output, a fraction of the peak, where this is more than the usual.
    left_out: runs on which the network itself loses more than `LEFT_OUT` times the usual; they may fail an artifact, not prove it.
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
    units: dict[int, list[float]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

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
    noise_there: Callable[[int], Iterable[Sequence[float]]] | None = None,
    discrete: Sequence[float] | None = None,
) -> Comparison:
    """Run the artifact on every probe and compare with the training graph.

    references: per probe, per output, the float64 values.     runtime: the loaded artifact, ``*arrays -> [arrays]``.
    probes: per probe, the inputs; floating ones are handed over in ``dtype``, what is not a tensor is left out.
    n32: the training graph's own noise, one number or one per output.      label: "onnxruntime 1.31.1".
    weights: of :func:`~foldexport.exporters.weights.match_weights`; a missing weight fails whatever the outputs say.
    tolerance: judges the error in place of the noise; weights and classes are judged as ever.
    unit: whose noise n32 is; "float32", or the half type that the artifact is in.
    factors: per probe, per output, the noise there in units of n32, 1 or more; None for 1 everywhere.
    noise_there: gives the noise of a probe, per output, a fraction of the peak, measured in several ways, the cheapest first;
        asked where the usual one reads above `WARN_ABOVE`, and as long as it does.
    discrete: per output, the share of an integer one that may differ, of all probes together; see :func:`allowed_share`.

    Never raises for a wrong artifact: a runtime that fails on a probe, a wrong shape, NaN, a missing weight are found.
    """
    found = Comparison(format, label, unit=unit)
    if weights is not None:
        found.weights_identical = (weights.identical, weights.total)
        _judge_weights(found, weights)
    counted: dict[int, list[int]] = {}
    for place, (wanted, inputs) in enumerate(zip(references, probes, strict=True)):
        outputs = _run(found, runtime, inputs, dtype)
        if outputs is None or not _shapes_agree(found, outputs, wanted, output_names):
            return found
        found.batches += (_batch(inputs),)
        pairs = [(np.asarray(output), reference.numpy(force=True)) for output, reference in zip(outputs, wanted, strict=True)]
        usual = [max(NOISE_FLOOR, n32 if isinstance(n32, (int, float)) else n32[index]) for index in range(len(pairs))]
        noises = [noise * (factors[place][index] if factors else 1.0) for index, noise in enumerate(usual)]
        ask = noise_there is not None and found.noise_multiple <= FAIL_ABOVE and _reading(pairs, noises) < math.inf
        measured = iter(noise_there(place) if ask else ())
        while _reading(pairs, noises) > WARN_ABOVE and (there := next(measured, None)) is not None:
            noises = found.units[place] = [max(noise, each) for noise, each in zip(noises, there, strict=True)]
        shows = all(noise <= LEFT_OUT * level for noise, level in zip(noises, usual, strict=True))
        if not shows and _reading(pairs, noises) <= FAIL_ABOVE:
            found.left_out.append(str(place))
            continue
        found.probes += 1
        for index, (output, reference) in enumerate(pairs):
            name = output_names[index] if output_names else _default_name(index, len(outputs))
            if reference.dtype.kind not in "fc":
                total = counted.setdefault(index, [0, 0])
                total[:] = total[0] + int(np.sum(output != reference)), total[1] + reference.size
                continue
            _compare_output(found, output, reference, noises[index], name, place)
            _judge_tolerance(found, output, reference, tolerance, name)
    if not found.probes:
        _fail(found, "it was compared on no input" + " that shows anything" * bool(found.left_out))
        return found
    for index, (differing, total) in counted.items():
        allowed = discrete[index] if discrete else DISCRETE_DIFFERENCES
        name = output_names[index] if output_names else _default_name(index, len(references[0]))
        if differing > allowed * total:
            kind = str(references[0][index].dtype).removeprefix("torch.")
            _fail(found, f"output {name!r} ({kind}) differs in {differing} of {total} values")
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


def allowed_share(own: float) -> float:
    """Of an integer output, the share that may differ, given the ``own`` share of the training graph in the artifact's type."""
    return min(DISCRETE_MOST, max(DISCRETE_DIFFERENCES, DISCRETE_NOISE * own))


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


def _reading(pairs: Sequence[tuple[np.ndarray, np.ndarray]], noises: Sequence[float]) -> float:
    """The largest multiple of the outputs of one probe."""
    real = [(pair, noise) for pair, noise in zip(pairs, noises, strict=True) if pair[1].dtype.kind in "fc"]
    return max((output_error(output, reference, noise)[1] for (output, reference), noise in real), default=0.0)


def _compare_output(
    found: Comparison, output: np.ndarray, reference: np.ndarray, n32: float, name: str, probe: int
) -> None:
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
        found.message = f"the network itself loses {noise:.1%} of peak to {found.unit}: {LITTLE}{equal}"


def _fail(found: Comparison, message: str) -> None:
    found.ok = False
    found.message = f"{found.message}; {message}" if found.message else message


def _batch(inputs: Sequence[Any]) -> int:
    return next((value.shape[0] for value in inputs if isinstance(value, Tensor) and value.dim()), 1)


def _default_name(index: int, count: int) -> str:
    return "output" if count == 1 else f"output_{index}"

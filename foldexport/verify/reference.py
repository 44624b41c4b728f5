"""What artifacts are compared with: the training graph's outputs in float64, computed once for all formats.

Inputs are the golden ones (batches of one and three, kept in the manifest), the certificate's uniform, constant and
impulse probes, the user's data, and as many more normal samples as are cheap, so that top-1 agreement means something.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foldexport import device as devices
from foldexport import exporters, interpret, probes
from foldexport.certify.rounding import Errors, rounding
from foldexport.certify.sensitivity import expected_noise
from foldexport.exporters import placing
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.weights import expected_weights, match_weights
from foldexport.trace import Graph
from foldexport.verify import Comparison, Tolerance, allowed_share, compare, summation, unrun
from foldexport.verify.golden import golden, golden_inputs

MORE_SAMPLES = 32  # normal samples beyond the probes
MORE_MULTIPLY_ADDS = 4e9  # that they may cost together
CHUNK = 8  # samples of one run
SPECIAL = ("uniform", "constant", "impulse")  # on which a network may be far worse conditioned than on natural inputs
OWN, EXPECTED = "own", "expected"  # ways to measure the noise of one run
UNUSUAL = 4.0  # times the usual noise
LOOKED_INTO = ("onnx", "torchscript", "pt2")  # formats that keep the module's operators as they are
FAR = 64.0  # times a normal input, to reach the bounds of clamps
AT_POINTS = 1000  # added to the seed for the inputs at a profile's points
BATCHES = (1, 3)  # from one artifact, where its batch is free
HUGE_BATCHES = (1, 2)  # of samples whose activations fill gigabytes


@dataclass(eq=False)
class Reference:
    """Inputs and the training graph's outputs on them.

    levels: the training graph's own noise in ``unit``, per output.     inputs, outputs, names: one entry per run.
    golden: the record for the manifest, None where the inputs cannot be drawn from a seed.
    dropped: probes on which the training graph itself rounds far worse than it usually does, or is not finite.
    factors: per run and output the noise there, in units of the usual: above 1 on probes where the training graph itself rounds
    worse than usual, so that no file is blamed for it. noise_there: run and lanes -> what `_noise_of` finds there, for runs on
    which a file reads as if it were wrong.
    discrete: per output the share of integers that may differ, empty where there are none.
    device: where artifacts are run if their runtimes can; levels_there: the training graph's float32 noise there, measured by
    `foldexport.verify.on_device`. noise_on: measures it on another device, for a runtime that has one of its own.
    """

    levels: list[float]
    output_names: list[str]
    inputs: list[tuple] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)
    golden: dict[str, Any] | None = None
    names: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    factors: list[list[float]] = field(default_factory=list)
    unit: str = "float32"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    levels_there: list[float] | None = None
    noise_on: Callable[[str], list[float]] | None = None
    noise_there: Callable[[int, int], Iterator[list[float]]] | None = None
    discrete: list[float] = field(default_factory=list)

    def levels_on(self, device: str) -> list[float]:
        """The noise of what runs on ``device``; the half types' own is measured without their hardware, and holds anywhere."""
        if device == "cpu" or self.unit != "float32":
            return self.levels
        if device == self.device and self.levels_there is not None:
            return self.levels_there
        # An engine runs on a GPU whatever was asked for; where PyTorch cannot use it, the CPU's noise is all there is.
        return self.levels if self.noise_on is None or devices.why_not(device) else self.noise_on(device)

    @staticmethod
    def of_tensors(graph: Graph, levels: Sequence[float]) -> list[float]:
        """The noise of those outputs of the graph that are tensors."""
        return [level for level, leaf in zip(levels, graph.fx.output_node().args[0], strict=True) if _is_tensor(leaf)]

    def compare(
        self, exporter: Any, path: Path, module: nn.Module | None, tolerance: Tolerance | None = None, *, as_written: bool = False
    ) -> Comparison:
        """Run the artifact at ``path`` on every input; ``module``'s weights, where given, must be in it bit for bit.

        as_written: the module is in the form that was written already.
        """
        module = exporters.suited(exporter, module) if module is not None and not as_written else module
        weights = match_weights(expected_weights(module), exporter.weights(path)) if module is not None else None
        reason = exporter.cannot_run(path) if hasattr(exporter, "cannot_run") else ""
        if reason:
            return unrun(
                reason, format=exporter.name, label=exporter.runtime(), instead=exporter.proved_instead(), weights=weights,
                unit=self.unit, made=getattr(exporter, "made", "built"),
            )  # fmt: skip
        placed = placing.place(exporter, path, self.device)
        taken = [at for at, inputs in enumerate(self.inputs) if not hasattr(exporter, "takes") or exporter.takes(inputs)]
        lanes = getattr(exporter, "lanes", summation.LANES)
        ask = self.noise_there if self.unit == "float32" and self.dtype == torch.float32 else None
        found = compare(
            [self.outputs[at] for at in taken], placed.run, [self.inputs[at] for at in taken],
            self.levels_on(placed.device), format=exporter.name, label=placed.label, output_names=self.output_names,
            weights=weights, tolerance=tolerance, unit=self.unit, dtype=self.dtype, factors=[self.factors[at] for at in taken],
            noise_there=None if ask is None else lambda place: ask(taken[place], lanes), discrete=self.discrete or None,
        )  # fmt: skip
        found.units = {taken[place]: units for place, units in found.units.items()}
        found.left_out = [self.names[taken[int(place)]] for place in found.left_out]
        self.dropped += [name for name in dict.fromkeys(found.left_out) if name not in self.dropped]
        if not found.ok and module is not None and weights is not None and taken:
            self._say_where(found, exporter, path, module, taken, weights.missing, placed.device)
        looked_into = exporter.name in LOOKED_INTO and (placed.device, self.unit) == ("cpu", "float32")
        if found.ok and weights is not None and taken and looked_into:
            self._look_inside(found, exporter, path, module, taken)
        found.device = placed.device
        return found

    def _look_inside(self, found: Comparison, exporter: Any, path: Path, module: nn.Module, taken: Sequence[int]) -> None:
        """Fail a file whose outputs are right, and an inner value is not, on normal inputs and on one that reaches the clamps."""
        from foldexport.verify import divergence

        normal = [at for at in taken if self.names[at] == "normal"]
        if not normal:
            return
        sizes = {at: sum(each.numel() for each in self.inputs[at] if isinstance(each, Tensor)) for at in normal}
        smallest = self.inputs[min(normal, key=sizes.__getitem__)]
        largest = self.inputs[max((at for at in normal if sizes[at] <= divergence.SMALL), key=sizes.__getitem__, default=normal[0])]
        far = tuple(each * FAR if isinstance(each, Tensor) and each.is_floating_point() else each for each in smallest)
        tried = (divergence.hidden(exporter, path, module, inputs, self.dtype) for inputs in (largest, far))
        said = next(filter(None, tried), "")
        if said:
            found.ok = False
            found.message = f"its outputs agree, and its inner values do not: {said}"

    def _say_where(
        self, found: Comparison, exporter: Any, path: Path, module: nn.Module, taken: Sequence[int], missing: Sequence[str],
        device: str,
    ) -> None:  # fmt: skip
        """Add to the message which of the module's layers differs first, on the first inputs that show it."""
        from foldexport.verify import divergence

        runs = [(self.inputs[each], self.outputs[each]) for each in taken]
        wrong = divergence.failing(exporter, path, runs, self.levels, self.dtype)
        if wrong is None and not missing and device != "cpu":
            found.message += "; run on the cpu the file is right, so the difference is the device's"
            return
        inputs = runs[wrong or 0][0]
        said = divergence.clause(exporter, path, module, inputs, unit=self.unit, dtype=self.dtype, missing=missing)
        found.message += f"; {said}" if said else ""

    def introduce(self, exporter: Any, module: nn.Module | None, tolerance: Tolerance | None = None) -> None:
        """Let an exporter that builds from another format's file prove that file before it builds.

        module: the folded one, whose weights the file must hold; None where nothing was folded.
        """
        if hasattr(exporter, "prove_source"):
            written = exporters.suited(exporter, module) if module is not None else None
            exporter.folded = module is not None
            exporter.prove_source = lambda source, file: self.compare(source, file, written, tolerance, as_written=True)


def reference(
    graph: Graph,
    example: tuple,
    options: ExportOptions,
    *,
    levels: Sequence[float] | None = None,
    multiply_adds: int | None = None,
    data: Sequence[np.ndarray] | None = None,
    seed: int = 0,
    device: str = "cpu",
    known: Sequence[tuple[tuple, list]] = (),
    unit: str = "float32",
    low: Callable[[tuple], list[Any]] | None = None,
    dtype: torch.dtype = torch.float32,
    points: Sequence[Sequence[Sequence[int]]] = (),
) -> Reference:
    """Run the training graph in float64 on all inputs that artifacts are compared on.

    example: the user's own inputs, whose batch is the only one of an artifact with fixed sizes.
    levels: of the certificate, measured here where there is none. known: inputs and outputs that the certificate has
    computed on the CPU already. unit, low: the half type of the artifacts, and the training graph run in it;
    dtype: what artifacts are fed. points: further shapes of all inputs, those of a profile.
    """
    run = _runner(graph, device, known if device == "cpu" else ())
    huge = probes.is_huge(graph)
    several = HUGE_BATCHES if huge else BATCHES
    batches = several if _free_batch(graph, options) else (_batch(example),)
    if levels is None:
        levels = rounding(graph, {}, probes.noise_probes(graph, seed=seed)).levels
    places = [place for place, leaf in enumerate(graph.fx.output_node().args[0]) if _is_tensor(leaf)]
    found = Reference(
        [levels[place] for place in places], options.names("output", len(places)), unit=unit, dtype=dtype, device=device
    )
    found.noise_on = functools.cache(lambda there: _noise_on(graph, found, there))
    measured = functools.cache(lambda at, way: _noise_of(graph, found, places, at, way))
    ways = (OWN, *([None] if summation.averages(graph) else ()), EXPECTED)
    found.noise_there = lambda at, lanes: (measured(at, lanes if way is None else way) for way in ways)
    low = low or (lambda inputs: interpret.outputs(graph, inputs, torch.float32))

    def record(*inputs: Tensor, name: str = "normal") -> list[Tensor]:
        outputs = run(*inputs)
        found.names.append(name)
        found.inputs.append(inputs)
        found.outputs.append(outputs)
        found.factors.append([1.0] * len(outputs))
        return outputs

    if _drawn_from_seed(graph, example):
        shapes = [list(value.shape) for value in example]
        found.golden = golden(
            record, shapes, n32=found.levels, batches=batches, seed=seed, output_names=found.output_names, raw=graph.raw
        )
    for name, inputs in _further(graph, options, data, seed, 0 if huge else _samples(multiply_adds), found.golden is not None):
        record(*(inputs if len(batches) > 1 else _at_batch(graph, inputs, batches[0])), name=name)
        if name not in SPECIAL:
            continue
        factors = _in_usual(low(found.inputs[-1]), found, places, -1)
        if all(each <= UNUSUAL for each in factors):
            found.factors[-1] = [max(1.0, factor) for factor in factors]
        else:
            found.dropped.append(name)
            found.inputs.pop(), found.outputs.pop(), found.factors.pop(), found.names.pop()
    for place, shapes in enumerate(dict.fromkeys(points) if found.golden is not None else ()):
        record(*(value.double() for value in golden_inputs(shapes, seed + AT_POINTS + place, graph.raw)))
    if any(not wanted.is_floating_point() and not wanted.is_complex() for outputs in found.outputs[:1] for wanted in outputs):
        found.discrete = _shares(low, found, places)
        if found.golden is not None:
            found.golden["discrete"] = found.discrete
    return found


def _shares(low: Callable[[tuple], list[Any]], found: Reference, places: list[int]) -> list[float]:
    """Per output the share of its integers that may differ: by the training graph's own in the artifact's type.

    Of all runs together, or of the golden ones alone where that is more: they are compared alone later.
    """
    golden = len(found.golden["runs"]) if found.golden is not None else 0
    differing, total = [[0] * len(places) for _ in range(2)], [[0] * len(places) for _ in range(2)]
    for at, (inputs, outputs) in enumerate(zip(found.inputs, found.outputs, strict=True)):
        leaves = low(inputs)
        for index, (place, wanted) in enumerate(zip(places, outputs, strict=True)):
            for group in range(1 + (at < golden)):
                differing[group][index] += 0 if wanted.is_floating_point() else int((leaves[place] != wanted).sum())
                total[group][index] += wanted.numel()
    return [
        allowed_share(max(differing[group][index] / max(1, total[group][index]) for group in range(2)))
        for index in range(len(places))
    ]


def _in_usual(leaves: list[Any], found: Reference, places: list[int], at: int) -> list[float]:
    """Per output the error of the training graph's outputs on a run in a low type, in units of its usual noise.

    A constant image drives statistics of the input itself to zero variance, where float32 means nothing.
    """
    factors = []
    for place, wanted, level in zip(places, found.outputs[at], found.levels, strict=True):
        errors = Errors()
        if wanted.is_floating_point() and wanted.isfinite().all():
            errors.add(wanted, leaves[place])
        factors.append(errors.rms / level if wanted.isfinite().all() else math.inf)
    return factors


def _noise_of(graph: Graph, found: Reference, places: list[int], at: int, way: str | int) -> list[float]:
    """Per output the noise of float32 on one run, a fraction of the peak. On inputs that are like others it is near the usual.

    way: `OWN`, the training graph's error there; a number, its error with averages summed in turn in so many lanes; `EXPECTED`,
    what its condition makes of one roundoff at every operator (`foldexport.certify.sensitivity.expected_noise`).
    """
    inputs = found.inputs[at]
    if way == EXPECTED:
        return expected_noise(graph, inputs, found.outputs[at])
    leaves = interpret.outputs(graph, inputs, torch.float32) if way == OWN else summation.outputs(graph, inputs, way)
    factors = _in_usual(leaves, found, places, at)
    return [level * factor for level, factor in zip(found.levels, factors, strict=True)]


def _noise_on(graph: Graph, found: Reference, device: str) -> list[float]:
    from foldexport.verify import on_device  # which needs this module

    return on_device.measured(graph, found, device)


def _runner(
    graph: Graph, device: str, known: Sequence[tuple[tuple, list]]
) -> Callable[..., list[Tensor]]:
    def run(*inputs: Tensor) -> list[Tensor]:
        for seen, outputs in known:
            if len(seen) == len(inputs) and all(map(_identical, seen, inputs)):
                return [leaf for leaf in outputs if isinstance(leaf, Tensor)]
        with torch.no_grad():
            leaves = interpret.outputs(graph, inputs, torch.float64, device=device)
        return [leaf.cpu() for leaf in leaves if isinstance(leaf, Tensor)]

    return run


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _further(
    graph: Graph, options: ExportOptions, data: Sequence[np.ndarray] | None, seed: int, samples: int, golden_too: bool
) -> list[tuple[str, tuple]]:
    """Names and inputs of the runs beyond the golden ones."""
    sized = bool({"height", "width"} & set(options.dynamic))
    found = [
        (probe.name, probe.inputs)
        for probe in probes.make(graph, seed=seed)
        if probe.name != "normal" or not golden_too
        if sized or not probe.resized
    ]
    if data is not None:
        found += [("data", inputs) for inputs in chunks(graph, data)]
    if samples:
        draws = (
            probes.noise_probes(graph, seed=seed + 8 * (1 + more)) for more in range(samples // probes.NOISE_SAMPLES)
        )
        found += [("normal", probe.inputs) for draw in draws for probe in draw]
    return found


def _samples(multiply_adds: int | None) -> int:
    """A multiple of `probes.NOISE_SAMPLES`: as many as are cheap, at most `MORE_SAMPLES`."""
    affordable = MORE_SAMPLES if not multiply_adds else int(MORE_MULTIPLY_ADDS / multiply_adds)
    return min(MORE_SAMPLES, affordable) // probes.NOISE_SAMPLES * probes.NOISE_SAMPLES


def chunks(graph: Graph, data: Sequence[np.ndarray]) -> list[tuple]:
    """The user's samples in runs of `CHUNK`; in one run of the traced batch where the network fixes it."""
    axes = _batch_axes(graph)
    if not any(axes):
        return [probe.inputs for probe in probes.make(graph, data=list(data)) if probe.name == "data"]
    tensors = [torch.as_tensor(np.asarray(array)) for array in data]
    tensors = [value.double() if value.is_floating_point() else value for value in tensors]
    count = min(len(value) for value, batched in zip(tensors, axes, strict=True) if batched)
    return [
        tuple(
            value[at : min(at + CHUNK, count)] if batched else value
            for value, batched in zip(tensors, axes, strict=True)
        )
        for at in range(0, count, CHUNK)
    ]


def _at_batch(graph: Graph, inputs: tuple, batch: int) -> tuple:
    """The inputs cut, or repeated, to one batch."""
    return tuple(
        value[torch.arange(batch) % len(value)] if batched else value
        for value, batched in zip(inputs, _batch_axes(graph), strict=True)
    )


def _batch_axes(graph: Graph) -> list[bool]:
    """Per input whether its axis 0 is the free batch."""
    found = []
    for node in graph.fx.find_nodes(op="placeholder"):
        shape = getattr(node.meta.get("val"), "shape", ())
        found.append(bool(graph.dynamic.get("batch")) and len(shape) > 0 and not isinstance(shape[0], int))
    return found


def _free_batch(graph: Graph, options: ExportOptions) -> bool:
    return "batch" in options.dynamic and bool(graph.dynamic.get("batch"))


def _drawn_from_seed(graph: Graph, example: tuple) -> bool:
    """Whether golden inputs say it all: floating, and with one batch in common."""
    floating = all(isinstance(value, Tensor) and value.is_floating_point() and value.dim() for value in example)
    return floating and len({value.shape[0] for value in example}) == 1 and len(set(_batch_axes(graph))) == 1


def _batch(example: tuple) -> int:
    return next((value.shape[0] for value in example if isinstance(value, Tensor) and value.dim()), 1)


def _is_tensor(leaf: Any) -> bool:
    value = leaf.meta.get("val") if hasattr(leaf, "meta") else leaf
    return isinstance(value, Tensor)

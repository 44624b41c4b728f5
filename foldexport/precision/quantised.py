"""The main command's int8: samples in, a file that is quantised, judged by its accuracy, and read back, out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from foldexport import interpret
from foldexport.errors import UsageError
from foldexport.exporters import placing
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.weights import WeightMatch
from foldexport.labels import NONE, Labels
from foldexport.precision import int8
from foldexport.precision.judging import NO_LABELS, cautions
from foldexport.samples import require_classes
from foldexport.trace import Graph
from foldexport.trace.outputs import output_names
from foldexport.verify import Comparison, compare, output_error

SCALE_SLACK = 1e-5  # of half a step: weights and scales are float32


@dataclass(eq=False)
class Quantised:
    """A network that is to be written in int8.

    program: makes the folded network in float64. quality: of the file that was written; other: of the same network without
    equalised ranges, or with them, whichever came out worse.
    """

    graph: Graph
    program: Callable[[], Any]
    samples: int8.Samples
    levels: list[float] | None = None
    max_drop: float | None = None
    quality: int8.Quality | None = None
    other: int8.Quality | None = None
    module: nn.Module | None = None
    notes: list[str] = field(default_factory=list)

    unit = {"unit": "int8"}

    def write(self, exporter: Any, example: tuple, path: Path, options: ExportOptions) -> dict[str, Any]:
        """Quantise with and without equalised ranges and keep what comes closer to the training graph on the calibration samples.

        Raises PrecisionError where a layer is not quantised, EquivalenceError where accuracy falls by more than is allowed.
        """
        tried, program = [], self.program().module
        for equalise in (True, False):
            place = path.with_name(f"{path.name}.{'equal' if equalise else 'plain'}")
            notes, module, equalised = int8.quantise(
                program, example, place, self.samples.calibration, options, equalise=equalise
            )
            on_calibration = int8.Samples(self.samples.calibration, self.samples.calibration, None)
            closeness = self._judge(exporter, place, on_calibration, equalised).closeness_db
            tried.append((closeness, place, notes, module, equalised))
        tried.sort(key=lambda each: -each[0])
        best, worse = tried
        self.other = self._judge(exporter, worse[1], self.samples, worse[4])
        worse[1].unlink()
        best[1].replace(path)
        self.module = best[3]
        found = int8.require_int8(exporter, path)
        self.quality = self._judge(exporter, path, self.samples, best[4])
        int8.require_quality(self.quality, self.max_drop)
        self.notes += cautions(self.quality, self.max_drop)
        return best[2] | {"precision": found.to_dict(), "int8": self.quality.to_dict()}

    def _judge(self, exporter: Any, path: Path, samples: int8.Samples, equalised: tuple[int, int]) -> int8.Quality:
        names = output_names(self.graph) or ()
        return int8.judge(exporter.load(path), self._reference, samples, equalised, names)

    def compare(self, expected: Any, exporter: Any, path: Path) -> Comparison:
        """The file on the golden inputs and probes; its own error there becomes the unit for `foldexport verify`."""
        placed = placing.place(exporter, path, expected.device)
        run = placed.run
        levels = [2.0**-24] * len(expected.output_names)
        for inputs, wanted in zip(expected.inputs, expected.outputs, strict=True):
            found = run(*(each.float().numpy() for each in inputs if isinstance(each, torch.Tensor)))
            for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
                levels[place] = max(levels[place], output_error(np.asarray(one), other.numpy(), 1.0)[1])
        if expected.golden is not None:
            expected.golden["n32"] = levels
        weights = half_a_step(self.module, exporter.weights(path)) if self.module is not None else None
        found = compare(
            expected.outputs, run, expected.inputs, levels, format=exporter.name, label=placed.label,
            output_names=expected.output_names, weights=weights, unit="int8",
        )  # fmt: skip
        found.device = placed.device
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "quality": self.quality.to_dict() if self.quality else None,
            "other_quality": self.other.to_dict() if self.other else None,
            "max_drop_points": self.max_drop if self.max_drop is not None else int8.MAX_DROP,
            "notes": self.notes,
        }

    def _reference(self, inputs: tuple) -> list[Any]:
        return [leaf for leaf in interpret.outputs(self.graph, inputs, torch.float32) if isinstance(leaf, torch.Tensor)]


@dataclass(frozen=True)
class Writer:
    """Stands for the exporter where an int8 file is written: the network comes from ``quantised``, not from a module."""

    quantised: Quantised
    exporter: Any

    @property
    def name(self) -> str:
        return self.exporter.name

    def export(self, module: Any, example: tuple, path: Path, options: ExportOptions) -> dict[str, Any]:
        return self.quantised.write(self.exporter, example, path, options)


def half_a_step(module: nn.Module, arrays: dict[str, np.ndarray]) -> WeightMatch:
    """How many quantised weights of a file are the module's to half a step, ``|W − s·q| ≤ s/2``, channel by channel."""
    wanted = {name: each.detach().numpy() for name, each in module.named_parameters() if each.dim() > 1}
    missing, total = [], 0
    for name, weight in wanted.items():
        quantised, scale = arrays.get(f"{name}_quantized"), arrays.get(f"{name}_scale")
        if quantised is None or scale is None or quantised.shape != weight.shape:
            continue
        total += 1
        if not any(_close(weight, quantised.astype(np.float32), step) for step in _steps(scale, weight.shape)):
            missing.append(name)
    return WeightMatch(total - len(missing), total, tuple(missing))


def _steps(scale: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
    """The scale along every axis that it may belong to."""
    if scale.size == 1:
        return [scale.reshape(())]
    axes = [axis for axis, size in enumerate(shape) if size == scale.size]
    return [scale.reshape([-1 if each == axis else 1 for each in range(len(shape))]) for axis in axes]


def _close(weight: np.ndarray, quantised: np.ndarray, step: np.ndarray) -> bool:
    return bool((np.abs(weight - step * quantised) <= step * (0.5 + SCALE_SLACK)).all())


def prepared(
    graph: Graph,
    program: Callable[[], Any] | None,
    data: Path | None,
    preprocessing: dict[str, Any],
    *,
    levels: list[float] | None = None,
    max_drop: float | None = None,
) -> Quantised:
    """Read the samples of ``--data`` for int8. Raises UsageError where there are none, or the network is not folded."""
    from foldexport import samples

    if data is None:
        raise UsageError(
            "--precision int8: needs --data with samples like those it will see, a folder of images (class/*.jpg to be judged by "
            "accuracy) or an .npz; random numbers would calibrate it for random numbers."
        )
    if program is None:
        raise UsageError("--precision int8: quantises the folded network; leave out --no-fold.")
    arrays, labels = samples.labelled(data, preprocessing, int8.CALIBRATION_SAMPLES + int8.JUDGED_SAMPLES)
    return _of(graph, program, arrays, labels, levels, max_drop)


def of_arrays(
    graph: Graph,
    program: Callable[[], Any] | None,
    arrays: list[np.ndarray],
    labels: np.ndarray | None = None,
    *,
    levels: list[float] | None = None,
    max_drop: float | None = None,
) -> Quantised:
    """The same with samples in memory: one array per input, batch first, and class numbers ``[N]``. Raises UsageError."""
    if program is None:
        raise UsageError("precision 'int8': the float64 fold is gone; fold again to quantise it")
    counts = {len(each) for each in arrays}
    if len(counts) != 1:
        raise UsageError(f"data: has {', '.join(map(str, sorted(counts)))} samples for different inputs; wanted as many for each")
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(arrays[0])):
        found = f"{labels.dtype} {list(labels.shape)}"
        raise UsageError(f"labels: are {found}; wanted one class number for each of the {len(arrays[0])} samples")
    known = NONE
    if labels is not None:
        require_classes("labels:", labels)
        known = Labels(labels.astype(np.int64), int(labels.max()) + 1, "array")
    return _of(graph, program, arrays, known, levels, max_drop)


def _of(
    graph: Graph, program: Callable[[], Any], arrays: list[np.ndarray], labels: Labels, levels: list[float] | None,
    max_drop: float | None,
) -> Quantised:  # fmt: skip
    """Labels that cannot be of the network's classes are left out. Raises UsageError where --max-drop needs them."""
    scores = graph.fx.output_node().args[0][0].meta["val"]
    outputs = int(scores.shape[1]) if scores.dim() == 2 and scores.is_floating_point() else 0
    why = ""
    if labels.values is None and max_drop is not None:
        raise UsageError(f"--max-drop: is about accuracy, and {NO_LABELS}.")
    if labels.values is not None and outputs < max(labels.classes, 2):
        why = f"the {labels.classes} classes of --data are not the network's"
    elif labels.source == "order" and labels.classes < outputs:
        why = (
            f"--data has {labels.classes} folders and the network {outputs} classes, and nothing says which of them these are "
            "(--class-names says it)"
        )
    if why and max_drop is not None:
        raise UsageError(f"--max-drop: is about accuracy, and {why}.")
    split = int8.split(arrays, None if why else labels.values, certain=labels.certain)
    return Quantised(graph, program, split, levels, max_drop, notes=[f"{why}: judged by agreement with float32"] if why else [])

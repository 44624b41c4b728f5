"""The format: ``NAME.mlpackage``, an ML program for Core ML.

Only macOS runs it. Elsewhere it is read back: its weights are compared bit for bit as in every format, and its program is computed
in float64 by the definitions of its operators and compared with the module. That is no run: the proof line says so.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from foldexport.errors import EquivalenceError, MissingDependencyError, PrecisionError, UsageError
from foldexport.exporters import asked
from foldexport.exporters.coreml import evaluate, package
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.silence import silenced
from foldexport.exporters.tensorrt.batches import fitted
from foldexport.exporters.widened import kept_wide, widened

MAX_BATCH = 16  # of a package whose batch is free: Core ML wants a bound
#: Of peak, between the program and the module, both in float64: numbers such as a slope are rounded to the package's type.
AGREEMENT = {"fp32": 2.0**-16, "fp16": 2.0**-6}  # what a writer folds itself, with --no-fold, it folds in float32
PRODUCTS = frozenset({"conv", "conv_transpose", "linear", "matmul"})
TARGETS = "iOS 16, macOS 13"


class CoreMLExporter:
    """Plain eval-mode modules to Core ML packages."""

    name = "coreml"
    suffix = ".mlpackage"
    made = "written"  # where it cannot be run: nothing is built

    def __init__(self) -> None:
        self._instead: list[str] = []

    def export(
        self, module: nn.Module, example: tuple, path: str | Path, options: ExportOptions | None = None
    ) -> dict[str, Any]:
        """Write ``module`` to the folder ``path``; equal modules give equal bytes.

        A free batch is 1 to ``MAX_BATCH``. What was written is read back and computed here.

        Returns notes for the manifest. Raises :class:`UsageError` for other free axes and for what coremltools cannot convert,
        :class:`PrecisionError` for another precision than fp32 and fp16 and for layers that stay in float32, and
        :class:`EquivalenceError` where the program read back computes something else than the module.
        """
        options = options or ExportOptions(dynamic=())
        asked.require(self.name, example, options, half_io=True)
        half = options.precision == "fp16"
        wide = kept_wide(module) if half else []
        if wide:
            raise PrecisionError(f"coreml: {', '.join(wide[:3])} stay in float32, and a package is in one type: ask for fp32.")
        single, path = widened(module), Path(path)
        example = tuple(value.float() for value in example)
        with torch.no_grad():
            outputs = [each for each in pytree.tree_leaves(single(*example)) if isinstance(each, Tensor)]
        names = options.names("input", len(example)), options.names("output", len(outputs))
        _require_distinct(names, example, outputs)
        _write(single, example, path, names, options)
        package.stabilise(path)
        spec = package.read(path)
        allowed = AGREEMENT[options.precision]
        self._instead = [_computed(path, spec, single, example, "batch" in options.dynamic, allowed)]
        kinds = Counter(each.type for each in package.block(spec).operations if each.type != "const")
        return {
            "inputs": [each.name for each in spec.description.input], "outputs": [each.name for each in spec.description.output],
            "batch": [1, MAX_BATCH] if "batch" in options.dynamic else asked.batch_of(example),
            "operations": dict(sorted(kinds.items())),
            "specification": spec.specificationVersion, "runs_on": TARGETS, "instead_of_running": self._instead,
        }  # fmt: skip

    def load(self, path: str | Path) -> Callable[..., list[np.ndarray]]:
        """A callable that runs the package in Core ML on the CPU, on macOS, ``*arrays -> [arrays]``.

        The GPU and the Neural Engine compute in float16 whatever the package says. Raises :class:`MissingDependencyError`
        elsewhere.
        """
        reason = self.cannot_run(path)
        if reason:
            raise MissingDependencyError(f"{Path(path).name} cannot be run here: {reason}.")
        import coremltools

        spec = package.read(path)
        inputs, outputs = ([each.name for each in ends] for ends in (spec.description.input, spec.description.output))
        with silenced():
            loaded = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit.CPU_ONLY)

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            found = loaded.predict(dict(zip(inputs, arrays, strict=True)))
            return [np.asarray(found[name]) for name in outputs]

        shape = spec.description.input[0].type.multiArrayType
        ranges = shape.shapeRange.sizeRanges
        lowest, highest = (ranges[0].lowerBound, ranges[0].upperBound) if ranges else (shape.shape[0], shape.shape[0])
        return fitted(run, lowest, highest)

    def cannot_run(self, path: str | Path) -> str:
        """Why the package cannot be run on this machine, empty where it can."""
        return "" if sys.platform == "darwin" else f"Core ML runs on macOS only, and this is {platform.system()}"

    def proved_instead(self) -> list[str]:
        """What was proved of a package that cannot be run here."""
        return self._instead

    def weights(self, path: str | Path) -> dict[str, np.ndarray]:
        """Every constant of the program, by its name in it, in the package's own bits."""
        found = package.constants(path, package.read(path))
        return {name: value for name, value in found if isinstance(value, np.ndarray)}

    def precision_of(self, path: str | Path) -> dict[str, int]:
        """Convolutions and matrix products of the program by the type of their result."""
        operations = package.block(package.read(path)).operations
        products = [each for each in operations if each.type in PRODUCTS]
        return dict(Counter(str(package.TYPES[each.outputs[0].type.tensorType.dataType]) for each in products))

    def runtime(self) -> str:
        """Who wrote it, and on macOS hands it to Core ML: "coremltools 9.0"."""
        return f"coremltools {importlib.metadata.version('coremltools')}"


def _require_distinct(names: tuple[list, list], example: tuple, outputs: list[Tensor]) -> None:
    """Raise UsageError for an output that is an input, or another output: a value of a program has one name."""
    known = {value.data_ptr(): name for name, value in zip(names[0], example, strict=True)}
    for name, value in zip(names[1], outputs, strict=True):
        other = known.setdefault(value.data_ptr(), name)
        if other != name:
            raise UsageError(f"coreml: output {name!r} is {other!r} itself, and a value has one name there: leave it out.")


def _write(module: nn.Module, example: tuple, path: Path, names: tuple[list, list], options: ExportOptions) -> None:
    """What coremltools converts a trace of ``torch.export`` to, at ``path``."""
    free = "batch" in options.dynamic
    given = asked.at_batch(example, 2) if free else example
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with silenced() as said, torch.no_grad():
        import coremltools as ct

        dtype = np.float16 if options.half_io else np.float32
        sizes = [(ct.RangeDim(1, MAX_BATCH, default=1) if free else len(value), *value.shape[1:]) for value in example]
        inputs = [ct.TensorType(name, shape=size, dtype=dtype) for name, size in zip(names[0], sizes, strict=True)]
        kind = ct.precision.FLOAT16 if options.precision == "fp16" else ct.precision.FLOAT32
        try:
            program = torch.export.export(module, given, dynamic_shapes=tuple({0: batch} for _ in given) if free else None)
            made = ct.convert(
                program.run_decompositions({}), convert_to="mlprogram", inputs=inputs, skip_model_load=True, compute_precision=kind,
                outputs=[ct.TensorType(name, dtype=dtype) for name in names[1]], minimum_deployment_target=ct.target.iOS16,
            )  # fmt: skip
        except Exception as error:  # torch.export and coremltools raise whatever their passes raise
            raise UsageError(f"coreml: cannot convert this network: {said.reason(error)}") from error
        made.save(str(path))


def _computed(path: Path, spec: Any, module: nn.Module, example: tuple, free: bool, allowed: float) -> str:
    """Compare the program in the package with the module, both in float64, on normal inputs; in words."""
    from foldexport.fold.rebuild import in_dtype
    from foldexport.verify.golden import golden_inputs

    exact, worst = in_dtype(module, torch.float64), 0.0
    for seed, batch in enumerate((1, 3) if free else (asked.batch_of(example),)):
        inputs = [value.double() for value in golden_inputs([[batch, *value.shape[1:]] for value in example], seed)]
        with torch.no_grad():
            wanted = [each for each in pytree.tree_leaves(exact(*inputs)) if isinstance(each, Tensor)]
            try:
                found = evaluate.program(path, spec, inputs)
            except evaluate.Unknown as error:
                return f"its program was not computed here: {error}"
        for one, other in zip(found, wanted, strict=True):
            if one.shape != other.shape:
                found, wanted = list(one.shape), list(other.shape)
                raise EquivalenceError(f"coreml: the program read back has an output of {found}, the folded module of {wanted}.")
            worst = max(worst, float((one - other).abs().max() / (other.abs().max() or 1.0)))
    if not worst <= allowed:
        raise EquivalenceError(
            f"coreml: the program read back is {worst:.1e} of peak off from the folded module ({allowed:.1e} allowed); no file was "
            "written."
        )
    return f"its program computed here in float64: within {worst:.1e} of the folded module"

"""OpenVINO IR: ``NAME.xml``, the graph, and ``NAME.bin``, its constants; made from our ONNX file of the same network.

OpenVINO reads ONNX itself, in its C++ core; its Python converter (``ov.convert_model``) reports its use, and is not called.
Format: OpenVINO's "Operation Sets" and "OpenVINO IR format" documents.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from foldexport.errors import EquivalenceError, UsageError
from foldexport.exporters.inner import Inner
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.openvino import inner as openvino_inner
from foldexport.exporters.openvino.importing import openvino as ov
from foldexport.exporters.options import FLOATS, ExportOptions

PRODUCTS = frozenset({"Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul"})
NUMPY = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64"}
#: What OpenVINO calls a processor's own arithmetic in a half type.
ABILITIES = {"f16": "FP16", "bf16": "BF16"}
DEVICE = "CPU"


class OpenVinoExporter:
    """Plain eval-mode modules to OpenVINO IR."""

    name = "openvino"
    suffix = ".xml"
    lanes = 1  # its averages over space add one term after the other

    def export(self, module: nn.Module, example: tuple, path: str | Path, options: ExportOptions | None = None) -> dict[str, Any]:
        """Write ``module`` to ``path`` and its constants beside it; equal modules give equal bytes.

        Constants are in the module's own type: OpenVINO's default of halving them is off.

        Returns notes for the manifest. Raises :class:`UsageError` when the network cannot be written as asked, and
        :class:`PrecisionError` for another precision than fp32, fp16 and bf16.
        """
        options = replace(options or ExportOptions(), opset=None)
        options.require_precision(self.name, FLOATS)
        path = Path(path)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".openvino-") as folder:
            source = Path(folder) / "network.onnx"
            notes = OnnxExporter().export(module, example, source, options)
            model = _read(source, UsageError, "cannot take this network")
            for kind, ports in (("inputs", model.inputs), ("outputs", model.outputs)):
                _name(ports, notes[kind])
            _number(model)
            ov.save_model(model, str(path), compress_to_fp16=False)
            operators = Counter(each.get_type_name() for each in model.get_ops())
        return {
            "inputs": notes["inputs"], "outputs": notes["outputs"],
            "operators": sum(operators.values()) - sum(operators[each] for each in ("Constant", "Parameter", "Result")),
            "run": f"computed in {_hint(model)} on this processor, and in what OpenVINO prefers elsewhere: pass it "
            f'INFERENCE_PRECISION_HINT "{_type_of(model)}"',
        }  # fmt: skip

    def load(self, path: str | Path, *, threads: int = 0) -> Callable[..., list[np.ndarray]]:
        """A callable that runs the file in OpenVINO on the CPU, ``*arrays -> [arrays]``, computing in the file's own type.

        Without the hint, processors with bfloat16 compute float32 files in it. Half types are computed where the processor can,
        else in float32. threads: 0 for OpenVINO's default. Raises :class:`EquivalenceError` when OpenVINO refuses the file.
        """
        network = _compiled(_read(Path(path), EquivalenceError, "refuses the file"), threads)

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            found = network([np.ascontiguousarray(array) for array in arrays])
            return [np.array(found[port]) for port in network.outputs]

        return run

    def weights(self, path: str | Path) -> dict[str, np.ndarray]:
        """Every constant of the file, by its name in the graph, in the file's own bits."""
        model = _read(Path(path), EquivalenceError, "refuses the file")
        constants = [each for each in model.get_ops() if each.get_type_name() == "Constant"]
        return {each.get_friendly_name(): _values(each) for each in constants}

    def inner(self, path: str | Path) -> Inner:
        """The operators inside the file, and their values, computed as `load` has it."""
        return openvino_inner.inner(_read(Path(path), EquivalenceError, "refuses the file"), _compiled)

    def precision_of(self, path: str | Path) -> dict[str, int]:
        """Convolutions and matrix products of the file by the type that the graph computes them in."""
        model = _read(Path(path), EquivalenceError, "refuses the file")
        products = [each for each in model.get_ops() if each.get_type_name() in PRODUCTS]
        return dict(Counter(NUMPY.get(kind, kind) for each in products for kind in [_kind(each.output(0))]))

    def runtime(self) -> str:
        """The runtime and its version, "OpenVINO 2026.4.1"."""
        return f"OpenVINO {ov.__version__.partition('-')[0]}"


def _read(path: Path, kind: type[Exception], what: str) -> ov.Model:
    try:
        return ov.Core().read_model(str(path))
    except RuntimeError as error:
        raise kind(_said(what, error)) from error


def _compiled(model: ov.Model, threads: int = 0) -> ov.CompiledModel:
    settings = {"INFERENCE_PRECISION_HINT": _hint(model)} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    try:
        return ov.Core().compile_model(model, DEVICE, settings)
    except RuntimeError as error:
        raise EquivalenceError(_said("refuses the file", error)) from error


def _said(what: str, error: RuntimeError) -> str:
    """The line that tells: the ones before it are places in OpenVINO's own sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    telling = [line for line in lines if not line.startswith(("Exception from ", "Check '"))] or lines
    return f"openvino: OpenVINO {ov.__version__.partition('-')[0]} {what}: {telling[0][:300]}"


def _name(ports: Iterable[ov.Output], names: list[str]) -> None:
    for port, name in zip(ports, names, strict=True):
        port.get_tensor().set_names({name})


def _number(model: ov.Model) -> None:
    """Number the operators without a name of their own within the graph; OpenVINO counts those of the process."""
    operators = model.get_ordered_ops()
    named = {each.get_friendly_name() for each in operators if not _is_numbered(each)}
    counts: Counter[str] = Counter()
    for each in operators:
        if _is_numbered(each):
            kind = each.get_type_name()
            while (name := f"{kind}_{counts[kind]}") in named:
                counts[kind] += 1
            counts[kind] += 1
            each.set_friendly_name(name)


def _is_numbered(operator: Any) -> bool:
    return re.fullmatch(rf"{operator.get_type_name()}_\d+", operator.get_friendly_name()) is not None


def _kind(port: ov.Output) -> str:
    return port.get_element_type().get_type_name()


def _type_of(model: ov.Model) -> str:
    """The half type that the graph's products are in, else "f32"."""
    kinds = {_kind(each.output(0)) for each in model.get_ops() if each.get_type_name() in PRODUCTS}
    return next((kind for kind in ABILITIES if kind in kinds), "f32")


def _hint(model: ov.Model) -> str:
    """The type to compute the graph in on this processor: its own where the processor has it."""
    kind = _type_of(model)
    able = ABILITIES.get(kind) in ov.Core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    return kind if able else "f32"


def _values(constant: Any) -> np.ndarray:
    if _kind(constant.output(0)) != "bf16":
        return constant.get_data(copy=True)
    import ml_dtypes  # comes with onnx

    return constant.get_tensor_view().data.copy().view(ml_dtypes.bfloat16)

"""onnxruntime's own format: the folded ONNX network as onnxruntime has optimised it, ``NAME.ort``.

Mobile and minimal builds of onnxruntime read this format only. The optimisations are those of level EXTENDED: the next one
(ALL) lays convolutions out for the exporting processor. Format: onnxruntime's "ORT format models" page and its FlatBuffers
schema ``ort.fbs``.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from torch import nn

from foldexport.errors import EquivalenceError, UsageError
from foldexport.exporters import sizes
from foldexport.exporters.inner import Inner
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.ort import file as ort_file
from foldexport.exporters.ort import inner as ort_inner

PRODUCTS = frozenset({"Conv", "FusedConv", "ConvTranspose", "MatMul", "Gemm", "FusedMatMul", "FusedGemm"})
LEVELS = onnxruntime.GraphOptimizationLevel


class OrtExporter:
    """Plain eval-mode modules to files in onnxruntime's own format."""

    name = "ort"
    suffix = ".ort"

    def export(self, module: nn.Module, example: tuple, path: str | Path, options: ExportOptions | None = None) -> dict[str, Any]:
        """Write ``module`` to ``path``; equal modules give equal bytes.

        Returns notes for the manifest. Raises :class:`UsageError` when the network cannot be written as asked, and
        :class:`PrecisionError` for another precision than fp32: onnxruntime casts half types to float32 before it writes.
        """
        options = options or ExportOptions()
        options.require_precision(self.name)
        sizes.require_one_file(self.name, module)
        path = Path(path)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".ort-") as folder:
            source, raw = Path(folder) / "network.onnx", Path(folder) / "network.ort"
            notes = OnnxExporter().export(module, example, source, options)
            _convert(source, raw)
            path.write_bytes(ort_file.canonical(raw.read_bytes()))
        return {key: notes[key] for key in ("inputs", "outputs", "opset", "onnxsim")} | {
            "nodes": len(ort_file.read(path).nodes),
            "level": "extended",
        }

    def load(self, path: str | Path, *, optimise: bool = True, threads: int = 0) -> Callable[..., list[np.ndarray]]:
        """A callable that runs the file in onnxruntime on the CPU, ``*arrays -> [arrays]``.

        optimise: what onnxruntime still does at loading; threads: within one operator, 0 for onnxruntime's default.
        Raises :class:`EquivalenceError` when onnxruntime refuses the file.
        """
        settings = _settings(LEVELS.ORT_ENABLE_ALL if optimise else LEVELS.ORT_DISABLE_ALL)
        settings.intra_op_num_threads = threads
        settings.add_session_config_entry("session.load_model_format", "ORT")
        try:
            session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no other base class
            reason = str(error).strip().splitlines()[0]
            raise EquivalenceError(f"ort: onnxruntime {onnxruntime.__version__} refuses the file: {reason}") from error
        names = [value.name for value in session.get_inputs()]
        return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))

    def weights(self, path: str | Path) -> dict[str, np.ndarray]:
        """Every initializer of the file, by name, in the file's own bits."""
        return ort_file.read(path).initializers

    def inner(self, path: str | Path) -> Inner:
        """The operators inside the file, and their values, as they stand."""
        return ort_inner.inner(path, _unoptimised)

    def precision_of(self, path: str | Path) -> dict[str, int]:
        """Convolutions and matrix products of the file by the type of their weight."""
        file = ort_file.read(path)
        return dict(Counter(str(value.dtype) for value in _product_weights(file)))

    def runtime(self) -> str:
        """The runtime and its version, "onnxruntime 1.31.1"."""
        return f"onnxruntime {onnxruntime.__version__}"


def _product_weights(file: ort_file.OrtFile) -> Iterator[np.ndarray]:
    for kind, reads in file.nodes:
        if kind in PRODUCTS and len(reads) > 1 and reads[1] in file.initializers:
            yield file.initializers[reads[1]]


def _settings(level: onnxruntime.GraphOptimizationLevel) -> onnxruntime.SessionOptions:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.graph_optimization_level = level
    return settings


def _unoptimised(source: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(source, _settings(LEVELS.ORT_DISABLE_ALL), providers=["CPUExecutionProvider"])


def _convert(source: Path, target: Path) -> None:
    settings = _settings(LEVELS.ORT_ENABLE_EXTENDED)
    settings.optimized_model_filepath = str(target)
    settings.add_session_config_entry("session.save_model_format", "ORT")
    try:
        onnxruntime.InferenceSession(str(source), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no other base class
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"ort: onnxruntime {onnxruntime.__version__} cannot write this network: {reason}") from error

"""The format: an ONNX file that onnxruntime-web has run, ``NAME.web.onnx``.

ONNX and not onnxruntime's own format: every build of the package reads it, so do its WebGPU and WebNN backends, which an
``.ort`` file made for the CPU's fused operators may not suit; and an ONNX file has the same bytes every time. What is proved
is the WebAssembly backend, which is the one that Node has.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from foldexport.errors import EquivalenceError
from foldexport.exporters import sizes
from foldexport.exporters.inner import Inner
from foldexport.exporters.onnx import inner as onnx_inner
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.web import node
from foldexport.exporters.web.session import WebSession

FLOATS = ("fp32", "fp16")  # onnxruntime-web has no bfloat16


class WebExporter:
    """Plain eval-mode modules to ONNX files for onnxruntime-web."""

    name = "onnxruntime-web"
    suffix = ".web.onnx"

    def export(self, module: nn.Module, example: tuple, path: str | Path, options: ExportOptions | None = None) -> dict[str, Any]:
        """Write ``module`` to ``path``; equal modules give equal bytes.

        Returns notes for the manifest. Raises :class:`UsageError` when the network cannot be written as asked or does not fit
        into one file, and :class:`PrecisionError` for another precision than fp32 and fp16.
        """
        options = options or ExportOptions()
        options.require_precision(self.name, FLOATS)
        sizes.require_one_file(self.name, module)
        notes = OnnxExporter().export(module, example, path, options)
        notes["backend"] = "wasm"
        if options.precision == "fp16":
            notes["run"] = "WebAssembly computes fp16 in float32 and rounds each result; WebGPU computes in fp16"
        return notes

    def load(self, path: str | Path, *, threads: int = 1) -> Callable[..., list[np.ndarray]]:
        """A callable that runs the file in onnxruntime-web under Node, ``*arrays -> [arrays]``.

        Raises :class:`MissingDependencyError` without Node or the package, :class:`EquivalenceError` when it refuses the file.
        """
        return _session(path, threads)

    def weights(self, path: str | Path) -> dict[str, np.ndarray]:
        """Every initializer of the file, by name, in the file's own bits."""
        return OnnxExporter().weights(path)

    def inner(self, path: str | Path) -> Inner:
        """The operators inside the file, and their values, as onnxruntime-web computes them."""
        return onnx_inner.inner(path, _Copy)

    def precision_of(self, path: str | Path) -> dict[str, int]:
        """Convolutions and matrix products of the file by the type that they compute in."""
        return OnnxExporter().precision_of(path)

    def runtime(self) -> str:
        """The runtime and its version, "onnxruntime-web 1.30.0"."""
        return f"{node.PACKAGE} {node.require().version}"


class _Copy:
    """A session of a model in memory, which lies in a file for as long as it is being loaded."""

    def __init__(self, source: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "copy.onnx"
            path.write_bytes(source)
            self._session = _session(path)

    def run(self, names: Sequence[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of these names."""
        found = dict(zip(self._session.outputs, self._session(*(inputs[name] for name in self._session.inputs)), strict=True))
        return [found[name] for name in names]


def _session(path: str | Path, threads: int = 1) -> WebSession:
    web = node.require()
    try:
        return WebSession(web, path, threads)
    except RuntimeError as error:
        said = " ".join(str(error).split())[:300]
        raise EquivalenceError(f"{WebExporter.name}: onnxruntime-web {web.version} refuses the file: {said}") from error

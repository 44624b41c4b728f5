"""Programs of ``torch.export``: ``NAME.pt2``, loaded by PyTorch without the code of the network.

``torch.export.save`` names the archive's folder after the file and dates nothing; stack traces are taken out before
(:mod:`foldexport.exporters.program`), and the example is one of zeros. Format: PyTorch's "PT2 Archive" specification.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from foldexport.device import full_float32
from foldexport.errors import EquivalenceError, UsageError
from foldexport.exporters import graph_inner
from foldexport.exporters.inner import Inner
from foldexport.exporters.options import FLOATS, ExportOptions
from foldexport.exporters.program import exported, leaves, outputs_of, silent
from foldexport.exporters.weights import as_array

PRODUCTS = frozenset({"linear", "addmm", "matmul", "mm", "bmm", "baddbmm", "einsum", "convolution"} | {
    f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)
})  # fmt: skip


class ProgramExporter:
    """Plain eval-mode modules to programs for ``torch.export.load``."""

    name = "pt2"
    suffix = ".pt2"
    devices = ("cpu", "cuda")

    def export(self, module: nn.Module, example: tuple, path: str | Path, options: ExportOptions | None = None) -> dict[str, Any]:
        """Write ``module`` to ``path``; equal modules give equal bytes, whatever the process or the folder.

        A program has positional inputs and outputs; the asked names go into the notes.

        Returns notes for the manifest. Raises :class:`UsageError` for a network that torch.export cannot take as asked, and
        :class:`PrecisionError` for another precision than fp32, fp16 and bf16.
        """
        options = options or ExportOptions()
        options.require_precision(self.name, FLOATS)
        path = Path(path)
        program = exported(self.name, module, example, options)
        # AOTInductor and others start from an example; zeros, since the bytes are to depend on the network alone.
        program._example_inputs = (tuple(map(torch.zeros_like, program.example_inputs[0])), {})
        with tempfile.TemporaryDirectory(dir=path.parent) as folder, silent():
            raw = Path(folder) / "program.pt2"  # the archive's folder has this name in every file
            torch.export.save(program, raw)
            raw.replace(path)
        return {
            "inputs": options.names("input", len(example)),
            "outputs": options.names("output", outputs_of(program)),
            "operators": sum(node.op == "call_function" for node in program.graph.nodes),
        }

    def load(self, path: str | Path, *, threads: int = 0, device: str = "cpu") -> Callable[..., list[np.ndarray]]:
        """A callable that runs the file in PyTorch on ``device``, ``*arrays -> [arrays]``; TF32 is off on a GPU.

        threads: not a property of a loaded file, 0 only. Raises :class:`EquivalenceError` when PyTorch refuses the file.
        """
        if threads:
            raise UsageError("pt2: threads belong to the process; call torch.set_num_threads instead.")
        with silent():
            program = _load(path)
            network = (program if device == "cpu" else move_to_device_pass(program, device)).module()
        exact = full_float32 if device != "cpu" else nullcontext

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            tensors = [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays]
            with exact(), torch.inference_mode():
                return leaves(network(*tensors))

        return run

    def weights(self, path: str | Path) -> dict[str, np.ndarray]:
        """Every parameter, buffer and constant of the program, by name."""
        program = _load(path)
        tensors = {**program.state_dict, **program.constants}
        return {name: as_array(value) for name, value in tensors.items() if isinstance(value, Tensor)}

    def inner(self, path: str | Path) -> Inner:
        """The operators of the program, and their values."""
        with silent():
            return graph_inner.inner(_load(path).module())

    def precision_of(self, path: str | Path) -> dict[str, int]:
        """Convolutions and matrix products of the program by the type that they compute in."""
        counts: Counter[str] = Counter()
        for node in _load(path).graph.nodes:
            target = getattr(node.target, "_opname", "")
            if node.op == "call_function" and target in PRODUCTS:
                counts[str(node.meta["val"].dtype).removeprefix("torch.")] += 1
        return dict(counts)

    def runtime(self) -> str:
        """The runtime and its version, "torch.export 2.13.0"."""
        return f"torch.export {torch.__version__}"


def _load(path: str | Path) -> ExportedProgram:
    try:
        with silent():
            return torch.export.load(str(path))
    except Exception as error:  # a bad archive raises RuntimeError, KeyError, AssertionError, JSON's or zip's own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise EquivalenceError(f"pt2: torch.export {torch.__version__} refuses the file: {lines[0][:300]}") from error

"""TorchScript: a trace of the module, its archive rewritten so that equal modules give equal bytes.

``torch.jit.save`` stores source positions with paths of the exporting machine (``*.debug_pkl``), the file's own name,
and class names numbered by how much the process has traced before. The rewritten archive has none of these.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from foldexport.device import IEEE, full_float32
from foldexport.errors import EquivalenceError, UsageError
from foldexport.exporters import sizes
from foldexport.exporters.inner import Inner
from foldexport.exporters.options import FLOATS, ExportOptions
from foldexport.exporters.torchscript import archive
from foldexport.exporters.torchscript import inner as torchscript_inner
from foldexport.exporters.torchscript import recording as torchscript_trace
from foldexport.exporters.weights import as_array

PRODUCTS = frozenset({"aten::_convolution", "aten::convolution", "aten::linear", "aten::addmm", "aten::matmul"} | {
    f"aten::conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)
})  # fmt: skip


class TorchScriptExporter:
    """Plain eval-mode modules to TorchScript archives, for ``torch.jit.load`` and libtorch."""

    name = "torchscript"
    suffix = ".torchscript.pt"
    devices = ("cpu", "cuda")

    def export(
        self, module: nn.Module, example: tuple, path: str | Path, options: ExportOptions | None = None
    ) -> dict[str, Any]:
        """Write ``module`` to ``path``; equal modules give equal bytes, whatever the process or the folder.

        A trace records sizes as operations, so every axis that the network itself leaves free stays free. TorchScript
        has positional inputs and outputs; the asked names go into the notes.

        Returns notes for the manifest. Raises :class:`UsageError` when the module cannot be traced, and
        :class:`PrecisionError` for another precision than fp32, fp16 and bf16.
        """
        options = options or ExportOptions()
        options.require_precision(self.name, FLOATS)
        sizes.require_free_axes(module, example, options)
        example = sizes.traceable(example, options)
        _require_tensors(example)
        path = Path(path)
        traced = _trace(module, example)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            raw = Path(folder) / "archive.pt"
            torch.jit.save(traced, str(raw))
            archive.rewrite(raw, path)
            outputs = len(pytree.tree_leaves(traced(*example)))
        return {"inputs": options.names("input", len(example)), "outputs": options.names("output", outputs)}

    def load(
        self, path: str | Path, *, optimise: bool = True, threads: int = 0, device: str = "cpu"
    ) -> Callable[..., list[np.ndarray]]:
        """A callable that runs the file in torch.jit on ``device``, ``*arrays -> [arrays]``.

        optimise: the executor's own optimisations; threads: not a property of a loaded file, 0 only.
        Raises :class:`EquivalenceError` when torch.jit refuses the file.
        """
        if threads:
            raise UsageError("torchscript: threads belong to the process; call torch.set_num_threads instead.")
        loaded = _load(path, device)
        exact = full_float32 if device != "cpu" else nullcontext

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            tensors = [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays]
            with torch.inference_mode(), torch.jit.optimized_execution(optimise), exact():
                return [
                    value.numpy(force=True)
                    for value in pytree.tree_leaves(loaded(*tensors))
                    if isinstance(value, Tensor)
                ]

        return run

    def weights(self, path: str | Path) -> dict[str, np.ndarray]:
        """Every parameter and buffer of the archive, by name."""
        loaded = _load(path)
        state = dict(loaded.named_parameters(remove_duplicate=False)) | dict(
            loaded.named_buffers(remove_duplicate=False)
        )
        return {name: as_array(value) for name, value in state.items()}

    def inner(self, path: str | Path) -> Inner:
        """The operators inside the archive, and their values."""
        return torchscript_inner.inner(_load(path))

    def precision_of(self, path: str | Path) -> dict[str, int]:
        """Convolutions and linear layers of the archive by the type of their weight, which is what torch computes them in.

        Those whose weight is computed while running are "unknown": the types that a trace stores are gone from the file.
        """
        loaded = _load(path)
        counts: Counter[str] = Counter()
        for node in loaded.inlined_graph.nodes():
            if node.kind() in PRODUCTS:
                weight = _stored(loaded, list(node.inputs())[1])
                counts[str(weight.dtype).removeprefix("torch.") if weight is not None else "unknown"] += 1
        return dict(counts)

    def runtime(self) -> str:
        """The runtime and its version, "torch.jit 2.13.0"."""
        return f"torch.jit {torch.__version__}"


def _stored(module: torch.jit.ScriptModule, value: Any) -> Tensor | None:
    """The tensor that ``module.a.b.weight`` names in a graph; None where the value is computed."""
    names: list[str] = []
    while value.node().kind() == "prim::GetAttr":
        names.append(value.node().s("name"))
        value = next(value.node().inputs())
    found: Any = module
    for name in reversed(names):
        found = getattr(found, name)
    return found if isinstance(found, Tensor) else None


def _require_tensors(example: tuple) -> None:
    for place, value in enumerate(example):
        if not isinstance(value, Tensor):
            raise UsageError(f"torchscript: input {place} is a {type(value).__name__}; a trace takes tensors only.")


def _trace(module: nn.Module, example: tuple) -> torch.jit.ScriptModule:
    """A trace with cuDNN's switches as a fresh process has them, but TF32 off.

    Each traced convolution stores these switches, so those of the exporting process would end up in the file; and an
    fp32 artifact that was proven in fp32 is to compute in fp32 on a GPU too.
    """
    cudnn = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=False, allow_tf32=False, fp32_precision=IEEE
    )
    try:
        with full_float32(), cudnn, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(torchscript_trace.sizes_recorded(module), example, check_trace=False, strict=False)
            torchscript_trace.devices_of_input(traced)
            return traced
    except UsageError:
        raise
    except Exception as error:  # the tracer passes on whatever the module's forward or its own C++ raised
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UsageError(f"torchscript: torch.jit cannot trace this network: {reason[:300]}") from error


def _load(path: str | Path, device: str = "cpu") -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.jit.load(str(path), map_location=device)
        except Exception as error:  # torch.jit raises RuntimeError, ValueError or its own C++ types on a bad archive
            reason = str(error).strip().splitlines()[0]
            raise EquivalenceError(f"torchscript: torch.jit {torch.__version__} refuses the file: {reason}") from error

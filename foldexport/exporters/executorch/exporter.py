"""ExecuTorch: ``torch.export``, XNNPACK for what it takes, ATen kernels of ExecuTorch for the rest."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from foldexport import threads as shared
from foldexport.errors import EquivalenceError, UsageError
from foldexport.exporters import asked, places, scales
from foldexport.exporters.executorch import file as executorch_file
from foldexport.exporters.executorch import rewrites as executorch_rewrites
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.silence import silenced
from foldexport.exporters.tensorrt.batches import fitted

MAX_BATCH = 8  # of a file whose batch is free: memory is planned for it


class ExecuTorchExporter:
    """Plain eval-mode modules to ExecuTorch programs for CPUs."""

    name = "executorch"
    suffix = ".pte"

    def __init__(self) -> None:
        self._batches = (1, MAX_BATCH)  # of the file that was loaded last

    def export(
        self, module: nn.Module, example: tuple, path: str | Path, options: ExportOptions | None = None
    ) -> dict[str, Any]:
        """Write ``module`` to ``path``; equal modules give equal bytes.

        A free batch is bounded, since memory is planned ahead: 1 to ``MAX_BATCH``. The network is traced at the bound, since
        XNNPACK otherwise plans for less than the bound that the trace declares.

        Returns notes for the manifest. Raises :class:`UsageError` for other free axes and for a network that
        ``torch.export`` or ExecuTorch refuses, :class:`PrecisionError` for another precision than fp32 and fp16.
        """
        options = options or ExportOptions()
        asked.require(self.name, example, options, half_io=True, floats=False)
        free, path, fixed = "batch" in options.dynamic, Path(path), ""
        with torch.no_grad():
            outputs = len(pytree.tree_leaves(module(*example)))
        at = asked.at_batch(example, MAX_BATCH) if free else tuple(example)
        module, content = _written(module, at, free, apart=options.precision == "fp32")  # squares of halves overflow
        path.write_bytes(content)
        if free:
            fixed = self._not_resized(path, example)
        if fixed:
            path.write_bytes(_lowered(module, tuple(example), False))
        read = executorch_file.read(path)
        said = {"fixed": fixed} if fixed else {}
        if options.precision == "fp16" and read.wide_bytes:
            said["storage"] = "kernels of half layers are stored as float32 of the same values"
        return {
            "inputs": options.names("input", len(example)), "outputs": options.names("output", outputs),
            "batch": [1, MAX_BATCH] if free and not fixed else asked.batch_of(example), **said,
            "delegate": "XNNPACK", "delegates": read.delegates, "outside_of_delegates": read.operators,
            "planned_bytes": read.planned_bytes,
        }  # fmt: skip

    def load(self, path: str | Path, *, optimise: bool = True, threads: int = 0) -> Callable[..., list[np.ndarray]]:
        """A callable that runs the file in ExecuTorch, ``*arrays -> [arrays]``; batches that it does not take go in parts.

        threads: of the whole process. Raises :class:`EquivalenceError` when ExecuTorch refuses the file.
        """
        if not optimise:
            raise UsageError("executorch: a program is optimised when it is written.")
        execute = self.method(path, threads or shared.share())
        self._batches = executorch_file.batches(path)

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            with silenced() as said:
                try:
                    found = execute([torch.from_numpy(np.ascontiguousarray(array)) for array in arrays])
                except RuntimeError as error:
                    raise ValueError(said.reason(error)) from error
            return [value.numpy(force=True).copy() for value in found if isinstance(value, Tensor)]

        return fitted(run, *self._batches)

    def method(self, path: str | Path, threads: int = 0) -> Callable[[list[Tensor]], list[Any]]:
        """The file's ``forward`` as ExecuTorch loads it. Raises :class:`EquivalenceError` when it refuses the file."""
        content = Path(path).read_bytes()
        with silenced() as said:
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime

            if threads and portable_lib._threadpool_get_thread_count() != threads:
                portable_lib._unsafe_reset_threadpool(threads)  # safe while nothing runs
            try:
                program = Runtime.get().load_program(content)
                method = program.load_method("forward")
            except Exception as error:  # of ExecuTorch's C++, RuntimeError mostly
                raise EquivalenceError(f"executorch: {self.runtime()} refuses the file: {said.reason(error)}") from error

        def execute(tensors: list[Tensor]) -> list[Any]:
            assert program and content  # a method borrows both
            return method.execute(tensors)

        return execute

    def _not_resized(self, path: Path, example: tuple) -> str:
        """Why the file does not run at every batch up to its bound; empty where it does at 1, 3 and the bound."""
        run = self.load(path)
        for batch in (1, 3, MAX_BATCH):
            try:
                run(*(value.numpy(force=True) for value in asked.at_batch(example, batch)))
            except ValueError as error:
                return f"XNNPACK does not resize this network to a batch of {batch} ({error}): the file has the example's batch"
        return ""

    def suited(self, module: nn.Module) -> nn.Module:
        """The module with no statistics among the weights of batch norms that only scale, which a file does not keep."""
        return scales.without_statistics(module)

    def weights(self, path: str | Path) -> dict[str, np.ndarray]:
        """Every constant of the file, in XNNPACK's parts and outside, in PyTorch's order of elements."""
        return executorch_file.read(path).weights

    def precision_of(self, path: str | Path) -> dict[str, int]:
        """Convolutions and linear layers in XNNPACK by the type of their result, which is what XNNPACK computes them in."""
        return dict(Counter(executorch_file.read(path).layers))

    def float32_bytes(self, path: str | Path) -> int:
        """Of XNNPACK's kernels and biases: ExecuTorch stores those of half layers as float32, which XNNPACK narrows on loading."""
        return executorch_file.read(path).wide_bytes

    def runtime(self) -> str:
        """The runtime and its version, "ExecuTorch 1.5.1"."""
        alone = self._batches[0] == self._batches[1]
        return f"ExecuTorch {importlib.metadata.version('executorch')}{f' in batches of {self._batches[0]}' if alone else ''}"


def _written(module: nn.Module, example: tuple, free: bool, apart: bool) -> tuple[nn.Module, bytes]:
    """The module as it is written, and its program. apart: its norms are taken apart where they can be."""
    better = executorch_rewrites.rewritten(module, apart)
    if better is not module:
        try:
            return better, _program(better, example, free)
        except RuntimeError:  # ExecuTorch cannot divide every graph; the proof then judges its own kernels
            pass
    return module, _lowered(module, example, free)


def _lowered(module: nn.Module, example: tuple, free: bool) -> bytes:
    """The program of a module. Raises UsageError for one that torch.export or ExecuTorch refuses."""
    try:
        return _program(module, example, free)
    except RuntimeError as error:
        reason = str(error)

    def fails(alone: nn.Module, given: tuple) -> bool:
        try:
            _program(alone, given, False)
        except RuntimeError:
            return True
        return False

    place = places.culprit(module, example, reason, fails) or "this network"
    raise UsageError(f"executorch: cannot write {place}: {reason.rstrip('.;')}; export to onnx or pt2.")


def _program(module: nn.Module, example: tuple, free: bool) -> bytes:
    """Raises RuntimeError with the reason."""
    with silenced() as said, torch.no_grad():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
        shapes = tuple({0: batch} if value.dim() else None for value in example) if free else None
        try:
            program = torch.export.export(module, example, dynamic_shapes=shapes)
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            return bytes(edge.to_executorch().buffer)
        except Exception as error:  # torch.export and ExecuTorch's passes share no base class of their errors
            reason = said.reason(error)
    raise RuntimeError(reason)

"""LiteRT (TensorFlow Lite): litert-torch converts, the interpreter runs; inputs keep PyTorch's NCHW."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from foldexport import threads as shared
from foldexport.errors import EquivalenceError, PrecisionError, UsageError
from foldexport.exporters import asked, places, sizes
from foldexport.exporters.inner import Inner
from foldexport.exporters.litert import batches as litert_batches
from foldexport.exporters.litert import file as litert_file
from foldexport.exporters.litert import inner as litert_inner
from foldexport.exporters.litert import rewrites as litert_rewrites
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.silence import silenced
from foldexport.exporters.tensorrt.batches import fitted
from foldexport.exporters.widened import kept_wide, widened

PLACE = re.compile(r"\S+\.py:\d+:\d+: (error: )?")  # in PyTorch's own sources
CLOSE = 1e-3  # of peak: a file that was resized wrongly is further off


class LiteRTExporter:
    """Plain eval-mode modules to ``.tflite`` files."""

    name = "litert"
    suffix = ".tflite"

    def __init__(self) -> None:
        self._batch = 0  # that the file which was loaded last takes; 0 where it is resized to any

    def export(
        self, module: nn.Module, example: tuple, path: str | Path, options: ExportOptions | None = None
    ) -> dict[str, Any]:
        """Write ``module`` to ``path``; equal modules give equal bytes.

        The file has sizes: those of one sample where the batch is free, which the interpreter resizes; where it cannot, the
        notes say so. In fp16 weights are stored as halves, which the file itself widens for processors without them.

        Returns notes for the manifest. Raises :class:`UsageError` for what litert-torch cannot convert, or the interpreter not
        resize in height and width; :class:`PrecisionError` for another precision than fp32 and fp16.
        """
        options = options or ExportOptions()
        asked.require(self.name, example, options, axes=("batch", "height", "width"))
        sizes.require_free_axes(module, example, options)
        wide = kept_wide(module) if options.precision == "fp16" else []
        if wide:
            raise PrecisionError(f"litert: {', '.join(wide[:3])} stay in float32, and a file is in one type here: ask for fp32.")
        free, path, single = "batch" in options.dynamic, Path(path), litert_rewrites.closed(widened(module))
        given = tuple(value.float() for value in (asked.at_batch(example, 1) if free else example))
        _write(single, given, path, options.precision == "fp16")
        self._require_runs(path, single, given)
        fixed = self._not_resized(path, single, asked.at_batch(given, 3)) if free else ""
        if fixed and litert_batches.free(path, plain := path.read_bytes()):
            fixed = self._not_resized(path, single, asked.at_batch(given, 3))
            if fixed:
                path.write_bytes(plain)
        for axis in {"height", "width"} & set(options.dynamic):
            why = self._not_resized(path, single, tuple(sizes._resized(value, axis, options) for value in given))
            if why:
                raise UsageError(f"litert: its {axis} cannot be free ({why}): pass --dynamic batch, and export once per size.")
        inputs, outputs = _signature(self.interpreter(path)[0])
        return {
            "inputs": inputs, "outputs": outputs, "batch": "free" if free and not fixed else asked.batch_of(given),
            **({"fixed": fixed} if fixed else {}), "operators": litert_file.operators(path),
            "converter": f"litert-torch {importlib.metadata.version('litert-torch')}",
            **({"arithmetic": "float32 on the CPU, where halves are widened; a delegate's own elsewhere"}
               if options.precision == "fp16" else {}),
        }  # fmt: skip

    def load(self, path: str | Path, *, optimise: bool = True, threads: int = 0) -> Callable[..., list[np.ndarray]]:
        """A callable that runs the file in LiteRT's interpreter with XNNPACK, ``*arrays -> [arrays]``, resized to each input.

        optimise: False for LiteRT's reference kernels. threads: 0 for one. A file that does not resize to a batch runs that
        batch in parts. Raises :class:`EquivalenceError` when the interpreter refuses the file.
        """
        held: dict[tuple, tuple] = {}
        self._batch, resizes = 0, False

        def resized(*arrays: np.ndarray) -> list[np.ndarray]:
            shapes = tuple(array.shape for array in arrays)
            if shapes not in held:
                held.clear()
                held[shapes] = self.interpreter(path, shapes, threads, optimise)
            return _run(*held[shapes], arrays)

        batch = int(self.interpreter(path, (), threads, optimise)[0].get_input_details()[0]["shape"][0])
        alone = fitted(resized, batch, batch)

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            nonlocal resizes
            if not self._batch and len(arrays[0]) != batch and not resizes:
                resizes = _resizes(resized, alone, arrays)
                self._batch = 0 if resizes else batch
            return alone(*arrays) if self._batch or len(arrays[0]) == batch else resized(*arrays)

        return run

    def interpreter(
        self, path: str | Path, shapes: Sequence[Sequence[int]] = (), threads: int = 0, optimise: bool = True, keep: bool = False
    ) -> tuple[Any, list[int], list[int]]:
        """LiteRT's interpreter of the file, at these input shapes, and where its inputs and outputs are, in order.

        keep: every tensor, which XNNPACK does not; it is left out then.
        Raises EquivalenceError for a file that it refuses, and ValueError for shapes.
        """
        with silenced() as said:
            from ai_edge_litert.interpreter import Interpreter, OpResolverType

            kinds = OpResolverType.AUTO if optimise else OpResolverType.BUILTIN_REF
            kinds = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if keep else kinds
            count = threads or shared.share() or 1
            try:
                found = Interpreter(
                    model_path=str(path), num_threads=count, experimental_op_resolver_type=kinds,
                    experimental_preserve_all_tensors=keep,
                )  # fmt: skip
                inputs, outputs = _places(found)
                found.allocate_tensors()
            except Exception as error:  # of LiteRT's C++, ValueError or RuntimeError
                raise EquivalenceError(f"litert: {self.runtime()} refuses the file: {said.reason(error)}") from error
            try:
                for index, shape in zip(inputs, shapes):
                    found.resize_tensor_input(index, list(shape))
                found.allocate_tensors()
            except (ValueError, RuntimeError) as error:
                raise ValueError(said.reason(error)) from error
        return found, inputs, outputs

    def suited(self, module: nn.Module) -> nn.Module:
        """The module without what a file does not keep: statistics of batch norms that only scale, γ of ones and β of zeros, and
        what constants are computed from."""
        return litert_rewrites.suited(module)

    def weights(self, path: str | Path) -> dict[str, np.ndarray]:
        """Every constant of the file, in PyTorch's order of elements."""
        return litert_file.weights(path)

    def inner(self, path: str | Path) -> Inner:
        """The operators inside the file, and their values in the file's own batch: not every kernel without XNNPACK resizes."""
        interpreter, inputs, _ = self.interpreter(path, keep=True)
        batch = int(interpreter.get_input_details()[0]["shape"][0])

        def tensors(places: Sequence[int], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
            return fitted(lambda *given: _run(interpreter, inputs, places, given), batch, batch)(*arrays)

        return litert_inner.inner(litert_file.read(path), self.weights(path), tensors)

    def float32_bytes(self, path: str | Path) -> int:
        """Of vectors, which LiteRT's operators take in float32 only."""
        return sum(each.nbytes for each in self.weights(path).values() if each.dtype == np.float32 and each.ndim < 2)

    def runtime(self) -> str:
        """The runtime and its version, "LiteRT 2.3.0"."""
        version = importlib.metadata.version("ai-edge-litert")
        return f"LiteRT in batches of {self._batch}, {version}" if self._batch else f"LiteRT {version}"

    def _require_runs(self, path: Path, module: nn.Module, inputs: tuple) -> None:
        """Raise UsageError, with the operator, for a file that the converter has written and LiteRT does not take."""
        try:
            self.interpreter(path)
            return
        except EquivalenceError as error:
            reason = str(error).partition("refuses the file: ")[2]

        def fails(alone: nn.Module, given: tuple) -> bool:
            try:
                _convert(alone, given, path)
                self.interpreter(path)
            except (RuntimeError, EquivalenceError):
                return True
            return False

        place = places.culprit(module, inputs, "", fails)
        path.unlink(missing_ok=True)
        what = f"what litert-torch writes for {place}" if place else "what litert-torch writes for this network"
        raise UsageError(f"litert: {self.runtime()} does not take {what}: {reason.rstrip('.')}; export to onnx.")

    def _not_resized(self, path: Path, module: nn.Module, inputs: tuple) -> str:
        """Why the file does not compute what the module does on inputs of another size; empty where it does."""
        with torch.no_grad():
            given = tuple(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) for value in inputs)
            wanted = [each.numpy(force=True) for each in pytree.tree_leaves(module(*given))]
        arrays = [value.numpy() for value in given]
        shapes = ", ".join("x".join(map(str, array.shape)) for array in arrays)
        try:
            found = _run(*self.interpreter(path, [array.shape for array in arrays]), arrays)
        except (ValueError, EquivalenceError) as error:
            return f"LiteRT does not resize it to {shapes}: {error}"
        return "" if all(map(_close, found, wanted)) else f"resized to {shapes} it computes something else"


def _close(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and bool(np.abs(one - other).max(initial=0) <= CLOSE * np.abs(other).max(initial=0))


def _resizes(resized: Callable, alone: Callable, arrays: Sequence[np.ndarray]) -> bool:
    """Whether a file at the sizes of ``arrays`` computes what it does in its own batch: some operators keep that, silently."""
    generator = np.random.default_rng(0)
    drawn = [generator.standard_normal(array.shape, np.float32) for array in arrays]
    try:
        return all(map(_close, resized(*drawn), alone(*drawn)))
    except ValueError:
        return False


def _write(module: nn.Module, example: tuple, path: Path, half: bool) -> None:
    """Raises UsageError for what litert-torch cannot convert."""
    try:
        _convert(module, example, path, half)
        return
    except RuntimeError as error:
        reason = PLACE.sub("", str(error))

    def fails(alone: nn.Module, given: tuple) -> bool:
        try:
            _convert(alone, given, path)
        except RuntimeError:
            return True
        return False

    place = places.culprit(module, example, reason, fails) or "this network"
    path.unlink(missing_ok=True)
    raise UsageError(f"litert: litert-torch cannot convert {place}: {reason.rstrip('.')}; export to onnx.")


def _convert(module: nn.Module, example: tuple, path: Path, half: bool = False) -> None:
    """Raises RuntimeError with the reason."""
    with silenced() as said, torch.no_grad():
        import litert_torch

        try:
            litert_torch.convert(module, example).export(str(path))
            if half:
                _halve(path)
            return
        except Exception as error:  # torch.export, MLIR and the converter raise whatever their passes raise
            reason = said.reason(error)
    raise RuntimeError(reason)


def _halve(path: Path) -> None:
    """Store the weights as halves, each widened by a DEQUANTIZE in front of its operator."""
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.quantizer import Quantizer

    kind = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
    settings = qtyping.OpQuantizationConfig(
        weight_tensor_config=kind, compute_precision=qtyping.ComputePrecision.FLOAT, explicit_dequantize=True
    )
    halver = Quantizer(str(path))
    halver.update_quantization_recipe(
        regex=".*", operation_name=qtyping.TFLOperationName.ALL_SUPPORTED, op_config=settings, algorithm_key="float_casting"
    )
    path.write_bytes(halver.quantize(enable_progress_report=False).quantized_model)


def _places(interpreter: Any) -> tuple[list[int], list[int]]:
    """Tensors that are inputs and outputs, in the order of the module's: their names are numbered."""
    found = []
    for ends in (interpreter.get_input_details(), interpreter.get_output_details()):
        found.append([each["index"] for each in ends])
    return found[0], found[1]


def _signature(interpreter: Any) -> tuple[list[str], list[str]]:
    (names,) = interpreter.get_signature_list().values()
    return list(names["inputs"]), list(names["outputs"])


def _run(interpreter: Any, inputs: Sequence[int], outputs: Sequence[int], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    if len(arrays) != len(inputs):
        raise ValueError(f"it takes {len(inputs)} inputs, not {len(arrays)}")
    for index, array in zip(inputs, arrays, strict=True):
        interpreter.set_tensor(index, np.ascontiguousarray(array))
    with silenced() as said:
        try:
            interpreter.invoke()
        except RuntimeError as error:
            raise ValueError(said.reason(error)) from error
    return [interpreter.get_tensor(index).copy() for index in outputs]

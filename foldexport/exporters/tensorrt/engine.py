"""An engine, opened and run on the GPU, with PyTorch's CUDA tensors as buffers.

An engine is executable code: what opens one here has compared its SHA-256 with a manifest's before.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from foldexport.errors import EquivalenceError
from foldexport.exporters.tensorrt import driver, messages
from foldexport.exporters.tensorrt.batches import Runtime, fitted

DECISIVE = ("VERSION_MISMATCH", "UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME", "INSUFFICIENT_GPU_MEMORY")


def why_not() -> str:
    """Why no engine can be run here, empty where one can: the driver's own reason first."""
    reason = driver.why_none()
    if reason:
        return f"no GPU ({reason})"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} cannot use the GPU"
    return ""


def misfit(trt: ModuleType, path: Path) -> str:
    """Why the library's own look at the file's header says that it cannot work here; empty where it does not say so.

    Only TensorRT-RTX has this (``IRuntime::getEngineValidity``): its engines work in the version that built them alone.
    """
    if not hasattr(trt.Runtime, "get_engine_validity"):
        return ""
    runtime = messages.made(trt.Runtime, messages.logger(trt))
    with open(path, "rb") as stream:
        _, flags = runtime.get_engine_validity(stream.read(runtime.engine_header_size))
    members = trt.EngineInvalidityDiagnostics.__members__
    return ", ".join(name for name in DECISIVE if name in members and int(flags) & int(members[name]))


class Engine:
    """A deserialised engine and its execution context; they and the runtime are kept for as long as it is used.

    Raises EquivalenceError where the library refuses the file, MissingDependencyError where it does not start here.
    """

    def __init__(self, trt: ModuleType, path: Path) -> None:
        self.trt, self.log = trt, messages.logger(trt)
        self.log.lines.clear()
        self._runtime = messages.made(trt.Runtime, self.log)
        self.engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            said = "; ".join(messages.errors(self.log.lines)[:2]) or "it does not say why"
            raise EquivalenceError(f"tensorrt: {path.name} cannot be opened here: {said[:400]}")
        names = [self.engine.get_tensor_name(place) for place in range(self.engine.num_io_tensors)]
        mode = trt.TensorIOMode
        self.inputs = [name for name in names if self.engine.get_tensor_mode(name) == mode.INPUT]
        self.outputs = [name for name in names if self.engine.get_tensor_mode(name) == mode.OUTPUT]
        self.context = self.engine.create_execution_context()
        if self.context is None:
            said = "; ".join(messages.errors(self.log.lines)[:2]) or "it does not say why"
            raise EquivalenceError(f"tensorrt: {path.name} gives no execution context: {said[:400]}")

    def limits(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes (min, opt, max) of the first input."""
        return tuple(tuple(shape) for shape in self.engine.get_tensor_profile_shape(self.inputs[0], 0))

    def runner(self) -> Runtime:
        """``*arrays -> [arrays]`` for any batch; larger and smaller ones than the engine's go through it in parts."""
        lowest, _, highest = self.limits()
        return fitted(self.run, lowest[0], highest[0]) if lowest else self.run

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """One execution. Raises ValueError for shapes outside the profile."""
        tensors = [torch.from_numpy(np.ascontiguousarray(array)).cuda() for array in arrays]
        for name, tensor in zip(self.inputs, tensors, strict=True):
            wanted = self._torch_type(name)
            if tensor.dtype != wanted:
                raise ValueError(f"input {name!r} is {wanted}, not {tensor.dtype}")
            if not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise ValueError(f"input {name!r}: {list(tensor.shape)} lies outside the engine's profile")
            self.context.set_tensor_address(name, tensor.data_ptr())
        results = [self._buffer(name) for name in self.outputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        if not self.context.execute_async_v3(stream.cuda_stream):
            said = "; ".join(messages.errors(self.log.lines)[:2]) or "it does not say why"
            raise ValueError(f"the engine stopped: {said[:300]}")
        stream.synchronize()
        return [result.cpu().numpy() for result in results]

    def inspect(self) -> str:
        """The inspector's JSON; empty where it gives none."""
        inspector = self.engine.create_engine_inspector()
        return inspector.get_engine_information(self.trt.LayerInformationFormat.JSON) if inspector is not None else ""

    def _buffer(self, name: str) -> torch.Tensor:
        shape = tuple(self.context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise ValueError(f"output {name!r} has a size that depends on the values of the input")
        buffer = torch.empty(shape, dtype=self._torch_type(name), device="cuda")
        self.context.set_tensor_address(name, buffer.data_ptr())
        return buffer

    def _torch_type(self, name: str) -> torch.dtype:
        types = {
            "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT32": torch.int32,
            "INT64": torch.int64, "INT8": torch.int8, "UINT8": torch.uint8, "BOOL": torch.bool,
        }  # fmt: skip
        return types[self.engine.get_tensor_dtype(name).name]

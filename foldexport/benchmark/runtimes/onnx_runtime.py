"""onnxruntime, with and without its own graph optimisations, on the CPU or through its CUDA provider."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from foldexport.benchmark.runtimes import Ready


def optimised(path: Path, arrays: Sequence[np.ndarray], threads: int, device: str) -> Ready:
    """As its users get it."""
    return _load(path, arrays, threads, device, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)


def plain(path: Path, arrays: Sequence[np.ndarray], threads: int, device: str) -> Ready:
    """The graph as it is in the file: what the fold itself is worth."""
    return _load(path, arrays, threads, device, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)


def session(path: Path, threads: int, device: str = "cpu", level: ort.GraphOptimizationLevel | None = None) -> ort.InferenceSession:
    """A session whose threads stop spinning when a run ends, so that sessions that take turns do not disturb each other."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL if level is None else level
    providers = [("CUDAExecutionProvider", {"use_tf32": "0"})] if device == "cuda" else []
    if providers:
        ort.preload_dlls()  # pip's CUDA and cuDNN: torch, which would have loaded them, is not imported here
    found = ort.InferenceSession(str(path), options, providers=[*providers, "CPUExecutionProvider"])
    if device == "cuda" and found.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError("onnxruntime fell back to the CPU: its CUDA provider did not load")
    return found


def _load(
    path: Path, arrays: Sequence[np.ndarray], threads: int, device: str, level: ort.GraphOptimizationLevel
) -> Ready:
    found = session(path, threads, device, level)
    names = [each.name for each in found.get_inputs()]
    if len(names) != len(arrays):
        raise ValueError(f"it has {len(names)} inputs ({', '.join(names)}), {len(arrays)} were given")
    if device == "cuda":
        return _bound(found, names, arrays)
    feed = dict(zip(names, map(np.ascontiguousarray, arrays), strict=True))
    return Ready(lambda: found.run(None, feed), lambda result: [np.asarray(each) for each in result])


def _bound(found: ort.InferenceSession, names: Sequence[str], arrays: Sequence[np.ndarray]) -> Ready:
    """Inputs and outputs on the GPU, so that no copy is timed."""
    binding = found.io_binding()
    held = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cuda", 0) for array in arrays]
    for name, value in zip(names, held, strict=True):
        binding.bind_ortvalue_input(name, value)
    for output in found.get_outputs():
        binding.bind_output(output.name, "cuda")

    def run() -> list[ort.OrtValue]:
        assert held  # the GPU's memory lives as long as the session
        found.run_with_iobinding(binding)
        return binding.get_outputs()

    return Ready(run, lambda result: [each.numpy() for each in result])

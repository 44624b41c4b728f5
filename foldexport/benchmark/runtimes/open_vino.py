"""OpenVINO on the CPU: ONNX or its own IR, computed in float32 whatever the processor prefers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from foldexport.benchmark.runtimes import Ready
from foldexport.exporters.openvino.importing import openvino as ov


def load(path: Path, arrays: Sequence[np.ndarray], threads: int, device: str) -> Ready:
    """For latency: one stream, ``threads`` threads, these sizes.

    On processors with bfloat16 OpenVINO computes float32 files in it unless it is told otherwise.
    """
    core = ov.Core()
    model = core.read_model(str(path))
    if len(model.inputs) != len(arrays):
        raise ValueError(f"it has {len(model.inputs)} inputs, {len(arrays)} were given")
    model.reshape({place: list(array.shape) for place, array in enumerate(arrays)})
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    settings["INFERENCE_NUM_THREADS"] = threads
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    for place, array in enumerate(arrays):
        request.set_input_tensor(place, ov.Tensor(np.ascontiguousarray(array)))
    count = len(model.outputs)
    return Ready(request.infer, lambda _: [request.get_output_tensor(place).data.copy() for place in range(count)])

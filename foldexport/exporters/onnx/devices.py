"""Where onnxruntime runs a file: its CPU provider, or its CUDA provider with TF32 off; and what it leaves on the CPU there.

onnxruntime falls back to the CPU without a word: where its CUDA provider does not load, and for each operator that it has no
kernel for. Both are told here.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import onnx
from onnx import TensorProto, helper

from foldexport import device as devices
from foldexport.errors import MissingDependencyError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
INSTALL = "pip install onnxruntime-gpu in place of onnxruntime"
RECORD = "session.record_ep_graph_assignment_info"
#: Operators that onnxruntime computes on the CPU on purpose: what they read and make are sizes, not data.
SIZES = frozenset({"Shape", "Size", "Gather", "Unsqueeze", "Squeeze", "Concat", "Slice", "Range", "Cast", "Constant"})


def providers(device: str) -> list[Any]:
    """For an inference session; the CPU last, since the sizes of tensors are computed there."""
    if devices.kind(device) != "cuda":
        return [CPU]
    number = device.partition(":")[2] or "0"
    # Not the search among all of cuDNN's algorithms that is onnxruntime's default: each run of it may round otherwise.
    return [(CUDA, {"device_id": number, "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}), CPU]


def lacks(device: str) -> str:
    """What this onnxruntime lacks to run on ``device``; empty where nothing. Found by trying, once in a process."""
    return "" if devices.kind(device) == "cpu" else _lacks(device)


@functools.cache
def _lacks(device: str) -> str:
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        return f"this onnxruntime has no CUDA in it ({INSTALL})"
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # the reason comes back as an exception, or not at all
    try:
        session = onnxruntime.InferenceSession(_smallest().SerializeToString(), settings, providers=providers(device))
        require(session, device)
    except Exception as error:  # onnxruntime's exceptions share no other base class
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ""


def _smallest() -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def require(session: Any, device: str) -> None:
    """Raise MissingDependencyError where the session is not on the device that was asked for."""
    if devices.kind(device) == "cuda" and CUDA not in session.get_providers():
        raise MissingDependencyError("onnxruntime's CUDA provider does not load: check its CUDA and cuDNN against the driver's")


def record_places(settings: Any, device: str) -> None:
    """Let a session on a GPU remember which operator it gave to which provider."""
    if device != "cpu":
        settings.add_session_config_entry(RECORD, "1")


def left_on_cpu(session: Any) -> Counter[str]:
    """Operators that the session computes on the CPU, by kind; empty where it does not remember."""
    try:
        parts = session.get_provider_graph_assignment_info()
    except Exception:  # onnxruntime's exceptions share no other base class; a session that was not told to remember raises one
        return Counter()
    return Counter(node.op_type for part in parts if part.ep_name == CPU for node in part.get_nodes())


def remark(session: Any) -> str:
    """What a session on a GPU computes on the CPU all the same, for the proof line; empty where that is sizes at most."""
    if CUDA not in session.get_providers():
        return ""
    kinds = {name: count for name, count in left_on_cpu(session).items() if name not in SIZES}
    return f"on the CPU {', '.join(f'{count} {name}' for name, count in sorted(kinds.items()))}" if kinds else ""

"""What a ``.pte`` holds: constants, delegates, operators, the batches that it takes.

A program is a flatbuffer; XNNPACK's parts are flatbuffers of their own inside of it, whose constants lie in the program's named
data. XNNPACK keeps kernels channels last, ``[out, kH, kW, in/g]``, and depthwise ones as ``[1, kH, kW, out]``; they are given back
as PyTorch has them (ExecuTorch's ``schema/program.fbs`` and ``backends/xnnpack/serialization/schema.fbs``).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from foldexport.errors import EquivalenceError

XNNPACK = "XnnpackBackend"
TYPES = {"xnn_datatype_fp32": np.dtype("<f4"), "xnn_datatype_fp16": np.dtype("<f2")}
CONVOLUTIONS = {"XNNConv2d": "conv", "XNNDepthwiseConv2d": "depthwise", "XNNConvTranspose2d": "transposed"}
LAYERS = {**CONVOLUTIONS, "XNNFullyConnected": "linear"}
BOUND = re.compile(r"(?<=: )(-?)\+?inf\b")  # flatc writes infinities as no JSON does
SCALARS = {"FLOAT": "<f4", "HALF": "<f2", "DOUBLE": "<f8", "LONG": "<i8", "INT": "<i4", "BOOL": "?"}


@dataclass
class Held:
    """weights: every constant; wide_bytes: of XNNPACK's float32 ones. layers: number type of the result of each of XNNPACK's
    convolutions and linear layers.

    operators: of ExecuTorch's own kernels, outside of delegates. planned_bytes: of memory for activations outside of them.
    """

    weights: dict[str, np.ndarray] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    wide_bytes: int = 0
    delegates: int = 0
    operators: list[str] = field(default_factory=list)
    planned_bytes: int = 0


def read(path: str | Path) -> Held:
    """Everything of the file at ``path``. Raises :class:`EquivalenceError` for one that is no program."""
    file = _parsed(path)
    found, named = Held(), _named(file)
    for plan in file.program.execution_plan:
        found.operators += [f"{each.name}.{each.overload}".rstrip(".") for each in plan.operators]
        found.planned_bytes += sum(plan.non_const_buffer_sizes)
        for place, delegate in enumerate(plan.delegates):
            found.delegates += 1
            if delegate.id == XNNPACK:
                graph, constants = _graph(file.program.backend_delegate_data[delegate.processed.index].data)
                for name, values in _constants(graph, constants, named):
                    found.weights[f"{place}.{name}"] = values
                    found.wide_bytes += values.nbytes if values.dtype == np.float32 else 0
                found.layers += _layers(graph)
        for place, value in enumerate(_tensors(plan)):
            if value.data_buffer_idx and value.data_buffer_idx < len(file.program.constant_buffer):
                raw = bytes(file.program.constant_buffer[value.data_buffer_idx].storage)
                kind = SCALARS.get(value.scalar_type.name)
                if kind and raw:
                    found.weights[f"{plan.name}.{place}"] = _contiguous(np.frombuffer(raw, kind, int(np.prod(value.sizes))), value)
    return found


def batches(path: str | Path) -> tuple[int, int]:
    """The smallest and the largest batch that the file takes."""
    plan = _parsed(path).program.execution_plan[0]
    inputs = [plan.values[place].val for place in plan.inputs]
    found = [(each.sizes[0], each.shape_dynamism.name) for each in inputs if getattr(each, "sizes", None)]
    highest = found[0][0] if found else 1
    return (highest if all(kind == "STATIC" for _, kind in found) else 1), highest


def _parsed(path: str | Path) -> Any:
    from executorch.exir._serialize._program import deserialize_pte_binary

    try:
        return deserialize_pte_binary(Path(path).read_bytes())
    except Exception as error:  # flatbuffers raise whatever reading wild offsets gives
        raise EquivalenceError(f"executorch: the file cannot be read: {str(error).splitlines()[0][:200]}") from error


def _named(file: Any) -> dict[str, bytes]:
    data = file.named_data
    return {key: bytes(data.buffers[entry.buffer_index]) for key, entry in data.pte_data.items()} if data is not None else {}


def _tensors(plan: Any) -> list[Any]:
    return [value.val for value in plan.values if hasattr(value.val, "scalar_type") and hasattr(value.val, "data_buffer_idx")]


def _contiguous(values: np.ndarray, tensor: Any) -> np.ndarray:
    """The elements in the order of the sizes, whatever order of axes they are stored in."""
    order = list(tensor.dim_order)
    stored = values.reshape([tensor.sizes[axis] for axis in order])
    return np.ascontiguousarray(stored.transpose([order.index(axis) for axis in range(len(order))]))


def _graph(blob: bytes) -> tuple[dict[str, Any], bytes]:
    """XNNPACK's graph as plain values, and the constants behind it."""
    import importlib.resources

    from executorch.backends.xnnpack import serialization
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(bytes(blob[: XNNHeader.EXPECTED_LENGTH]))
    start, end = header.flatbuffer_offset, header.flatbuffer_offset + header.flatbuffer_size
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder) / "schema.fbs", Path(folder) / "graph.bin"
        schema.write_bytes((importlib.resources.files(serialization) / "schema.fbs").read_bytes())
        binary.write_bytes(bytes(blob[start:end]))
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        text = BOUND.sub(r"\1Infinity", (Path(folder) / "graph.json").read_text())
        return json.loads(text), bytes(blob[header.constant_data_offset :])


def _values(graph: dict[str, Any]) -> list[dict[str, Any]]:
    """The tensors of XNNPACK's graph, without what a quantised one has around it."""
    return [each["xvalue_union"].get("tensor_value", each["xvalue_union"]) for each in graph.get("xvalues", ())]


def _layers(graph: dict[str, Any]) -> list[str]:
    kinds = {value.get("id_out", 0): str(TYPES.get(value.get("datatype", ""), "unknown")) for value in _values(graph)}
    nodes = [each["xnode_union"] for each in graph.get("xnodes", ()) if each["xnode_union_type"] in LAYERS]
    return [kinds.get(node.get("output_id", 0), "unknown") for node in nodes]


def _constants(graph: dict[str, Any], constants: bytes, named: dict[str, bytes]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values in PyTorch's order) of every constant of XNNPACK's graph."""
    roles = _roles(graph)
    for value in _values(graph):
        place, kind = value.get("constant_buffer_idx", 0), TYPES.get(value.get("datatype", ""))
        if not place or kind is None:
            continue
        entry = graph["constant_data"][place]
        raw = named.get(entry.get("named_key", "")) or constants[entry.get("offset", 0) :]
        shape = value.get("dims", [])
        values = np.frombuffer(raw, kind, int(np.prod(shape))).reshape(shape)
        name = value.get("id_out", 0)
        role, node = roles.get(name, ("", {}))
        yield f"{name}", np.ascontiguousarray(_as_pytorch(values, role, node))


def _roles(graph: dict[str, Any]) -> dict[int, tuple[str, dict[str, Any]]]:
    """Of the values that are kernels of layers: which kind of layer, and the layer."""
    found = {}
    for each in graph.get("xnodes", ()):
        kind, node = each["xnode_union_type"], each["xnode_union"]
        if kind in LAYERS:
            found[node.get("filter_id", 0)] = (LAYERS[kind], node)
    return found


def _as_pytorch(values: np.ndarray, role: str, node: dict[str, Any]) -> np.ndarray:
    if values.ndim != 4 or role not in ("conv", "depthwise", "transposed"):
        return values
    if role == "depthwise":  # [1, kH, kW, out] to [out, 1, kH, kW]
        return values.transpose(3, 0, 1, 2)
    values = values.transpose(0, 3, 1, 2)
    groups = node.get("groups", 1)
    if role == "transposed" and groups > 1:  # [g·out/g, in/g, …] to [g·in/g, out/g, …]
        parts = values.reshape(groups, -1, *values.shape[1:]).swapaxes(1, 2)
        return parts.reshape(-1, *parts.shape[2:])
    return values.swapaxes(0, 1) if role == "transposed" else values

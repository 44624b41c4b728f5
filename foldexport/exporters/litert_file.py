"""What a ``.tflite`` file holds: its constants as PyTorch has them, and what it computes in.

Kernels are channels last, ``[out, kH, kW, in/g]``, and depthwise ones ``[1, kH, kW, out]``. A half weight passes a DEQUANTIZE in
front of its operator (TensorFlow's ``lite/schema/schema.fbs``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from foldexport.errors import EquivalenceError

IDENTIFIER = b"TFL3"
TYPES = {number: np.dtype(kind) for number, kind in {0: "<f4", 1: "<f2", 2: "<i4", 4: "<i8", 6: "?", 9: "i1", 10: "<f8"}.items()}
CONCATENATION, CONV_2D, DEPTHWISE_CONV_2D, DEQUANTIZE, RESHAPE, TRANSPOSE_CONV = 2, 3, 4, 6, 22, 67
MAXIMUM, MINIMUM = 55, 57
NO_BOUND = {MAXIMUM: np.finfo("<f4").min, MINIMUM: np.finfo("<f4").max}  # as the converter writes an infinite one
KERNELS = (CONV_2D, DEPTHWISE_CONV_2D, TRANSPOSE_CONV)  # each reads its kernel as its second input


def weights(path: str | Path) -> dict[str, np.ndarray]:
    """Every constant of the file by its name there and its place. Raises :class:`EquivalenceError` for one that is no model."""
    model, content = read(path), Path(path).read_bytes()
    found: dict[str, np.ndarray] = {}
    for graph in model.subgraphs:
        roles, bounds = _roles(model, graph), _bounds(model, graph)
        for place, tensor in enumerate(graph.tensors):
            raw, kind = _bytes(model.buffers[tensor.buffer], content), TYPES.get(tensor.type)
            if kind is None or not raw:
                continue
            shape = [] if tensor.shape is None else [int(size) for size in tensor.shape]
            try:
                values = np.frombuffer(raw, kind).reshape(shape)
            except ValueError as error:
                raise EquivalenceError(f"litert: the file has {len(raw)} bytes where a {kind} of {shape} should be.") from error
            if place in bounds and kind == np.float32:
                values = np.where(values == (end := NO_BOUND[bounds[place]]), np.copysign(np.float32(np.inf), end), values)
            found[f"{place}.{_text(tensor.name)}"] = np.ascontiguousarray(_as_pytorch(values, roles.get(place)))
        places = {int(name.partition(".")[0]): values for name, values in found.items()}
        for parts in _groups(model, graph):
            if all(part in places for part in parts):
                found[f"{'+'.join(map(str, parts))}."] = np.concatenate([places[part] for part in parts])
    return found


def operators(path: str | Path) -> int:
    """How many operators the file has."""
    return sum(len(graph.operators) for graph in read(path).subgraphs)


def read(path: str | Path) -> Any:
    """The model as plain objects. Raises :class:`EquivalenceError`."""
    from ai_edge_litert import schema_py_generated as schema

    content = Path(path).read_bytes()
    try:
        if content[4:8] != IDENTIFIER:
            raise ValueError("it does not begin as a model does")
        return schema.ModelT.InitFromPackedBuf(content, 0)
    except Exception as error:  # flatbuffers raise whatever reading wild offsets gives
        raise EquivalenceError(f"litert: the file cannot be read: {str(error).splitlines()[0][:200]}") from error


def _bytes(buffer: Any, content: bytes) -> bytes:
    """Of a constant: inside of the flatbuffer, or behind it, where files that may grow above 2 GB have them."""
    if buffer.data is not None and len(buffer.data):
        return np.asarray(buffer.data, np.uint8).tobytes()
    return content[buffer.offset : buffer.offset + buffer.size] if buffer.offset > 1 else b""


def free_reshapes(path: Path, content: bytes) -> bool:
    """Let every RESHAPE take its first size from its input, in place; whether there was one that did not.

    A converter that knows the batch writes it into their constants, where -1 means the size that is left.
    """
    from ai_edge_litert import schema_py_generated as schema

    changed, writable = False, bytearray(content)
    model = schema.Model.GetRootAs(writable)
    codes = [model.OperatorCodes(place) for place in range(model.OperatorCodesLength())]
    for graph in (model.Subgraphs(place) for place in range(model.SubgraphsLength())):
        for operator in (graph.Operators(place) for place in range(graph.OperatorsLength())):
            if _kind(codes[operator.OpcodeIndex()]) != RESHAPE or operator.InputsLength() < 2:
                continue
            buffer = model.Buffers(graph.Tensors(operator.Inputs(1)).Buffer())
            if buffer.DataLength() >= 8:
                shape = buffer.DataAsNumpy().view("<i4")  # of the bytes themselves
                if shape[0] > 0 and (shape[1:] > 0).all():
                    shape[0], changed = -1, True
    if changed:
        path.write_bytes(bytes(writable))
    return changed


def _kind(code: Any) -> int:
    """Codes up to 126 may stand in the older of the two fields alone."""
    return max(code.BuiltinCode(), code.DeprecatedBuiltinCode())


def kind_names(model: Any) -> list[str]:
    """The kinds of operators, "CONV_2D", by the number that operators have for them."""
    from ai_edge_litert import schema_py_generated as schema

    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
    return [names.get(code, str(code)) for code in _kinds(model)]


def _kinds(model: Any) -> list[int]:
    return [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]


def _sources(model: Any, graph: Any) -> dict[int, int]:
    """Of the tensors that a DEQUANTIZE made: what it read."""
    kinds = _kinds(model)
    return {int(each.outputs[0]): int(each.inputs[0]) for each in graph.operators if kinds[each.opcodeIndex] == DEQUANTIZE}


def _roles(model: Any, graph: Any) -> dict[int, int]:
    """Of the tensors that are kernels: the operator that reads them, also through a DEQUANTIZE."""
    kinds, sources = _kinds(model), _sources(model, graph)
    found: dict[int, int] = {}
    for each in graph.operators:
        if kinds[each.opcodeIndex] in KERNELS:
            place = int(each.inputs[1])
            found[sources.get(place, place)] = kinds[each.opcodeIndex]
    return found


def _bounds(model: Any, graph: Any) -> dict[int, int]:
    """Of the constants that bound values from below or above: the operator that reads them, where only one kind does."""
    kinds, readers = _kinds(model), dict[int, set[int]]()
    for each in graph.operators:
        for place in each.inputs:
            readers.setdefault(int(place), set()).add(kinds[each.opcodeIndex])
    return {place: min(found) for place, found in readers.items() if len(found) == 1 and found <= {MAXIMUM, MINIMUM}}


def _groups(model: Any, graph: Any) -> list[list[int]]:
    """Kernels of transposed convolutions whose results are concatenated: the parts of a grouped one."""
    kinds, sources = _kinds(model), _sources(model, graph)
    kernels = {
        int(each.outputs[0]): sources.get(int(each.inputs[1]), int(each.inputs[1]))
        for each in graph.operators if kinds[each.opcodeIndex] == TRANSPOSE_CONV
    }  # fmt: skip
    joined = [[int(place) for place in each.inputs] for each in graph.operators if kinds[each.opcodeIndex] == CONCATENATION]
    return [[kernels[place] for place in places] for places in joined if all(place in kernels for place in places)]


def _as_pytorch(values: np.ndarray, kind: int | None) -> np.ndarray:
    if kind is None or values.ndim != 4:
        return values
    if kind == DEPTHWISE_CONV_2D:  # [1, kH, kW, out] to [out, 1, kH, kW]
        return values.transpose(3, 0, 1, 2)
    values = values.transpose(0, 3, 1, 2)
    return values.swapaxes(0, 1) if kind == TRANSPOSE_CONV else values


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)

"""What a ``.tflite`` file holds: its constants as PyTorch has them, and what it computes in.

Kernels are channels last, ``[out, kH, kW, in/g]``, and depthwise ones ``[1, kH, kW, out]``. A half weight passes a DEQUANTIZE in
front of its operator (TensorFlow's ``lite/schema/schema.fbs``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from foldexport.errors import EquivalenceError

IDENTIFIER = b"TFL3"
TYPES = {number: np.dtype(kind) for number, kind in {0: "<f4", 1: "<f2", 2: "<i4", 4: "<i8", 6: "?", 9: "i1", 10: "<f8"}.items()}
CONCATENATION, CONV_2D, DEPTHWISE_CONV_2D, DEQUANTIZE, FULLY_CONNECTED, TRANSPOSE_CONV = 2, 3, 4, 6, 9, 67
ADD, MUL, SUB, MAXIMUM, MINIMUM = 0, 18, 41, 55, 57
NO_BOUND = {MAXIMUM: np.finfo("<f4").min, MINIMUM: np.finfo("<f4").max}  # as the converter writes an infinite one
KERNELS = (CONV_2D, DEPTHWISE_CONV_2D, TRANSPOSE_CONV)  # each reads its kernel as its second input
BIASES = {CONV_2D: (2, 0), DEPTHWISE_CONV_2D: (2, 3), FULLY_CONNECTED: (2, 0), TRANSPOSE_CONV: (3, 0)}  # input; kernel's axis
BROADCASTING = (ADD, MUL, SUB, MAXIMUM, MINIMUM)
LONGEST = 2**20  # elements of a vector that is stored as one number


def weights(path: str | Path) -> dict[str, np.ndarray]:
    """Every constant of the file by its name there and its place. Raises :class:`EquivalenceError` for one that is no model."""
    model, content = read(path), Path(path).read_bytes()
    found: dict[str, np.ndarray] = {}
    for number, graph in enumerate(model.subgraphs):
        first = f"{number}/" if number else ""  # of a body of an operator
        held = dict(_constants(model, graph, content))
        found.update((f"{first}{place}.{_text(graph.tensors[place].name)}", values) for place, values in held.items())
        for parts in _groups(model, graph):
            if all(part in held for part in parts):
                found[f"{first}{'+'.join(map(str, parts))}."] = np.concatenate([held[part] for part in parts])
        for place, sizes in _splats(model, graph, held).items():
            found.update((f"{first}{place}*{size}.", np.full(size, held[place].reshape(()))) for size in sorted(sizes))
        found.update((f"{first}{place}-.", np.zeros(size, "<f4")) for place, size in _without_bias(model, graph).items())
    return found


def _constants(model: Any, graph: Any, content: bytes) -> Iterator[tuple[int, np.ndarray]]:
    """(place, values in PyTorch's order) of a graph's constants."""
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
        yield place, np.ascontiguousarray(_as_pytorch(values, roles.get(place)))


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


def kind_names(model: Any) -> list[str]:
    """The kinds of operators, "CONV_2D", by the number that operators have for them."""
    from ai_edge_litert import schema_py_generated as schema

    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
    return [names.get(code, str(code)) for code in kinds_of(model)]


def kinds_of(model: Any) -> list[int]:
    return [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]


def _sources(model: Any, graph: Any) -> dict[int, int]:
    """Of the tensors that a DEQUANTIZE made: what it read."""
    kinds = kinds_of(model)
    return {int(each.outputs[0]): int(each.inputs[0]) for each in graph.operators if kinds[each.opcodeIndex] == DEQUANTIZE}


def _roles(model: Any, graph: Any) -> dict[int, int]:
    """Of the tensors that are kernels: the operator that reads them, also through a DEQUANTIZE."""
    kinds, sources = kinds_of(model), _sources(model, graph)
    found: dict[int, int] = {}
    for each in graph.operators:
        if kinds[each.opcodeIndex] in KERNELS:
            place = int(each.inputs[1])
            found[sources.get(place, place)] = kinds[each.opcodeIndex]
    return found


def _bounds(model: Any, graph: Any) -> dict[int, int]:
    """Of the constants that bound values from below or above: the operator that reads them, where only one kind does."""
    kinds, readers = kinds_of(model), dict[int, set[int]]()
    for each in graph.operators:
        for place in each.inputs:
            readers.setdefault(int(place), set()).add(kinds[each.opcodeIndex])
    return {place: min(found) for place, found in readers.items() if len(found) == 1 and found <= {MAXIMUM, MINIMUM}}


def _groups(model: Any, graph: Any) -> list[list[int]]:
    """Kernels of transposed convolutions whose results are concatenated: the parts of a grouped one."""
    kinds, sources = kinds_of(model), _sources(model, graph)
    kernels = {
        int(each.outputs[0]): sources.get(int(each.inputs[1]), int(each.inputs[1]))
        for each in graph.operators if kinds[each.opcodeIndex] == TRANSPOSE_CONV
    }  # fmt: skip
    joined = [[int(place) for place in each.inputs] for each in graph.operators if kinds[each.opcodeIndex] == CONCATENATION]
    return [[kernels[place] for place in places] for places in joined if all(place in kernels for place in places)]


def _splats(model: Any, graph: Any, constants: dict[int, np.ndarray]) -> dict[int, set[int]]:
    """Of the constants of one number that a channel-wise operator reads: the lengths of the vectors that it may stand for.

    The converter stores a vector of equal values as one. It is read beside a tensor that has as many channels, first or last,
    or that is as long without its batch (a norm over all of it); or has them once it is broadcast or reshaped (a group norm).
    """
    kinds, sources, made = kinds_of(model), _sources(model, graph), dict[int, set[int]]()
    for each in graph.operators:
        for place in each.inputs:
            made.setdefault(int(place), set()).update(map(int, each.outputs[:1]))
    found: dict[int, set[int]] = {}
    for each in graph.operators:
        for place in {sources.get(int(place), int(place)) for place in each.inputs}:
            single = place in constants and constants[place].size == 1 and constants[place].dtype.kind == "f"
            if single and kinds[each.opcodeIndex] in BROADCASTING:
                result = int(each.outputs[0])
                lengths = (_lengths(graph.tensors[one]) for one in (result, *made.get(result, ())))
                found.setdefault(place, set()).update(*lengths)
    return found


def _without_bias(model: Any, graph: Any) -> dict[int, int]:
    """Of the layers without a bias, by the place of their kernel: how many zeros that stands for; the converter drops them."""
    found, kinds = {}, kinds_of(model)
    for each in graph.operators:
        at, axis = BIASES.get(kinds[each.opcodeIndex], (0, 0))
        shape = graph.tensors[int(each.inputs[1])].shape if at else None
        if shape is not None and (len(each.inputs) <= at or each.inputs[at] < 0):
            found[int(each.inputs[1])] = int(shape[axis])
    return found


def _lengths(tensor: Any) -> set[int]:
    shape = [] if tensor.shape is None else [int(size) for size in tensor.shape]
    return {size for size in (*shape[1:2], *shape[-1:], int(np.prod(shape[1:]))) if len(shape) > 1 and 1 < size <= LONGEST}


def _as_pytorch(values: np.ndarray, kind: int | None) -> np.ndarray:
    if kind is None or values.ndim != 4:
        return values
    if kind == DEPTHWISE_CONV_2D:  # [1, kH, kW, out] to [out, 1, kH, kW]
        return values.transpose(3, 0, 1, 2)
    values = values.transpose(0, 3, 1, 2)
    return values.swapaxes(0, 1) if kind == TRANSPOSE_CONV else values


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)

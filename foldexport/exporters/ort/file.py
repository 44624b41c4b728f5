"""What is in an ``.ort`` file, read with the FlatBuffers classes that onnxruntime ships for its own tools.

The file is one table of four: the version of onnxruntime, the model, and the resolver, which says which types select a kernel
(``InferenceSession`` of onnxruntime's schema ``ort.fbs``). A FlatBuffer grows from its end, and offsets count from there: the
model is written first, so it is the end of the file, and the resolver, in the order of a hash table, lies before it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flatbuffers  # comes with onnxruntime
import numpy as np

from foldexport.errors import EquivalenceError

#: ``TensorDataType`` of ort.fbs, which numbers types as ONNX does.
KINDS = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64",
}  # fmt: skip


ALIGNMENT_BYTES = 64  # at least that of the weights in the file


@dataclass(frozen=True)
class OrtFile:
    """nodes: (kind, names that it reads) in the file's order. initializers: by name."""

    nodes: list[tuple[str, list[str]]]
    initializers: dict[str, np.ndarray]


def read(path: str | Path) -> OrtFile:
    """Raises :class:`EquivalenceError` for a file of another format."""
    graph = model(Path(path)).Graph()
    nodes = [graph.Nodes(place) for place in range(graph.NodesLength())]
    tensors = [graph.Initializers(place) for place in range(graph.InitializersLength())]
    return OrtFile(
        [(each.OpType().decode(), [each.Inputs(place).decode() for place in range(each.InputsLength())]) for each in nodes],
        {each.Name().decode(): _values(each) for each in tensors if each.DataType() in KINDS},
    )


def model(path: Path) -> Any:
    """The table ``Model`` of the file. Raises :class:`EquivalenceError` for a file of another format."""
    content = path.read_bytes()
    sessions = _schema("InferenceSession").InferenceSession
    if len(content) < 8 or not sessions.InferenceSessionBufferHasIdentifier(content, 0):
        raise EquivalenceError(f"ort: {path.name} is not in onnxruntime's format.")
    return sessions.GetRootAs(content, 0).Model()


def element_type(value: Any) -> int:
    """Of a value that is a tensor its ``TensorDataType``; 0 where the file does not say."""
    kind = value.Type()
    if kind is None or kind.ValueType() != _schema("TypeInfoValue").TypeInfoValue.tensor_type:
        return 0
    tensor, held = _schema("TensorTypeAndShape").TensorTypeAndShape(), kind.Value()
    tensor.Init(held.Bytes, held.Pos)
    return tensor.ElemType()


def _values(tensor: Any) -> np.ndarray:
    shape = [tensor.Dims(place) for place in range(tensor.DimsLength())]
    raw = tensor.RawDataAsNumpy() if tensor.RawDataLength() else np.empty(0, np.uint8)
    return np.frombuffer(raw.tobytes(), KINDS[tensor.DataType()]).reshape(shape)


def canonical(content: bytes) -> bytes:
    """The same file with the resolver written anew, in the order of its keys: equal models give equal bytes."""
    session = _schema("InferenceSession").InferenceSession.GetRootAs(content, 0)
    model = session.Model()._tab
    start = min(model.Pos, model.Pos - model.Get(flatbuffers.number_types.SOffsetTFlags, model.Pos))  # its vtable may lie before it
    builder = flatbuffers.Builder(0)
    builder.Bytes = bytearray(content[start:])
    builder.head, builder.minalign = 0, ALIGNMENT_BYTES
    resolver = _resolver(builder, session.KernelTypeStrResolver())
    version = builder.CreateString(session.OrtVersion())
    fields = _schema("InferenceSession")
    fields.InferenceSessionStart(builder)
    fields.InferenceSessionAddOrtVersion(builder, version)
    fields.InferenceSessionAddModel(builder, len(content) - model.Pos)
    fields.InferenceSessionAddKernelTypeStrResolver(builder, resolver)
    builder.Finish(fields.InferenceSessionEnd(builder), file_identifier=content[4:8])
    return bytes(builder.Output())


def _resolver(builder: flatbuffers.Builder, old: Any) -> int:
    """Operators in the order of their keys, and per operator its types; readers look both up by bisection."""
    operators = []
    for entry in sorted(_all(old.OpKernelTypeStrArgs, old.OpKernelTypeStrArgsLength()), key=lambda each: each.OpId()):
        types = []
        for each in sorted(_all(entry.KernelTypeStrArgs, entry.KernelTypeStrArgsLength()), key=lambda each: each.KernelTypeStr()):
            arguments = [
                _table(builder, "ArgTypeAndIndex", ArgType=argument.ArgType(), Index=argument.Index())
                for argument in _all(each.Args, each.ArgsLength())
            ]
            name, held = builder.CreateString(each.KernelTypeStr()), _vector(builder, arguments)
            types.append(_table(builder, "KernelTypeStrArgsEntry", KernelTypeStr=name, Args=held))
        name, held = builder.CreateString(entry.OpId()), _vector(builder, types)
        operators.append(_table(builder, "OpIdKernelTypeStrArgsEntry", OpId=name, KernelTypeStrArgs=held))
    return _table(builder, "KernelTypeStrResolver", OpKernelTypeStrArgs=_vector(builder, operators))


def _all(at: Callable[[int], Any], count: int) -> list[Any]:
    return [at(place) for place in range(count)]


def _table(builder: flatbuffers.Builder, kind: str, **fields: int) -> int:
    schema = _schema(kind)
    getattr(schema, f"{kind}Start")(builder)
    for name, value in fields.items():
        getattr(schema, f"{kind}Add{name}")(builder, value)
    return getattr(schema, f"{kind}End")(builder)


def _vector(builder: flatbuffers.Builder, offsets: Iterable[int]) -> int:
    offsets = list(offsets)
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return builder.EndVector()


def _schema(kind: str) -> Any:
    """The module of a table. The package puts its own folder on the path to import it, which is taken off again."""
    before = list(sys.path)
    try:
        import onnxruntime.tools.ort_format_model  # noqa: F401 - makes the next import possible

        return importlib.import_module(f"ort_flatbuffers_py.fbs.{kind}")
    finally:
        sys.path[:] = before

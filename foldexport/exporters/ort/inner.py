"""Inner values of an ``.ort`` file: its nodes, attributes and weights as an ONNX model, run by onnxruntime as they stand.

A file of this format is optimised already; the model here has the same operators, onnxruntime's own among them, and no others.
"""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx

from foldexport.exporters.inner import Inner
from foldexport.exporters.onnx import inner as onnx_inner
from foldexport.exporters.ort import file as ort_file

NAMED = frozenset({"FusedConv", "FusedGemm"})  # have an attribute that says which
WITH_BIAS = frozenset({"BiasGelu", "FastGelu"})


def inner(path: str | Path, session: Callable[[bytes], Any]) -> Inner:
    """The file's operators. session: an inference session of a serialised model, with its nodes as they are."""
    return onnx_inner.inner_of(model(path), session, _fused)


def _fused(node: onnx.NodeProto) -> str:
    if node.op_type in NAMED:
        return next((each.s.decode() for each in node.attribute if each.name == "activation"), "")
    return "gelu" if node.op_type in WITH_BIAS and len(node.input) > 1 else ""


def model(path: str | Path) -> onnx.ModelProto:
    """The file as an ONNX model. Raises :class:`EquivalenceError` for a file of another format."""
    read = ort_file.model(Path(path))
    versions = {_text(each.Domain()): each.Version() for each in _all(read, "OpsetImport")}
    graph = _graph(read.Graph())
    return onnx.helper.make_model(
        graph, ir_version=read.IrVersion(), opset_imports=[onnx.helper.make_opsetid(*each) for each in versions.items()]
    )


def _graph(graph: Any) -> onnx.GraphProto:
    """Nodes in an order in which they can run, which the file's is not."""
    kinds = {_text(each.Name()): ort_file.element_type(each) for each in _all(graph, "NodeArgs")}
    weights = [_tensor(each) for each in _all(graph, "Initializers")]
    held = {each.name for each in weights}
    ends = [[_text(name) for name in _all(graph, kind)] for kind in ("Inputs", "Outputs")]
    inputs, outputs = ([onnx.helper.make_tensor_value_info(name, kinds.get(name, 0), None) for name in names] for names in ends)
    nodes = list(_sorted([_node(each) for each in _all(graph, "Nodes")]))
    return onnx.helper.make_graph(nodes, "network", [each for each in inputs if each.name not in held], outputs, weights)


def _node(node: Any) -> onnx.NodeProto:
    made = onnx.NodeProto(name=_text(node.Name()), op_type=_text(node.OpType()), domain=_text(node.Domain()))
    made.input.extend(_text(name) for name in _all(node, "Inputs"))
    made.output.extend(_text(name) for name in _all(node, "Outputs"))
    made.attribute.extend(_attribute(each) for each in _all(node, "Attributes"))
    return made


def _attribute(attribute: Any) -> onnx.AttributeProto:
    kinds = onnx.AttributeProto
    kind = attribute.Type()  # numbered as in ONNX
    made = kinds(name=_text(attribute.Name()), type=kind)
    if kind == kinds.FLOAT:
        made.f = attribute.F()
    elif kind == kinds.INT:
        made.i = attribute.I()
    elif kind == kinds.STRING:
        made.s = attribute.S() or b""
    elif kind == kinds.TENSOR:
        made.t.CopyFrom(_tensor(attribute.T()))
    elif kind == kinds.GRAPH:
        made.g.CopyFrom(_graph(attribute.G()))
    elif kind in (kinds.FLOATS, kinds.INTS, kinds.STRINGS):
        name = {kinds.FLOATS: "Floats", kinds.INTS: "Ints", kinds.STRINGS: "Strings"}[kind]
        getattr(made, name.lower()).extend(_all(attribute, name))
    else:
        raise ValueError(f"attribute {made.name!r} is of kind {kind}, which is not read here")
    return made


def _tensor(tensor: Any) -> onnx.TensorProto:
    made = onnx.TensorProto(name=_text(tensor.Name()), dims=_all(tensor, "Dims"), data_type=tensor.DataType())
    if tensor.DataType() == onnx.TensorProto.STRING:
        made.string_data.extend(_all(tensor, "StringData"))
    else:
        made.raw_data = tensor.RawDataAsNumpy().tobytes() if tensor.RawDataLength() else b""
    return made


def _sorted(nodes: list[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    made = {name: place for place, node in enumerate(nodes) for name in node.output if name}
    reads = {place: {made[name] for name in _reads(node) if name in made} for place, node in enumerate(nodes)}
    return (nodes[place] for place in graphlib.TopologicalSorter(reads).static_order())


def _reads(node: onnx.NodeProto) -> Iterable[str]:
    """Also what graphs inside of it read."""
    inside = [other for each in node.attribute for other in each.g.node]
    return [*node.input, *(name for other in inside for name in _reads(other))]


def _all(table: Any, name: str) -> list[Any]:
    return [getattr(table, name)(place) for place in range(getattr(table, f"{name}Length")())]


def _text(value: bytes | None) -> str:
    return (value or b"").decode()

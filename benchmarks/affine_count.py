"""Counts the affine operators of a network that run at each inference: one rule for ONNX graphs and for OpenVINO's models.

Counted, each where its result depends on the network's input:
  norms    batch norm on stored statistics
  scales   × or ÷ by a floating-point constant, or a change of sign     (a constant: one number, or one for each position of
  shifts   + or − of a constant                                          one axis; learned tables of positions are none)
  weights  convolutions and matrix products whose weights are computed by arithmetic on constants instead of stored
A scale read by a shift alone is one operator with it, as the two halves of a batch norm are. A shift of a convolution or a
matrix product without bias is its bias, and scales and shifts behind a normalisation are its own: neither is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

NORMS = frozenset({"BatchNormalization", "BatchNormInference"})
SCALES = frozenset({"Mul", "Div", "Neg", "Multiply", "Divide", "Negative"})
SHIFTS = frozenset({"Add", "Sub", "Subtract"})
CONVS = frozenset({"Conv", "ConvTranspose", "Convolution", "GroupConvolution", "ConvolutionBackpropData",
                   "GroupConvolutionBackpropData"})  # fmt: skip
PRODUCTS = CONVS | {"MatMul", "Gemm"}
NORMALISATIONS = frozenset({"MVN", "GroupNormalization", "LayerNormalization", "InstanceNormalization", "RMS"})
MOVES = frozenset({"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Cast", "CastLike", "Convert", "Expand", "Broadcast",
                   "Slice", "Split", "Concat", "Gather"})  # fmt: skip
VIEWS = frozenset({"Transpose", "Reshape", "Flatten", "Unsqueeze", "Squeeze", "Identity", "Cast", "CastLike", "Convert", "Expand",
                   "Broadcast", "Parameter", "Result"})  # fmt: skip
CONSTANT = frozenset({"Constant", "Shape", "ShapeOf", "Size"})  # a shape is no value of the data


@dataclass(frozen=True)
class Node:
    """An operator: its values' names. sizes: of each input where known, without ones. floating: whether its result is."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: tuple[tuple[int, ...] | None, ...]
    floating: bool = True


def count(nodes: Iterable[Node], stored: Iterable[str]) -> dict[str, int]:
    """Affine operators by kind; ``nodes`` in the order of the data, ``stored``: names of the constants' values."""
    nodes = list(nodes)
    constants, computed = _constants(nodes, stored)
    maker = {name: node for node in nodes for name in node.outputs}
    readers = Counter(name for node in nodes for name in set(node.inputs))
    found: Counter[str] = Counter()
    for node in nodes:
        if node.outputs and node.outputs[0] in constants:
            continue
        if node.op in PRODUCTS and any(name in computed for name in node.inputs[1:2]):
            found["weights"] += 1
        kind = _kind(node, constants)
        if kind and not (kind != "norms" and _belongs(node, kind, maker, readers, constants)):
            found[kind] += 1
    return {kind: found[kind] for kind in ("norms", "scales", "shifts", "weights")}


def operators(nodes: Iterable[Node], stored: Iterable[str]) -> int:
    """Operators that run on the data at each inference, views and the biases of layers aside, and computed weights."""
    nodes = list(nodes)
    constants, computed = _constants(nodes, stored)
    maker = {name: node for node in nodes for name in node.outputs}
    readers = Counter(name for node in nodes for name in set(node.inputs))
    running = [node for node in nodes if not (node.outputs and node.outputs[0] in constants) and node.op not in VIEWS]
    biases = sum(_kind(node, constants) == "shifts" and _is_bias(node, maker, readers, constants) for node in running)
    weights = sum(node.op in PRODUCTS and any(name in computed for name in node.inputs[1:2]) for node in running)
    return len(running) - biases + weights


def _constants(nodes: list[Node], stored: Iterable[str]) -> tuple[set[str], set[str]]:
    """Names of the values that depend on constants only, and of those among them that arithmetic made."""
    constants, computed = set(stored), set()
    for node in nodes:
        known = [name for name in node.inputs if name in constants]
        like = node.op == "CastLike" and node.inputs[0] in constants  # of its second operand only the type is read
        if node.op in CONSTANT or like or (known and len(known) == len(node.inputs)):
            constants.update(node.outputs)
            if node.op not in CONSTANT and (node.op not in MOVES or any(name in computed for name in known)):
                computed.update(node.outputs)
    return constants, computed


def _kind(node: Node, constants: set[str]) -> str | None:
    if node.op in NORMS:
        return "norms"
    if not node.floating or node.op not in SCALES | SHIFTS:
        return None
    if node.op in ("Neg", "Negative"):
        return "scales"
    varied = [at for at, name in enumerate(node.inputs) if name not in constants]
    if len(varied) != 1 or (node.op in ("Div", "Divide") and varied != [0]):
        return None
    size = node.sizes[1 - varied[0]]
    if size is not None and len(size) > 1:
        return None
    return "scales" if node.op in SCALES else "shifts"


def _belongs(node: Node, kind: str, maker: Mapping[str, Node], readers: Counter, constants: set[str]) -> bool:
    """Whether an affine is a part of the operator that it reads, which nothing else reads."""
    source = next((name for name in node.inputs if name not in constants), None)
    before = maker.get(source)
    if before is None or readers[source] > 1:
        return False
    if before.op in NORMALISATIONS:
        return True
    if kind == "shifts" and _kind(before, constants) == "scales":
        return True  # counted there, or a normalisation's own
    return kind == "shifts" and _is_bias(node, maker, readers, constants)


def _is_bias(node: Node, maker: Mapping[str, Node], readers: Counter, constants: set[str]) -> bool:
    """Whether a shift is the bias of a convolution or a matrix product that has none and that nothing else reads."""
    source = next((name for name in node.inputs if name not in constants), None)
    before = maker.get(source)
    if before is None or readers[source] > 1 or before.op not in PRODUCTS:
        return False
    return len(before.inputs) == 2 and before.inputs[1] in constants


def of_onnx(model) -> dict[str, int]:
    """Affine operators of an ONNX graph without subgraphs."""
    return count(onnx_nodes(model), [each.name for each in model.graph.initializer])


def onnx_nodes(model) -> list[Node]:
    """The nodes of an ONNX graph without subgraphs."""
    import onnx

    graph = model.graph
    sizes = {each.name: tuple(each.dims) for each in graph.initializer}
    types = {each.name: each.data_type for each in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
        if value.type.tensor_type.HasField("shape"):
            sizes.setdefault(value.name, tuple(dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                sizes[node.output[0]], types[node.output[0]] = tuple(attribute.t.dims), attribute.t.data_type
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    return [
        Node(node.op_type, names := tuple(name for name in node.input if name), tuple(node.output),
             tuple(_without_ones(sizes.get(name)) for name in names),
             all(types[name] in floats for name in names if name in types))
        for node in graph.node
    ]  # fmt: skip


def of_openvino(model) -> dict[str, int]:
    """Affine operators of an ``openvino.Model``."""
    return count(openvino_nodes(model), ())


def openvino_nodes(model) -> list[Node]:
    """The operators of an ``openvino.Model``."""
    read = []
    for op in model.get_ordered_ops():
        ins = op.inputs()
        read.append(Node(
            op.get_type_name(), tuple(_name(each.get_source_output()) for each in ins), tuple(_name(each) for each in op.outputs()),
            tuple(_without_ones(tuple(s.get_length() if s.is_static else 2 for s in each.get_partial_shape())) for each in ins),
            not op.outputs() or op.output(0).get_element_type().is_real(),
        ))  # fmt: skip
    return read


def _name(output) -> str:
    return f"{output.get_node().get_name()}:{output.get_index()}"


def _without_ones(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if shape is None else tuple(size for size in shape if size != 1)

"""Number types in an ONNX file: which its layers compute in, and how onnxruntime's CPU runs bfloat16.

onnxruntime's CPU provider has no bfloat16 convolution, so a bfloat16 graph is run there with each operator in float32 and each of
its results rounded to bfloat16 by onnxruntime's own Cast: values are those of the file, sums are float32, as in hardware.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OLDEST_BFLOAT16 = 22  # the first opset whose Conv, pools and ConvTranspose take bfloat16
LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
QUANTISED = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
NAMES = {
    TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16", TensorProto.DOUBLE: "float64",
}  # fmt: skip
EIGHT_BITS = (TensorProto.INT8, TensorProto.UINT8)


def layers_by_type(path: str | Path) -> dict[str, int]:
    """Convolutions and matrix products of a file by the type of their result: ``{"float16": 20, "float32": 1}``.

    "int8": both operands come straight out of a DequantizeLinear of 8-bit integers.
    """
    model = onnx.load(str(path), load_external_data=False)
    kinds = value_types(model)
    made = {name: node for node in _nodes(model.graph) for name in node.output}
    counts: Counter[str] = Counter()
    for node in _nodes(model.graph):
        if node.op_type in QUANTISED:
            counts["int8"] += 1
        elif node.op_type in LAYERS:
            eight = all(_dequantised(name, made, kinds) for name in node.input[:2])
            counts["int8" if eight else NAMES.get(kinds.get(node.output[0], 0), "unknown")] += 1
    return dict(counts)


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value of the graph, by name."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    found = {each.name: each.type.tensor_type.elem_type for each in (*graph.value_info, *graph.input, *graph.output)}
    return found | {each.name: each.data_type for each in graph.initializer}


def _dequantised(name: str, made: dict[str, onnx.NodeProto], kinds: dict[str, int]) -> bool:
    node = made.get(name)
    return node is not None and node.op_type == "DequantizeLinear" and kinds.get(node.input[0]) in EIGHT_BITS


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def has_bfloat16(model: onnx.ModelProto) -> bool:
    return any(each.data_type == TensorProto.BFLOAT16 for each in model.graph.initializer)


def runnable(model: onnx.ModelProto) -> onnx.ModelProto:
    """The bfloat16 graph for a runtime without bfloat16 operators: float32 operators, results rounded to bfloat16."""
    kinds = value_types(model)
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    del graph.value_info[:]
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(_widened(tensor))
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += _rounding(node, [name for name in node.output if kinds.get(name) == TensorProto.BFLOAT16])
    del graph.node[:]
    graph.node.extend(nodes)
    return wide


def _widened(tensor: TensorProto) -> TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def _rounding(node: onnx.NodeProto, halves: list[str]) -> list[onnx.NodeProto]:
    """The node in float32, and behind it two casts for each bfloat16 result."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for attribute in copy.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.BFLOAT16:
            attribute.t.CopyFrom(_widened(attribute.t))
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
            attribute.i = TensorProto.FLOAT
    result = [copy]
    for place, name in enumerate(copy.output):
        if name in halves:
            copy.output[place] = f"{name}.float32"
            result.append(helper.make_node("Cast", [f"{name}.float32"], [f"{name}.bfloat16"], to=TensorProto.BFLOAT16))
            result.append(helper.make_node("Cast", [f"{name}.bfloat16"], [name], to=TensorProto.FLOAT))
    return result

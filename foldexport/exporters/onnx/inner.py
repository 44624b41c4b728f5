"""Inner values of an ONNX file: further outputs of a copy in memory, run by onnxruntime without its optimisations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from foldexport.exporters.inner import Inner, Row, operators_of
from foldexport.exporters.onnx import types as onnx_types

PASSING = frozenset({"Identity", "Cast", "Dropout"})
SIZES = frozenset({"Shape", "Size"})


def inner(path: str | Path, session: Callable[[bytes], Any]) -> Inner:
    """The file's operators. session: an inference session of a serialised model, with its nodes as they are.

    Raises ValueError where the weights lie in a file of their own: no copy of gigabytes is made.
    """
    return inner_of(onnx.load(str(path), load_external_data=False), session)


def inner_of(
    model: onnx.ModelProto, session: Callable[[bytes], Any], fused: Callable[[onnx.NodeProto], str] = lambda node: ""
) -> Inner:
    """The model's operators. fused: the activation that is a part of a node. Raises as `inner`."""
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise ValueError("the weights lie in a file of their own")
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in weights]
    rows = (_row(node, weights, fused) for node in model.graph.node)
    operators, known = operators_of(inputs, rows, passing=PASSING, sizes=SIZES)
    runnable = onnx_types.runnable(model) if onnx_types.has_bfloat16(model) else model
    ends = list(runnable.graph.output)

    def run(names: Sequence[str], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        there = {each.name for each in ends}
        del runnable.graph.output[:]
        runnable.graph.output.extend(ends)
        runnable.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in there)
        loaded = session(runnable.SerializeToString())
        return loaded.run(list(names), dict(zip(inputs, arrays, strict=True)))

    return Inner(operators, inputs, [known.get(each.name, each.name) for each in ends], run)


def _row(node: onnx.NodeProto, weights: Collection[str], fused: Callable[[onnx.NodeProto], str]) -> Row:
    held = [name for name in node.input if name in weights]
    return Row(node.op_type, node.input, [name for name in node.output if name], held, fused(node))

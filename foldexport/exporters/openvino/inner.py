"""Inner values of an OpenVINO graph: further results of a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from foldexport.exporters.inner import Inner, Row, operators_of
from foldexport.exporters.openvino.importing import openvino as ov

PASSING = frozenset({"Convert"})
SIZES = frozenset({"ShapeOf"})
NOT_OPERATORS = frozenset({"Parameter", "Result", "Constant"})


def inner(model: ov.Model, compiled: Callable[[ov.Model], Any]) -> Inner:
    """The graph's operators; a weight has the name of its constant. compiled: a copy of the graph, ready to run.

    A value is called as its operator and its port, which are those of every copy.
    """
    inputs = [_name(port) for port in model.inputs]
    operators, known = operators_of(inputs, _rows(model), passing=PASSING, sizes=SIZES)

    def run(names: Sequence[str], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        copy = model.clone()
        ports = {_name(port): port for operator in copy.get_ops() for port in operator.outputs()}
        copy.add_results([ov.opset13.result(ov.opset13.convert(ports[name], "f32")) for name in names])
        network = compiled(copy)
        found = network([np.ascontiguousarray(array) for array in arrays])
        return [np.array(found[port]) for port in network.outputs[len(model.outputs) :]]

    ends = [_name(result.input_value(0)) for result in model.get_results()]
    return Inner(operators, inputs, [known.get(name, name) for name in ends], run)


def _rows(model: ov.Model) -> Iterator[Row]:
    for operator in model.get_ordered_ops():
        if operator.get_type_name() in NOT_OPERATORS:
            continue
        reads = [port.get_source_output() for port in operator.inputs()]
        constants = [each.get_node().get_friendly_name() for each in reads if each.get_node().get_type_name() == "Constant"]
        makes = [_name(each) for each in operator.outputs()]
        yield Row(operator.get_type_name(), [_name(each) for each in reads], makes, constants)


def _name(port: Any) -> str:
    return f"{port.get_node().get_friendly_name()}:{port.get_index()}"

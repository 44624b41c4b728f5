"""Inner values of a TorchScript archive: a copy of its graph, inlined, that returns those that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from foldexport.exporters.inner import Inner, Row, operators_of

PASSING = frozenset({"aten::to", "aten::contiguous", "aten::detach", "aten::dropout", "aten::feature_dropout", "aten::clone"})
SIZES = frozenset({"aten::size", "prim::NumToTensor", "aten::Int", "aten::dim"})


def inner(loaded: torch.jit.ScriptModule) -> Inner:
    """The archive's operators; a weight has the name that it has in the state of the module."""
    graph = loaded.inlined_graph
    given = [value.debugName() for value in graph.inputs()][1:]  # the first is the module itself
    operators, known = operators_of(given, _rows(graph), passing=PASSING, sizes=SIZES)
    ends = [value.debugName() for value in graph.outputs()]
    made = {node.output().debugName(): node for node in graph.nodes() if node.outputsSize() == 1}
    if len(ends) == 1 and ends[0] in made and made[ends[0]].kind() in ("prim::TupleConstruct", "prim::ListConstruct"):
        ends = [value.debugName() for value in made[ends[0]].inputs()]
    places = {value.debugName(): place for place, value in enumerate(_values(graph))}  # a copy gives other names

    def run(names: Sequence[str], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        copy = graph.copy()
        values = list(_values(copy))
        wanted = copy.create("prim::ListConstruct", [_kept(copy, values[places[name]]) for name in names], 1)
        wanted.output().setType(torch._C.ListType(torch._C.TensorType.get()))
        copy.appendNode(wanted)
        for place in reversed(range(len(list(copy.outputs())))):
            copy.eraseOutput(place)
        copy.registerOutput(wanted.output())
        torch._C._jit_pass_dce(copy)
        function = torch._C._create_function_from_graph("inner", copy)
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        with torch.inference_mode(), torch.jit.optimized_execution(False):
            return [value.float().numpy(force=True) for value in function(loaded._c, *tensors)]

    return Inner(operators, given, [known.get(name, name) for name in ends], run)


def _kept(graph: torch.Graph, value: torch.Value) -> torch.Value:
    """A copy of a value where it is made, since a later operator may work in place."""
    if not value.type().isSubtypeOf(torch._C.TensorType.get()):
        return value
    clone, none = graph.create("aten::clone", 1), graph.create("prim::Constant", 1)
    none.output().setType(torch._C.NoneType.get())
    clone.addInput(value), clone.addInput(none.output())
    clone.insertAfter(value.node()), none.insertBefore(clone)
    return clone.output()


def _values(graph: torch.Graph) -> Iterator[torch.Value]:
    yield from graph.inputs()
    for node in graph.nodes():
        yield from node.outputs()


def _rows(graph: torch.Graph) -> Iterator[Row]:
    paths = {next(iter(graph.inputs())).debugName(): ""}
    for node in graph.nodes():
        reads = [value.debugName() for value in node.inputs()]
        makes = [value.debugName() for value in node.outputs()]
        if node.kind() == "prim::GetAttr" and reads[0] in paths:
            paths[makes[0]] = f"{paths[reads[0]]}.{node.s('name')}".lstrip(".")
            continue
        yield Row(node.kind(), reads, makes, [paths[name] for name in reads if name in paths])

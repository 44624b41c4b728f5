"""Folded graph → plain nn.Module in float64, one rounding to the user's type at the end.

The module is made of ``torch.nn`` layers under the user's own names: an ``nn.Sequential`` where the graph is a chain, else a
``torch.fx.GraphModule``. Both share their layers with the :class:`Program` that the certificate executes node by node.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from foldexport.fold.emitter import Operand
from foldexport.fold.layers import Buffer, Step, layer_of
from foldexport.fold.names import module_names
from foldexport.fold.passes import FoldedGraph
from foldexport.fold.records import Record
from foldexport.fold.sequential import as_sequential
from foldexport.fold.stored import Stored
from foldexport.interpret import cast


@dataclass(eq=False)
class Program:
    """The folded network in float64, executable node by node.

    records: folded node → the training values that it stores, the one to trust most last.
    labels: folded node → the user's module name.
    """

    module: fx.GraphModule
    records: dict[str, list[Record]]
    labels: dict[str, str]


@dataclass(eq=False)
class Rebuilt:
    """What :func:`rebuild` returns: the program, the user-facing module over the same layers, and operator counts."""

    program: Program
    module: nn.Module
    counts: dict[str, int]

    def to(self, dtype: torch.dtype) -> nn.Module:
        """Round the weights once, to the user's type; casts inside the graph follow."""
        if dtype != torch.float64:
            _retype(self.program.module, dtype)
            if self.module is not self.program.module:
                _round(self.module, dtype)
        return self.module


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A folded module in ``dtype``: itself where all its floating tensors are, else a copy; casts inside it follow."""
    old = {tensor.dtype for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()} - {dtype}
    if not old:
        return module
    module = copy.deepcopy(module)
    for each in old:
        if isinstance(module, fx.GraphModule):
            _retype(module, dtype, each)
    return _round(module, dtype)


def rebuild(folded: FoldedGraph) -> Rebuilt:
    """Build the folded network in float64."""
    steps = {stored: layer_of(stored) for stored in folded.order if stored.kind != "input"}
    names = module_names(folded.order, steps)
    _share_equal(folded.order, steps, names)
    module, nodes = _graph_module(folded, steps, names)
    program = Program(module, _records(folded, nodes), _labels(folded, nodes))
    chain = as_sequential(folded, steps, names)
    result = chain if chain is not None else module
    result.eval()
    module.eval()
    counted = [kind for stored, step in steps.items() if not _is_size(stored) for kind in _kinds(step)]
    return Rebuilt(program, result, dict(Counter(counted)))


def _is_size(stored: Stored) -> bool:
    """Whether it is arithmetic on sizes, which the training graph's count leaves out as well."""
    value = stored.node.meta.get("val") if stored.node is not None else None
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float)


def _kinds(step: Step) -> list[str]:
    if step.kind in ("constant", "identity") or step.kind.startswith("sym_") or step.kind in ("getitem", "call"):
        return []
    return ["pad", step.kind] if step.before is not None else [step.kind]


def _share_equal(order: list[Stored], steps: dict[Stored, Step], names: dict[Stored, str]) -> None:
    """Calls of one shared layer whose folded weights came out equal share one layer again."""
    seen: dict[tuple, list[Stored]] = {}
    for stored in order:
        key = stored.attrs.get("shared") if stored.kind == "conv" else None
        if key is None:
            continue
        for other in seen.setdefault(key, []):
            if _equal_layers(steps[stored].module, steps[other].module):
                steps[stored].module, names[stored] = steps[other].module, names[other]
                break
        else:
            seen[key].append(stored)


def _equal_layers(a: nn.Module, b: nn.Module) -> bool:
    if repr(a) != repr(b):
        return False
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def _graph_module(folded: FoldedGraph, steps, names) -> tuple[fx.GraphModule, dict[Stored, fx.Node]]:
    graph, root, nodes = fx.Graph(), nn.Module(), {}
    input_names = iter(folded.graph.input_names)
    for stored in folded.order:
        if stored.kind == "input":
            nodes[stored] = graph.placeholder(next(input_names))
        else:
            nodes[stored] = _emit(graph, root, stored, steps[stored], names.get(stored, stored.name), nodes)
            nodes[stored].meta["module"] = stored.module  # the user's own, for messages about operators that are no layer
            nodes[stored].meta["kind"] = steps[stored].kind if _kinds(steps[stored]) and not _is_size(stored) else ""
            nodes[stored].meta["origin"] = stored.node.name if stored.node is not None else ""  # in the training graph
    flat = [nodes[o] if isinstance(o, Stored) else o for o in folded.outputs]
    graph.output(_structured(flat, folded.graph.out_spec))
    graph.lint()
    return fx.GraphModule(root, graph, class_name="Folded"), nodes


def _structured(flat: list, spec) -> Any:
    """The outputs in the structure that forward() returns; a flat tuple where fx cannot express it."""
    value = pytree.tree_unflatten(flat, spec)
    return _plain(value) if _expressible(value) else tuple(flat)


def _expressible(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_expressible(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _expressible(item) for key, item in value.items())
    return value is None or isinstance(value, fx.Node | int | float | bool | str)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_plain(item) for item in value)
    return value


def _emit(graph: fx.Graph, root: nn.Module, stored: Stored, step: Step, name: str, nodes: dict) -> fx.Node:
    inputs = [nodes[operand] for operand in dict.fromkeys(stored.inputs)]

    def place(argument: Any) -> Any:
        if isinstance(argument, Operand):
            return inputs[argument.index]
        if isinstance(argument, Buffer):
            path = f"{name}_{argument.name}".replace(".", "_")
            root.register_buffer(path, argument.value.clone())
            return graph.get_attr(path)
        if isinstance(argument, torch.dtype) and argument.is_floating_point:
            return torch.float64
        if isinstance(argument, list | tuple):
            return type(argument)(place(item) for item in argument)
        return argument

    if step.kind == "constant":
        node = place(step.args[0])
    elif step.module is not None:
        if step.before is not None:
            inputs = [_call_layer(graph, root, f"{name}_pad", step.before, inputs[0])]
        node = _call_layer(graph, root, name, step.module, inputs[0])
    else:
        kwargs = {key: place(value) for key, value in step.kwargs.items()}
        node = graph.call_function(step.function, tuple(place(a) for a in step.args), kwargs)
    return node


def _call_layer(graph: fx.Graph, root: nn.Module, path: str, layer: nn.Module, operand: fx.Node) -> fx.Node:
    parent = root
    *folders, leaf = path.split(".")
    for folder in folders:
        if not hasattr(parent, folder):
            parent.add_module(folder, nn.Module())
        parent = getattr(parent, folder)
    if not hasattr(parent, leaf):
        parent.add_module(leaf, layer)
    return graph.call_module(path, (operand,))


def _records(folded: FoldedGraph, nodes: dict[Stored, fx.Node]) -> dict[str, list[Record]]:
    records: dict[str, list[Record]] = {}
    for value, stored, affine, usable in folded.values:
        if stored.kind in ("input", "constant"):
            continue
        records.setdefault(nodes[stored].name, []).append(Record(value.name, affine.scale, affine.shift, usable))
    for stored, record in folded.parts:
        records.setdefault(nodes[stored].name, []).append(record)
    for found in records.values():
        found.sort(key=_trust)
    return records


def _trust(record: Record) -> tuple[bool, bool, bool, float]:
    """Sort key: records of the whole tensor last, of those complete ones, of those the ones closest to ``(1, 0)``."""
    magnitude = record.scale.abs()
    spread = float(magnitude.log().abs().amax()) if bool((magnitude > 0).all()) else float("inf")
    identity = bool((record.scale == 1).all()) and not bool(record.shift.any())
    return record.is_whole, record.usable is None, identity, -spread


def _labels(folded: FoldedGraph, nodes: dict[Stored, fx.Node]) -> dict[str, str]:
    return {nodes[stored].name: stored.module or stored.name for stored in folded.order}


def _retype(module: fx.GraphModule, dtype: torch.dtype, old: torch.dtype = torch.float64) -> None:
    """Weights to ``dtype``, and the casts to ``old`` inside the graph."""
    _round(module, dtype)
    changed = False
    for node in module.graph.nodes:
        if node.op == "call_function" and _mentions(node, old):
            swap = lambda x: dtype if x is old else x  # noqa: E731 - the one rewrite
            node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), swap)
            changed = True
    if changed:
        module.recompile()


def _round(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with its real tensors in ``dtype`` and its complex ones in the complex type of that; ``.to`` would cut them."""
    return module._apply(lambda tensor: cast(tensor, dtype))


def _mentions(node: fx.Node, wanted: torch.dtype) -> bool:
    found: list[bool] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda x: found.append(x is wanted))
    return any(found)

"""The module that is exported in a half type: every layer in it but those that it does not hold, casts in between.

Inputs and outputs stay in float32 (or become half, where asked). An operator runs in the half type where everything that it
reads, holds and makes fits; else in float32. A cast stands wherever a reader works in another type than the value has.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from foldexport.precision.types import NumberType, rounded

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def in_half(
    module: fx.GraphModule, real: Collection[str], kind: NumberType, single: Collection[str] = (), *, half_io: bool = False
) -> fx.GraphModule:
    """A copy of a float64 program in ``kind``.

    real: names of the nodes whose values are real numbers. single: names of the nodes that stay in float32. Weights are rounded
    once, from float64. Names of layers and buffers are kept.
    """
    result = copy.deepcopy(module)
    types = types_of(result, real, kind, single)
    _round_layers(result, types)
    _round_buffers(result, types)
    for node in list(result.graph.nodes):
        if node in types:
            node.meta["works_in"] = types[node]
        if node.op == "call_function" and node in types:
            if node.target is torch.ops.aten.view.default:  # half kernels leave other strides than those that were traced
                node.target = torch.ops.aten.reshape.default
            node.args, node.kwargs = with_type(node, types[node])
    _cast(result.graph, types, torch.float32 if not half_io else kind.dtype)
    result.graph.lint()
    result.recompile()
    return result.eval()


def with_type(node: fx.Node, dtype: torch.dtype) -> tuple[tuple, dict]:
    """The node's arguments, with ``dtype`` for every real type among them."""
    return fx.node.map_aggregate(
        (node.args, node.kwargs), lambda each: dtype if isinstance(each, torch.dtype) and each in FLOATS else each
    )


def types_of(
    module: fx.GraphModule, real: Collection[str], kind: NumberType, single: Collection[str]
) -> dict[fx.Node, torch.dtype]:
    """The type in which each operator on real numbers works; calls of one layer work in one."""
    kept = {node.target for node in module.graph.nodes if node.op == "call_module" and node.name in single}
    types: dict[fx.Node, torch.dtype] = {}
    for node in module.graph.nodes:
        works = node.name in real or any(each in types for each in node.all_input_nodes)
        if node.op in ("call_function", "call_module") and works:
            types[node] = torch.float32 if node.name in single or node.target in kept else kind.dtype
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.name in real:
            readers = {types.get(user, torch.float32) for user in node.users}
            types[node] = torch.float32 if torch.float32 in readers else kind.dtype
    return types


def _round_layers(module: fx.GraphModule, types: dict[fx.Node, torch.dtype]) -> None:
    for node, dtype in types.items():
        if node.op == "call_module":
            layer = module.get_submodule(node.target)
            for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
                if tensor.dtype == torch.float64:
                    _replace(layer, name, rounded(tensor.detach(), dtype))


def _round_buffers(module: fx.GraphModule, types: dict[fx.Node, torch.dtype]) -> None:
    wanted: dict[str, torch.dtype] = {}
    for node, dtype in types.items():
        if node.op == "get_attr":
            wanted[node.target] = torch.float32 if wanted.get(node.target, dtype) == torch.float32 else dtype
    for node in types:
        if node.op == "get_attr":
            types[node] = wanted[node.target]
    for target, dtype in wanted.items():
        if module.get_buffer(target).dtype == torch.float64:
            _replace(module, target, rounded(module.get_buffer(target), dtype))


def _replace(owner: nn.Module, name: str, tensor: Tensor) -> None:
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[name] = tensor


def _cast(graph: fx.Graph, types: dict[fx.Node, torch.dtype], outside: torch.dtype) -> None:
    """Puts casts between values and readers of different types; readers of one type share a cast."""
    real_inputs = {node for node in graph.nodes if node.op == "placeholder" and any(user in types for user in node.users)}
    has = dict(types) | dict.fromkeys(real_inputs, outside)
    for node in list(graph.nodes):
        if node not in has or _holds_list(node):
            continue
        made: dict[torch.dtype, fx.Node] = {}
        for user in list(node.users):
            wanted = outside if user.op == "output" else types.get(user)
            if wanted is None or wanted == has[node]:
                continue
            if wanted not in made:
                with graph.inserting_after(_last_cast(node, made)):
                    made[wanted] = graph.call_method("to", (node, wanted))
            _rewire(user, node, made[wanted])


def _last_cast(node: fx.Node, made: dict[torch.dtype, fx.Node]) -> fx.Node:
    return next(reversed(made.values()), node)


def _holds_list(node: fx.Node) -> bool:
    return bool(node.users) and all(user.target is operator.getitem for user in node.users)


def _rewire(user: fx.Node, old: fx.Node, new: fx.Node) -> None:
    user.replace_input_with(old, new)


class PlainHalf(nn.Module):
    """Any module in a half type, between casts: for networks that were not folded."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, outside: torch.dtype, inputs: int) -> None:
        super().__init__()
        self.network = copy.deepcopy(module).to(dtype)
        self._dtype, self._outside = dtype, outside
        positional = lambda *given: type(self).forward(self, *given)  # noqa: E731 - exporters read the names of its parameters
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        positional.__signature__ = inspect.Signature([inspect.Parameter(f"input_{place}", kind) for place in range(inputs)])
        self.forward = positional

    def forward(self, *inputs: Any) -> Any:
        given = [_to(value, self._dtype) for value in inputs]
        return torch.utils._pytree.tree_map(lambda value: _to(value, self._outside), self.network(*given))


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

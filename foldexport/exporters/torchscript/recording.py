"""What a trace would fix and must not: sizes that a graph reads, and the device of tensors that it makes.

``torch.jit.trace`` records what the Python functions of torch are called with. Through the ATen operators of a graph,
``torch.ops.aten.reshape.default(x, [n, 2, -1])``, it sees a number where the size ``n`` is read from a tensor; through
``torch.reshape`` and ``Tensor.size`` it sees the reading. And it writes the device of every new tensor as a constant, so that
a file made on a CPU would mix devices on a GPU.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from foldexport.errors import UsageError

SIZE = torch.ops.aten.sym_size.int
SLICE = torch.ops.aten.slice.Tensor


def larger(one: Any, other: Any) -> Tensor:
    """``max(one, other)`` of two sizes, as the tensors that a trace takes them for."""
    return torch.maximum(_tensor(one), _tensor(other))


def smaller(one: Any, other: Any) -> Tensor:
    """``min(one, other)`` of two sizes."""
    return torch.minimum(_tensor(one), _tensor(other))


def ceiling(size: Any) -> Tensor:
    """``math.ceil`` of a quotient of sizes."""
    return torch.ceil(_tensor(size))


def floor(size: Any) -> Tensor:
    """``math.floor`` of a quotient of sizes."""
    return torch.floor(_tensor(size))


def _tensor(size: Any) -> Tensor:
    return size if isinstance(size, Tensor) else torch.tensor(size)


#: What a graph computes sizes with, beside Python's operators, that would give a number where a trace needs a tensor.
OF_SIZES = {torch.sym_max: larger, torch.sym_min: smaller, math.ceil: ceiling, math.floor: floor}


def sizes_recorded(module: nn.Module) -> nn.Module:
    """The module itself, or a graph with the same layers that reads its sizes where a trace records them.

    Raises :class:`UsageError` for an operator that takes a size and that no function of torch stands for.
    """
    if not isinstance(module, fx.GraphModule) or not any(node.target is SIZE for node in module.graph.nodes):
        return module
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    sizes: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "output":
            break
        copy = copies[node] = graph.node_copy(node, copies.__getitem__)
        if _is_size(node, sizes):
            sizes.add(node)
        if node.target is SIZE:
            copy.op, copy.target = "call_method", "size"
        elif node in sizes:
            copy.target = _of_sizes(node)
        elif not sizes.isdisjoint(node.all_input_nodes):
            _through_python(copy)
    graph.output(fx.node.map_arg(node.args[0], copies.__getitem__))
    return fx.GraphModule(module, graph, type(module).__name__)


def devices_of_input(traced: torch.jit.ScriptModule) -> None:
    """Make every new tensor of the traced graphs on the device of their first tensor, in place of the exporting machine's."""
    for part in traced.modules():
        graph = part.graph if part._c._has_method("forward") else torch._C.Graph()  # containers have none
        fixed = _device_constants(graph)
        source = next((each for each in graph.inputs() if each.type().kind() == "TensorType"), None) if fixed else None
        if source is None:
            continue
        read = graph.create("prim::device", [source], 1)
        read.output().setType(torch._C.DeviceObjType.get())
        graph.prependNode(read)
        for constant in fixed:
            constant.output().replaceAllUsesWith(read.output())


def _device_constants(graph: torch._C.Graph) -> list[torch._C.Node]:
    return [each for each in graph.findAllNodes("prim::Constant") if each.output().type().kind() == "DeviceObjType"]


def _is_size(node: fx.Node, sizes: set[fx.Node]) -> bool:
    """Whether a node's value is a number that was read from a tensor's shape, or computed from such numbers."""
    if node.target is SIZE:
        return True
    read = node.all_input_nodes
    return bool(read) and node.op == "call_function" and sizes.issuperset(read) and not _is_aten(node.target)


def _of_sizes(node: fx.Node) -> Callable:
    target = OF_SIZES.get(node.target, node.target)
    if target is not node.target or getattr(target, "__module__", "") == operator.add.__module__:
        return target
    raise UsageError(f"torchscript: sizes are computed with {target}, which a trace does not record; use onnx or pt2.")


def _is_aten(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload)


def _through_python(node: fx.Node) -> None:
    """The Python function, or the method, for the ATen operator that a node calls."""
    if node.op != "call_function" or not _is_aten(node.target):
        return
    if node.target is SLICE:
        return _as_brackets(node)
    name = node.target.overloadpacket.__name__
    function = _function(name)
    if function is not None:
        node.target = function
    elif hasattr(Tensor, name):
        node.op, node.target = "call_method", name
    else:
        where = node.meta.get("module") or node.name
        raise UsageError(f"torchscript: `{where}` gives a size to {node.target}, which a trace does not record; use onnx or pt2.")


def _function(name: str) -> Callable | None:
    return next((found for owner in (torch, torch._C._nn) if callable(found := getattr(owner, name, None))), None)


def _as_brackets(node: fx.Node) -> None:
    """``x[:, start:end:step]``; an axis counted from behind as ``x[..., start:end:step, :]``."""
    value, axis, start, end, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    whole = slice(None)
    part = slice(start, end, step)
    index = (*(whole,) * axis, part) if axis >= 0 else (..., part, *(whole,) * (-1 - axis))
    node.target, node.args, node.kwargs = operator.getitem, (value, index), {}

"""Numbers that torch.onnx's optimiser takes for 0 or 1: it drops ``x + c`` for ``|c| ≤ 1e-8`` and ``x·c`` for ``|c − 1| ≤ 1e-5``.

It compares with a tolerance (``onnxscript.rewriter``, rules ``add_0``, ``sub_0``, ``mul_by_1``, ``div_by_1``), but scalars only.
The ε of ``x / (Σ|x| + 1e-8)`` is such a number; without it a black image is 0/0. As vectors of one element they stay.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from foldexport.precision.homogeneous import name_of

NEAR_ZERO, NEAR_ONE = 1e-8, 1e-5
ADDED, MULTIPLIED = ("add", "sub"), ("mul", "div", "truediv")


class _Values(fx.Interpreter):
    """Rank and type of every tensor on the example."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, tuple[int, torch.dtype]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.seen[n] = (value.dim(), value.dtype)
        return value


def kept(module: nn.Module, example: tuple) -> nn.Module:
    """The module with such numbers as vectors of one element: a copy, or itself where it has none or is no graph."""
    places = _places(module)
    if not places:
        return module
    module = copy.deepcopy(module)
    places, values = _places(module), _Values(module)
    with torch.no_grad():
        values.run(*example)
    for number, (node, place, value) in enumerate(places):
        rank, dtype = values.seen.get(node, (0, None))
        if not rank:
            continue  # a vector would make a vector of the result
        name = f"_constant_{number}"
        module.register_buffer(name, torch.tensor([value], dtype=torch.float64).to(dtype))
        with module.graph.inserting_before(node):
            node.update_arg(place, module.graph.get_attr(name))
    module.graph.lint()
    module.recompile()
    return module


def _places(module: nn.Module) -> list[tuple[fx.Node, int, float]]:
    """(operator, place of its argument, number)."""
    if not isinstance(module, fx.GraphModule):
        return []
    found, held = [], dict(module.named_buffers())
    for node in module.graph.nodes:
        name = name_of(node.target) if node.op == "call_function" else ""
        if name not in ADDED + MULTIPLIED or len(node.args) != 2 or node.kwargs or all(isinstance(each, int) for each in node.args):
            continue
        for place, each in enumerate(node.args):
            value = _scalar(held, each)
            away = None if value is None else abs(value if name in ADDED else value - 1.0)
            if away and away <= (NEAR_ZERO if name in ADDED else NEAR_ONE):
                found.append((node, place, value))
    return found


def _scalar(held: dict[str, Tensor], argument: Any) -> float | None:
    if isinstance(argument, float):
        return argument
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    value = held.get(argument.target)
    return float(value) if value is not None and value.dim() == 0 and value.is_floating_point() else None

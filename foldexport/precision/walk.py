"""A folded program, executed node by node, with every value seen and freed after its last reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from foldexport.certify.lockstep import Runner
from foldexport.interpret import cast, last_users

Change = Callable[[fx.Node, Any], Any]


def walk(
    module: fx.GraphModule, inputs: Sequence[Any], dtype: torch.dtype = torch.float64, change: Change | None = None
) -> Iterator[tuple[fx.Node, Any]]:
    """Yields (node, value) for every node but the output, in graph order; use it inside ``torch.no_grad()``.

    inputs: in the order of the placeholders; floating ones are cast to ``dtype``. change: what its readers get instead of a value.
    """
    given = (cast(value, dtype) if isinstance(value, Tensor) else value for value in inputs)
    runner, last = Runner(module, dtype), last_users(module.graph)
    for node in module.graph.nodes:
        if node.op == "output":
            return
        value = next(given) if node.op == "placeholder" else runner.run_node(node)
        runner.env[node] = value = value if change is None else change(node, value)
        yield node, value
        del value
        for done in last.get(node, ()):
            del runner.env[done]


def outputs(
    module: fx.GraphModule, inputs: Sequence[Any], dtype: torch.dtype = torch.float64, change: Change | None = None
) -> list[Any]:
    """The program's outputs, flat, in order."""
    wanted: dict[fx.Node, Any] = {}
    result = next(node for node in module.graph.nodes if node.op == "output").args[0]
    leaves = pytree.tree_leaves(result)
    for node, value in walk(module, inputs, dtype, change):
        if node in leaves:
            wanted[node] = value
    return [wanted[each] if isinstance(each, fx.Node) else each for each in leaves]

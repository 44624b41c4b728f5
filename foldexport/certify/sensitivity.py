"""How far rounding in float64 moves the training graph itself: what no comparison of outputs can see below.

Deep networks of random weights can be chaotic: each layer magnifies a difference, until the last digit of the first one
decides the output. Float32 noise then saturates at the size of the output and says nothing about float64.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from foldexport.certify.lockstep import is_inexact
from foldexport.interpret import cast, evaluate, last_users, steps

if TYPE_CHECKING:
    from foldexport.trace import Graph

ROUNDOFF = 2.0**-53


@torch.no_grad()
def moved_by_rounding(graph: Graph, inputs: tuple, names: Collection[str]) -> dict[str, float]:
    """``max |v' − v|`` of the named values, v' from a run in which every operator's result is off by one roundoff.

    Every element is multiplied by ``1 ± 2^-52``, signs drawn at random: it moves to a neighbour. An operator's own rounding
    is about that, so the folded network cannot be asked to come closer.
    """
    exact = {node.name: value for node, value in steps(graph, inputs) if node.name in names and is_inexact(value)}
    generator = torch.Generator().manual_seed(0)
    last, values, moved, given = last_users(graph.fx), {}, {}, iter(inputs)
    for node in graph.fx.nodes:
        if node.op == "output":
            break
        value = _value(graph, node, values, given)
        if node.op != "get_attr" and is_inexact(value):
            value = _nudged(value, generator)
        values[node] = value
        if node.name in exact and value.shape == exact[node.name].shape:
            moved[node.name] = float((value - exact[node.name]).abs().amax()) if value.numel() else 0.0
        for done in last.get(node, ()):
            del values[done]
    return moved


def _value(graph: Graph, node: fx.Node, values: dict[fx.Node, Any], given: Iterator[Any]) -> Any:
    if node.op == "placeholder":
        value = next(given)
        return cast(value, torch.float64) if isinstance(value, Tensor) else value
    if node.op == "get_attr":
        return cast(graph.tensors[node.target], torch.float64)
    return evaluate(node, *map_arg((node.args, node.kwargs), values.__getitem__))


def _nudged(value: Tensor, generator: torch.Generator) -> Tensor:
    """Every element moved by about one roundoff, up or down."""
    signs = 1.0 - 2.0 * torch.randint(0, 2, value.shape, generator=generator, dtype=torch.int8).to(value.dtype)
    return value * (1.0 + 2 * ROUNDOFF * signs)

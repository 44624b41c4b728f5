"""How far rounding in float64 moves the training graph itself: what no comparison of outputs can see below.

Deep networks of random weights can be chaotic: each layer magnifies a difference, until the last digit of the first one
decides the output. Float32 noise then saturates at the size of the output and says nothing about float64.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from foldexport.certify.lockstep import is_inexact
from foldexport.interpret import cast, evaluate, last_users, steps

if TYPE_CHECKING:
    from foldexport.trace import Graph

ROUNDOFF = 2.0**-53
FLOAT32 = 2.0**28  # nudges of 2^-52 in one roundoff of float32, 2^-24
DRAWS = 3


@torch.no_grad()
def moved_by_rounding(graph: Graph, inputs: tuple, names: Collection[str]) -> dict[str, float]:
    """``max |v' − v|`` of the named values, v' from a run in which every operator's result is off by one roundoff.

    Every element is multiplied by ``1 ± 2^-52``, signs drawn at random: it moves to a neighbour. An operator's own rounding
    is about that, so the folded network cannot be asked to come closer.
    """
    exact = {node.name: value for node, value in steps(graph, inputs) if node.name in names and is_inexact(value)}
    moved = {}
    for node, value in _nudged_steps(graph, inputs, seed=0):
        if node.name in exact and value.shape == exact[node.name].shape:
            moved[node.name] = float((value - exact[node.name]).abs().amax()) if value.numel() else 0.0
    return moved


@torch.no_grad()
def expected_noise(graph: Graph, inputs: tuple, wanted: Sequence[Tensor]) -> list[float]:
    """Per output the float32 noise that the network's own condition on these inputs makes: Monte Carlo arithmetic.

    With v' as in `moved_by_rounding`, over `DRAWS` draws of the signs,

        2^28 · √( mean of RMS((v' − v)/peak)² ),     peak = max |v|,

    for 2^28 nudges of 2^-52 are 2^-24, the roundoff of float32. What one float32 run loses on an input is one draw of luck;
    this is what any float32 run of these operators may be expected to lose (Parker 1997, "Monte Carlo Arithmetic").

    wanted: v, the outputs in float64, those that are tensors.
    """
    squares = [0.0] * len(wanted)
    leaves = [leaf for leaf in graph.fx.output_node().args[0] if isinstance(leaf, fx.Node)]
    places: dict[fx.Node, list[int]] = {}
    for place, leaf in enumerate([leaf for leaf in leaves if isinstance(leaf.meta.get("val"), Tensor)]):
        places.setdefault(leaf, []).append(place)
    for draw in range(DRAWS):
        for node, value in _nudged_steps(graph, inputs, seed=draw):
            for place in places.get(node, ()):
                exact = wanted[place]
                if is_inexact(exact) and exact.numel() and value.shape == exact.shape:
                    error = (value - exact).abs() / (float(exact.abs().max()) or 1.0)
                    squares[place] += float(error.square().mean()) / DRAWS
    return [FLOAT32 * math.sqrt(square) for square in squares]


def _nudged_steps(graph: Graph, inputs: tuple, seed: int) -> Iterator[tuple[fx.Node, Any]]:
    """(node, value) of a float64 run in which every operator's result is off by one roundoff."""
    generator = torch.Generator().manual_seed(seed)
    last, values, given = last_users(graph.fx), {}, iter(inputs)
    for node in graph.fx.nodes:
        if node.op == "output":
            return
        value = _value(graph, node, values, given)
        if node.op != "get_attr" and is_inexact(value):
            value = _nudged(value, generator)
        values[node] = value
        yield node, value
        for done in last.get(node, ()):
            del values[done]


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

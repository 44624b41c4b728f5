"""Where a signal is measured: behind every residual sum, in a network without them behind every layer.

Residual blocks are found in the training graph, not by the names of modules: a residual sum is an addition of two values of the
input whose convolutions and linear layers are not the same. Names, the user's own, say which module a point lies in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from foldexport.fold.affine import Affine
from foldexport.fold.constants import Constants
from foldexport.fold.pending import is_float, name_of, pending_rule, shape_of
from foldexport.trace import Graph, bound

SUM, LAYER = "residual sum", "layer"
FEWEST_SUMS = 2  # one addition does not make a residual network: a global skip, a sum of two heads
ADDITIONS = frozenset({"add", "sub", "subtract"})
CONVOLUTIONS = frozenset({
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
})  # fmt: skip
PRODUCTS = frozenset({"linear", "addmm", "mm", "matmul"})


@dataclass(frozen=True)
class Point:
    """A value of the training graph and the user's name of the module that it lies in."""

    name: str
    value: fx.Node


def points(graph: Graph) -> tuple[str, list[Point]]:
    """What a point is (`SUM` or `LAYER`) and the points, in the order of execution.

    Behind a sum come the constant scalars that it alone is multiplied with in its own module (``c·(h(x) + f(x))``); behind a
    layer everything affine that it alone feeds (its batch norm). A sum that only another sum reads is a part of it. Where
    layers are the points, the network's outputs are none: the gradient there is the one that is given.
    """
    constants = Constants(graph)
    layers = [node for node in graph.fx.nodes if _is_layer(node, constants)]
    found = _residual_sums(graph, constants, layers)
    if len(found) >= FEWEST_SUMS:
        return SUM, _named(found, SUM)
    made = [(node, _end(node, constants, lambda reader, outer: True)) for node in layers]
    results = graph.fx.output_node().all_input_nodes
    return LAYER, _named([(node, end) for node, end in made if end not in results] or made, LAYER)


def _residual_sums(graph: Graph, constants: Constants, layers: Sequence[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """(addition, the value behind its scalars), those left out that only another addition reads."""
    behind = _layers_behind(graph, layers)
    sums = {node for node in graph.fx.nodes if _is_sum(node, constants, behind)}
    ends = {node: _end(node, constants, _scalar_of(node)) for node in graph.fx.nodes if node in sums}
    return [(node, end) for node, end in ends.items() if len(end.users) != 1 or next(iter(end.users)) not in sums]


def _layers_behind(graph: Graph, layers: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Which layers a value depends on, one bit each."""
    bit = {node: 1 << place for place, node in enumerate(layers)}
    behind: dict[fx.Node, int] = {}
    for node in graph.fx.nodes:
        behind[node] = bit.get(node, 0)
        for source in node.all_input_nodes:
            behind[node] |= behind[source]
    return behind


def _is_sum(node: fx.Node, constants: Constants, behind: Mapping[fx.Node, int]) -> bool:
    """An addition of two variables of one shape: no bias, nothing that broadcasting enlarges, no polynomial in one value."""
    if name_of(node) not in ADDITIONS or not is_float(node):
        return False
    operands, shape = node.all_input_nodes, shape_of(node)
    variable = all(is_float(each) and each not in constants and shape_of(each) == shape for each in operands)
    return len(operands) == 2 and len(shape) > 1 and variable and behind[operands[0]] != behind[operands[1]]


def _is_layer(node: fx.Node, constants: Constants) -> bool:
    """A convolution or linear layer: a product of the input with a weight."""
    if node in constants or not is_float(node) or name_of(node) not in CONVOLUTIONS | PRODUCTS:
        return False
    args = bound(node)
    return args.get("weight", args.get("mat2", args.get("other"))) in constants


def _scalar_of(maker: fx.Node) -> Callable[[fx.Node, Affine], bool]:
    """Whether a reader multiplies by a number, in the module of the maker or one inside of it."""
    module = maker.meta.get("module", "")

    def taken(reader: fx.Node, outer: Affine) -> bool:
        inside = f"{reader.meta.get('module', '')}.".startswith(f"{module}.") or not module
        return inside and outer.has_zero_shift and not outer.axes()

    return taken


def _end(node: fx.Node, constants: Constants, taken: Callable[[fx.Node, Affine], bool]) -> fx.Node:
    """The last of the affine operators behind a value that are its only readers."""
    while len(node.users) == 1:
        reader = next(iter(node.users))
        rule = pending_rule(reader, constants) if reader.op == "call_function" else None
        if rule is None or rule[0] is not node or not taken(reader, rule[1]):
            break
        node = reader
    return node


def _named(found: Sequence[tuple[fx.Node, fx.Node]], kind: str) -> list[Point]:
    """Points under their makers' modules, numbered where a module makes several; in plain functions the kind stands for it."""
    names = [maker.meta.get("module") or kind for maker, _ in found]
    total, seen = Counter(names), Counter[str]()
    made = []
    for name, (_, value) in zip(names, found, strict=True):
        seen[name] += 1
        made.append(Point(f"{name} #{seen[name]}" if total[name] > 1 else name, value))
    return made

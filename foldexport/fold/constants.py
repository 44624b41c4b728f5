"""Partial evaluation: nodes that depend on parameters and buffers only, computed in float64 on demand.

The Dirac parametrisation ``alpha·delta + beta·normalize(W)``, weight norm, spectral norm, weight standardisation and
frozen statistics need no rule of their own: they are constant nodes like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from foldexport.interpret import constant_nodes, evaluate
from foldexport.trace import Graph

SMALL = 1 << 16  # elements; larger results are computed again rather than kept


class Constants:
    """Values of the constant nodes of a training graph, float64 where they are floating point."""

    def __init__(self, graph: Graph) -> None:
        self._tensors = graph.tensors
        self.nodes = constant_nodes(graph)
        self._kept: dict[fx.Node, object] = {}

    def __contains__(self, node: object) -> bool:
        return isinstance(node, fx.Node) and node in self.nodes

    def raw(self, node: fx.Node) -> Tensor:
        """The tensor behind ``node`` in its stored type when it is a plain parameter, else its float64 value."""
        if node.op == "get_attr":
            return self._tensors[node.target].detach()
        return self.value(node)

    def value(self, node: fx.Node):
        """The float64 value of a constant node (integers and booleans keep their type)."""
        if node in self._kept:
            return self._kept[node]
        if node.op == "get_attr":
            tensor = self._tensors[node.target].detach()
            value = tensor.double() if tensor.is_floating_point() else tensor
        else:
            value = self._compute(node)
        if not isinstance(value, Tensor) or value.numel() <= SMALL:
            self._kept[node] = value
        return value

    def _compute(self, node: fx.Node):
        """Evaluate ``node`` and what it needs, operands first, without recursion."""
        local: dict[fx.Node, object] = {}
        stack = [node]
        while stack:
            current = stack[-1]
            if current in local:
                stack.pop()
                continue
            missing = [n for n in current.all_input_nodes if n not in local and n not in self._kept]
            plain = [n for n in missing if n.op == "get_attr"]
            for leaf in plain:
                local[leaf] = self.value(leaf)
            missing = [n for n in missing if n.op != "get_attr"]
            if missing:
                stack.extend(missing)
                continue
            look = lambda n: local[n] if n in local else self._kept[n]  # noqa: E731 - two dictionaries, one view
            args, kwargs = fx.node.map_arg((current.args, current.kwargs), look)
            with torch.no_grad():
                local[current] = evaluate(current, args, kwargs, torch.float64)
            stack.pop()
        return local[node]


def is_parameter(node: object) -> bool:
    """Whether ``node`` is a parameter or buffer itself, not computed from one."""
    return isinstance(node, fx.Node) and node.op == "get_attr"

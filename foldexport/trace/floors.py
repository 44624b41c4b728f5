"""Floor division of sizes by a negative number, which same padding is written with: ``-(size // -stride)`` is a ceiling.

Runtimes whose integer division rounds towards zero, ONNX's among them, compute another number. By a positive one they agree:

    a // −b = −((a + b − 1) // b)       for every a, and b > 0
"""

from __future__ import annotations

import operator

from torch import fx


def by_positive_numbers(graph: fx.Graph) -> None:
    """Rewrite every such division of the graph, in place."""
    for node in graph.find_nodes(op="call_function", target=operator.floordiv):
        size, divisor = node.args
        if not isinstance(size, fx.Node) or not isinstance(divisor, int) or divisor >= 0:
            continue
        with graph.inserting_before(node):
            shifted = _made(graph, node, operator.add, size, -divisor - 1)
            quotient = _made(graph, node, operator.floordiv, shifted, -divisor)
            node.replace_all_uses_with(_made(graph, node, operator.mul, quotient, -1))
        graph.erase_node(node)


def _made(graph: fx.Graph, like: fx.Node, function, value: fx.Node, number: int) -> fx.Node:
    made = graph.call_function(function, (value, number))
    made.meta = {**like.meta, "val": function(value.meta["val"], number)}
    return made

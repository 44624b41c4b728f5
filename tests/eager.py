"""A module against its functional graph: the same bits, at several batches from one trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn
from torch.utils import _pytree as pytree

from foldexport import interpret
from foldexport.trace import Graph, packet_name, trace


def assert_functional(graph: Graph) -> None:
    """No operator of the graph writes to its arguments."""
    mutable = [n for n in graph.fx.nodes if hasattr(n.target, "_schema") and n.target._schema.is_mutable]
    assert not mutable
    graph.fx.lint()


def assert_same_as_eager(module: nn.Module, *example: torch.Tensor, batches: tuple[int, ...] = (1, 3)) -> Graph:
    """Traces module, and compares the graph's outputs with the module's own, bit by bit. Returns the graph."""
    graph = trace(module, example)
    assert_functional(graph)
    for batch in batches:
        inputs = [torch.randn(batch, *e.shape[1:], generator=torch.Generator().manual_seed(batch)) for e in example]
        kept = [i.clone() for i in inputs]
        found = interpret.outputs(graph, inputs, None)
        assert all(torch.equal(i, k) for i, k in zip(inputs, kept)), "a write reached the caller's input"
        with torch.no_grad():
            wanted = pytree.tree_leaves(module(*kept))
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted):
            if not isinstance(other, torch.Tensor):
                assert one == other
                continue
            assert one.shape == other.shape and one.dtype == other.dtype
            assert torch.equal(one, other)
    return graph


class Function(nn.Module):
    """A function as a network."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def operators(graph: Graph) -> Counter[str]:
    """How often each operator occurs."""
    return Counter(packet_name(n.target) for n in graph.fx.nodes if n.op == "call_function")

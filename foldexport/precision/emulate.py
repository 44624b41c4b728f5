"""Networks run in a half type without its hardware: every value rounded to the type, sums taken in float32.

This is what tensor cores and PyTorch's CPU kernels do, and about as fast as float32 (a native float16 convolution of PyTorch on a
CPU without float16 instructions takes 25 times as long and gives the same errors to five digits).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from foldexport import interpret
from foldexport.precision.half import in_half, types_of
from foldexport.precision.types import NumberType, through, to_digits
from foldexport.precision.walk import outputs
from foldexport.trace import Graph

Round = Callable[[Tensor], Tensor]


def own_run(graph: Graph, kind: NumberType, *, ranged: bool = False) -> Callable[[tuple], list[Any]]:
    """The training graph in a half type: ``inputs → outputs`` in float32.

    Every value that depends on an input is rounded to the type's digits, in float32's range: what the type's precision alone does
    (Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 2.2, ``fl(x) = x(1 + δ), |δ| ≤ u``). So it is a unit
    that does not grow where the training graph overflows or vanishes. What depends on weights alone (Dirac, weight norm) is
    evaluated in float64 first, and rounded where it meets data. ranged: with the type's range as well, as ``module.half()`` runs.
    """
    cut = (lambda value: through(value, kind)) if ranged else (lambda value: to_digits(value, kind))
    constants = interpret.constant_nodes(graph)
    last = interpret.last_users(graph.fx)

    def run(inputs: tuple) -> list[Any]:
        given, values, result = iter(inputs), {}, None

        def rounded(each: fx.Node) -> Any:
            return _as_read(values[each], each in constants, cut)

        for node in graph.fx.nodes:
            if node.op == "output":
                result = list(map_arg(node.args[0], rounded))
                break
            read = values.__getitem__ if node in constants else rounded
            if node.op == "placeholder":
                value = next(given)
                value = cut(value.float()) if isinstance(value, Tensor) and value.is_floating_point() else value
            elif node.op == "get_attr":
                value = interpret.cast(graph.tensors[node.target], torch.float64)
            elif node in constants:
                value = interpret.evaluate(node, *map_arg((node.args, node.kwargs), read), torch.float64)
            else:
                value = _cut(interpret.evaluate(node, *map_arg((node.args, node.kwargs), read), torch.float32), cut)
            values[node] = value
            for done in last.get(node, ()):
                values.pop(done, None)
        return result if result is not None else []

    return run


def folded_run(
    module: fx.GraphModule, real: Collection[str], kind: NumberType, single: Collection[str]
) -> Callable[[tuple], list[Any]]:
    """A float64 program in a half type, with its range: weights and values rounded, but for those of the nodes in ``single``."""
    held = in_half(module, real, kind, single)
    works = {node.name: dtype for node, dtype in types_of(held, real, kind, single).items()}
    held.float()  # what was rounded keeps its value; casts below round again

    def change(node: fx.Node, value: Any) -> Any:
        if node.op == "call_method":  # a cast that `in_half` put there
            value = value.float()
            return through(value, kind) if node.args[1] == kind.dtype else value
        return _cut(value, lambda each: through(each, kind)) if works.get(node.name) == kind.dtype else value

    def run(inputs: tuple) -> list[Any]:
        with torch.no_grad():
            return outputs(held, inputs, torch.float32, change)

    return run


def _as_read(value: Any, constant: bool, cut: Round) -> Any:
    if not constant or not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return cut(value.float())


def _cut(value: Any, cut: Round) -> Any:
    return pytree.tree_map(lambda each: cut(each) if isinstance(each, Tensor) and each.dtype == torch.float32 else each, value)

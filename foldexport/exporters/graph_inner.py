"""Inner values of a graph of PyTorch's: a traced module, or the program of a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from foldexport.exporters.inner import Inner, Row, operators_of

PASSING = frozenset({
    "Dropout", "Dropout2d", "Identity", "to", "_to_copy", "float", "half", "contiguous", "clone", "detach", "dropout",
    "feature_dropout", "alias", "lift_fresh_copy",
})  # fmt: skip
SIZES = frozenset({"size", "dim", "sym_size", "getattr"})


def module_operators(module: fx.GraphModule) -> Inner:
    """The graph's operators on data, named as its nodes; weights by their names in the module. It is not run."""
    nodes = [node for node in module.graph.nodes if node.op in ("placeholder", "output") or node.users]
    inputs = [node.name for node in nodes if node.op == "placeholder"]
    operators, known = operators_of(inputs, _rows(module, nodes), passing=PASSING, sizes=SIZES)
    leaves = pytree.tree_leaves(nodes[-1].args[0])
    return Inner(operators, inputs, [known.get(leaf.name, "") for leaf in leaves if isinstance(leaf, fx.Node)], _not_run)


def inner(module: fx.GraphModule, constants: Mapping[str, np.ndarray] | None = None) -> Inner:
    """The graph's operators, and their values as PyTorch computes them, node by node, in the types that they have.

    constants: weights by the graph's names, where these are not the user's.
    """

    def run(names: Sequence[str], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        runner = _Runner(module, names)
        with torch.inference_mode():
            runner.run(*tensors)
        return [runner.kept[name] for name in names]

    return replace(module_operators(module), run=run, constants=constants)


class _Runner(fx.Interpreter):
    """Keeps the asked values; each is copied, since a later operator may work in place."""

    def __init__(self, module: fx.GraphModule, names: Sequence[str]) -> None:
        super().__init__(module)
        self._names, self.kept = frozenset(names), {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._names:
            # Several tensors at once are compared with nothing.
            self.kept[n.name] = value.clone().float().numpy(force=True) if isinstance(value, Tensor) else np.empty(0)
        return value


def _not_run(names: Sequence[str], arrays: Sequence) -> list:
    raise NotImplementedError


def _rows(module: fx.GraphModule, nodes: list[fx.Node]) -> Iterator[Row]:
    for node in nodes:
        reads = [each.name for each in node.all_input_nodes]
        if node.op == "call_module":
            layer = module.get_submodule(node.target)
            tensors = [*layer.named_parameters(), *layer.named_buffers()]
            yield Row(type(layer).__name__, reads, [node.name], [f"{node.target}.{name}" for name, _ in tensors])
        elif node.op in ("call_function", "call_method"):
            held = [str(each.target) for each in node.all_input_nodes if each.op == "get_attr"]
            kind = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            yield Row(kind.partition(".")[0], reads, [node.name], held)

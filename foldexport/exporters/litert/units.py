"""Norms without their ``· 1`` and ``+ 0``: for writers that leave such an operator, and so its constant, out of the file.

With γ = 1 and β = 0, ``γ·x + β`` is x for every number x: a norm without them computes the same bits.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
UNITS = {"weight": 1.0, "bias": 0.0}
#: Where ATen's calls have (γ, β).
CALLS = {
    torch.ops.aten.layer_norm.default: (2, 3),
    torch.ops.aten.group_norm.default: (2, 3),
    torch.ops.aten.instance_norm.default: (1, 2),
}


def without_units(module: nn.Module) -> nn.Module:
    """A copy in which no norm has a γ of ones or a β of zeros; ``module`` itself where there is none."""
    if not any(_units(layer) for layer in module.modules()) and not _arguments(module):
        return module
    result = copy.deepcopy(module)
    for layer in result.modules():
        for name in _units(layer):
            setattr(layer, name, None)
    for node, place in _arguments(result):
        constant = node.args[place]
        node.update_arg(place, None)
        _forget(result, constant)
    if isinstance(result, fx.GraphModule):
        result.recompile()
    return result


def _units(layer: nn.Module) -> list[str]:
    return [name for name, unit in UNITS.items() if isinstance(layer, NORMS) and _is(getattr(layer, name, None), unit)]


def _is(value: object, unit: float) -> bool:
    return isinstance(value, Tensor) and bool((value == unit).all())


def _arguments(module: nn.Module) -> list[tuple[fx.Node, int]]:
    """(call, place) of such constants that calls of norms read."""
    if not isinstance(module, fx.GraphModule):
        return []
    return [
        (node, place)
        for node in module.graph.nodes
        for place, unit in zip(CALLS.get(node.target, ()), UNITS.values())
        if isinstance(each := node.args[place], fx.Node) and each.op == "get_attr" and _is(_held(module, each), unit)
    ]


def _held(module: fx.GraphModule, node: fx.Node) -> object:
    return getattr(module, str(node.target), None)


def _forget(module: fx.GraphModule, node: fx.Node) -> None:
    """Take a constant that nobody reads any more out of the module."""
    if node.users:
        return
    module.graph.erase_node(node)
    if not any(each.op == "get_attr" and each.target == node.target for each in module.graph.nodes):
        delattr(module, str(node.target))

"""Clamps with a bound for each channel, which ncnn has not, as a maximum and a minimum, which it has: the same values, exactly."""

from __future__ import annotations

import torch
from torch import fx, nn


def separated(module: nn.Module) -> nn.Module:
    """``module`` itself, with ``min(max(x, lower), upper)`` for every ``torch.clamp(x, lower, upper)`` with two tensors."""
    if not isinstance(module, fx.GraphModule):
        return module
    for node in list(module.graph.nodes):
        if node.target is torch.clamp and len(node.args) == 3 and all(isinstance(each, fx.Node) for each in node.args):
            x, lower, upper = node.args
            with module.graph.inserting_before(node):
                above = module.graph.call_function(torch.maximum, (x, lower))
                made = module.graph.call_function(torch.minimum, (above, upper))
            node.replace_all_uses_with(made)
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module

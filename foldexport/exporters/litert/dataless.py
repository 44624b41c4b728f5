"""Constants from which only constants are computed, for a writer that computes those itself and keeps their values alone.

A position embedding is computed from sizes and a few numbers. What a file holds of it is its value, which the outputs are compared
with; the numbers are nowhere.
"""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

SIZES = ("sym_size", "size", "dim")


def without_dataless(module: nn.Module) -> nn.Module:
    """A copy in which such float32 constants are no weights, but plain attributes; ``module`` itself where there is none."""
    found = _dataless(module) if isinstance(module, fx.GraphModule) else []
    if not found:
        return module
    result = copy.deepcopy(module)
    for name in found:
        value = result._buffers.pop(name)
        setattr(result, name, value)
    return result


def _dataless(module: fx.GraphModule) -> list[str]:
    """Names of the buffers that no reader mixes with the network's inputs."""
    reached: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or (reached & set(node.all_input_nodes) and not _is_size(node)):
            reached.add(node)
    read: dict[str, bool] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            read[str(node.target)] = read.get(str(node.target), True) and not any(user in reached for user in node.users)
    buffers = {name for name, value in module._buffers.items() if value is not None and value.dtype == torch.float32}
    return [name for name, alone in read.items() if alone and name in buffers]


def _is_size(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.partition(".")[0] in SIZES

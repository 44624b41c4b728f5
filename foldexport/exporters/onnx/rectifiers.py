"""Per-channel clamps at zero in the form that onnxruntime runs fastest.

Where batch norms that read one trunk disagree in the sign of γ, folding leaves ``max(x, 0)`` on some channels and ``min(x, 0)`` on
others. With σ = +1 on the former and −1 on the latter,

    y = σ ⊙ relu(σ ⊙ x)        and a layer W that reads y reads relu(σ ⊙ x) with its input channels multiplied by σ

so ``Max`` and ``Min``, for which onnxruntime leaves its blocked layout ("NCHWc") and makes two passes, become a depthwise 1×1
convolution with the ReLU fused into it. σ is ±1: no value is rounded anew, and there are as many operators as before. It is one
multiplication for each element of y. Measured on a pre-activation ResNet-50: ``benchmarks/latency_peers.py``.
"""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, fx, nn

CONVOLUTIONS = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}  # by the axes of the clamp's bounds with a batch in front
READERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
CHANNELWISE = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
               nn.Flatten, nn.Identity)  # fmt: skip


def signed(module: nn.Module) -> nn.Module:
    """A copy with every such clamp rewritten whose value convolutions and linear layers alone read; else ``module`` itself."""
    if not isinstance(module, fx.GraphModule):
        return module
    calls = Counter(id(layer.weight) for node in module.graph.nodes if isinstance(layer := _layer(module, node), READERS))
    found = {node.name: plan for node in module.graph.nodes if (plan := _plan(module, node, calls)) is not None}
    if not found:
        return module
    result = copy.deepcopy(module)
    for node in list(result.graph.nodes):
        if node.name in found:
            _rewrite(result, node, *found[node.name])
    result.graph.lint()
    result.recompile()
    return result


def _layer(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return module.get_submodule(node.target) if node.op == "call_module" else None


def _plan(module: fx.GraphModule, node: fx.Node, calls: Counter) -> tuple[Tensor, list[str]] | None:
    """``(σ [C], targets of the layers that read y)``; None where the clamp stays as it is. calls: how often weights are read."""
    signs = _signs(module, node)
    if signs is None:
        return None
    targets, waiting = [], list(node.users)
    while waiting:
        user = waiting.pop()
        layer = _layer(module, user)
        if isinstance(layer, READERS) and calls[id(layer.weight)] == 1:
            if _input_channels(layer) % len(signs):
                return None
            targets.append(user.target)
        elif isinstance(layer, CHANNELWISE) and getattr(layer, "start_dim", 1) == 1:
            waiting += user.users
        else:
            return None
    return (signs, targets) if targets else None


def _signs(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """σ of ``torch.clamp(x, lower, upper)`` with bounds ``[C, 1, …]`` of 0 on one side of each channel and none on the other."""
    if node.op != "call_function" or node.target is not torch.clamp or len(node.args) != 3:
        return None
    ends = node.args[1:]
    if not all(isinstance(end, fx.Node) and end.op == "get_attr" for end in ends):
        return None
    lower, upper = (getattr(module, end.target, None) for end in ends)
    if not all(isinstance(end, Tensor) and end.shape[1:].numel() == 1 and end.dim() in CONVOLUTIONS for end in (lower, upper)):
        return None
    if lower.dtype != torch.float32:  # measured in float32; a half type's casts stand between a clamp and its readers
        return None
    lower, upper = lower.flatten(), upper.flatten()
    above, below = (lower == 0) & (upper == torch.inf), (lower == -torch.inf) & (upper == 0)
    if not bool((above | below).all()):
        return None
    return torch.where(above, 1.0, -1.0)


def _input_channels(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _rewrite(module: fx.GraphModule, node: fx.Node, signs: Tensor, targets: list[str]) -> None:
    """Put the convolution and the ReLU in the clamp's place, and σ into the layers that read it."""
    for target in targets:
        layer = module.get_submodule(target)
        every = signs.repeat_interleave(_input_channels(layer) // len(signs))
        groups = getattr(layer, "groups", 1)
        with torch.no_grad():  # weight [Cout, Cin/g, …]; an output of group j reads the j-th part of the input channels
            parts = every.reshape(groups, -1).repeat_interleave(len(layer.weight) // groups, dim=0)
            layer.weight.mul_(parts.reshape(*parts.shape, *(1,) * (layer.weight.dim() - 2)))
    lower = node.args[1]
    rank, name = getattr(module, lower.target).dim(), lower.target.removesuffix("_lower")
    channels = len(signs)
    convolution = CONVOLUTIONS[rank](channels, channels, 1, groups=channels, bias=False)
    convolution.weight = nn.Parameter(signs.reshape(channels, *(1,) * rank), requires_grad=False)
    module.add_submodule(f"{name}_sign", convolution)
    module.add_submodule(f"{name}_relu", nn.ReLU())
    with module.graph.inserting_before(node):
        multiplied = module.graph.call_module(f"{name}_sign", (node.args[0],))
        made = module.graph.call_module(f"{name}_relu", (multiplied,))
    node.replace_all_uses_with(made)
    ends = node.args[1:]
    module.graph.erase_node(node)
    for end in dict.fromkeys(ends):
        if not end.users:
            module.graph.erase_node(end)
            if not any(each.op == "get_attr" and each.target == end.target for each in module.graph.nodes):
                delattr(module, end.target)

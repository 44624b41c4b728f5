"""Group and layer norms as plain operators, for a runtime whose own kernels lose digits.

With m and v the mean and the variance of all x of a group,

    y = (x − m) / √(v + ε) · γ + β,        v = mean((x − m)²)

ExecuTorch's kernels (``kernels/portable/cpu/op_native_group_norm.cpp``, ``op_native_layer_norm.cpp``) take v = mean(x²) − m² in
float32, and add all terms one after another: on 25 088 values 30 times as much rounding as PyTorch, and 700 times at m = 5 √v. Here
the mean is subtracted first, and a long mean is a mean of means over parts of equal length (Higham, Accuracy and Stability of
Numerical Algorithms, 2002, §1.9 and §4.2). It is subtracted twice, ``x − m = (x − c) − mean(x − c)`` for every c: where all x are
equal, what is left of them is then nothing, and not the rounding of m in units of √ε.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.instancenorm import _InstanceNorm

SHORT = 64  # terms that are added up one after another without harm


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, cudnn: bool = False
) -> Tensor:
    """``F.group_norm``: x [N, C, …], weight and bias [C]. cudnn: as ATen has it, and unused."""
    shape = (-1, *(1,) * (x.dim() - 2))
    y = _normalised(x, groups, eps)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    cudnn: bool = False,
) -> Tensor:  # fmt: skip
    """``F.layer_norm`` over the last axes: x [N, …, *shape], weight and bias [*shape]. cudnn: as ATen has it, and unused."""
    y = _normalised(x, math.prod(x.shape[1 : x.dim() - len(shape)]), eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def separated(module: nn.Module) -> nn.Module:
    """A copy in which group norms, layer norms over several axes, and instance norms of their input are such operators.

    ``module`` itself where there is none. A layer norm over the channels alone adds up a few hundred terms, and stays.
    """
    layers = [name for name, layer in module.named_modules() if name and _function(layer) is not None]
    calls = [node.name for node in module.graph.nodes if _called(node) is not None] if isinstance(module, fx.GraphModule) else []
    if not layers and not calls:
        return module
    result = copy.deepcopy(module)
    for name in layers:
        result.set_submodule(name, _Separated(result.get_submodule(name)))
    if calls:
        for node in [each for each in result.graph.nodes if each.name in calls]:
            node.target, node.args = _called(node)
        result.recompile()
    return result


class _Separated(nn.Module):
    """A norm by the functions above; its weights keep their names."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._function = _function(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x, self.weight, self.bias)


def _function(layer: nn.Module) -> Callable | None:
    """(x, γ, β) → y of a layer that is such a norm."""
    if isinstance(layer, nn.GroupNorm):
        return lambda x, weight, bias: group_norm(x, layer.num_groups, weight, bias, layer.eps)
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1:
        return lambda x, weight, bias: layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    if isinstance(layer, _InstanceNorm) and not layer.track_running_stats:
        return lambda x, weight, bias: group_norm(x, x.shape[1], weight, bias, layer.eps)
    return None


def _called(node: fx.Node) -> tuple[Callable, tuple] | None:
    """(function, arguments) in place of ATen's call."""
    if node.kwargs:
        return None
    if node.target is torch.ops.aten.group_norm.default:
        return group_norm, node.args
    if node.target is torch.ops.aten.layer_norm.default and len(node.args[1]) > 1:
        return layer_norm, node.args
    if node.target is torch.ops.aten.instance_norm.default and node.args[5]:  # of its input
        x, weight, bias = node.args[:3]
        return _instance_norm, (x, weight, bias, node.args[7])
    return None


def _instance_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return group_norm(x, x.shape[1], weight, bias, eps)


def _normalised(x: Tensor, groups: int, eps: float) -> Tensor:
    """``(x − m) / √(v + ε)``; the group of an element of a sample is its place divided by the length of a group.

    Of three axes, since XNNPACK takes means of four in another layout only, for which ExecuTorch 1.5 cannot divide every network.
    """
    y = x.reshape(x.shape[0], groups, -1)
    y = y - _mean(y)
    y = y - _mean(y)
    return (y * torch.rsqrt(_mean(y * y) + eps)).reshape(x.shape)


def _mean(x: Tensor) -> Tensor:
    """Of each group of x [N, G, L]."""
    parts = _parts(x.shape[2])
    if parts > 1:
        x = x.reshape(x.shape[0], x.shape[1] * parts, -1).mean(2, keepdim=True).reshape(x.shape[0], x.shape[1], parts)
    return x.mean(2, keepdim=True)


def _parts(length: int) -> int:
    """How many parts of equal length: the divisor next to the square root, one where the length is short or has none."""
    if length <= SHORT:
        return 1
    return max(each for each in range(1, math.isqrt(length) + 1) if length % each == 0)

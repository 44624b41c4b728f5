"""Modules in a half type, with the same values in float32: for writers that store halves, but do not read them."""

from __future__ import annotations

import copy
import inspect

import torch
from torch import Tensor, fx, nn

from foldexport.precision.half import FLOATS, PlainHalf, with_type

HALVES = (torch.float16, torch.bfloat16)


def widened(module: nn.Module) -> nn.Module:
    """A float32 copy of a module in a half type; every value is exact. The casts between its layers are gone."""
    if isinstance(module, PlainHalf):  # it is bound to what it runs, and a copy would be too
        count = len(inspect.signature(module.forward).parameters)
        return PlainHalf(module.network, torch.float32, torch.float32, count).eval()
    result = copy.deepcopy(module)
    result._apply(_wide)
    if isinstance(result, fx.GraphModule):
        _without_casts(result)
    return result.eval()


def halves(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that are in a half type, by name."""
    state = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return {name: value.detach() for name, value in state.items() if value.dtype in HALVES}


def kept_wide(module: nn.Module) -> list[str]:
    """Names of the floating tensors, but scalars, that a module in a half type holds in a wider one."""
    state = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return [name for name, value in state.items() if value.is_floating_point() and value.dim() and value.dtype not in HALVES]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALVES else tensor


def _without_casts(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.op == "call_method" and node.target == "to" and len(node.args) == 2 and node.args[1] in FLOATS:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.op in ("call_function", "call_method"):
            node.args, node.kwargs = with_type(node, torch.float32)
    module.graph.lint()
    module.recompile()

"""Layers in a form of the same values whose weights litert-torch's converter leaves alone.

The converter writes ``hardsigmoid(x) = relu6(x + 3) / 6``, adds the 3 to the bias of a convolution or linear layer in front, and
multiplies the weights of one behind by 1/6: in float32, so that neither can be found again. With

    hardsigmoid(x) = min(relu6(max(x, −3) + 3) · 1/6, 1)

what it would move stands between a maximum and a minimum, which change no value.

It multiplies γ and β of a layer norm into the linear layer that reads it in the same way, and sees them through a change of shape.
A maximum with float32's lowest number stands between them, which changes no number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from foldexport.exporters import scales
from foldexport.exporters.litert import dataless, units

LOWEST = torch.finfo(torch.float32).min


def suited(module: nn.Module) -> nn.Module:
    """``module`` with those weights alone that a file keeps; itself where it has no others."""
    return dataless.without_dataless(units.without_units(scales.without_statistics(module)))


class Hardsigmoid(nn.Module):
    """``nn.Hardsigmoid`` with both ends closed."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return (F.relu6(x.clamp(min=-3.0) + 3.0) * (1 / 6)).clamp(max=1.0)


class Linear(nn.Linear):
    """``nn.Linear`` with its input closed at the lower end."""

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] to […, out]."""
        return super().forward(x.clamp(min=LOWEST))


def closed(module: nn.Module) -> nn.Module:
    """``module`` itself, with every hard sigmoid and every linear layer behind a norm replaced in place."""
    if isinstance(module, nn.Hardsigmoid):
        return Hardsigmoid()
    behind = _behind_norms(module)
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.Hardsigmoid):
            module.set_submodule(name, Hardsigmoid())
        elif type(child) is nn.Linear and (behind is None or name in behind):
            child.__class__ = Linear
    return module


def _behind_norms(module: nn.Module) -> set[str] | None:
    """Targets of layers that read a norm; None where there is no graph to see it in."""
    if not isinstance(module, fx.GraphModule):
        return None
    return {str(user.target) for node in module.graph.nodes if _is_norm(module, node) for user in node.users}


def _is_norm(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), units.NORMS)
    return node.target in units.CALLS

"""Layers in a form of the same values whose weights litert-torch's converter leaves alone.

The converter writes ``hardsigmoid(x) = relu6(x + 3) / 6``, adds the 3 to the bias of a convolution or linear layer in front, and
multiplies the weights of one behind by 1/6: in float32, so that neither can be found again. With

    hardsigmoid(x) = min(relu6(max(x, −3) + 3) · 1/6, 1)

what it would move stands between a maximum and a minimum, which change no value.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Hardsigmoid(nn.Module):
    """``nn.Hardsigmoid`` with both ends closed."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return (F.relu6(x.clamp(min=-3.0) + 3.0) * (1 / 6)).clamp(max=1.0)


def closed(module: nn.Module) -> nn.Module:
    """``module`` itself, with every hard sigmoid replaced in place."""
    if isinstance(module, nn.Hardsigmoid):
        return Hardsigmoid()
    for name, child in module.named_children():
        if isinstance(child, nn.Hardsigmoid):
            setattr(module, name, Hardsigmoid())
        else:
            closed(child)
    return module

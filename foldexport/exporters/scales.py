"""Batch norms that stay in a folded network, ``y = γ·x + β``: for writers that keep γ and β, but multiply the statistics out.

The statistics are μ = 0 and σ² + ε = 1, so γ and β are in such a file bit for bit, and nothing is left of μ and σ². They are
constants here, and no weights, which a file has to hold.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

STATISTICS = ("running_mean", "running_var")


class _Scale:
    """A batch norm whose statistics are plain attributes: in no state, but with it in another type or on another device."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name in STATISTICS:
            setattr(self, name, fn(getattr(self, name)))
        return self


KINDS = {kind: type(f"Scale{kind.__name__}", (_Scale, kind), {}) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)}


def without_statistics(module: nn.Module) -> nn.Module:
    """A copy in which such batch norms have no statistics among their weights; ``module`` itself where there is none."""
    if not any(map(_only_scales, module.modules())):
        return module
    result = copy.deepcopy(module)
    for norm in filter(_only_scales, list(result.modules())):
        held = {name: norm._buffers.pop(name) for name in STATISTICS}
        norm.__class__ = KINDS[type(norm)]
        for name, value in held.items():
            setattr(norm, name, value)
    return result


def count(module: nn.Module) -> int:
    """How many such batch norms there are, with statistics or without."""
    return sum(isinstance(each, _Scale) or _only_scales(each) for each in module.modules())


def _only_scales(module: nn.Module) -> bool:
    """Whether it is a batch norm with γ and β, with μ = 0 and, in its own type, σ² + ε = 1."""
    if type(module) not in KINDS or module.training or module.weight is None or module._buffers.get(STATISTICS[0]) is None:
        return False
    return not bool(module.running_mean.any()) and bool(torch.all(module.running_var + module.eps == 1))

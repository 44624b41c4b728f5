"""The largest numbers that a folded network holds: whether a type with a smaller range can hold it.

Folding moves scales between layers. A residual scalar c = √½ over 33 blocks makes weights and trunk 2^16.5 times larger at one
end than at the other; the fold centres that range (foldexport.fold.passes), and this says what is left of it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

ABSURD = 1e6  # a magnitude from which on a weight may be no weight, and times the median of its tensor
FEWEST = 3  # values of a tensor that have a median

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from foldexport.fold.rebuild import Program


@dataclass(frozen=True)
class Peak:
    """A largest magnitude and the user's name of the layer that holds it."""

    value: float
    layer: str

    def or_larger(self, tensor: Tensor, layer: str) -> Peak:
        """This peak, or that of ``tensor`` in ``layer`` where it is larger."""
        value = _peak(tensor)
        return Peak(value, layer) if value > self.value else self


@dataclass(frozen=True)
class Extremes:
    """Over all folded layers: the largest weight or bias, and the largest activation on the probes of the certificate."""

    weight: Peak
    activation: Peak

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def extremes(program: Program, activation: Peak) -> Extremes:
    """The largest weight of a float64 program, beside the largest activation, which the certificate saw on its way."""
    weight = Peak(0.0, "")
    for name, tensor in program.module.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            weight = weight.or_larger(tensor, name.rpartition(".")[0] or name)
    return Extremes(weight, activation)


@torch.no_grad()
def absurd(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """A sentence for every tensor in which single values are a million times larger than most: a bit that flipped, or overflow.

    All that is proved of such a network holds, and its outputs are hardly what it was trained for.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() < FEWEST or _peak(tensor) < ABSURD:
            continue
        values = tensor.detach().abs().flatten()
        usual, peak = float(values[values > 0].median()), _peak(tensor)
        wrong = (values > ABSURD * usual) & (values >= ABSURD)
        count = int(wrong.sum())
        if 0 < count <= max(1, len(values) // 100):
            place = torch.unravel_index(values.argmax(), tensor.shape)
            at, more = ", ".join(str(int(each)) for each in place), f" ({count} such values)" if count > 1 else ""
            yield f"`{name}` holds {peak:.3g} at [{at}], {peak / usual:.1g} times the median of its values{more}: is it damaged?"


def _peak(tensor: Tensor) -> float:
    """The largest finite magnitude; bounds of clamps may be infinite."""
    low, high = (float(end) for end in (tensor.abs() if tensor.is_complex() else tensor).aminmax())
    if math.isfinite(low) and math.isfinite(high):
        return max(-low, high)
    return float(tensor.nan_to_num(0.0, 0.0, 0.0).abs().max())

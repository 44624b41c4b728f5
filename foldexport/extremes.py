"""The largest numbers that a folded network holds: whether a type with a smaller range can hold it.

Folding moves scales between layers. A residual scalar c = √½ over 33 blocks makes weights and trunk 2^16.5 times larger at one
end than at the other; the fold centres that range (foldexport.fold.passes), and this says what is left of it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from foldexport.fold.rebuild import Program
from foldexport.probes import Probe


@dataclass(frozen=True)
class Peak:
    """A largest magnitude and the user's name of the layer that holds it."""

    value: float
    layer: str


@dataclass(frozen=True)
class Extremes:
    """Over all folded layers: the largest weight or bias, and the largest activation on one probe."""

    weight: Peak
    activation: Peak

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def extremes(program: Program, probe: Probe) -> Extremes:
    """Measure a float64 program on one probe; one forward pass."""
    watch = _Watch(program)
    watch.run(*probe.inputs)
    weight = Peak(0.0, "")
    for name, tensor in program.module.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            weight = _larger(weight, _peak(tensor), name.rpartition(".")[0] or name)
    return Extremes(weight, watch.largest)


class _Watch(fx.Interpreter):
    """Runs the program and remembers the largest finite value it made."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self._labels = program.labels
        self.largest = Peak(0.0, "")

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node.op.startswith("call") and isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            self.largest = _larger(self.largest, _peak(value), self._labels.get(node.name, node.name))
        return value


def _peak(tensor: Tensor) -> float:
    """The largest finite magnitude; bounds of clamps may be infinite."""
    low, high = (float(end) for end in tensor.aminmax())
    if math.isfinite(low) and math.isfinite(high):
        return max(-low, high)
    return float(tensor.nan_to_num(0.0, 0.0, 0.0).abs().max())


def _larger(peak: Peak, value: float, layer: str) -> Peak:
    return Peak(value, layer) if value > peak.value else peak

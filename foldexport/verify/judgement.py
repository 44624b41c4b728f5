"""What one inner value of an artifact is worth: the module's own in float64, its noise in a lower type, and how far off the
artifact's is (:mod:`foldexport.verify.divergence` has the equation)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from foldexport.interpret import cast
from foldexport.precision.half import with_type
from foldexport.precision.types import NumberType, to_digits
from foldexport.precision.walk import walk
from foldexport.verify import FAIL_ABOVE

NOISES = 64.0  # times the module's own noise at a value
FLOOR = 1e-6  # of the value's peak


@dataclass(frozen=True)
class Judged:
    """One inner value: its error, what is allowed and what is above suspicion (all of its peak), its peak.

    noise: the largest error of the module's own run in the type, of the peak too.
    """

    error: float = 0.0
    allowed: float = 0.0
    peak: float = 0.0
    clean: float = 0.0
    incomparable: bool = False
    noise: float = 0.0

    @property
    def wrong(self) -> bool:
        return not self.incomparable and not self.error <= self.allowed

    @property
    def suspect(self) -> bool:
        """Of a value that one which diverges is computed from."""
        return not self.incomparable and not self.error <= self.clean


def forms(result: np.ndarray, channels_last: bool) -> list[np.ndarray]:
    """The value, and what it is where its channels stand elsewhere."""
    moved = [np.moveaxis(result, -1, 1), np.moveaxis(result, 1, -1)] if channels_last and result.ndim > 2 else []
    return [result, *moved]


def judgement(forms: Sequence[np.ndarray], exact: Any, low: Any) -> Judged:
    """The best of the forms; axes of length one change no order of elements."""
    if not isinstance(exact, Tensor) or not exact.is_floating_point() or not exact.numel() or not bool(exact.isfinite().all()):
        return Judged(incomparable=True)
    wanted = exact.numpy(force=True)
    fitting = [form.reshape(wanted.shape) for form in forms if _long(form.shape) == _long(wanted.shape)]
    if not fitting:
        return Judged(incomparable=forms[0].size == exact.numel(), error=math.inf)
    peak = float(np.abs(wanted).max()) or 1.0
    noise = (low.double() - exact) / peak
    rms = float(noise.square().mean().sqrt()) if bool(noise.isfinite().all()) else 0.0
    errors = [float(np.abs(form.astype(np.float64) - wanted).max() / peak) for form in fitting]
    error = min((each for each in errors if math.isfinite(each)), default=math.inf)
    clean = min(NOISES, FAIL_ABOVE * max(1.0, math.sqrt(2.0 * math.log(exact.numel())))) * rms
    clean = max(clean, FLOOR)
    largest = float(noise.abs().max()) if bool(noise.isfinite().all()) else math.inf
    return Judged(error, max(NOISES * rms, FLOOR), peak, clean, noise=largest)


def _long(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


class Values:
    """The module's own values: in float64 with its weights as they are, and in the artifact's number type."""

    def __init__(self, module: fx.GraphModule, kind: NumberType | None) -> None:
        self._kind = kind
        self._double = _in(module, torch.float64)
        self._single = _in(module, torch.float32) if kind is None else None

    def exact(self, inputs: tuple, keep: Sequence[str]) -> dict[str, Any]:
        return _kept(self._double, inputs, torch.float64, keep)

    def low(self, inputs: tuple, keep: Sequence[str]) -> dict[str, Any]:
        if self._single is not None:
            return _kept(self._single, inputs, torch.float32, keep)
        return _kept(self._double, inputs, torch.float64, keep, self._rounded)

    def _rounded(self, node: fx.Node, value: Any) -> Any:
        """Rounded to the type's digits, in float64's range: the noise of a layer that overflows is not infinite."""
        if node.meta.get("works_in", self._kind.dtype) != self._kind.dtype:
            return value
        return pytree.tree_map(self._cut, value)

    def _cut(self, value: Any) -> Any:
        real = isinstance(value, Tensor) and value.is_floating_point()
        return to_digits(value.float(), self._kind).double() if real else value


def _kept(module: fx.GraphModule, inputs: tuple, dtype: torch.dtype, keep: Sequence[str], change: Any = None) -> dict[str, Any]:
    """Copies, since a later operator may work in place."""
    with torch.no_grad():
        values = ((node.name, value) for node, value in walk(module, inputs, dtype, change) if node.name in keep)
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in values}


def _in(module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """A copy with every real tensor, and every cast to a real type, in ``dtype``."""
    result = copy.deepcopy(module)
    result._apply(lambda tensor: cast(tensor, dtype))
    for node in result.graph.nodes:
        if node.op in ("call_function", "call_method"):
            node.args, node.kwargs = with_type(node, dtype)
    return result.eval()

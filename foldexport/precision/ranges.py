"""How large and how small the numbers of a folded network are, and scales that bring them inside a type's range.

With a = log2 of a tensor's peak or root mean square, and e the exponent of its group's scale ``ρ = 2^e``, an activation comes to
``a + e`` and a layer's weights to ``a + e_out − e_in``. Each is to lie between two bounds, and the exponents minimise

    Σ max(0, a + e − high)² + max(0, low − a − e)²

by accelerated gradient descent (Nesterov 1983), linear in the number of layers. A network that lies inside already is not touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx

from foldexport.precision.groups import ONE, Groups, Layer, is_real
from foldexport.precision.homogeneous import CLAMPS, PRODUCTS, SUMS, name_of
from foldexport.precision.types import NumberType, rounded
from foldexport.precision.walk import walk

HEADROOM = 4.0  # times the peak over all probes has to fit; inputs that nobody tried may be larger
WANTED_HEADROOM = 32.0  # what scales are chosen for
LOST = 2.0  # roundoffs: the relative error of a whole tensor, above which the type loses digits that it should have
STEPS = 400
NORMS = frozenset(("linalg_vector_norm", "norm", "frobenius_norm", "linalg_norm"))


@dataclass
class Size:
    """Of one tensor over all probes: largest magnitude, root mean square of the probe where that is smallest."""

    peak: float = 0.0
    rms: float = math.inf

    def add(self, tensor: Tensor) -> None:
        if tensor.numel():
            finite = torch.where(tensor.isfinite(), tensor, 0.0)
            rms = float(finite.square().mean().sqrt())
            self.peak = max(self.peak, float(finite.abs().max()))
            self.rms = min(self.rms, rms) if rms else self.rms


@dataclass(eq=False)
class Sizes:
    """What was measured: activations by node name, weights and biases by layer, shapes of float values by node name."""

    activations: dict[str, Size] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


@torch.no_grad()
def measure(module: fx.GraphModule, probes: Iterable[Sequence]) -> Sizes:
    """Run a float64 program on every probe."""
    found = Sizes()
    for inputs in probes:
        for node, value in walk(module, inputs):
            if not is_real(value):
                continue
            parts = list(value) if isinstance(value, list | tuple) else [value]
            found.shapes.setdefault(node.name, tuple(parts[0].shape))
            size = found.activations.setdefault(node.name, Size())
            for part in parts:
                size.add(part)
    return found


@dataclass(frozen=True)
class Misfit:
    """A tensor that a type does not hold: ``found`` is its peak, or its relative rounding error in roundoffs."""

    node: str
    what: str  # "weight", "bias", "activation", "constant" (added, or a bound), "factor", "sum of squares"
    problem: str  # "overflows", "vanishes"
    found: float


@torch.no_grad()
def misfits(module: fx.GraphModule, sizes: Sizes, probes: Sequence[Sequence], kind: NumberType) -> list[Misfit]:
    """Every weight, bias and activation of a program that does not fit a type, in graph order.

    It overflows where `HEADROOM` times its peak is beyond the largest number; it vanishes where rounding all of it is off by more
    than `LOST` roundoffs, ``‖fl(x) − x‖ > LOST·u·‖x‖``, which happens only below the smallest normal number.
    """
    found: list[Misfit] = []
    for node in module.graph.nodes:
        for what, tensor in tensors_of(module, node):
            if float(tensor.abs().nan_to_num(0.0, 0.0, 0.0).max() if tensor.numel() else 0.0) > kind.largest:
                found.append(Misfit(node.name, what, "overflows", float(tensor.abs().max())))
            elif what == "bias" and _bias_is_safe(tensor, sizes.activations.get(node.name), kind):
                continue
            elif _lost(tensor, kind) > LOST:
                found.append(Misfit(node.name, what, "vanishes", _lost(tensor, kind)))
        found += _numbers(node, kind)
        size = sizes.activations.get(node.name)
        if size is not None and node.op != "get_attr" and size.peak * HEADROOM > kind.largest:
            found.append(Misfit(node.name, "activation", "overflows", size.peak))
        elif size is not None:
            found += _squares(node, size, sizes, kind)
    suspects = {
        name for name, size in sizes.activations.items() if size.rms < 2.0**10 * kind.smallest_normal and size.peak > 0
    }
    return found + _vanishing(module, probes, suspects, kind)


def _numbers(node: fx.Node, kind: NumberType) -> list[Misfit]:
    """A number that is added or is a bound, or multiplies, and is not one of the type: ``|fl(c) − c| > LOST·u·|c|``.

    The ε of a normalisation is the usual one: 1e-12 is 0 in float16, and 0/0 where an image is black. Activations do not show it,
    for beside others it counts for nothing. (A bound beyond the largest number bounds nothing in the type either.)
    """
    name = name_of(node.target) if node.op == "call_function" else ""
    if name not in SUMS | CLAMPS | PRODUCTS | {"rsub"}:
        return []
    given = [*node.args[1:], *(each for key, each in node.kwargs.items() if key != "alpha"), *node.args[:1]]
    for number in given:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            continue
        exact = torch.tensor(float(number), dtype=torch.float64)
        if not rounded(exact, kind.dtype).isfinite():
            if name in PRODUCTS:
                return [Misfit(node.name, "factor", "overflows", abs(float(number)))]
        elif (lost := _lost(exact, kind)) > LOST:
            return [Misfit(node.name, "factor" if name in PRODUCTS else "constant", "vanishes", lost)]
    return []


def _squares(node: fx.Node, result: Size, sizes: Sizes, kind: NumberType) -> list[Misfit]:
    """The sum inside of a norm, ``‖x‖² = Σ x²``, which runtimes hold in the type where they make the norm of squares."""
    order = node.kwargs.get("ord", node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 2))
    if node.op != "call_function" or name_of(node.target) not in NORMS or order not in (2, 2.0, None, "fro"):
        return []
    if (HEADROOM * result.peak) ** 2 > kind.largest:
        return [Misfit(node.name, "sum of squares", "overflows", result.peak**2)]
    read = sizes.activations.get(node.args[0].name)
    small = read is not None and read.rms**2 < kind.smallest_normal
    return [Misfit(node.name, "sum of squares", "vanishes", 1.0 / kind.roundoff)] if small else []


def _vanishing(module: fx.GraphModule, probes: Sequence[Sequence], suspects: set[str], kind: NumberType) -> list[Misfit]:
    worst: dict[str, float] = {}
    for inputs in probes if suspects else ():
        for node, value in walk(module, inputs):
            if node.name in suspects and isinstance(value, Tensor) and node.op != "get_attr":
                worst[node.name] = max(worst.get(node.name, 0.0), _lost(value, kind))
    return [Misfit(name, "activation", "vanishes", lost) for name, lost in worst.items() if lost > LOST]


def _bias_is_safe(bias: Tensor, result: Size | None, kind: NumberType) -> bool:
    """A bias is added to what is larger: its own digits count only as far as those of the sum do."""
    error = (rounded(bias, kind.dtype).to(bias.dtype) - bias).abs().max() if bias.numel() else 0.0
    return result is not None and float(error) <= LOST * kind.roundoff * result.rms


def tensors_of(module: fx.GraphModule, node: fx.Node) -> list[tuple[str, Tensor]]:
    """The floating weights, biases and constants of a node."""
    if node.op == "get_attr":
        value = module.get_buffer(node.target)
        return [("constant", value)] if value.is_floating_point() else []
    if node.op != "call_module":
        return []
    layer = module.get_submodule(node.target)
    return [(name, each) for name, each in layer.named_parameters() if each.is_floating_point()]


def _lost(tensor: Tensor, kind: NumberType) -> float:
    """``‖fl(x) − x‖ / ‖x‖`` in roundoffs."""
    finite = torch.where(tensor.isfinite(), tensor, 0.0)
    norm = float(finite.norm())
    error = rounded(finite, kind.dtype).to(finite.dtype) - finite
    return float(torch.where(error.isfinite(), error, 0.0).norm()) / norm / kind.roundoff if norm else 0.0


@dataclass(eq=False)
class _Terms:
    """Rows of the least squares above: ``base + e[made] − e[read]`` between ``low`` and ``high``; place 0 is always 0."""

    made: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def add(self, made: int, read: int, base: float, low: float = -math.inf, high: float = math.inf) -> None:
        if made != read and math.isfinite(base):
            for row, value in zip((self.made, self.read, self.base, self.low, self.high), (made, read, base, low, high)):
                row.append(value)


def exponents(module: fx.GraphModule, groups: Groups, sizes: Sizes, kind: NumberType) -> dict[int, int]:
    """The exponent e of each group's scale 2^e, by root; groups that keep their scale are left out."""
    terms, places = _Terms(), {ONE: 0}

    def place(node: fx.Node) -> int:
        return places.setdefault(int(groups.roots(node)[0]), len(places))

    highest = math.log2(kind.largest / WANTED_HEADROOM)
    lowest = math.log2(kind.smallest_normal) + 5
    for node in groups.slots:
        size = sizes.activations.get(node.name)
        if size is None or not size.peak or node.op == "get_attr":
            continue
        terms.add(place(node), 0, math.log2(size.peak), high=highest)
        terms.add(place(node), 0, math.log2(size.rms), low=lowest)
    for layer in groups.layers:
        _weight_terms(terms, module, layer, place, lowest - 2, highest)
    if not terms.base:
        return {}
    best = _descend(terms, len(places))
    rounded_ = {root: int(np.rint(best[at])) for root, at in places.items() if at}
    return {root: exponent for root, exponent in rounded_.items() if exponent}


def _weight_terms(terms: _Terms, module: fx.GraphModule, layer: Layer, place, lowest: float, highest: float) -> None:
    made, read = place(layer.node), place(layer.reads)
    held = tensors_of(module, layer.node if layer.constant is None else layer.constant)
    for name, tensor in held:
        size = Size()
        size.add(tensor)
        if not size.peak:
            continue
        if name == "bias":
            terms.add(made, 0, math.log2(size.peak), high=highest)
        else:
            terms.add(made, read, math.log2(size.peak), high=highest)
            terms.add(made, read, math.log2(size.rms), low=lowest)


def _descend(terms: _Terms, count: int) -> np.ndarray:
    made, read = np.asarray(terms.made), np.asarray(terms.read)
    base, low, high = (np.asarray(row) for row in (terms.base, terms.low, terms.high))
    degree = np.bincount(made, minlength=count) + np.bincount(read, minlength=count)
    step = 0.5 / np.maximum(degree, 1)  # the Hessian's rows sum to at most 4·degree (Gershgorin); half of that is the gradient's 2
    current = previous = np.zeros(count)
    for turn in range(STEPS):
        ahead = current + turn / (turn + 3) * (current - previous)
        level = base + ahead[made] - ahead[read]
        excess = np.maximum(0.0, level - high) - np.maximum(0.0, low - level)
        if not excess.any():
            return ahead
        slope = np.bincount(made, excess, count) - np.bincount(read, excess, count)
        previous, current = current, ahead - step * slope
        current[0] = 0.0
    return current

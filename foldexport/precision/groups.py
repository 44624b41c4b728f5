"""Which values of a folded network may be multiplied by positive numbers, together, without changing what it computes.

A value v may be stored as ``v' = ρ ⊙ v``, ρ > 0, constant but for the channel. A convolution or linear layer makes v' from
``x' = ρ_x ⊙ x`` with other weights,

    W'[o, i] = W[o, i] · ρ[o] / ρ_x[i],      b'[o] = b[o] · ρ[o],

so it puts no condition on the two. Positively homogeneous operators, ``f(ρ·x) = ρ·f(x)``, tie the ρ of their result to that of
their operands: ReLU and leaky ReLU, pooling, addition, concatenation, views, resampling; a clamp too, whose bounds follow.
Everything else, inputs and outputs have ρ = 1. What is tied together is one *group* (a union-find over channels).

The idea for chains is Nagel et al. 2019 ("Data-free quantization through weight equalization and bias correction", section 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from foldexport.precision.homogeneous import flattened, function_rule, spatial

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS = (nn.LayerNorm, nn.GroupNorm)
BOUNDED = (nn.Hardtanh, nn.ReLU6)
PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
BY_CHANNEL = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
WHOLE = (nn.PixelShuffle, nn.PixelUnshuffle)
ONE = 0  # the group whose ρ is 1


@dataclass(frozen=True, eq=False)
class Slot:
    """The groups of one value: ``ids[c]`` is that of channel c on ``axis``."""

    axis: int
    ids: np.ndarray


@dataclass(frozen=True, eq=False)
class Layer:
    """What absorbs: a layer's node, or a product with a constant, with the values that it reads and makes."""

    node: fx.Node
    reads: fx.Node
    constant: fx.Node | None = None


@dataclass(eq=False)
class Groups:
    """The union-find and its slots.

    slots: float values of the program. layers: what can take a factor. constants: buffers that follow a group.
    numbers: nodes whose numbers (bounds, addends, pad values) follow the group of their result.
    """

    shapes: dict[str, tuple[int, ...]]
    per_channel: bool
    parents: list[int] = field(default_factory=lambda: [ONE])
    slots: dict[fx.Node, Slot] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    constants: dict[fx.Node, Slot] = field(default_factory=dict)
    numbers: set[fx.Node] = field(default_factory=set)

    def find(self, place: int) -> int:
        while self.parents[place] != place:
            self.parents[place] = self.parents[self.parents[place]]
            place = self.parents[place]
        return place

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        self.parents[max(a, b)] = min(a, b)  # the smallest is the root, so ONE stays one

    def fresh(self, node: fx.Node, axis: int | None = None) -> Slot:
        """A slot of its own for a value: a group per channel, or one for the tensor."""
        shape = self.shapes[node.name]
        axis = min(1, len(shape) - 1) if axis is None else axis
        count = shape[axis] if shape else 1
        start = len(self.parents)
        if self.per_channel:
            self.parents += range(start, start + count)
            return Slot(max(axis, 0), np.arange(start, start + count))
        self.parents.append(start)
        return Slot(max(axis, 0), np.full(count, start))

    @staticmethod
    def slot(axis: int, ids: np.ndarray) -> Slot:
        """A slot over groups that exist."""
        return Slot(axis, ids)

    def tie(self, *slots: Slot) -> None:
        """Channel by channel where the slots have the same channels, else everything with everything."""
        first = slots[0]
        for slot in slots[1:]:
            if slot.axis == first.axis and len(slot.ids) == len(first.ids):
                for a, b in {(int(a), int(b)) for a, b in zip(first.ids, slot.ids)}:
                    self.join(a, b)
            else:
                self.tie_whole(first, slot)

    def tie_whole(self, *slots: Slot) -> None:
        for place in {int(place) for slot in slots for place in slot.ids}:
            self.join(int(slots[0].ids[0]), place)

    def pin(self, *slots: Slot) -> None:
        for place in {int(place) for slot in slots for place in slot.ids}:
            self.join(ONE, place)

    def is_pinned(self, slot: Slot) -> bool:
        return all(self.find(int(place)) == ONE for place in slot.ids)

    def absorbs(self, node: fx.Node, reads: fx.Node, constant: fx.Node | None = None) -> None:
        self.layers.append(Layer(node, reads, constant))

    def roots(self, node: fx.Node) -> np.ndarray:
        """``[C]``: the group of each channel of a value."""
        return np.asarray([self.find(int(place)) for place in self.slots[node].ids])


def groups_of(module: fx.GraphModule, shapes: dict[str, tuple[int, ...]], *, per_channel: bool = False) -> Groups:
    """The groups of a folded program. shapes: of its float values, by node name; other values have no scale."""
    found = Groups(shapes, per_channel)
    called: dict[str, tuple[fx.Node, fx.Node]] = {}
    for node in module.graph.nodes:
        operands = [each for each in node.all_input_nodes if each in found.slots]
        if node.op == "output":
            found.pin(*(found.slots[each] for each in operands))
        elif node.name not in shapes:
            found.pin(*(found.slots[each] for each in operands))  # an integer, boolean or list made of real numbers
        elif node.op == "placeholder":
            found.slots[node] = found.fresh(node)
            found.pin(found.slots[node])
        elif node.op == "get_attr":
            found.slots[node] = found.constants[node] = _whole(found, node)
        elif node.op == "call_module":
            _layer(found, node, module.get_submodule(node.target), operands)
            _same_layer(found, node, called)
        else:
            function_rule(found, node, operands)
    return found


def _whole(found: Groups, node: fx.Node) -> Slot:
    slot = found.fresh(node)
    found.tie_whole(slot)
    return slot


def _same_layer(found: Groups, node: fx.Node, called: dict[str, tuple[fx.Node, fx.Node]]) -> None:
    """Calls of one layer share its weights, so they share their groups."""
    known = called.setdefault(node.target, (node, node.args[0]))
    if known[0] is not node:
        found.tie(found.slots[known[0]], found.slots[node])
        found.tie(found.slots[known[1]], found.slots[node.args[0]])


def _layer(found: Groups, node: fx.Node, layer: nn.Module, operands: list[fx.Node]) -> None:
    source = found.slots[operands[0]]
    rank = len(found.shapes[node.name])
    if isinstance(layer, (*CONVOLUTIONS, *BATCH_NORMS, nn.Linear)):
        axis = rank - 1 if isinstance(layer, nn.Linear) else 1
        if source.axis != axis:
            found.tie_whole(source)
        found.slots[node] = found.fresh(node, axis)
        found.absorbs(node, operands[0])
    elif isinstance(layer, NORMS):
        found.pin(source)
        found.slots[node] = found.fresh(node, rank - 1 if isinstance(layer, nn.LayerNorm) else 1)
        if layer.weight is None:
            found.pin(found.slots[node])
        else:
            found.absorbs(node, operands[0])
    elif isinstance(layer, nn.Flatten):
        found.slots[node] = flattened(found, node, source)
    elif isinstance(layer, BY_CHANNEL):
        found.slots[node] = found.fresh(node, source.axis)
        apart = source.axis < min(spatial(type(layer).__name__, rank), default=rank)
        (found.tie if apart else found.tie_whole)(source, found.slots[node])
    elif isinstance(layer, (*BOUNDED, *PADS, *WHOLE)):
        found.slots[node] = found.fresh(node)
        zero = isinstance(layer, PADS) and layer.value == 0
        (found.tie if zero else found.tie_whole)(source, found.slots[node])
        found.numbers |= set() if zero or isinstance(layer, WHOLE) else {node}
    else:
        found.slots[node] = found.fresh(node)
        found.pin(source, found.slots[node])


def is_real(value: Any) -> bool:
    """Whether a value has a scale: a tensor of real numbers, or a list of them."""
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(each, Tensor) and each.is_floating_point() for each in value)
    return isinstance(value, Tensor) and value.is_floating_point()

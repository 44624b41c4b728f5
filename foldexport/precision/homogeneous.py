"""What each function does to the scales of its operands: ties them to that of its result, hands them on, or pins them to 1.

A rule puts the node's slot and returns True, or returns False, and then everything that the node touches keeps its scale.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from foldexport.trace.views import packet_name

if TYPE_CHECKING:
    from foldexport.precision.groups import Groups, Slot

#: Homogeneous functions that keep channels apart.
HOMOGENEOUS = frozenset(
    ("relu", "leaky_relu", "abs", "clone", "contiguous", "detach", "alias", "dropout", "feature_dropout",
     "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
     "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
     "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "upsample_nearest1d", "upsample_nearest2d",
     "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "neg", "to",
     "mean", "sum", "amax", "amin")
)  # fmt: skip
#: Homogeneous functions that mix channels, or move them.
VIEWS = frozenset(
    ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand",
     "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "getitem", "stack", "pixel_shuffle", "pixel_unshuffle",
     "roll", "flip", "repeat", "expand_as", "index_select", "narrow", "channel_shuffle", "unfold")
)  # fmt: skip
CLAMPS = frozenset(("maximum", "minimum", "clamp", "clamp_min", "clamp_max", "hardtanh"))
REDUCTIONS = frozenset(("mean", "sum", "amax", "amin"))
SUMS = frozenset(("add", "sub"))
PRODUCTS = frozenset(("mul", "div", "truediv"))


def flattened(found: Groups, node: fx.Node, source: Slot) -> Slot:
    """``[N, C, H, W] → [N, C·H·W]``: each channel's group, repeated."""
    shape = found.shapes[node.name]
    if source.axis == 1 and len(shape) == 2 and shape[1] % len(source.ids) == 0:
        return found.slot(1, np.repeat(source.ids, shape[1] // len(source.ids)))
    slot = found.fresh(node)
    found.tie_whole(source, slot)
    return slot


def function_rule(found: Groups, node: fx.Node, operands: list[fx.Node]) -> None:
    """The slot of a function's result, by its rule; operands: those that have a scale."""
    name = name_of(node.target)
    rule: Callable[[Groups, fx.Node, list[fx.Node]], bool] | None = _RULES.get(name)
    if not operands or rule is None or not rule(found, node, operands):
        found.slots[node] = found.fresh(node)
        found.pin(found.slots[node], *(found.slots[each] for each in operands))


def _homogeneous(found: Groups, node: fx.Node, operands: list[fx.Node]) -> bool:
    if len(operands) != 1 or node.kwargs.get("dtype") is not None and name_of(node.target) != "to":
        return False
    source = found.slots[operands[0]]
    before, after = found.shapes[operands[0].name], found.shapes[node.name]
    same = len(after) > source.axis and before[: source.axis + 1] == after[: source.axis + 1]
    same = same and source.axis < min(_mixed(node, len(before)), default=len(before))
    found.slots[node] = found.fresh(node, source.axis if same else None)
    if name_of(node.target) == "neg" or same:
        found.tie(source, found.slots[node])
    else:
        found.tie_whole(source, found.slots[node])
    return True


def _mixed(node: fx.Node, rank: int) -> Iterable[int]:
    """The axes of the operand over which a function sums, compares or moves values: in front of them channels stay apart.

    A reduced axis goes away, so the sizes behind it move up: ``[N, C, C, W].mean(1)`` has C channels that are others.
    """
    name = name_of(node.target)
    if name in REDUCTIONS:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        dims = [dims] if isinstance(dims, int) else list(dims or range(rank))
        return [each % rank if rank else 0 for each in dims]
    return spatial(name, rank)


def spatial(name: str, rank: int) -> Iterable[int]:
    """``("max_pool2d", 4)`` → 2, 3: the axes of an operator whose name ends with their number."""
    return range(rank - int(name[-2]), rank) if name[-2:] in ("1d", "2d", "3d") else ()


def _tie_values(found: Groups, node: fx.Node, operands: Iterable[fx.Node]) -> None:
    """Tie operands to a result with which they are aligned from the last axis."""
    rank, slot = len(found.shapes[node.name]), found.slots[node]
    for each in operands:
        aligned = len(found.shapes[each.name]) == rank
        (found.tie if aligned else found.tie_whole)(slot, found.slots[each])


def _view(found: Groups, node: fx.Node, operands: list[fx.Node]) -> bool:
    if any(operand in found.constants for operand in operands) and len(operands) == 1:
        return False
    if name_of(node.target) == "flatten":
        found.slots[node] = flattened(found, node, found.slots[operands[0]])
        return True
    found.slots[node] = found.fresh(node)
    found.tie_whole(found.slots[node], *(found.slots[each] for each in operands))
    return True


def _cat(found: Groups, node: fx.Node, operands: list[fx.Node]) -> bool:
    tensors = [found.slots[each] for each in node.args[0]]
    axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0) % len(found.shapes[node.name])
    if axis == 1 and all(slot.axis == 1 for slot in tensors):
        found.slots[node] = found.slot(1, np.concatenate([slot.ids for slot in tensors]))
        if not found.per_channel:
            found.tie_whole(found.slots[node])
        return True
    found.slots[node] = found.fresh(node)
    (found.tie if axis != 1 else found.tie_whole)(found.slots[node], *tensors)
    return True


def _sum(found: Groups, node: fx.Node, operands: list[fx.Node]) -> bool:
    if node.kwargs.get("alpha") is not None and not isinstance(node.kwargs["alpha"], int | float):
        return False
    found.slots[node] = found.fresh(node, _variable(found, operands).axis)
    _tie_values(found, node, operands)
    if len([each for each in node.args if isinstance(each, fx.Node)]) < 2:
        found.tie_whole(found.slots[node])
        found.numbers.add(node)
    return True


def _clamp(found: Groups, node: fx.Node, operands: list[fx.Node]) -> bool:
    found.slots[node] = found.fresh(node, _variable(found, operands).axis)
    _tie_values(found, node, operands)
    if any(isinstance(each, int | float) for each in (*node.args[1:], *node.kwargs.values())):
        found.tie_whole(found.slots[node])
        found.numbers.add(node)
    return True


def _product(found: Groups, node: fx.Node, operands: list[fx.Node]) -> bool:
    """``v·const`` absorbs as a layer does; of ``v·gate`` the gate keeps its scale, and v hands its own on."""
    if node.kwargs.get("rounding_mode") is not None:
        return False  # steps
    variables = [each for each in operands if each not in found.constants]
    if len(variables) == 1:
        source, constant = found.slots[variables[0]], next((each for each in operands if each in found.constants), None)
        if constant is None and not (len(node.args) == 2 and node.args[0] is variables[0]):
            return False  # 1 / v
        found.slots[node] = found.fresh(node, source.axis)
        if constant is not None and len(constant.users) == 1 and not found.per_channel and name_of(node.target) == "mul":
            found.absorbs(node, variables[0], constant)
            del found.constants[constant]
            return True
        if constant is not None:
            found.pin(found.slots[constant])
        _tie_values(found, node, variables)
        return True
    if len(variables) != 2 or variables[0] is variables[1]:
        return False
    pinned = [each for each in variables if found.is_pinned(found.slots[each])]
    gate = pinned[0] if len(pinned) == 1 and name_of(node.target) == "mul" else variables[1]
    value = variables[0] if gate is variables[1] else variables[1]
    found.pin(found.slots[gate])
    found.slots[node] = found.fresh(node, found.slots[value].axis)
    _tie_values(found, node, [value])
    return True


def _addcmul(found: Groups, node: fx.Node, operands: list[fx.Node]) -> bool:
    """``shift + v·scale`` with constants on either side: the shift follows the result, the scale absorbs."""
    shift, value, scale = node.args[:3]
    if found.per_channel or scale not in found.constants or shift not in found.constants or len(scale.users) > 1:
        return False
    found.slots[node] = found.fresh(node, found.slots[value].axis)
    found.tie(found.slots[node], found.slots[shift])
    found.absorbs(node, value, scale)
    del found.constants[scale]
    return True


def _pad(found: Groups, node: fx.Node, operands: list[fx.Node]) -> bool:
    value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else node.args[2] if len(node.args) > 2 else 0)
    if node.kwargs.get("mode", "constant") == "constant" and value not in (0, None):
        return False
    found.slots[node] = found.fresh(node)
    source, pads = found.slots[operands[0]], node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else ())
    inside = len(found.shapes[node.name]) - len(pads) // 2 > source.axis  # a pad of the channels moves them
    (found.tie if inside else found.tie_whole)(source, found.slots[node])
    return True


def _variable(found: Groups, operands: Iterable[fx.Node]) -> Slot:
    """The slot of the first operand that is computed; of a constant where none is."""
    operands = list(operands)
    return found.slots[next((each for each in operands if each not in found.constants), operands[0])]


def name_of(target: Any) -> str:
    """``aten::add.Tensor``, ``operator.add`` and ``torch.add`` are all ``add``."""
    if target is operator.getitem:
        return "getitem"
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return packet_name(target)
    return getattr(target, "__name__", str(target))


_RULES: dict[str, Callable[[Groups, fx.Node, list[fx.Node]], bool]] = {
    **dict.fromkeys(HOMOGENEOUS, _homogeneous),
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(CLAMPS, _clamp),
    **dict.fromkeys(SUMS, _sum),
    **dict.fromkeys(PRODUCTS, _product),
    "cat": _cat,
    "addcmul": _addcmul,
    "pad": _pad,
    "constant_pad_nd": _pad,
}

"""Views and their inverses: how what is written through a view reaches the tensor that it looks at.

For a view ``c = view(p)`` the inverse is ``p' = write_back(p, c')``: equal to c' where the view looks, to p elsewhere.
The functional forms are those of PyTorch's functionalization: ``slice_scatter``, ``select_scatter``,
``diagonal_scatter``, inverse permutations and reshapes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

Emit = Callable[..., fx.Node]

# Views that see every element of their tensor in the same row-major order.
RESHAPES = frozenset(
    {"view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "squeeze", "unsqueeze"}
    | {"view_as", "reshape_as", "ravel", "atleast_1d", "atleast_2d", "atleast_3d"}
)
# Views that are their tensor, unless they are not views at all.
IDENTITIES = frozenset(
    {"alias", "detach", "contiguous", "to", "positive", "resolve_conj", "resolve_neg", "pin_memory", "lift_fresh"}
    | {"type_as", "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
)
EXPANSIONS = frozenset({"expand", "expand_as", "broadcast_to"})
SWAPS = frozenset({"transpose", "swapaxes", "swapdims", "t", "mT", "adjoint", "numpy_T"})
SPLITS = frozenset({"split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "hsplit", "vsplit", "dsplit"})


# Where the functional operator does not bear the in-place operator's name.
_RENAMED = {"normal_": "normal_functional"}


class NotFunctional(Exception):
    """An operator that has no functional form here; the message names it and says what to do."""


def packet_name(target: Any) -> str:
    """``add`` for ``aten.add.Tensor``; the plain name of any other callable."""
    packet = getattr(target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(target, "__name__", str(target))


def bound(node: fx.Node) -> dict[str, Any]:
    """Arguments of a node by their names in the operator's schema, defaults filled in; ``fx.Node`` values stay.

    ``operator.getitem`` has ``self`` and ``index``; other Python functions have ``"0"``, ``"1"``, …
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        names = ("self", "index") if node.target is operator.getitem else map(str, range(len(node.args)))
        return dict(zip(names, node.args)) | dict(node.kwargs)
    arguments = node.target._schema.arguments
    result = {a.name: a.default_value for a in arguments}
    result.update((a.name, value) for a, value in zip(arguments, node.args))
    result.update(node.kwargs)
    return result


def out_of_place(target: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """``aten.relu.default`` for ``aten.relu_.default``: the name without underscore, the same argument types."""
    name = packet_name(target)
    packet = getattr(aten, _RENAMED.get(name, name.removesuffix("_")), None)
    types = [str(a.type) for a in target._schema.arguments]
    for overload in [] if packet is None else [target._overloadname, *packet.overloads()]:
        candidate = getattr(packet, overload, None)
        if candidate is not None and not candidate._schema.is_mutable:
            if [str(a.type) for a in candidate._schema.arguments] == types:
                return candidate
    raise NotFunctional(f"'{target}' has no functional form; write it out of place")


def is_symbolic(size: Any) -> bool:
    """Whether a size is a symbol (the batch), not a number."""
    return not isinstance(size, int) and size.node.maybe_as_int() is None


def same_sizes(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes are equal as expressions; adds no guard."""
    return len(one) == len(other) and all(str(a) == str(b) for a, b in zip(one, other))


def reshaped(emit: Emit, value: fx.Node, like: fx.Node) -> fx.Node:
    """value with the shape of like: ``reshape``, its one symbolic size written as -1."""
    shape = like.meta["val"].shape
    symbolic = [axis for axis, size in enumerate(shape) if is_symbolic(size)]
    sizes = [size if is_symbolic(size) else int(size) for size in shape]
    for axis in symbolic:
        sizes[axis] = -1 if len(symbolic) == 1 else emit(aten.sym_size.int, (like, axis), shape[axis])
    return emit(aten.reshape.default, (value, sizes), like.meta["val"])


def write_back(emit: Emit, view: fx.Node, args: dict[str, Any], parent: fx.Node, child: fx.Node) -> fx.Node:
    """``p'``: parent with child in the place that view looks at.

    emit: ``emit(target, args, val)`` appends a node. view: the view's node in the source graph, args its arguments by
    name (values of the new graph). parent, child: values of the new graph.

    Raises NotFunctional for views whose elements overlap, or that are not known.
    """
    name = packet_name(view.target).removesuffix("_")
    before, after = parent.meta["val"], child.meta["val"]
    if name in IDENTITIES or (name in EXPANSIONS and same_sizes(before.shape, after.shape)):
        return child
    if name in RESHAPES:
        return reshaped(emit, child, parent)
    if name in INVERSES:
        return INVERSES[name](emit, args, parent, child)
    if name in SWAPS:
        return _unswap(emit, name, args, parent, child)
    raise NotFunctional(f"a write through '{name}' has no functional form; write it out of place")


def _unslice(emit: Emit, args: dict[str, Any], parent: fx.Node, child: fx.Node) -> fx.Node:
    place = (args["dim"], args["start"], args["end"], args["step"])
    return emit(aten.slice_scatter.default, (parent, child, *place), parent.meta["val"])


def _unnarrow(emit: Emit, args: dict[str, Any], parent: fx.Node, child: fx.Node) -> fx.Node:
    start = args["start"]
    if isinstance(start, fx.Node) or start < 0:
        raise NotFunctional("a write through 'narrow' with a computed start has no functional form; write out of place")
    place = (args["dim"], start, start + args["length"], 1)
    return emit(aten.slice_scatter.default, (parent, child, *place), parent.meta["val"])


def _unselect(emit: Emit, args: dict[str, Any], parent: fx.Node, child: fx.Node) -> fx.Node:
    return emit(aten.select_scatter.default, (parent, child, args["dim"], args["index"]), parent.meta["val"])


def _undiagonal(emit: Emit, args: dict[str, Any], parent: fx.Node, child: fx.Node) -> fx.Node:
    place = (args["offset"], args["dim1"], args["dim2"])
    return emit(aten.diagonal_scatter.default, (parent, child, *place), parent.meta["val"])


def _unpermute(emit: Emit, args: dict[str, Any], parent: fx.Node, child: fx.Node) -> fx.Node:
    rank = len(args["dims"])
    inverse = sorted(range(rank), key=lambda axis: args["dims"][axis] % rank)
    return emit(aten.permute.default, (child, inverse), parent.meta["val"])


def _unmove(emit: Emit, args: dict[str, Any], parent: fx.Node, child: fx.Node) -> fx.Node:
    axes = [[a] if isinstance(a, int) else list(a) for a in (args["destination"], args["source"])]
    return emit(aten.movedim.intlist, (child, *axes), parent.meta["val"])


def _unstride(emit: Emit, args: dict[str, Any], parent: fx.Node, child: fx.Node) -> fx.Node:
    place = (args["size"], args["stride"], args["storage_offset"])
    return emit(aten.as_strided_scatter.default, (parent, child, *place), parent.meta["val"])


def _unswap(emit: Emit, name: str, args: dict[str, Any], parent: fx.Node, child: fx.Node) -> fx.Node:
    """A swap of two axes is its own inverse; ``numpy_T`` swaps all."""
    rank = parent.meta["val"].ndim
    if name == "numpy_T" or rank < 2:
        axes = list(range(rank))[::-1]
        return emit(aten.permute.default, (child, axes), parent.meta["val"])
    default = (0, 1) if name == "t" else (-2, -1)
    first, second = list(args.values())[1:3] if len(args) >= 3 else default
    return emit(aten.transpose.int, (child, first, second), parent.meta["val"])


INVERSES: dict[str, Callable[[Emit, dict[str, Any], fx.Node, fx.Node], fx.Node]] = {
    "slice": _unslice,
    "narrow": _unnarrow,
    "select": _unselect,
    "diagonal": _undiagonal,
    "permute": _unpermute,
    "movedim": _unmove,
    "moveaxis": _unmove,
    "as_strided": _unstride,
}


def write_back_part(emit: Emit, split: fx.Node, part: int, parent: fx.Node, child: fx.Node) -> fx.Node:
    """``p'`` for ``c = split(p)[part]``: a slice at the sum of the sizes before it, or a ``select`` for ``unbind``."""
    name, dim = packet_name(split.target), bound(split).get("dim", 0)
    if name == "unbind":
        return emit(aten.select_scatter.default, (parent, child, dim, part), parent.meta["val"])
    parts = split.meta["val"]
    if name not in SPLITS or any(is_symbolic(p.shape[dim]) for p in parts):
        raise NotFunctional(f"a write through '{name}' has no functional form; write it out of place")
    start = sum(int(p.shape[dim]) for p in parts[:part])
    end = start + int(parts[part].shape[dim])
    return emit(aten.slice_scatter.default, (parent, child, dim, start, end, 1), parent.meta["val"])


def is_whole_slice(node: fx.Node) -> bool:
    """Whether a ``slice.Tensor`` takes everything (``x[:, …]`` writes one per axis)."""
    if node.target is not aten.slice.Tensor:
        return False
    args = bound(node)
    start, end = args["start"], args["end"]
    if args["step"] != 1 or not (start is None or (isinstance(start, int) and start == 0)):
        return False
    size = args["self"].meta["val"].shape[args["dim"]]
    return end is None or (isinstance(end, int) and (end == 2**63 - 1 or (not is_symbolic(size) and end >= int(size))))

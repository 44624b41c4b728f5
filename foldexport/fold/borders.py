"""Zero pads whose border is then overwritten by one constant per channel: they are constant pads.

DiverseBranchBlock's BNAndPad (Ding et al. 2021) pads with zeros and then fills the four border slices with what its batch
norm gives to zero. As functional operators that is ``pad`` and a chain of ``slice_scatter``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from foldexport.fold.constants import Constants
from foldexport.fold.pending import is_float, name_of, shape_of
from foldexport.trace import Graph, bound

_MOVES = frozenset({"expand", "expand_as", "view", "reshape", "unsqueeze", "clone", "contiguous", "_to_copy", "to"})


@dataclass(frozen=True, eq=False)
class Border:
    """``node = constant pad of source``; sides are ``(lo, hi)`` per spatial axis, value is ``[1, C, 1, …]`` or one number."""

    source: fx.Node
    sides: tuple[tuple[int, int], ...]
    value: Tensor


def find_borders(graph: Graph, constants: Constants) -> dict[fx.Node, Border]:
    """The last operator of every such chain."""
    found = {}
    for node in graph.fx.nodes:
        if name_of(node) in ("pad", "constant_pad_nd") and is_float(node) and node not in constants:
            last, border = _follow(node, constants)
            if border is not None:
                found[last] = border
    return found


def _follow(pad: fx.Node, constants: Constants) -> tuple[fx.Node, Border | None]:
    args, rank = bound(pad), len(shape_of(pad))
    source, pads = args.get("self", args.get("input")), args["pad"]
    zero = args.get("mode", "constant") == "constant" and not args.get("value")
    if not zero or len(pads) != 2 * (rank - 2) or not all(isinstance(p, int) and p >= 0 for p in pads):
        return pad, None
    sides = tuple((pads[2 * i], pads[2 * i + 1]) for i in range(rank - 2))[::-1]
    wanted = {(axis + 2, side) for axis, pair in enumerate(sides) for side, width in enumerate(pair) if width}
    value, current = None, pad
    while wanted:
        users = list(current.users)
        if len(users) != 1 or name_of(users[0]) != "slice_scatter":
            return pad, None
        step = bound(users[0])
        covered, level = _covered(step, sides, shape_of(pad)), _level(step["src"], constants, rank)
        if step["self"] is not current or covered is None or level is None:
            return pad, None
        if value is not None and not torch.equal(*torch.broadcast_tensors(value, level)):
            return pad, None
        value, current = level, users[0]
        wanted.discard(covered)
    return current, None if value is None else Border(source, sides, value)


def _covered(step: dict, sides: tuple[tuple[int, int], ...], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Which side of which axis a ``slice_scatter`` overwrites, exactly; None for anything else."""
    axis = step["dim"] % len(shape)
    if axis < 2 or step["step"] != 1 or not isinstance(step["start"] or 0, int):
        return None
    lo, hi = sides[axis - 2]
    size = shape[axis]
    start, end = step["start"] or 0, step["end"] if isinstance(step["end"], int) else size
    start, end = (min(max(i + size if i < 0 else i, 0), size) for i in (start, end))
    if lo and (start, end) == (0, lo):
        return axis, 0
    # from the far end only when counted from it: the size of the axis may be symbolic
    if hi and (start, end) == (size - hi, size) and (step["start"] or 0) < 0:
        return axis, 1
    return None


def _level(source: object, constants: Constants, rank: int) -> Tensor | None:
    """The constant behind a broadcast, one number per channel."""
    while isinstance(source, fx.Node) and source not in constants and name_of(source) in _MOVES:
        channels = shape_of(source)
        source = bound(source).get("self", bound(source).get("input"))
        if len(channels) not in (rank, rank - 1):
            continue
    if source not in constants:
        return None
    value = constants.value(source)
    sizes = [size for size in value.shape if size != 1]
    if len(sizes) > 1 or (sizes and list(value.shape)[-(rank - 2) - 1] != sizes[0]):
        return None
    return value.double().reshape((1, -1) + (1,) * (rank - 2))

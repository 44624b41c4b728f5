"""Slices that cut rows or columns off the sides of a feature map: they are pads with negative widths."""

from __future__ import annotations

from torch import fx

from foldexport.fold.pending import name_of, shape_of
from foldexport.trace import bound

ENDLESS = 2**62  # an end that no axis reaches: all of it


def cropped_sides(node: fx.Node) -> tuple[tuple[int, int], ...] | None:
    """``x[..., lo:−hi, ...]`` on one spatial axis as ``(−lo, −hi)``, the others ``(0, 0)``; None for any other node.

    The start must be counted from the front and the end from the back: the folded network may see other sizes than the
    traced one.
    """
    if name_of(node) != "slice":
        return None
    args = bound(node)
    shape, start, end = shape_of(args["self"]), args.get("start") or 0, args.get("end")
    axis = args.get("dim", 0) % len(shape)
    end = ENDLESS if end is None else end
    if axis < 2 or args.get("step", 1) != 1 or not isinstance(start, int) or not isinstance(end, int):
        return None
    if start < 0 or 0 <= end < ENDLESS:
        return None
    hi = 0 if end > 0 else -end
    if start + hi >= shape[axis]:
        return None
    return tuple((-start, -hi) if i == axis else (0, 0) for i in range(2, len(shape)))

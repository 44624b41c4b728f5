"""Views: the affine is mapped the way the elements are."""

from __future__ import annotations

import torch
from torch import fx

from foldexport.fold import reshape as mapping
from foldexport.fold.affine import Affine
from foldexport.fold.emitter import Fold
from foldexport.fold.needs import EXACT
from foldexport.fold.pending import dynamic_axes, name_of, shape_of
from foldexport.fold.stored import Pending
from foldexport.trace import bound


def _source(node: fx.Node) -> fx.Node:
    args = bound(node)
    return args.get("self", args.get("input"))


def _put_view(fold: Fold, node: fx.Node, source: fx.Node, pending: Pending, affine: Affine, unmap) -> None:
    stored = fold.call(node, "view", {source: pending.stored}, unmap=unmap)
    fold.put(node, stored, affine, pending.carried)


def _exact(fold: Fold, node: fx.Node, pending: Pending) -> Pending:
    return fold.satisfy(pending, EXACT, node, f"`{fold.label(node)}` mixes the axes along which it varies")


def reshape(fold: Fold, node: fx.Node) -> bool:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze: by groups of axes with equal products."""
    source = _source(node)
    if not fold.is_variable(source):
        return False
    shapes = shape_of(source), shape_of(node)
    dynamic = dynamic_axes(source), dynamic_axes(node)
    pending = fold.pending(source)
    affine = mapping.map_view(pending.affine, *shapes, set(dynamic[0]), set(dynamic[1]))
    if affine is None:
        pending = _exact(fold, node, pending)
        affine = Affine.identity(len(shapes[1]))

    def unmap(change: Affine) -> Affine | None:
        return mapping.unmap_view(change, *shapes, set(dynamic[0]), set(dynamic[1]))

    _put_view(fold, node, source, pending, affine, unmap)
    return True


def _order(node: fx.Node, rank: int) -> list[int] | None:
    """The permutation of a permute, transpose, t, movedim: axis i of the result is axis order[i] of the operand."""
    order = list(range(rank))
    marks = torch.empty([i + 2 for i in range(rank)], device="meta")
    args = bound(node)
    rest = [value for key, value in args.items() if key not in ("self", "input")]
    try:
        moved = node.target(marks, *rest)
    except RuntimeError:
        return None
    sizes = [size - 2 for size in moved.shape]
    return sizes if sorted(sizes) == order else None


def permute(fold: Fold, node: fx.Node) -> bool:
    """permute, transpose, t, movedim, swapaxes."""
    source = _source(node)
    if not fold.is_variable(source):
        return False
    pending = fold.pending(source)
    order = _order(node, pending.stored.rank)
    if order is None:
        return False
    back = [order.index(axis) for axis in range(len(order))]
    _put_view(fold, node, source, pending, pending.affine.permute(order), lambda change: change.permute(back))
    return True


def _kept_only(axis: int):
    """The way back through a cut along ``axis``: possible when the change is constant along it."""
    return lambda change: change if axis not in change.axes() else None


def index(fold: Fold, node: fx.Node) -> bool:
    """slice, select, narrow: the affine is cut the same way."""
    source, args = _source(node), bound(node)
    if not fold.is_variable(source):
        return False
    pending = fold.pending(source)
    rank = pending.stored.rank
    axis = args.get("dim", 0) % rank
    if axis in pending.affine.axes() and not _static(args):
        pending = _exact(fold, node, pending)
    halves = (pending.affine.scale, pending.affine.shift)
    if name_of(node) == "select":
        cut = [half.squeeze(axis) if half.shape[axis] == 1 else _cut(node, half, args) for half in halves]
        _put_view(fold, node, source, pending, Affine(*cut), _identity_only)
        return True
    cut = [half if half.shape[axis] == 1 else _cut(node, half, args) for half in halves]
    _put_view(fold, node, source, pending, Affine(*cut), _kept_only(axis))
    return True


def _identity_only(change: Affine) -> Affine | None:
    """A view that no change but the identity goes back through."""
    return change if change.is_identity else None


def _static(args: dict) -> bool:
    return not any(isinstance(value, fx.Node) for key, value in args.items() if key not in ("self", "input"))


def _cut(node: fx.Node, tensor: torch.Tensor, args: dict) -> torch.Tensor:
    rest = [value for key, value in args.items() if key not in ("self", "input")]
    return node.target(tensor, *rest)


def expand(fold: Fold, node: fx.Node) -> bool:
    """expand of size-1 axes: the affine, which is constant along them, stays."""
    source = _source(node)
    if not fold.is_variable(source) or len(shape_of(source)) != len(shape_of(node)):
        return False
    pending = fold.pending(source)
    _put_view(fold, node, source, pending, pending.affine, _identity_only)
    return True


def split(fold: Fold, node: fx.Node) -> bool:
    """split, chunk, unbind: one stored tensor per part, each with its part of the affine."""
    source, args = _source(node), bound(node)
    if not fold.is_variable(source):
        return False
    pending = fold.pending(source)
    rank = pending.stored.rank
    axis = args.get("dim", 0) % rank
    if axis in dynamic_axes(source) or (name_of(node) == "unbind" and axis in pending.affine.axes()):
        return False
    whole = fold.call(node, "opaque", {source: pending.stored})
    found, start = [], 0
    for part in fold.parts(node, whole):
        if name_of(node) == "unbind":
            affine = Affine(pending.affine.scale.squeeze(axis), pending.affine.shift.squeeze(axis))
        else:
            affine = pending.affine.slice(axis, range(start, start + part.shape[axis]))
            start += part.shape[axis]
        found.append(Pending.of(part, affine, pending.carried))
    fold.values[node] = found
    return True


def channel_shuffle(fold: Fold, node: fx.Node) -> bool:
    """channel_shuffle: a permutation of the channels, undone by shuffling with C/g groups."""
    groups = bound(node)["groups"]
    channels = shape_of(node)[1]
    return _moved(fold, node, lambda a: mapping.channel_shuffle(a, groups),
                  lambda a: mapping.channel_shuffle(a, channels // groups))  # fmt: skip


def pixel_shuffle(fold: Fold, node: fx.Node) -> bool:
    """pixel_shuffle and pixel_unshuffle: equal factors within each group of channels that share a pixel."""
    args = bound(node)
    if name_of(node) == "pixel_shuffle":
        factor = args["upscale_factor"]
        return _moved(fold, node, lambda a: mapping.pixel_shuffle(a, factor), lambda a: mapping.pixel_unshuffle(a, factor))
    factor = args["downscale_factor"]
    return _moved(fold, node, lambda a: mapping.pixel_unshuffle(a, factor), lambda a: mapping.pixel_shuffle(a, factor))


def _moved(fold: Fold, node: fx.Node, forth, back) -> bool:
    """A view that moves channels: the affine goes forth with it, a change of the result goes back."""
    source = _source(node)
    if not fold.is_variable(source):
        return False
    pending = fold.pending(source)
    if any(axis != 1 for axis in pending.affine.axes()):
        pending = _exact(fold, node, pending)
    affine = forth(_channelwise(pending.affine, shape_of(source)[1]))
    if affine is None:
        pending = _exact(fold, node, pending)
        affine = Affine.identity(pending.stored.rank)

    def unmap(change: Affine) -> Affine | None:
        return None if any(axis != 1 for axis in change.axes()) else back(_channelwise(change, shape_of(node)[1]))

    _put_view(fold, node, source, pending, affine, unmap)
    return True


def _channelwise(affine: Affine, channels: int) -> Affine:
    """Written out along the channels."""
    scale, shift = affine.vector(1, channels)
    return Affine.of_vectors(scale, shift, 1, affine.rank)

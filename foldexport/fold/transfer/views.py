"""Views: the affine is mapped the way the elements are."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from foldexport.fold import reshape as mapping
from foldexport.fold.affine import Affine
from foldexport.fold.emitter import Fold
from foldexport.fold.needs import EXACT
from foldexport.fold.pending import dynamic_axes, name_of, shape_of
from foldexport.fold.stored import Pending
from foldexport.trace import bound

#: Operators that keep the elements in their order.
RESHAPES = frozenset({"view", "reshape", "reshape_as", "view_as", "flatten", "unflatten", "squeeze", "unsqueeze"})


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
    undone = _undone(node, pending)
    if undone is not None:
        fold.pass_on(node, undone)
        return True
    affine = mapping.map_view(pending.affine, *shapes, set(dynamic[0]), set(dynamic[1]))
    if affine is None:
        pending = _exact(fold, node, pending)
        affine = Affine.identity(len(shapes[1]))

    def unmap(change: Affine) -> Affine | None:
        return mapping.unmap_view(change, *shapes, set(dynamic[0]), set(dynamic[1]))

    _put_view(fold, node, source, pending, affine, unmap)
    return True


def _undone(node: fx.Node, pending: Pending) -> Pending | None:
    """The tensor in front of a reshape that this one takes back; nothing but affines stands between the two."""
    stored = pending.stored
    if stored.kind != "view" or not stored.open or stored.maps or name_of(stored.node) not in RESHAPES:
        return None
    before = [str(size) for size in _source(stored.node).meta["val"].shape]  # symbols are equal where they read alike
    if before != [str(size) for size in node.meta["val"].shape]:
        return None
    affine = stored.attrs["unmap"](pending.affine)
    return None if affine is None else Pending.of(stored.inputs[0], affine, pending.carried)


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
    """split, chunk, unbind: one stored tensor per part, each with its part of the affine.

    Parts are disjoint, so a change of one is a change of the operand that leaves the other channels as they are: a linear
    layer or convolution in front takes what each of q, k and v needs.
    """
    source, args = _source(node), bound(node)
    if not fold.is_variable(source):
        return False
    pending = fold.pending(source)
    rank = pending.stored.rank
    axis = args.get("dim", 0) % rank
    unbound = name_of(node) == "unbind"
    if axis in dynamic_axes(source) or (unbound and axis in pending.affine.axes()):
        return False
    whole = fold.call(node, "opaque", {source: pending.stored})
    found, start, size = [], 0, shape_of(source)[axis]
    for part in fold.parts(node, whole):
        length = 1 if unbound else part.shape[axis]
        affine = pending.affine.slice(axis, 0 if unbound else range(start, start + length))
        part.kind, part.attrs["back"] = "part", _beside_others(axis, start, length, size, unbound)
        start += length
        found.append(Pending.of(part, affine, pending.carried))
    for index, part in enumerate(found):
        readers = [user for user in node.users if user.target is operator.getitem and user.args[1] == index]
        if len(readers) == 1:
            part.stored.reads = fold.analysis.reads.get(readers[0], 0)
    fold.values[node] = found
    return True


def _beside_others(axis: int, start: int, length: int, size: int, unbound: bool) -> Callable[[Affine], Affine]:
    """The change of the whole, ``size`` long on ``axis``, that changes one part of it: the identity everywhere else."""

    def back(change: Affine) -> Affine:
        change = change.unsqueeze(axis) if unbound else change
        before, behind = (Affine.identity(change.rank) for _ in range(2))
        sizes = [start, length, size - start - length]
        parts = [(affine, long) for affine, long in zip((before, change, behind), sizes, strict=True) if long]
        return Affine.cat([affine for affine, _ in parts], [long for _, long in parts], axis)

    return back


def take_part(fold: Fold, node: fx.Node) -> None:
    """``getitem``: one result of an operator with several; a part with several readers takes its wish now."""
    part = fold.values[node.args[0]][node.args[1]]
    fold.values[node] = part
    alone = sum(user.args[1] == node.args[1] for user in node.args[0].users if user.target is operator.getitem) == 1
    if isinstance(part, Pending) and part.stored.kind == "part" and alone and not part.stored.open:
        fold.values[node] = fold.grant(node, part)


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

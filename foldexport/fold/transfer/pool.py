"""Pooling, resampling and padding: the affine passes, if it does not vary along the axes they work on.

    max_pool(a·s + t) = a·max_pool(s) + t          for a ≥ 0 (padding is −∞)
    avg_pool(a·s + t) = a·avg_pool(s) + t·avg_pool(1)
"""

from __future__ import annotations

import torch
from torch import fx

from foldexport.fold import pooling
from foldexport.fold.affine import Affine
from foldexport.fold.emitter import Fold
from foldexport.fold.merge import merge_composition, pointwise_source, pool_as_conv
from foldexport.fold.needs import EXACT, ZERO_SHIFT, NonNegative, ShiftOf
from foldexport.fold.pending import dynamic_axes, name_of, shape_of
from foldexport.fold.stored import Pending, Stored
from foldexport.trace import bound


def _source(node: fx.Node) -> fx.Node:
    args = bound(node)
    return args.get("self", args.get("input"))


def _space(node: fx.Node, source: fx.Node) -> tuple[int, ...]:
    """The axes that a window runs over, counted from the front."""
    rank, name = len(shape_of(source)), name_of(node)
    if name in ("mean", "amax"):
        dims = bound(node).get("dim")
        dims = range(rank) if dims in (None, []) else ([dims] if isinstance(dims, int) else dims)
        return tuple(sorted(d % rank for d in dims))
    digits = [int(c) for c in name if c.isdigit()]
    return tuple(range(rank - (digits[-1] if digits else rank - 2), rank))


def max_pool(fold: Fold, node: fx.Node) -> bool:
    """Max pooling and amax over space; ``a ≥ 0``."""
    source = _source(node)
    space = _space(node, source)
    if not fold.is_variable(source) or 0 in space:
        return False
    pending = fold.demand(node, source, NonNegative(space), f"a negative factor does not pass `{fold.label(node)}`")
    stored = fold.call(node, "max_pool", {source: pending.stored}, space=space)
    fold.put(node, stored, _reduced(node, pending.affine, space), pending.carried)
    return True


def max_pool_with_indices(fold: Fold, node: fx.Node) -> bool:
    """The variants that return ``(values, indices)``: ``a > 0``, so that the indices stay the same too."""
    source = _source(node)
    if not fold.is_variable(source):
        return False
    space = _space(node, source)
    pending = fold.demand(node, source, NonNegative(space, strict=True), f"`{fold.label(node)}` returns indices")
    stored = fold.call(node, "opaque", {source: pending.stored})
    values, *indices = fold.parts(node, stored)
    fold.values[node] = [Pending.of(values, pending.affine, pending.carried), *indices]
    return True


def average(fold: Fold, node: fx.Node) -> bool:
    """Average pooling; behind a convolution it may compose with it, or a 1×1 convolution may go behind it."""
    source = _source(node)
    if not fold.is_variable(source) or len(shape_of(source)) != len(shape_of(node)):
        return False
    pending = fold.pending(source)
    if _with_convolution(fold, node, source, pending):
        return True
    space, keeps = _space(node, source), pooling.keeps_constants(node)
    if any(axis in space for axis in pending.affine.axes()):
        pending = fold.satisfy(pending, EXACT, node, f"it varies over the space that `{fold.label(node)}` averages")
    elif not keeps:
        why = f"`{fold.label(node)}` counts its zero padding, which a shift would meet"
        pending = fold.satisfy(pending, ZERO_SHIFT, node, why)
    stored = fold.call(node, "pool", {source: pending.stored}, space=space, keeps_constants=keeps)
    fold.put(node, stored, pending.affine.compressed(), pending.carried)
    return True


def _with_convolution(fold: Fold, node: fx.Node, source: fx.Node, pending: Pending) -> bool:
    """Exchange with a 1×1 convolution, or compose with a larger one, whichever needs fewer multiply-adds."""
    if not pooling.has_batch(node):
        return False
    exchanged = pointwise_source(pending)
    if exchanged is not None and (pooling.keeps_constants(node) or exchanged[1].bias is None or not bool(exchanged[1].bias.any())):
        below, conv = exchanged
        if _volume(shape_of(node)[2:]) < _volume(shape_of(source)[2:]):
            _emit_exchanged(fold, node, source, pending, below, conv)
            return True
    if not pooling.is_convolution(node) or not pending.stored.open or pending.stored.kind != "conv":
        return False
    merged = merge_composition(pending, pool_as_conv(node, shape_of(source)[1]))
    if merged.conv is None:
        return False
    stored = fold.emit(node, "conv", [merged.source], conv=merged.conv, shared=None)
    stored.module, stored.op = next((name for name in reversed(merged.labels) if name), stored.module), "conv"
    entry = fold.ledger.note(node, fold.label(node), "merge by composition")
    entry.into = stored.module or stored.name
    fold.absorbed(pending.carried, entry.into)
    fold.put(node, stored)
    return True


def _emit_exchanged(fold: Fold, node: fx.Node, source: fx.Node, pending: Pending, below: Stored, conv) -> None:
    old = pending.stored
    shape = (shape_of(node)[0], below.shape[1], *shape_of(node)[2:])
    pooled = fold.call(node, "pool", {source: below}, suffix="_early", shape=shape, dynamic=dynamic_axes(node),
                       space=_space(node, source), keeps_constants=pooling.keeps_constants(node))  # fmt: skip
    pooled.reads = 1
    stored = fold.emit(node, "conv", [pooled], conv=conv, shared=None)
    stored.module, stored.op = old.module, "conv"
    entry = fold.ledger.note(node, fold.label(node), "exchange with average pooling")
    entry.into = "in front of " + (old.module or old.name)
    fold.absorbed(pending.carried, old.module or old.name)
    fold.put(node, stored)


def mean(fold: Fold, node: fx.Node) -> bool:
    """Mean over some axes; the affine must be constant along them."""
    source = _source(node)
    args = bound(node)
    if not fold.is_variable(source):
        return False
    space = _space(node, source)
    if 0 in space or args.get("dim") in (None, []):
        return False
    pending = fold.pending(source)
    if any(axis in space for axis in pending.affine.axes()):
        pending = fold.satisfy(pending, EXACT, node, f"it varies along the axes that `{fold.label(node)}` averages")
    keepdim = len(shape_of(node)) == len(shape_of(source))
    restore = None if keepdim else lambda change: _with_axes(change, space)
    stored = fold.call(node, "pool", {source: pending.stored}, space=space if keepdim else (), keeps_constants=True,
                       drops_axes=restore)  # fmt: skip
    fold.put(node, stored, _reduced(node, pending.affine, space), pending.carried)
    return True


def _reduced(node: fx.Node, affine: Affine, space: tuple[int, ...]) -> Affine:
    """The affine of a reduced tensor: the reduced axes, along which it is constant, disappear."""
    affine = affine.compressed()
    if len(shape_of(node)) == affine.rank:
        return affine
    keep = [axis for axis in range(affine.rank) if axis not in space]
    return Affine(*(half.reshape([half.shape[axis] for axis in keep]) for half in (affine.scale, affine.shift)))


def _with_axes(affine: Affine, space: tuple[int, ...]) -> Affine:
    """The way back: size-1 axes where the reduction dropped them."""
    scale, shift = affine.scale, affine.shift
    for axis in space:
        scale, shift = scale.unsqueeze(axis), shift.unsqueeze(axis)
    return Affine(scale, shift)


def resample(fold: Fold, node: fx.Node) -> bool:
    """Upsampling and padding by copies: each output is an average of inputs with weights that add up to one."""
    source = _source(node)
    if not fold.is_variable(source):
        return False
    space = _space(node, source)
    pending = fold.pending(source)
    if any(axis in space for axis in pending.affine.axes()):
        pending = fold.satisfy(pending, EXACT, node, f"it varies over the space that `{fold.label(node)}` resamples")
    stored = fold.call(node, "pool", {source: pending.stored}, space=space, keeps_constants=True)
    fold.put(node, stored, pending.affine.compressed(), pending.carried)
    return True


def pad(fold: Fold, node: fx.Node) -> bool:
    """``F.pad``. By copies: as resampling. Constant p: the stored tensor is padded with ``(p − t)/a``."""
    args = bound(node)
    source = _source(node)
    if not fold.is_variable(source):
        return False
    if args.get("mode", "constant") != "constant":
        return _pad_by_copies(fold, node, source)
    pads = args["pad"]
    if not all(isinstance(p, int) for p in pads):
        return False
    rank = len(shape_of(source))
    sides = [(pads[2 * i], pads[2 * i + 1]) for i in range(len(pads) // 2)][::-1]
    axes = tuple(range(rank - len(sides), rank))
    padded = [axis for axis, side in zip(axes, sides, strict=True) if any(side)]
    return _pad_constant(fold, node, source, sides, padded, args.get("value") or 0.0)


def border(fold: Fold, node: fx.Node) -> bool:
    """The end of a zero pad whose border was overwritten by one constant per channel (see foldexport.fold.borders)."""
    found = fold.analysis.borders.get(node)
    if found is None:
        return False
    padded = [axis + 2 for axis, side in enumerate(found.sides) if any(side)]
    return _pad_constant(fold, node, found.source, list(found.sides), padded, found.value)


def _pad_by_copies(fold: Fold, node: fx.Node, source: fx.Node) -> bool:
    pending = fold.pending(source)
    space = tuple(range(2, pending.stored.rank))
    if any(axis in space for axis in pending.affine.axes()):
        pending = fold.satisfy(pending, EXACT, node, f"it varies over the space that `{fold.label(node)}` pads")
    stored = fold.call(node, "pool", {source: pending.stored}, space=space, keeps_constants=True)
    fold.put(node, stored, pending.affine.compressed(), pending.carried)
    return True


def _pad_constant(fold: Fold, node: fx.Node, source: fx.Node, sides, padded: list[int], value) -> bool:
    pending = fold.pending(source)
    rank = pending.stored.rank
    if 0 in padded:
        return False
    level = torch.as_tensor(value, dtype=torch.float64)
    if padded == [1] and level.numel() == 1 and min(sides[1 - rank]) >= 0:
        return _pad_channels(fold, node, pending, sides, float(level))
    stored_value = _stored_level(pending.affine, level)
    if set(padded) & set(pending.affine.axes()):
        pending = fold.satisfy(pending, EXACT, node, f"it varies along the axes that `{fold.label(node)}` pads")
        stored_value = _stored_level(pending.affine, level)
    if stored_value is None:
        one = level.numel() == 1
        why = f"`{fold.label(node)}` pads with {'one value for all channels' if one else 'values that are not its shift'}"
        need = _pad_need(level, one)
        pending = fold.satisfy(pending, need, node, why)
        stored_value = _stored_level(pending.affine, level)
    if stored_value is None:
        return False
    zero_pad = tuple(sides) if stored_value == 0 and len(sides) == rank - 2 and rank > 2 else None
    flat = [p for side in reversed(sides) for p in side]
    stored = fold.emit(node, "pad", [pending.stored], pads=flat, value=stored_value, zero_pad=zero_pad)
    fold.put(node, stored, pending.affine.compressed(), pending.carried)
    return True


def _pad_need(level: torch.Tensor, one: bool):
    """What padding with these values requires: an infinity keeps its sign under ``a > 0``, zero under ``t = 0``."""
    if bool(level.isinf().any()):
        return NonNegative(strict=True)
    return ZERO_SHIFT if not bool(level.any()) else EXACT if one else ShiftOf(level)


def _pad_channels(fold: Fold, node: fx.Node, pending: Pending, sides, value: float) -> bool:
    """New channels of a constant: they are stored as they are, whatever is pending on the others."""
    stored_shape, rank = shape_of(node), pending.stored.rank
    before, after = sides[1 - rank]
    sizes = (before, stored_shape[1] - before - after, after)
    own = Affine.identity(rank)
    affine = Affine.cat((own, pending.affine, own), sizes, 1)
    flat = [p for side in reversed(sides) for p in side]
    stored = fold.emit(node, "pad", [pending.stored], pads=flat, value=value, zero_pad=None)
    fold.put(node, stored, affine.compressed(), pending.carried)
    return True


def _stored_level(affine: Affine, level: torch.Tensor) -> float | None:
    """``(p − t)/a`` when it is the same for every channel, else None. Channels with a = 0 can hold anything if p = t."""
    scale, shift, level = torch.broadcast_tensors(affine.scale, affine.shift, level)
    dead = scale == 0
    if bool((dead & (level != shift)).any()):
        return None
    values = ((level - shift) / torch.where(dead, 1.0, scale))[~dead]
    if values.numel() == 0:
        return 0.0
    first = float(values.reshape(-1)[0])
    if not bool(values.isfinite().all()):
        return first if bool((values == first).all()) else None
    spread = float((values - first).abs().max())
    limit = 1e-14 * float(torch.maximum(level.abs(), shift.abs()).max() / scale[~dead].abs().min()) if spread else 0.0
    if spread > limit:
        return None
    return 0.0 if abs(first) <= limit else first


def _volume(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total

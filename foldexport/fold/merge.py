"""Merging in the forward pass: sums, compositions, exchanges and concatenations of what is linear.

A stored tensor that only linear operators separate from an ancestor is a convolution of that ancestor (:class:`Path`). Two
paths from the same ancestor add up to one convolution, a path and a convolution behind it compose to one. The algebra is in
:mod:`foldexport.fold.conv`; here is only when it may be used: nobody else may read what disappears, and neither
multiply-adds nor bytes moved may grow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from foldexport.fold import conv as algebra
from foldexport.fold import pooling
from foldexport.fold.affine import Affine
from foldexport.fold.conv import Conv
from foldexport.fold.crops import cropped_sides
from foldexport.fold.emitter import Fold
from foldexport.fold.stored import Pending, Stored, channel_axis

MAX_PATH = 4  # operators that one path may span
MAX_GROWTH = 16  # times the multiply-adds of its parts that a branch may need before its sum is judged
MAX_TERMS = 8  # operands of one sum that are tried against each other


@dataclass(frozen=True, eq=False)
class Path:
    """``stored = conv(source)``; `macs` and `bytes` of the operators along it, all of which would disappear."""

    source: Stored
    conv: Conv
    macs: float
    bytes: float
    labels: tuple[str, ...] = ()


def sizes_for(conv: Conv, source: Stored) -> tuple[int, ...]:
    """The spatial sizes that a convolution of ``source`` sees."""
    return source.shape[2:] if conv.spatial_rank else ()


def expense(source: Stored, conv: Conv, behind: Conv | None = None, beside: Conv | None = None) -> tuple[float, float]:
    """Multiply-adds and bytes moved per sample; of a merge with one behind or beside it without building its weights.

    A linear layer runs once per row. Raises ValueError where the merge would not be exact.
    """
    sizes = sizes_for(conv, source)
    if behind is not None:
        macs, moved = algebra.composed_cost(conv, behind, sizes)
    elif beside is not None:
        macs, moved = algebra.added_cost(conv, beside, sizes)
    else:
        macs, moved = algebra.cost(conv, sizes)
    rows = math.prod(source.shape[1:-1]) if conv.spatial_rank == 0 else 1
    return macs * rows, moved * rows


def paths(stored: Stored, length: int = MAX_PATH) -> list[Path]:
    """Every way to write an open stored tensor as one convolution of an ancestor, the shortest first."""
    if length == 0 or not stored.open or stored.fixed:
        return []
    step = as_conv(stored)
    if step is None:
        return []
    source = stored.inputs[0]
    macs, moved = expense(source, step)
    spent = 0.0 if stored.kind == "view" else macs  # a cut multiplies nothing
    label = (stored.module,) if stored.kind == "conv" else ()
    found = [Path(source, step, spent, moved, label)]
    for first in paths(source, length - 1):
        composed = attempt(_compose_within_reason, first, step, macs)
        if composed is not None:
            found.append(Path(first.source, composed, first.macs + spent, first.bytes + moved, first.labels + label))
    return found


def _compose_within_reason(first: Path, step: Conv, macs: float) -> Conv:
    """The composition, unless it is so dear that no sum could pay for it; a branch alone may cost more than its parts."""
    if expense(first.source, first.conv, behind=step)[0] > MAX_GROWTH * (first.macs + macs):
        raise ValueError("the composed convolution is far dearer than its parts")
    return algebra.compose(first.conv, step)


def as_conv(stored: Stored) -> Conv | None:
    """One stored tensor as a convolution of its input, with its retargets so far."""
    if stored.kind == "conv":
        base = stored.conv
    elif stored.kind == "pool" and stored.node is not None and pooling.is_convolution(stored.node):
        base = pool_as_conv(stored.node, stored.shape[1])
    elif stored.kind == "pad" and stored.attrs.get("zero_pad") is not None:
        pads = stored.attrs["zero_pad"]
        base = algebra.absorb_padding(algebra.identity(stored.shape[1], len(pads)), *zip(*pads, strict=True))
    elif stored.kind == "view" and stored.node is not None and (cut := cropped_sides(stored.node)) is not None:
        base = algebra.absorb_padding(algebra.identity(stored.shape[1], len(cut)), *zip(*cut, strict=True))
    else:
        return None
    change = stored.since(0)
    if change.is_identity:
        return base
    axis = 1 if base.spatial_rank else stored.rank - 1
    if not change.varies_only_on(axis):
        return None
    return base.affine_output(*change.vector(axis, stored.shape[axis]))


def pool_as_conv(node: fx.Node, channels: int) -> Conv:
    """An average pool as the depthwise convolution that it is (see :func:`foldexport.fold.pooling.is_convolution`)."""
    kernel, stride, padding = pooling.window(node)
    base = algebra.average_pool(channels, kernel, stride, [(p, p) for p in padding])
    factor = math.prod(kernel) / pooling.divisor(node)
    return base if factor == 1 else base.scale_output(torch.full((channels,), factor, dtype=torch.float64))


def attempt(function, *convs) -> Conv | None:
    """The merged convolution, or None where the algebra refuses (it says why in its ValueError)."""
    try:
        return function(*convs)
    except ValueError:
        return None


def pays(new: tuple[float, float], old: tuple[float, float]) -> bool:
    """Neither multiply-adds nor bytes moved grow."""
    return new[0] <= old[0] and new[1] <= old[1]


# ── sum ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def merge_sum(fold: Fold, node: fx.Node, left: Pending, right: Pending) -> list[Pending] | None:
    """The terms of ``v + w`` with those merged that come from one tensor; None when none do.

    Additions that nobody else reads are opened up, so that the branches find each other in any order.
    """
    terms = _terms(left) + _terms(right)
    if len(terms) > MAX_TERMS:
        return None
    merged_any, index = False, 0
    while index < len(terms):
        for other in range(index + 1, len(terms)):
            partner = _merge_pair(fold, node, terms[index], terms[other])
            if partner is not None:
                terms[index] = partner
                del terms[other]
                merged_any = True
                break
        else:
            index += 1
    return terms if merged_any else None


def _terms(pending: Pending) -> list[Pending]:
    """The operands of a sum, through additions that only this sum reads, each with its share of the affine."""
    stored, affine = pending.stored, pending.affine
    if stored.kind != "add" or not stored.open or stored.fixed or any(i.shape != stored.shape for i in stored.inputs):
        return [pending]
    total = stored.since(0).then(affine)
    sign = -1.0 if stored.attrs["minus"] else 1.0
    shares = [total, Affine(sign * total.scale, torch.zeros_like(total.shift))]
    found = []
    for operand, share in zip(stored.inputs, shares, strict=True):
        found.extend(_terms(Pending.of(operand, share, pending.carried)))
    return found


def _merge_pair(fold: Fold, node: fx.Node, left: Pending, right: Pending) -> Pending | None:
    addition = 3.0 * 4 * math.prod(left.stored.shape[1:])
    best: tuple[float, Path, Path] | None = None
    for a in _term_paths(left):
        for b in _term_paths(right):
            if a.source is not b.source:
                continue
            try:
                new = expense(a.source, a.conv, beside=b.conv)
            except ValueError:
                continue
            if pays(new, (a.macs + b.macs, a.bytes + b.bytes + addition)) and (best is None or new[0] < best[0]):
                best = (new[0], a, b)
    if best is None:
        return None
    _, a, b = best
    labels = a.labels + b.labels
    stored = fold.emit(node, "conv", [a.source], suffix="_merged", conv=algebra.add(a.conv, b.conv),
                       shape=left.stored.shape, dynamic=left.stored.dynamic)  # fmt: skip
    stored.module, stored.op = next((label for label in labels if label), stored.module), "conv"
    into = stored.module or stored.name
    fold.absorbed(left.carried + right.carried, into)
    fold.ledger.note(node, fold.label(node), "merge by sum").into = into
    return Pending.of(stored)


def _term_paths(pending: Pending) -> list[Path]:
    """The paths of a term with its pending affine folded in; the tensor itself is a Dirac convolution of itself."""
    stored, affine = pending.stored, pending.affine
    axis = channel_axis(stored) if stored.kind == "conv" else 1
    if stored.rank < 2 or not affine.varies_only_on(axis):
        return []
    vectors = affine.vector(axis, stored.shape[axis])
    found = [
        Path(path.source, path.conv.affine_output(*vectors), path.macs, path.bytes, path.labels)
        for path in paths(stored)
        if (1 if path.conv.spatial_rank else stored.rank - 1) == axis
    ]
    if stored.rank > 2 and axis == 1:
        dirac = algebra.identity(stored.shape[1], stored.rank - 2)
        found.append(Path(stored, dirac.affine_output(*vectors), 0.0, 0.0))
    return found


# ── composition ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Composition:
    """``conv(v)`` as one convolution of an ancestor of ``v``; without one, `refusal` says why (empty: nothing to merge)."""

    source: Stored | None = None
    conv: Conv | None = None
    labels: tuple[str, ...] = ()
    refusal: str = ""


def merge_composition(pending: Pending, conv: Conv) -> Composition:
    """Compose with what is linear in front, as far back as that is exact and no dearer."""
    stored, affine = pending.stored, pending.affine
    axis = 1 if conv.spatial_rank else stored.rank - 1
    found = [p for p in paths(stored) if any(p.labels) and p.conv.spatial_rank == conv.spatial_rank]
    if not found or not affine.varies_only_on(axis):
        return Composition()
    vectors = affine.vector(axis, stored.shape[axis])
    macs, moved = expense(stored, conv)
    chosen, refusal = None, ""
    for path in found:
        first, old = path.conv.affine_output(*vectors), (path.macs + macs, path.bytes + moved)
        try:
            new = expense(path.source, first, behind=conv)
        except ValueError as refused:
            refusal = refusal or str(refused)
            continue
        if pays(new, old):
            chosen = (path, first)
        else:
            refusal = refusal or _dearer(new, old)
    if chosen is None:
        return Composition(refusal=refusal)
    path, first = chosen
    return Composition(path.source, algebra.compose(first, conv), path.labels)


def _dearer(new: tuple[float, float], old: tuple[float, float]) -> str:
    what = ("multiply-adds", 0) if new[0] > old[0] else ("bytes moved", 1)
    return f"the merged layer would need {new[what[1]]:,.0f} {what[0]} per sample instead of {old[what[1]]:,.0f}"


def pointwise_source(pending: Pending) -> tuple[Stored, Conv] | None:
    """``(x, conv)`` when ``v`` is a 1×1 convolution of ``x`` that nobody else reads: it may go behind a pool.

    ``pool(conv1x1(x)) = conv1x1(pool(x))`` because a 1×1 convolution acts on each position alone; its bias needs
    ``pool(1) = 1``.
    """
    stored, affine = pending.stored, pending.affine
    if stored.kind != "conv" or not stored.open or stored.fixed or not affine.varies_only_on(1):
        return None
    conv = as_conv(stored)
    if conv is None or conv.spatial_rank == 0 or not conv.is_pointwise:
        return None
    return stored.inputs[0], conv.affine_output(*affine.vector(1, stored.shape[1]))


# ── concatenation ───────────────────────────────────────────────────────────────────────────────────────────────────


def merge_concatenation(operands: list[Pending]) -> tuple[Stored, Conv] | None:
    """Convolutions of one tensor with one geometry, concatenated along channels, are one convolution."""
    stored = [pending.stored for pending in operands]
    if any(s.kind != "conv" or not s.open or s.fixed for s in stored) or len({id(s.inputs[0]) for s in stored}) != 1:
        return None
    convs = []
    for pending in operands:
        axis = channel_axis(pending.stored)
        if not pending.affine.varies_only_on(axis):
            return None
        vectors = pending.affine.vector(axis, pending.stored.shape[axis])
        convs.append(as_conv(pending.stored).affine_output(*vectors))
    merged = attempt(algebra.concatenate, convs)
    return None if merged is None else (stored[0].inputs[0], merged)

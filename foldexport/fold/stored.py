"""Stored tensors of the folded graph and what their makers can still change.

During the fold a value ``v`` of the training graph is a stored tensor and a pending affine, ``v = a ⊙ s + t``
(:class:`Pending`). The maker of ``s`` may be able to make another tensor instead,

    s' = p ⊙ s + q,

without an operator of its own: a convolution through its weights, a clamp through its bounds, an addition through its
operands. That ability is the *handle* of ``s``; :func:`can` asks for it and :meth:`Stored.retarget` uses it. A retarget
is only recorded; :func:`push_down` hands the recorded maps to the operands and weights once, in one reverse pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foldexport.fold.affine import Affine
from foldexport.fold.conv import Conv

MAX_CARRIED = 8  # ledger keys that a pending affine remembers; keeps a trunk of n scalars linear
ROUNDING = 8 * 2.0**-53  # relative to the terms of a difference
MAX_DEPTH = 48  # how far a retarget may travel upstream; keeps a chain of n open additions linear


@dataclass(eq=False)
class Stored:
    """A tensor that the folded graph really computes.

    kind: "input", "constant", "conv", "clamp", "add", "affine", "max_pool", "pool", "view", "part", "cat", "pad",
        "norm", "leaky" or "opaque"; the handles below are by kind.
    shape: sizes at the traced example; `dynamic` holds the axes that are symbolic.
    reads: how many (consumer, argument) pairs will read it; one read makes it open.
    maps: the retargets so far, oldest first.
    """

    name: str
    kind: str
    inputs: list[Stored]
    shape: tuple[int, ...]
    dynamic: frozenset[int] = frozenset()
    attrs: dict[str, Any] = field(default_factory=dict)
    module: str = ""
    op: str = ""
    node: Any = None
    reads: int = 1
    maps: list[Affine] = field(default_factory=list)
    fixed: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def open(self) -> bool:
        return self.reads == 1

    @property
    def conv(self) -> Conv:
        return self.attrs["conv"]

    def retarget(self, change: Affine) -> None:
        """Make ``s' = p ⊙ s + q`` from now on; :func:`can` must have agreed."""
        if not change.is_identity:
            self.maps.append(change)

    def since(self, epoch: int) -> Affine:
        """The composition of the maps recorded after ``epoch``."""
        total = Affine.identity(self.rank)
        for change in self.maps[epoch:]:
            total = total.then(change)
        return total


@dataclass(frozen=True, eq=False)
class Pending:
    """``v = affine(s)``, with ``s`` as it was after ``epoch`` retargets."""

    stored: Stored
    affine: Affine
    epoch: int
    carried: tuple = ()  # ledger keys of what waits in the affine, the latest few

    @staticmethod
    def of(stored: Stored, affine: Affine | None = None, carried: tuple = ()) -> Pending:
        return Pending(stored, affine or Affine.identity(stored.rank), len(stored.maps), carried[-MAX_CARRIED:])

    def current(self) -> Pending:
        """The same value in terms of ``s`` as it is now: ``a ⊙ (s' − q)/p + t``."""
        if self.epoch == len(self.stored.maps):
            return self
        affine, _ = rebase(self.affine, self.stored.since(self.epoch))
        return Pending.of(self.stored, affine, self.carried)


def rebase(affine: Affine, change: Affine) -> tuple[Affine, Tensor | None]:
    """``a ⊙ s + t`` in terms of ``s' = p ⊙ s + q``, and the mask of channels where that is possible.

    ``v = (a/p) ⊙ s' + (t − a·q/p)``. Where p = 0 the new tensor holds no trace of ``s``: the value is known there only if
    a = 0, and the mask is False elsewhere. The mask is None when every channel is known.
    """
    if change.is_identity:
        return affine, None
    lost = change.scale == 0
    if not bool(lost.any()):
        ratio = affine.scale / change.scale
        return Affine(*torch.broadcast_tensors(ratio, difference(affine.shift, ratio * change.shift))), None
    known = lost & (affine.scale == 0)  # there v = t and s' = q, so v = s' + (t − q) says the same
    ratio = torch.where(known, 1.0, torch.where(lost, 0.0, affine.scale / torch.where(lost, 1.0, change.scale)))
    shift = difference(affine.shift, ratio * change.shift)
    usable = ~lost | known
    return Affine(*torch.broadcast_tensors(ratio, shift)), None if bool(usable.all()) else usable


def difference(x: Tensor, y: Tensor) -> Tensor:
    """``x − y``, exactly zero where the two cancel but for rounding.

    A maker that took ``q = β/k`` leaves ``β − k·q``, which is zero in exact arithmetic and must not cost an operator.
    """
    result = x - y
    return torch.where(result.abs() <= ROUNDING * (x.abs() + y.abs()), 0.0, result)


# ── handles: can the maker of s make p ⊙ s + q instead? ─────────────────────────────────────────────────────────────


def can(stored: Stored, change: Affine, depth: int = 0) -> bool:
    """Whether ``s' = p ⊙ s + q`` costs nothing more than ``s``. The caller knows that nobody has read ``s`` yet."""
    if change.is_identity:
        return True
    if depth > MAX_DEPTH or stored.fixed or not bool(torch.isfinite(change.scale).all() & torch.isfinite(change.shift).all()):
        return False
    handle = _HANDLES.get(stored.kind)
    return handle is not None and handle(stored, change, depth + 1)


def _operand(stored: Stored, change: Affine, depth: int) -> bool:
    return change.is_identity or (stored.open and can(stored, change, depth))


def _unshifted(change: Affine) -> Affine:
    return Affine(change.scale, torch.zeros_like(change.shift))


def _conv(stored: Stored, change: Affine, depth: int) -> bool:
    return change.varies_only_on(channel_axis(stored))


def _norm(stored: Stored, change: Affine, depth: int) -> bool:
    return change.varies_only_on(stored.attrs["axis"])


def _affine(stored: Stored, change: Affine, depth: int) -> bool:
    return True


def _shares(stored: Stored, change: Affine, taker: int) -> tuple[Affine, Affine]:
    """What each operand of ``s₀ ± s₁`` has to become for ``p ⊙ s + q``: p on both, q on the taker, negated behind a minus."""
    scale = _unshifted(change)
    if taker == 0:
        return change, scale
    return scale, Affine(change.scale, -change.shift) if stored.attrs.get("minus") else change


def _shift_operand(stored: Stored, change: Affine, depth: int) -> int | None:
    """Which operand of an addition takes the shift: the first that can, beside the scale on both."""
    for taker in (1, 0):
        shares = _shares(stored, change, taker)
        if all(_operand(operand, share, depth) for operand, share in zip(stored.inputs, shares, strict=True)):
            return taker
    return None


def _add(stored: Stored, change: Affine, depth: int) -> bool:
    if any(operand.shape != stored.shape for operand in stored.inputs):
        return False
    return _shift_operand(stored, change, depth) is not None


def _clamp(stored: Stored, change: Affine, depth: int) -> bool:
    # a = 0: the bounds make the constant, the operand keeps its scale there
    live = torch.where(change.scale == 0, 1.0, change.scale)
    dead_shift = torch.where(change.scale == 0, 0.0, change.shift)
    return _operand(stored.inputs[0], Affine(*torch.broadcast_tensors(live, dead_shift)), depth)


def _positive_scale(stored: Stored, change: Affine, depth: int) -> bool:
    return change.has_zero_shift and bool((change.scale > 0).all()) and _operand(stored.inputs[0], change, depth)


def _on_space(stored: Stored, change: Affine) -> bool:
    """Whether the change varies along the axes that a pooling window runs over."""
    return any(axis in stored.attrs["space"] for axis in change.axes())


def _max_pool(stored: Stored, change: Affine, depth: int) -> bool:
    return bool((change.scale > 0).all()) and not _on_space(stored, change) and _operand(stored.inputs[0], change, depth)


def _pool(stored: Stored, change: Affine, depth: int) -> bool:
    if _on_space(stored, change) or not (stored.attrs["keeps_constants"] or change.has_zero_shift):
        return False
    if stored.attrs.get("drops_axes") is not None:
        change = stored.attrs["drops_axes"](change)
    return _operand(stored.inputs[0], change, depth)


def _view(stored: Stored, change: Affine, depth: int) -> bool:
    back = stored.attrs["unmap"](change)
    return back is not None and _operand(stored.inputs[0], back, depth)


def _part(stored: Stored, change: Affine, depth: int) -> bool:
    """A part of a split: the maker of the whole, behind views, has one row for each channel and takes any part's change."""
    whole = stored.inputs[0].inputs[0]
    maker = whole
    while maker.kind == "view" and maker.open:
        maker = maker.inputs[0]
    return maker.kind in _BY_ROWS and _operand(whole, stored.attrs["back"](change), depth)


#: Makers for which any two changes that they can take, they can take together.
_BY_ROWS = frozenset({"conv", "norm", "affine"})


def _cat(stored: Stored, change: Affine, depth: int) -> bool:
    return all(
        _operand(operand, part, depth) for operand, part in zip(stored.inputs, cat_parts(stored, change), strict=True)
    )


_HANDLES = {
    "conv": _conv,
    "norm": _norm,
    "affine": _affine,
    "add": _add,
    "clamp": _clamp,
    "leaky": _positive_scale,
    "max_pool": _max_pool,
    "pool": _pool,
    "view": _view,
    "part": _part,
    "cat": _cat,
}


def channel_axis(stored: Stored) -> int:
    """The axis on which a convolution's rows lie: 1, or the last for a linear layer."""
    return 1 if stored.conv.spatial_rank else stored.rank - 1


def cat_parts(stored: Stored, change: Affine) -> list[Affine]:
    """The change of a concatenation, cut into its operands' parts along the concatenated axis."""
    axis, start, parts = stored.attrs["axis"], 0, []
    for operand in stored.inputs:
        parts.append(change.slice(axis, range(start, start + operand.shape[axis])))
        start += operand.shape[axis]
    return parts


# ── push_down: hand the recorded maps to the operands and weights ───────────────────────────────────────────────────


def push_down(order: list[Stored]) -> None:
    """Apply every recorded map, last maker first, so that each stored tensor gets its readers' wishes before its own turn.

    `maps` keeps the record afterwards: the certificate needs it to express earlier values in the final tensors.
    """
    for stored in reversed(order):
        change = stored.since(0)
        if not change.is_identity:
            _APPLY[stored.kind](stored, change)


def _apply_conv(stored: Stored, change: Affine) -> None:
    scale, shift = change.vector(channel_axis(stored), stored.shape[channel_axis(stored)])
    stored.attrs["conv"] = stored.conv.affine_output(scale, shift)


def _apply_norm(stored: Stored, change: Affine) -> None:
    stored.attrs["affine"] = stored.attrs["affine"].then(change)


def _apply_add(stored: Stored, change: Affine) -> None:
    taker = _shift_operand(stored, change, 0)
    for operand, share in zip(stored.inputs, _shares(stored, change, taker), strict=True):
        operand.retarget(share)


def _apply_clamp(stored: Stored, change: Affine) -> None:
    lower, upper = stored.attrs["lower"], stored.attrs["upper"]
    p, q = change.scale, change.shift
    dead = p == 0
    ends = [torch.where(dead, q, torch.where(dead, 1.0, p) * bound + q) for bound in (lower, upper)]
    stored.attrs["lower"] = torch.where(p < 0, ends[1], ends[0])
    stored.attrs["upper"] = torch.where(p < 0, ends[0], ends[1])
    live = Affine(*torch.broadcast_tensors(torch.where(dead, 1.0, p), torch.where(dead, 0.0, q)))
    stored.inputs[0].retarget(live)


def _apply_through(stored: Stored, change: Affine) -> None:
    if stored.attrs.get("drops_axes") is not None:
        change = stored.attrs["drops_axes"](change)
    stored.inputs[0].retarget(change)


def _apply_view(stored: Stored, change: Affine) -> None:
    stored.inputs[0].retarget(stored.attrs["unmap"](change))


def _apply_part(stored: Stored, change: Affine) -> None:
    stored.inputs[0].inputs[0].retarget(stored.attrs["back"](change))


def _apply_cat(stored: Stored, change: Affine) -> None:
    for operand, part in zip(stored.inputs, cat_parts(stored, change), strict=True):
        operand.retarget(part)


_APPLY = {
    "conv": _apply_conv,
    "norm": _apply_norm,
    "affine": _apply_norm,
    "add": _apply_add,
    "clamp": _apply_clamp,
    "leaky": _apply_through,
    "max_pool": _apply_through,
    "pool": _apply_through,
    "view": _apply_view,
    "part": _apply_part,
    "cat": _apply_cat,
}

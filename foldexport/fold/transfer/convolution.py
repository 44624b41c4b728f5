"""Convolution, transposed convolution and linear layers: they absorb the pending affine of their operand.

    W ← W·a[in],   b ← b + Σ_{in,k} W·t,   output (1, 0)

exact for any t when no zero padding is met, for t = 0 otherwise.
"""

from __future__ import annotations

from torch import Tensor, fx

from foldexport.fold import conv as algebra
from foldexport.fold.constants import is_parameter
from foldexport.fold.conv import Conv
from foldexport.fold.emitter import Fold
from foldexport.fold.merge import attempt, merge_composition
from foldexport.fold.needs import EXACT, AlongAxis, ZeroShift
from foldexport.fold.pending import name_of, shape_of
from foldexport.fold.pooling import per_axis
from foldexport.fold.stored import Pending, Stored
from foldexport.trace import bound


def convolution(fold: Fold, node: fx.Node) -> bool:
    """conv1d/2d/3d and their transposes with a constant weight."""
    args = bound(node)
    if not _constant_weights(fold, node, args):
        return False
    source = args["input"]
    if len(shape_of(source)) != len(shape_of(args["weight"])):
        return False  # no batch axis
    weight = fold.constants.raw(args["weight"])
    rank = weight.dim() - 2
    transposed = "transpose" in name_of(node) or bool(args.get("transposed", False))
    conv = Conv(
        weight=weight,
        bias=_bias(fold, args.get("bias")),
        stride=per_axis(args.get("stride", 1), rank),
        dilation=per_axis(args.get("dilation", 1), rank),
        padding=_padding(args, weight),
        groups=args.get("groups", 1),
        transposed=transposed,
        output_padding=per_axis(args.get("output_padding", 0), rank) if transposed else (),
    )
    absorb(fold, node, source, conv, axis=1, shared=_name_of_weight(args["weight"]))
    return True


def linear(fold: Fold, node: fx.Node) -> bool:
    """``linear(x, W, b)``, and ``matmul``, ``mm``, ``addmm`` with a constant right factor ``[in, out]``."""
    args, name = bound(node), name_of(node)
    if name == "linear":
        if not _constant_weights(fold, node, args):
            return False
        source, weight, bias = args["input"], fold.constants.raw(args["weight"]), _bias(fold, args.get("bias"))
        key = _name_of_weight(args["weight"])
    else:
        source, factor = (args["mat1"], args["mat2"]) if name == "addmm" else (args["self"], args.get("mat2", args.get("other")))
        if factor not in fold.constants or not fold.is_variable(source) or len(shape_of(factor)) != 2:
            return False
        weight, bias, key = fold.constants.raw(factor).t(), None, None
        if name == "addmm":
            if args["self"] not in fold.constants or args.get("beta", 1) != 1 or args.get("alpha", 1) != 1:
                return False
            bias = fold.constants.value(args["self"])
            if bias.numel() != weight.shape[0]:
                return False
            bias = bias.reshape(-1)
    if len(shape_of(source)) < 2 or weight.dim() != 2:
        return False
    conv = Conv(weight=weight, bias=bias, stride=(), dilation=(), padding=())
    absorb(fold, node, source, conv, axis=len(shape_of(source)) - 1, shared=key)
    return True


def _constant_weights(fold: Fold, node: fx.Node, args: dict) -> bool:
    """Whether weight and bias are constants; a weight that depends on the input makes the operator opaque."""
    bias = args.get("bias")
    if args["weight"] in fold.constants and (bias is None or bias in fold.constants):
        return fold.is_variable(args["input"])
    reason = "its weight depends on the network's input, so there is nothing constant to fold into"
    fold.ledger.kept(node, fold.label(node), name_of(node), reason)
    return False


def _name_of_weight(node: fx.Node) -> str | None:
    return node.target if is_parameter(node) else None


def _bias(fold: Fold, node) -> Tensor | None:
    return None if node is None else fold.constants.value(node)


def _padding(args: dict, weight: Tensor) -> tuple[tuple[int, int], ...]:
    """``(lo, hi)`` per axis; "same" puts the odd element behind, as PyTorch does."""
    rank, padding = weight.dim() - 2, args.get("padding", 0)
    if padding == "valid":
        return ((0, 0),) * rank
    if padding == "same":
        dilation = per_axis(args.get("dilation", 1), rank)
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in per_axis(padding, rank))


def absorb(fold: Fold, node: fx.Node, source: fx.Node, conv: Conv, axis: int, shared: str | None) -> None:
    """Emit ``conv`` with the pending affine of its operand folded in, merged with what is linear in front of it."""
    if shared in fold.pinned:
        _keep_shared(fold, node, source, conv, shared)
        return
    pending = fold.pending(source)
    merged = merge_composition(pending, conv)
    if merged.conv is not None:
        names = [name for name in merged.labels if name]
        entry = fold.ledger.note(("compose", node), ", ".join(names) or fold.label(node), "merge by composition")
        entry.into = fold.label(node)
        fold.absorbed(pending.carried, fold.label(node))
        fold.put(node, _emit(fold, node, merged.source, merged.conv, shared=None))
        return
    if merged.refusal:
        fold.ledger.kept(("compose", node), fold.label(node), "merge by composition", merged.refusal)
    if _behind_upsample(fold, node, pending, conv):
        return
    label = fold.label(node)
    if conv.pads_zeros:
        why = f"its shift meets the zero padding of `{label}`"
        pending = fold.satisfy(pending, ZeroShift(axis), node, why)
    else:
        why = f"it does not vary along the channels of `{label}` alone"
        pending = fold.satisfy(pending, AlongAxis(axis), node, why)
    conv, stored_source = _through_pad(conv, pending)
    fold.put(node, _emit(fold, node, stored_source, _absorbed(conv, pending, axis), shared))
    fold.absorbed(pending.carried, label)


def _keep_shared(fold: Fold, node: fx.Node, source: fx.Node, conv: Conv, shared: str) -> None:
    """A layer called several times whose copies would cost more than folding saves: it stays one layer, as it is."""
    reason = f"its weight {shared} is shared by several calls, and a copy for each would cost more bytes than it saves"
    pending = fold.demand(node, source, EXACT, f"`{fold.label(node)}` keeps one weight for several calls")
    fold.ledger.kept(("shared", node), fold.label(node), name_of(node), reason)
    stored = _emit(fold, node, pending.stored, conv, shared)
    stored.fixed = True
    fold.put(node, stored)


def _absorbed(conv: Conv, pending: Pending, axis: int) -> Conv:
    if pending.affine.is_identity:
        return conv
    scale, shift = pending.affine.vector(axis, pending.stored.shape[axis])
    if not pending.affine.has_zero_shift:
        conv = conv.shift_input(shift)
    return conv if pending.affine.has_unit_scale else conv.scale_input(scale)


def _emit(fold: Fold, node: fx.Node, source: Stored, conv: Conv, shared: str | None) -> Stored:
    return fold.emit(node, "conv", [source], conv=conv, shared=shared)


def _through_pad(conv: Conv, pending: Pending) -> tuple[Conv, Stored]:
    """A zero pad that only this convolution reads becomes its padding, where the result is a layer's own padding again."""
    stored = pending.stored
    pads = stored.attrs.get("zero_pad") if stored.kind == "pad" and stored.open else None
    if pads is None or conv.transposed or len(pads) != conv.spatial_rank or not pending.affine.has_zero_shift:
        return conv, stored
    joined = attempt(algebra.absorb_padding, conv, *zip(*pads, strict=True))
    if joined is None or any(lo != hi or lo < 0 for lo, hi in joined.padding):
        return conv, stored
    return joined, stored.inputs[0]


def _behind_upsample(fold: Fold, node: fx.Node, pending: Pending, conv: Conv) -> bool:
    """``conv1x1(upsample(x)) = upsample(conv1x1(x))``: the convolution runs on the small tensor."""
    stored = pending.stored
    if stored.kind != "pool" or not stored.open or not stored.op.startswith("upsample") or conv.spatial_rank == 0:
        return False
    if not conv.is_pointwise or not pending.affine.varies_only_on(1):
        return False
    small, channels = stored.inputs[0], shape_of(node)[1]
    if channels > stored.shape[1] or _volume(small.shape[2:]) >= _volume(stored.shape[2:]) or stored.maps:
        return False
    early = fold.emit(node, "conv", [small], suffix="_early", conv=_absorbed(conv, pending, 1), shared=None,
                      shape=(small.shape[0], channels, *small.shape[2:]), dynamic=small.dynamic)  # fmt: skip
    early.reads = 1
    sizes = stored.inputs[1:]  # that the network reads while it runs
    late = fold.emit(stored.node, "pool", [early, *sizes], suffix="_late", call=stored.attrs["call"], shape=shape_of(node),
                     space=stored.attrs["space"], keeps_constants=True)  # fmt: skip
    late.reads, late.node, late.module, late.op = fold.analysis.reads.get(node, 1), node, stored.module, stored.op
    entry = fold.ledger.note(node, fold.label(node), "exchange with upsampling")
    entry.into = "in front of " + (stored.module or stored.op)
    fold.absorbed(pending.carried, fold.label(node))
    fold.put(node, late)
    return True


def _volume(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total



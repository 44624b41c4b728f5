"""One stored tensor → the plain PyTorch layer or call that makes it, in float64."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldexport.fold.conv import Conv
from foldexport.fold.emitter import Operand
from foldexport.fold.stored import Stored

EPSILON = 2.0**-17  # of a batch norm that stays


@dataclass
class Step:
    """How a stored tensor is computed: a layer, or a function with arguments and constant tensors.

    In `args`, :class:`~foldexport.fold.passes.Operand` stands for an input and :class:`Buffer` for a constant tensor.
    """

    kind: str
    module: nn.Module | None = None
    function: Callable | None = None
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    before: nn.Module | None = None  # an explicit pad in front of a convolution whose own padding is symmetric


@dataclass(frozen=True, eq=False)
class Buffer:
    """A constant tensor among the arguments of a call; it becomes a buffer of the folded module."""

    name: str
    value: Tensor


def layer_of(stored: Stored) -> Step:
    """The step for one stored tensor."""
    return _MAKERS[stored.kind](stored)


# ── convolution ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A layer without memory of its own: its weights are assigned, not initialised."""
    with torch.device("meta"):
        return make()


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous())


def _convolution(stored: Stored) -> Step:
    conv: Conv = stored.conv
    bias = conv.bias is not None
    if conv.spatial_rank == 0:
        layer = _meta(lambda: nn.Linear(conv.in_channels, conv.out_channels, bias=bias))
        return Step("linear", _with_weights(layer, conv))
    if conv.transposed:
        return Step("conv_transpose", _with_weights(_transposed_layer(conv), conv))
    padding, before = _padding(conv)
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[conv.spatial_rank - 1]
    layer = _meta(lambda: make(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, padding,
                               conv.dilation, conv.groups, bias))  # fmt: skip
    return Step("conv", _with_weights(layer, conv), before=before)


def _with_weights(layer: nn.Module, conv: Conv) -> nn.Module:
    dense = conv.dense()
    layer.weight = _parameter(dense.clone() if dense.data_ptr() == conv.weight.data_ptr() else dense)
    if conv.bias is not None:
        layer.bias = _parameter(conv.bias.clone())
    return layer


def _transposed_layer(conv: Conv) -> nn.Module:
    if any(lo != hi or lo < 0 for lo, hi in conv.padding):
        raise ValueError(f"no layer holds a transposed convolution with padding {conv.padding}")
    make = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[conv.spatial_rank - 1]
    return _meta(lambda: make(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                              tuple(lo for lo, _ in conv.padding), conv.output_padding, conv.groups,
                              conv.bias is not None, conv.dilation))  # fmt: skip


def _padding(conv: Conv) -> tuple[Any, nn.Module | None]:
    """A layer's own padding where it is symmetric or PyTorch's "same"; else a pad in front."""
    if all(lo == hi and lo >= 0 for lo, hi in conv.padding):
        return tuple(lo for lo, _ in conv.padding), None
    totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    same = tuple((total // 2, total - total // 2) for total in totals)
    if conv.padding == same and all(stride == 1 for stride in conv.stride):
        return "same", None
    flat = [side for pair in reversed(conv.padding) for side in pair]
    make = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)[conv.spatial_rank - 1]
    return (0,) * conv.spatial_rank, make(flat, 0.0)


# ── clamps, slopes, affines ─────────────────────────────────────────────────────────────────────────────────────────


def _compressed(tensor: Tensor) -> Tensor:
    """Without the axes along which nothing varies, from the left: ``[1, C, 1, 1]`` keeps its right-aligned form."""
    for axis in range(tensor.dim()):
        if tensor.shape[axis] > 1 and bool((tensor == tensor.narrow(axis, 0, 1)).all()):
            tensor = tensor.narrow(axis, 0, 1)
    while tensor.dim() and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor.clone()


def _clamp(stored: Stored) -> Step:
    lower, upper = _compressed(stored.attrs["lower"]), _compressed(stored.attrs["upper"])
    if lower.dim() == 0 and upper.dim() == 0:
        return _scalar_clamp(float(lower), float(upper))
    below, above = Buffer("lower", lower), Buffer("upper", upper)
    if not bool(torch.isfinite(upper).any()):
        return Step("clamp", function=torch.maximum, args=(Operand(0), below))
    if not bool(torch.isfinite(lower).any()):
        return Step("clamp", function=torch.minimum, args=(Operand(0), above))
    return Step("clamp", function=torch.clamp, args=(Operand(0), _expanded(below, upper), _expanded(above, lower)))


def _expanded(bound: Buffer, other: Tensor) -> Buffer:
    """Both bounds with one shape: every exporter knows that form."""
    return Buffer(bound.name, torch.broadcast_tensors(bound.value, other)[0].clone())


def _scalar_clamp(lower: float, upper: float) -> Step:
    if lower == 0 and upper == math.inf:
        return Step("relu", nn.ReLU())
    if lower == 0 and upper == 6:
        return Step("relu6", nn.ReLU6())
    if math.isinf(lower) and math.isinf(upper):
        return Step("identity", nn.Identity())
    if math.isfinite(lower) and math.isfinite(upper) and lower < upper:
        return Step("clamp", nn.Hardtanh(lower, upper))
    low, high = (bound if math.isfinite(bound) else None for bound in (lower, upper))
    return Step("clamp", function=torch.clamp, args=(Operand(0), low, high))


def _leaky(stored: Stored) -> Step:
    slope = _compressed(stored.attrs["slope"])
    if slope.dim() == 0 and stored.op == "leaky_relu":
        return Step("leaky_relu", nn.LeakyReLU(float(slope)))
    channels = slope.reshape(-1)
    layer = nn.PReLU(channels.numel(), dtype=torch.float64)
    layer.weight = _parameter(channels)
    return Step("prelu", layer)


def _affine(stored: Stored) -> Step:
    """What could not be folded: one multiplication, one addition, or one batch norm on stored statistics."""
    affine = stored.attrs["affine"]
    scale, shift = Buffer("scale", _compressed(affine.scale)), Buffer("shift", _compressed(affine.shift))
    if affine.is_identity:
        return Step("identity", nn.Identity())
    if affine.has_zero_shift:
        return Step("mul", function=operator.mul, args=(Operand(0), scale))
    if affine.has_unit_scale:
        return Step("add", function=operator.add, args=(Operand(0), shift))
    if 2 <= stored.rank <= 5 and affine.varies_only_on(1):
        return Step("batch_norm", _batch_norm(stored))
    return Step("mul", function=torch.addcmul, args=(shift, Operand(0), scale))


def _batch_norm(stored: Stored) -> nn.Module:
    """``γ·s + β`` as a batch norm with μ = 0 and σ² + ε = 1: one operator, which runtimes fuse where they can.

    ε is a power of two near the usual 1e-5, so that 1 − ε and its sum with ε are exact in float32 too; ε = 0 is refused by
    training in PyTorch, and by inference as well in some of its versions (2.11).
    """
    size = stored.shape[1]
    make = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[stored.rank]
    layer = make(size, eps=EPSILON, dtype=torch.float64)
    layer.running_var.fill_(1.0 - EPSILON)
    scale, shift = stored.attrs["affine"].vector(1, size)
    layer.weight, layer.bias = _parameter(scale.clone()), _parameter(shift.clone())
    return layer.eval()


def _norm(stored: Stored) -> Step:
    attrs = stored.attrs
    size, affine = stored.shape[attrs["axis"]], attrs["affine"]
    wanted = not (attrs["plain"] and affine.is_identity)
    if attrs["norm"] == "layer_norm":
        layer = nn.LayerNorm(size, eps=attrs["eps"], elementwise_affine=wanted, dtype=torch.float64)
    else:
        layer = nn.GroupNorm(attrs["groups"], size, eps=attrs["eps"], affine=wanted, dtype=torch.float64)
    if wanted:
        scale, shift = affine.vector(attrs["axis"], size)
        layer.weight, layer.bias = _parameter(scale.clone()), _parameter(shift.clone())
    return Step(attrs["norm"], layer)


# ── everything else ─────────────────────────────────────────────────────────────────────────────────────────────────


def _add(stored: Stored) -> Step:
    function = operator.sub if stored.attrs["minus"] else operator.add
    return Step("add", function=function, args=(Operand(0), Operand(1 if stored.inputs[0] is not stored.inputs[1] else 0)))


def _cat(stored: Stored) -> Step:
    unique = list(dict.fromkeys(stored.inputs))
    tensors = [Operand(unique.index(operand)) for operand in stored.inputs]
    return Step("cat", function=torch.cat, args=(tensors,), kwargs={"dim": stored.attrs["axis"]})


def _pad(stored: Stored) -> Step:
    pads, value = stored.attrs["pads"], stored.attrs["value"]
    rank = len(pads) // 2
    if stored.attrs["zero_pad"] is not None or (rank == stored.rank - 2 and rank in (1, 2, 3)):
        make = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)[rank - 1]
        return Step("pad", make(tuple(pads), value))
    return Step("pad", function=F.pad, args=(Operand(0), tuple(pads)), kwargs={"mode": "constant", "value": value})


def _constant(stored: Stored) -> Step:
    return Step("constant", function=None, args=(Buffer("value", stored.attrs["value"]),))


def _call(stored: Stored) -> Step:
    """The ATen call as traced: the ``nn`` layer that does the same where there is one."""
    from foldexport.fold.named_layers import named_layer

    target, args, kwargs = stored.attrs["call"]
    layer = named_layer(stored.op, target, args, kwargs)
    kind = KIND_OF.get(stored.op, stored.op or getattr(target, "__name__", "call"))
    if layer is not None:
        return Step(kind, layer)
    if target is torch.ops.aten.view.default:  # what made its operand contiguous may be gone, or leave other strides
        target = torch.ops.aten.reshape.default
    return Step(kind, function=target, args=args, kwargs=kwargs)


#: Operator families by which operators are counted.
KIND_OF = {
    **{f"max_pool{d}d": "max_pool" for d in (1, 2, 3)},
    **{f"adaptive_max_pool{d}d": "max_pool" for d in (1, 2, 3)},
    **{f"avg_pool{d}d": "avg_pool" for d in (1, 2, 3)},
    **{f"adaptive_avg_pool{d}d": "avg_pool" for d in (1, 2, 3)},
    **{f"conv{d}d": "conv" for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": "conv_transpose" for d in (1, 2, 3)},
    **{f"reflection_pad{d}d": "pad" for d in (1, 2, 3)},
    **{f"replication_pad{d}d": "pad" for d in (1, 2, 3)},
    **{f"upsample_{how}": "upsample" for how in (
        "nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d", "trilinear3d")},
    "mean": "avg_pool",
    "amax": "max_pool",
    "max_pool2d_with_indices": "max_pool",
    "constant_pad_nd": "pad",
    "hardtanh": "clamp",
    "clamp_min": "clamp",
    "clamp_max": "clamp",
    "threshold": "relu",
    "reshape": "view",
    "reshape_as": "view",
    "view_as": "view",
    "_unsafe_view": "view",
    "convolution": "conv",
    "native_batch_norm": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "sub": "add",
    "rsub": "add",
    "div": "mul",
    "neg": "mul",
    "maximum": "clamp",
    "minimum": "clamp",
}  # fmt: skip

_MAKERS = {
    "conv": _convolution,
    "clamp": _clamp,
    "leaky": _leaky,
    "affine": _affine,
    "norm": _norm,
    "add": _add,
    "cat": _cat,
    "pad": _pad,
    "constant": _constant,
    "max_pool": _call,
    "pool": _call,
    "view": _call,
    "part": _call,
    "opaque": _call,
}



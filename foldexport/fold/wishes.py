"""What readers would like of the tensors they read, stated backwards (pass 1).

Readers state wishes about the values they read; expressed for the root ``value = A ⊙ root + B`` they are

    shift  z   "let the pending shift of the root be z", so that what I read has none (z = −B/A),
    sign   σ   "let the pending scale have this sign" (σ·A > 0, for a ReLU or a max pool),
    scale  k   "let the pending scale be k", exactly (a graph output wants 1/A),

each with a weight: the operators it saves. One wish of each kind is kept per root, the heaviest, the earliest on a tie, so the
pass is linear. A shift is wished only on channels where taking it upstream keeps float32 healthy (:data:`MAX_SIGMA`).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from foldexport.fold.pending import dynamic_axes, name_of, shape_of
from foldexport.fold.pooling import keeps_constants
from foldexport.interpret import steps
from foldexport.trace import bound

if TYPE_CHECKING:
    from foldexport.fold.analysis import Analysis, View

MAX_SIGMA = 4.0  # a shift is absorbed upstream up to this many standard deviations (or RMS) of its channel

OPERATOR_SAVED = 1.0
PLAIN_RELU = 0.25  # a plain ReLU instead of a one-sided clamp: no operator, but every runtime fuses it
EXACT = 2.0  # an output or opaque reader would cost a multiplication and an addition

ACTIVATIONS = frozenset({"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "threshold"})
LEAKY = frozenset({"leaky_relu", "prelu"})
MAX_POOLS = frozenset({"max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "amax"})
FARTHEST_WISH = 40.0  # octaves from 1
LARGEST_STEP = 8.0  # octaves from sum to sum: a trunk drifts by a half at a time, a layer scale of 1e-5 is a branch's own
AVERAGES = frozenset(
    {f"avg_pool{d}d" for d in (1, 2, 3)} | {f"adaptive_avg_pool{d}d" for d in (1, 2, 3)} | {"mean", "_adaptive_avg_pool2d"}
)
CONVS = frozenset({f"conv{d}d" for d in (1, 2, 3)} | {f"conv_transpose{d}d" for d in (1, 2, 3)} | {"convolution"})
SHAPE_READERS = frozenset({"sym_size", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "empty_like"})


@dataclass(eq=False)
class Wish:
    """The heaviest wishes for one root. `shift` and `scale` are broadcastable to it; `mask` is where `shift` is sound."""

    shift: Tensor | None = None
    mask: Tensor | None = None
    shift_weight: float = 0.0
    sign: Tensor | None = None
    sign_weight: float = 0.0
    scale: Tensor | None = None
    scale_weight: float = 0.0
    low: float = 0.0  # log2 of the smallest and
    high: float = 0.0  # largest pending scale that additions downstream will see, relative to this root's

    @property
    def wants_exact(self) -> bool:
        """Whether a reader needs this root exactly as it is, ``(1, 0)``."""
        return self.scale is not None and bool((self.scale == 1).all()) and self.wants_zero_shift

    @property
    def wants_zero_shift(self) -> bool:
        """Whether a reader pays an operator for any pending shift left on this root."""
        return self.shift_weight >= OPERATOR_SAVED and not bool(self.shift.any())



def collect(analysis: Analysis, node: fx.Node) -> None:
    name = name_of(node) if node.op == "call_function" else "output"
    variables = [operand for operand in analysis.operands(node) if operand in analysis.views]
    if name in SHAPE_READERS or not variables:
        return
    if name in ACTIVATIONS:
        wanted = analysis.wish(node).wants_zero_shift
        _want_shift(analysis, variables[0], PLAIN_RELU + (OPERATOR_SAVED if wanted else 0.0))
        _want_sign(analysis, variables[0], PLAIN_RELU)
    elif name in LEAKY:
        _want_shift(analysis, variables[0], OPERATOR_SAVED)
    elif name in CONVS or name == "linear":
        _collect_conv(analysis, node, variables)
    elif name in MAX_POOLS:
        _inherit(analysis, node, variables[0])
        _want_sign(analysis, variables[0], OPERATOR_SAVED)
    elif name in AVERAGES:
        if not keeps_constants(node):
            _want_shift(analysis, variables[0], OPERATOR_SAVED)
        _inherit(analysis, node, variables[0])
    elif name in ("add", "sub") and len(variables) == 2:
        _collect_sum(analysis, node, variables)
    elif name == "mul" and len(variables) == 2:
        for variable in variables:
            _want_shift(analysis, variable, OPERATOR_SAVED)
    elif name == "cat":
        _collect_cat(analysis, node)
    elif _pads_infinity(node, name):
        _want_sign(analysis, variables[0], OPERATOR_SAVED)
        _inherit(analysis, node, variables[0])  # later, for it wins a tie: a pool that reads negated values wants the other sign
    elif name in PASSIVE or node.target is operator.getitem:
        return
    else:
        for variable in reversed(variables):  # of two outputs the first one wins a tie
            _want_exact(analysis, variable)
            analysis.exact_reads[variable] = node


def _pads_infinity(node: fx.Node, name: str) -> bool:
    """Whether a constant pad writes an infinity, as the pads in front of max pools do."""
    if name not in ("pad", "constant_pad_nd"):
        return False
    value = bound(node).get("value")
    return isinstance(value, float) and math.isinf(value)


#: Operators that map an affine without a wish of their own.
PASSIVE = frozenset({
    "view", "view_as", "reshape", "reshape_as", "flatten",
    "permute", "transpose", "t", "movedim", "squeeze", "unsqueeze", "slice", "select",
    "split", "split_with_sizes", "chunk", "unbind", "narrow", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle",
    "expand", "pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d", "stack", "swapaxes",
    "unflatten", "numpy_T", "mT", "adjoint",
})  # fmt: skip


def _collect_conv(analysis: Analysis, node: fx.Node, variables: list[fx.Node]) -> None:
    args = bound(node)
    if args["weight"] not in analysis.constants:
        for variable in variables:
            _want_exact(analysis, variable)
        return
    padding = args.get("padding", 0)
    pads = padding == "same" or any(padding if isinstance(padding, list | tuple) else [padding] if padding != "valid" else [])
    if pads or "transpose" in name_of(node):
        _want_shift(analysis, args["input"], OPERATOR_SAVED)


def _want_shift(analysis: Analysis, value: fx.Node, weight: float) -> None:
    """Ask for no pending shift on ``value``; where that is ill-conditioned the channel is left out."""
    view = analysis.views[value]
    a, b = view.affine.scale, view.affine.shift
    dead = a == 0
    zero_crossing = torch.where(dead, 0.0, -b / torch.where(dead, 1.0, a))
    mask = ~dead & _healthy(analysis, view, zero_crossing)
    _keep_shift(analysis, view.root, zero_crossing, mask, weight)


def _want_sign(analysis: Analysis, value: fx.Node, weight: float) -> None:
    view = analysis.views[value]
    _keep_sign(analysis, view.root, torch.where(view.affine.scale < 0, -1.0, 1.0).double(), weight)


def _healthy(analysis: Analysis, view: View, z: Tensor) -> Tensor:
    """Where a shift of z may be added upstream and taken off again: within MAX_SIGMA deviations of the channel's mean.

    For a batch norm that is ``|β/γ| ≤ 4``. A shift of another origin is measured against the channel's RMS on a probe.
    """
    if not bool(z.any()):
        return torch.ones_like(z, dtype=torch.bool)
    if view.bn is not None:
        return (z - view.bn.mean).abs() <= analysis.max_sigma * view.bn.std
    rms = _probe_rms(analysis, view.root)
    return z.abs() <= analysis.max_sigma * rms


def _probe_rms(analysis: Analysis, root: fx.Node) -> Tensor:
    """RMS of every channel of ``root`` on one normal probe, measured once for all roots when first asked for."""
    if analysis.rms is None:
        generator = torch.Generator().manual_seed(0)
        inputs = tuple(
            torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) if x.is_floating_point() else x
            for x in analysis.graph.example
        )
        analysis.rms = {}
        for node, value in steps(analysis.graph, inputs, torch.float32):
            if node in analysis.reads and isinstance(value, Tensor) and value.dim() > 0:
                axes = [axis for axis in range(value.dim()) if axis != 1]
                analysis.rms[node] = value.double().square().mean(axes, keepdim=True).sqrt() if axes else value.double().abs()
    return analysis.rms.get(root, torch.zeros((), dtype=torch.float64))


def _keep_shift(analysis: Analysis, root: fx.Node, z: Tensor, mask: Tensor, weight: float) -> None:
    wish = analysis.wishes.setdefault(root, Wish())
    if weight >= wish.shift_weight:  # the sweep runs backwards: on a tie the earlier reader wins
        wish.shift, wish.mask, wish.shift_weight = z, mask, weight


def _want_exact(analysis: Analysis, value: fx.Node) -> None:
    view = analysis.views[value]
    a = view.affine.scale
    if bool((a == 0).any()):
        return
    _keep_scale(analysis, view.root, 1.0 / a, EXACT)
    z = -view.affine.shift / a
    _keep_shift(analysis, view.root, z, torch.ones_like(z, dtype=torch.bool), EXACT)


def _keep_scale(analysis: Analysis, root: fx.Node, scale: Tensor, weight: float) -> None:
    wish = analysis.wishes.setdefault(root, Wish())
    if weight >= wish.scale_weight:
        wish.scale, wish.scale_weight = scale, weight


def _inherit(analysis: Analysis, node: fx.Node, value: fx.Node) -> None:
    """Pull the wish for a pooled value back to what is pooled; pools pass the affine, so the vectors are the same."""
    wish, view = analysis.wishes.get(node), analysis.views[value]
    a, b = view.affine.scale, view.affine.shift
    if wish is None or len(shape_of(node)) != a.dim() or bool((a == 0).any()):
        return
    if wish.shift is not None:
        _keep_shift(analysis, view.root, (wish.shift - b) / a, wish.mask, wish.shift_weight)
    scale = None if wish.scale is None else wish.scale / a
    if scale is not None and not (name_of(node) in MAX_POOLS and bool((scale < 0).any())):
        _keep_scale(analysis, view.root, scale, wish.scale_weight)
    if wish.sign is not None:
        _keep_sign(analysis, view.root, wish.sign * a.sign(), wish.sign_weight)


def _keep_sign(analysis: Analysis, root: fx.Node, sign: Tensor, weight: float) -> None:
    wish = analysis.wishes.setdefault(root, Wish())
    if weight >= wish.sign_weight:
        wish.sign, wish.sign_weight = sign, weight


def _collect_sum(analysis: Analysis, node: fx.Node, variables: list[fx.Node]) -> None:
    """An addition hands its exact scale to both operands and adds to the range of scales that each will see."""
    wish = analysis.wish(node)
    blend = analysis.blends.get(node)
    outers = (1.0, 1.0) if blend is None else (blend.one_outer.scale, blend.other_outer.scale)
    for variable, other, outer in zip(variables, reversed(variables), outers, strict=True):
        view = analysis.views[variable]
        a = outer * view.affine.scale
        if bool((a == 0).any()) or shape_of(view.root) != shape_of(node):
            continue
        handed = None if wish.scale is None else wish.scale / a
        if handed is not None and _holdable(handed) and _can_follow(analysis, analysis.views[other].root):
            _keep_scale(analysis, view.root, handed, wish.scale_weight)
        step = math.log2(float(a.abs().log().mean().exp()))
        if abs(step) > LARGEST_STEP:
            continue
        mine = analysis.wishes.setdefault(view.root, Wish())
        mine.low, mine.high = min(mine.low, step + wish.low), max(mine.high, step + wish.high)


def _holdable(scale: Tensor) -> bool:
    """Whether a wish is worth keeping: handed from sum to sum past layer scales of 1e-5, it soon is beyond what float32 holds."""
    size = scale.abs().log2()
    return bool(size.isfinite().all()) and float(size.abs().max()) <= FARTHEST_WISH


def _can_follow(analysis: Analysis, root: fx.Node) -> bool:
    """Whether an operand's maker will be able to take the scale that the other operand carries."""
    return analysis.reads.get(root) == 1 and name_of(root) in (CONVS | {"linear", "add", "sub"})


def _collect_cat(analysis: Analysis, node: fx.Node) -> None:
    """Each operand of a concatenation inherits its own slice of the wish."""
    wish, args = analysis.wishes.get(node), bound(node)
    tensors, rank = args["tensors"], len(shape_of(node))
    axis, start = args.get("dim", 0) % rank, 0
    for operand in tensors:
        size = shape_of(operand)[axis]
        view = analysis.views.get(operand)
        if wish is not None and view is not None and axis not in dynamic_axes(node):
            part = slice(start, start + size)
            _inherit_slice(analysis, wish, view, axis, part)
        start += size


def _inherit_slice(analysis: Analysis, wish: Wish, view: View, axis: int, part: slice) -> None:
    def cut(tensor: Tensor) -> Tensor:
        if tensor.dim() <= axis or tensor.shape[axis] == 1:
            return tensor
        return tensor.narrow(axis, part.start, part.stop - part.start)

    a, b = view.affine.scale, view.affine.shift
    if bool((a == 0).any()):
        return
    if wish.shift is not None:
        _keep_shift(analysis, view.root, (cut(wish.shift) - b) / a, cut(wish.mask), wish.shift_weight)
    if wish.scale is not None:
        _keep_scale(analysis, view.root, cut(wish.scale) / a, wish.scale_weight)
    if wish.sign is not None:
        _keep_sign(analysis, view.root, cut(wish.sign) * a.sign(), wish.sign_weight)

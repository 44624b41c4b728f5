"""Pass 1: what every stored tensor's readers would like, collected backwards.

A *root* is a value whose maker emits an operator; everything that only changes a pending affine hangs on a root by a known
affine ``v = A ⊙ root + B``. Readers state wishes about the values they read; expressed for the root they are

    shift  z   "let the pending shift of the root be z", so that what I read has none (z = −B/A),
    sign   σ   "let the pending scale have this sign" (σ·A > 0, for a ReLU or a max pool),
    scale  k   "let the pending scale be k", exactly (a graph output wants 1/A),

each with a weight: the operators it saves. One wish of each kind is kept per root, the heaviest, the earliest on a tie, so the
pass is linear. A shift is wished only on channels where taking it upstream keeps float32 healthy (:data:`MAX_SIGMA`).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from foldexport.fold.affine import Affine
from foldexport.fold.borders import Border, find_borders
from foldexport.fold.constants import Constants
from foldexport.fold.pending import (
    Statistics,
    dynamic_axes,
    is_float,
    name_of,
    pending_rule,
    shape_of,
    statistics,
)
from foldexport.fold.pooling import keeps_constants
from foldexport.interpret import steps
from foldexport.trace import Graph, bound

MAX_SIGMA = 4.0  # a shift is absorbed upstream up to this many standard deviations (or RMS) of its channel

OPERATOR_SAVED = 1.0
PLAIN_RELU = 0.25  # a plain ReLU instead of a one-sided clamp: no operator, but every runtime fuses it
EXACT = 2.0  # an output or opaque reader would cost a multiplication and an addition

ACTIVATIONS = frozenset({"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "threshold"})
LEAKY = frozenset({"leaky_relu", "prelu"})
MAX_POOLS = frozenset({"max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "amax"})
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


@dataclass(frozen=True, eq=False)
class View:
    """``value = affine(root)``; `bn` is the last batch norm's statistics of the root along the way."""

    root: fx.Node
    affine: Affine
    bn: Statistics | None = None


@dataclass(eq=False)
class Analysis:
    """Everything that the forward pass needs to know in advance."""

    graph: Graph
    constants: Constants
    views: dict[fx.Node, View] = field(default_factory=dict)
    rules: dict[fx.Node, tuple[fx.Node, Affine]] = field(default_factory=dict)
    live: set[fx.Node] = field(default_factory=set)
    borders: dict[fx.Node, Border] = field(default_factory=dict)
    reads: dict[fx.Node, int] = field(default_factory=dict)
    common: dict[fx.Node, Affine | None] = field(default_factory=dict)
    exact_reads: dict[fx.Node, fx.Node] = field(default_factory=dict)
    wishes: dict[fx.Node, Wish] = field(default_factory=dict)
    rms: dict[fx.Node, Tensor] | None = None
    max_sigma: float = MAX_SIGMA

    def wish(self, node: fx.Node) -> Wish:
        """The wish for a root; an empty one when nobody asked for anything."""
        return self.wishes.get(node) or Wish()

    def view(self, node: fx.Node) -> View:
        return self.views[node]

    def is_variable(self, node: object) -> bool:
        """Whether a node is a floating-point tensor that depends on the input."""
        return is_float(node) and node not in self.constants


def analyse(graph: Graph, constants: Constants, max_sigma: float = MAX_SIGMA) -> Analysis:
    """Roots, reads and wishes of a training graph; two linear sweeps."""
    analysis = Analysis(graph, constants, max_sigma=max_sigma, borders=find_borders(graph, constants))
    for node in graph.fx.nodes:
        if node.op != "output" and is_float(node) and node not in constants and node.op != "get_attr":
            analysis.views[node] = _view_of(analysis, node)
    _mark_live(analysis)
    nodes = [node for node in graph.fx.nodes if node in analysis.live and node not in analysis.rules]
    for node in nodes:
        _count_reads(analysis, node)
    users = _live_users(analysis)
    for root, count in analysis.reads.items():
        if count > 1:
            analysis.common[root] = _common_affine(analysis, users, root)
    for node in reversed(nodes):
        if node.op in ("call_function", "output"):
            _collect(analysis, node)
    return analysis


def operands(analysis: Analysis, node: fx.Node) -> list[fx.Node]:
    """Every (argument slot) that a node really reads, repeated as often as it is read."""
    if node in analysis.rules:
        return [analysis.rules[node][0]]
    if node in analysis.borders:
        return [analysis.borders[node].source]
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _mark_live(analysis: Analysis) -> None:
    """What the outputs need: branches that are identically zero, and pads that a border replaces, are not among it."""
    stack = [node for node in analysis.graph.fx.nodes if node.op in ("output", "placeholder")]
    while stack:
        node = stack.pop()
        if node not in analysis.live and node not in analysis.constants:
            analysis.live.add(node)
            stack.extend(operands(analysis, node))


def _live_users(analysis: Analysis) -> dict[fx.Node, list[fx.Node]]:
    users: dict[fx.Node, list[fx.Node]] = {}
    for node in analysis.graph.fx.nodes:
        if node in analysis.live and name_of(node) not in SHAPE_READERS:
            for operand in dict.fromkeys(operands(analysis, node)):
                users.setdefault(operand, []).append(node)
    return users


def _count_reads(analysis: Analysis, node: fx.Node) -> None:
    """Count what an emitting operator reads."""
    if name_of(node) in SHAPE_READERS:
        return
    for operand in operands(analysis, node):
        if operand not in analysis.views:
            continue
        view = analysis.views[operand]
        analysis.reads[view.root] = analysis.reads.get(view.root, 0) + 1


def _common_affine(analysis: Analysis, users: dict[fx.Node, list[fx.Node]], root: fx.Node) -> Affine | None:
    """The affine through which every reader sees ``root``: its maker can take that whole."""
    current = root
    while len(users.get(current, ())) == 1 and users[current][0] in analysis.rules:
        current = users[current][0]
    return None if current is root else analysis.views[current].affine


def _view_of(analysis: Analysis, node: fx.Node) -> View:
    rank = len(shape_of(node))
    if node.op != "call_function":
        return View(node, Affine.identity(rank))
    found = pending_rule(node, analysis.constants)
    if found is not None:
        source, outer = found
        base = analysis.views[source]
        analysis.rules[node] = found
        bn = _root_statistics(base, statistics(node, analysis.constants)) if "norm" in name_of(node) else base.bn
        return View(base.root, base.affine.then(outer), bn)
    return _without_zero_branch(analysis, node) or _double(analysis, node) or View(node, Affine.identity(rank))


def _without_zero_branch(analysis: Analysis, node: fx.Node) -> View | None:
    """``v + 0·w + t``: a branch that is identically constant (ReZero at α = 0, γ = 0) only shifts the other operand."""
    if name_of(node) not in ("add", "sub"):
        return None
    args = bound(node)
    pair = [args["self"], args["other"]]
    if any(not isinstance(x, fx.Node) or x not in analysis.views or shape_of(x) != shape_of(node) for x in pair):
        return None
    alpha = float(args.get("alpha", 1)) * (1 if name_of(node) == "add" else -1)
    for kept, gone, own, other in ((pair[0], pair[1], 1.0, alpha), (pair[1], pair[0], alpha, 1.0)):
        branch = analysis.views[gone].affine
        if not bool(branch.scale.any()):
            outer = Affine.of(own, other * branch.shift, branch.rank)
            analysis.rules[node] = (kept, outer)
            base = analysis.views[kept]
            return View(base.root, base.affine.then(outer), base.bn)
    return None


def _root_statistics(base: View, stats: Statistics | None) -> Statistics | None:
    """Mean and deviation of the root, from those of ``A ⊙ root + B``."""
    if stats is None:
        return None
    a, b = base.affine.scale, base.affine.shift
    return Statistics((stats.mean - b) / a, stats.std / a.abs())


def _double(analysis: Analysis, node: fx.Node) -> View | None:
    """``y + y`` and ``bn1(y) + bn2(y)``: two affines of one root add up, nothing is emitted."""
    if name_of(node) not in ("add", "sub"):
        return None
    args = bound(node)
    left, right = (analysis.views.get(args[key]) if isinstance(args[key], fx.Node) else None for key in ("self", "other"))
    if left is None or right is None or left.root is not right.root or shape_of(node) != shape_of(left.root):
        return None
    alpha = float(args.get("alpha", 1)) * (1 if name_of(node) == "add" else -1)
    rank = len(shape_of(node))
    total = Affine.of(
        left.affine.scale + alpha * right.affine.scale, left.affine.shift + alpha * right.affine.shift, rank
    )
    analysis.rules[node] = (left.root, total)
    return View(left.root, total, left.bn or right.bn)


# ── wishes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _collect(analysis: Analysis, node: fx.Node) -> None:
    name = name_of(node) if node.op == "call_function" else "output"
    variables = [operand for operand in operands(analysis, node) if operand in analysis.views]
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
    elif name in PASSIVE or node.target is operator.getitem:
        return
    else:
        for variable in reversed(variables):  # of two outputs the first one wins a tie
            _want_exact(analysis, variable)
            analysis.exact_reads[variable] = node


#: Operators that map an affine without a wish of their own.
PASSIVE = frozenset(
    """view reshape flatten permute transpose t movedim squeeze unsqueeze slice select split split_with_sizes chunk unbind
    narrow channel_shuffle pixel_shuffle pixel_unshuffle expand pad constant_pad_nd reflection_pad1d reflection_pad2d
    reflection_pad3d replication_pad1d replication_pad2d replication_pad3d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d stack swapaxes
    unflatten numpy_T mT adjoint""".split()
)


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
    for variable, other in zip(variables, reversed(variables), strict=True):
        view = analysis.views[variable]
        a = view.affine.scale
        if bool((a == 0).any()) or shape_of(view.root) != shape_of(node):
            continue
        if wish.scale is not None and _can_follow(analysis, analysis.views[other].root):
            _keep_scale(analysis, view.root, wish.scale / a, wish.scale_weight)
        step = math.log2(float(a.abs().log().mean().exp()))
        mine = analysis.wishes.setdefault(view.root, Wish())
        mine.low, mine.high = min(mine.low, step + wish.low), max(mine.high, step + wish.high)


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

"""Pass 1: the roots of a training graph, who reads them, and what the readers would like.

A *root* is a value whose maker emits an operator; everything that only changes a pending affine hangs on a root by a known
affine ``v = A ⊙ root + B``. Branches that are identically zero are dead before anything is counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx

from foldexport.fold.affine import Affine
from foldexport.fold.blends import Blend, find_blend
from foldexport.fold.borders import Border, find_borders
from foldexport.fold.constants import Constants
from foldexport.fold.pending import Statistics, is_float, name_of, pending_rule, shape_of, statistics
from foldexport.fold.wishes import MAX_SIGMA, SHAPE_READERS, Wish, collect
from foldexport.trace import Graph, bound

LIKE = frozenset({"reshape_as", "view_as"})  # of their second operand they read the shape alone


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
    blends: dict[fx.Node, Blend] = field(default_factory=dict)
    reads: dict[fx.Node, int] = field(default_factory=dict)
    common: dict[fx.Node, Affine | None] = field(default_factory=dict)
    exact_reads: dict[fx.Node, fx.Node] = field(default_factory=dict)
    wishes: dict[fx.Node, Wish] = field(default_factory=dict)
    rms: dict[fx.Node, Tensor] | None = None
    max_sigma: float = MAX_SIGMA

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Every (argument slot) that a node really reads, repeated as often as it is read."""
        if node in self.rules:
            return [self.rules[node][0]]
        if node in self.borders:
            return [self.borders[node].source]
        if node in self.blends:
            return [self.blends[node].one, self.blends[node].other]
        found: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), found.append)
        return found

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
            collect(analysis, node)
    return analysis


def _mark_live(analysis: Analysis) -> None:
    """What the outputs need: branches that are identically zero, and pads that a border replaces, are not among it."""
    stack = [node for node in analysis.graph.fx.nodes if node.op in ("output", "placeholder")]
    while stack:
        node = stack.pop()
        if node not in analysis.live and node not in analysis.constants:
            analysis.live.add(node)
            stack.extend(analysis.operands(node))


def _live_users(analysis: Analysis) -> dict[fx.Node, list[fx.Node]]:
    users: dict[fx.Node, list[fx.Node]] = {}
    for node in analysis.graph.fx.nodes:
        if node in analysis.live and name_of(node) not in SHAPE_READERS:
            for operand in dict.fromkeys(analysis.operands(node)):
                users.setdefault(operand, []).append(node)
    return users


def _count_reads(analysis: Analysis, node: fx.Node) -> None:
    """Count what an emitting operator reads."""
    if name_of(node) in SHAPE_READERS:
        return
    operands = analysis.operands(node)
    for operand in operands[:1] if name_of(node) in LIKE else operands:
        if operand not in analysis.views:
            continue
        view = analysis.views[operand]
        analysis.reads[view.root] = analysis.reads.get(view.root, 0) + 1


def _common_affine(analysis: Analysis, users: dict[fx.Node, list[fx.Node]], root: fx.Node) -> Affine | None:
    """The affine through which every reader sees ``root``: its maker can take that whole.

    It ends in front of an affine along several axes, which no maker of such a tensor takes.
    """
    current = root
    while len(users.get(current, ())) == 1 and _is_narrow(analysis, users[current][0]):
        current = users[current][0]
    return None if current is root else analysis.views[current].affine


def _is_narrow(analysis: Analysis, node: fx.Node) -> bool:
    """Whether ``node`` is an affine along one axis at most."""
    rule = analysis.rules.get(node)
    return rule is not None and len(rule[1].axes()) <= 1


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
    without = _without_zero_branch(analysis, node) or _double(analysis, node)
    if without is None and (blend := find_blend(analysis, node)) is not None:
        return _blended(analysis, node, blend)
    return without or View(node, Affine.identity(rank))


def _blended(analysis: Analysis, node: fx.Node, blend: Blend) -> View:
    """The sum in its flat form; where the value that it reads twice cancels, an affine of the other one."""
    if not bool(blend.other_outer.scale.any()):
        outer = Affine.of(blend.one_outer.scale, blend.other_outer.shift, blend.one_outer.rank)
        analysis.rules[node] = (blend.one, outer)
        base = analysis.views[blend.one]
        return View(base.root, base.affine.then(outer), base.bn)
    analysis.blends[node] = blend
    return View(node, Affine.identity(len(shape_of(node))))


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

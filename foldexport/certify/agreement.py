"""The user's own module against its trace: what every other comparison takes for granted.

The certificate measures the folded network by the training graph, which tracing and the removal of in-place operators
made out of the user's code. One plain call of the module, in its own type, closes that gap.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from foldexport.certify.endtoend import beyond_jumps
from foldexport.certify.layers import first_apart, listening
from foldexport.certify.lockstep import first_line, is_inexact
from foldexport.interpret import steps
from foldexport.trace.calling import run
from foldexport.trace.exporting import quiet
from foldexport.trace.kept import kept

if TYPE_CHECKING:
    from foldexport.probes import Probe
    from foldexport.trace import Graph

UNITS = 1024.0  # machine epsilons of the module's type that two runs of the same operators may differ by


@torch.no_grad()
def disagreement(graph: Graph, module: nn.Module, probe: Probe, noise: float = 0.0) -> str:
    """Why the traced graph is not the module on this probe; empty where it is, and where the two cannot be compared.

    Both run in the module's type, operator by operator the same, so they agree to rounding: for every output
    ``max |y_module − y_graph| ≤ UNITS · max(eps, 2·noise) · max |y_graph|``. Networks that mix float types are not
    compared, for the graph runs in one. The module works on copies of the inputs and of its own tensors, so that neither
    changes, whatever its forward writes into. Layers that are one node of the graph are compared at their own results in the
    same way (:mod:`foldexport.certify.layers`).

    module: takes the graph's inputs by position, as `Graph.module` does.

    noise: the graph's own rounding error in that type, a fraction of the peak.
    """
    dtype = _only_type(graph)
    if dtype is None or any(child.training for _, child in module.named_modules()):
        return ""
    given = [_as_traced(value, example) for value, example in zip(probe.inputs, graph.example, strict=True)]
    behind, _ = beyond_jumps(graph.fx)
    try:
        with listening(graph, module, behind) as heard:
            found = pytree.tree_leaves(_call(module, given))
    except Exception as error:  # the user's forward may raise anything
        return f"the module refuses {probe.shapes}: {first_line(error)}"
    leaves = pytree.tree_leaves(graph.fx.output_node().args[0])
    if len(found) != len(leaves):
        return f"the module has {len(found)} outputs, its trace {len(leaves)}"
    allowed = UNITS * max(torch.finfo(dtype).eps, 2.0 * noise)
    wanted, apart = dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node)), {}
    for node, value in steps(graph, given, dtype):
        if node in wanted:
            wanted[node] = value
        error = heard.error(node, value) if node in heard.nodes else 0.0
        if not error <= allowed:
            apart[node] = error
    for leaf, one in zip(leaves, found, strict=True):
        error = 0.0 if leaf in behind else _error(one, wanted[leaf] if isinstance(leaf, fx.Node) else leaf)
        if not error <= allowed:
            found_by = f"by {error:.3g} of its peak, allowed {allowed:.3g}"
            return f"the module's output {leaf} differs from its trace {found_by}"
    return first_apart(graph, given, heard, apart, dtype, allowed) if apart else ""


def _call(module: nn.Module, given: list[Any]) -> Any:
    """What the user's forward gives. It works on copies, its attributes are put back, and nothing that it prints is shown."""
    with kept(module), quiet():
        return run(module, tuple(given), ())[0]


def _as_traced(value: Any, example: Any) -> Any:
    return value.to(example.dtype, copy=True) if isinstance(value, Tensor) else value


def _only_type(graph: Graph) -> torch.dtype | None:
    """The one float type of every value of the graph; None when there are several or none."""
    values = [leaf for node in graph.fx.nodes for leaf in pytree.tree_leaves(node.meta.get("val"))]
    found = {value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def _error(found: Any, wanted: Any) -> float:
    if not is_inexact(wanted) or not isinstance(found, Tensor) or wanted.numel() == 0:
        return 0.0
    if found.shape != wanted.shape:
        return math.inf
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    peak = float(torch.where(wanted.isfinite(), wanted, 0.0).abs().max()) or 1.0
    return float(torch.where(same, 0.0, found - wanted).abs().max()) / peak

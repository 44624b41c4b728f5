"""What the user's own layers give inside of one call of the module, beside what its trace has there.

The outputs of a deep network hide a trace that is wrong in the first layer, as they hide a wrong fold
(:mod:`foldexport.certify`). Layers without children that were called once, and that are one node of the trace, are
compared where they stand; of each value every k-th element is kept, k odd, so that no channel is passed over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook

from foldexport.certify.lockstep import is_inexact
from foldexport.interpret import steps

if TYPE_CHECKING:
    from foldexport.trace import Graph

KEPT = 2**14  # elements of one value
OWN_NOISE = 64.0  # times what the trace itself loses at a value in its type, that a layer may differ by


@dataclass(eq=False)
class Heard:
    """nodes: of the trace -> the user's name of the layer. values: that name -> its thinned values, one per call."""

    nodes: dict[fx.Node, str]
    values: dict[str, list[Tensor]] = field(default_factory=dict)

    def error(self, node: fx.Node, wanted: Any) -> float:
        """``max |y − v| / max |v|`` over the elements kept; 0 where the layer was not called once, or gave another shape.

        What the trace did to a layer in between is unknown then, and its outputs are compared in any case.
        """
        found = self.values.get(self.nodes[node], ())
        if len(found) != 1 or not is_inexact(wanted) or wanted.is_complex() or not wanted.numel():
            return 0.0
        kept = _thinned(wanted)
        if found[0].shape != kept.shape or found[0].dtype != wanted.dtype:
            return 0.0
        peak = float(torch.where(wanted.isfinite(), wanted, 0.0).abs().max()) or 1.0
        same = (found[0] == kept) | (found[0].isnan() & kept.isnan())
        return float(torch.where(same, 0.0, found[0] - kept).abs().max()) / peak


@contextmanager
def listening(graph: Graph, module: nn.Module, besides: set[fx.Node]) -> Iterator[Heard]:
    """What the layers give while the block calls the module; the module itself is not touched.

    besides: nodes that are not to be compared.
    """
    names = {id(child): name for name, child in _layers(module)}
    heard = Heard({node: name for node, name in _single(graph, set(names.values())) if node not in besides})
    wanted = set(heard.nodes.values())

    def hear(layer: nn.Module, given: Any, result: Any) -> None:
        name = names.get(id(layer))
        if name in wanted:  # a copy: the next operator may write into it
            heard.values.setdefault(name, []).append(_thinned(result).clone() if isinstance(result, Tensor) else torch.empty(0))

    handle = register_module_forward_hook(hear)
    try:
        yield heard
    finally:
        handle.remove()


def first_apart(graph: Graph, given: Sequence[Any], heard: Heard, errors: dict[fx.Node, float], dtype: torch.dtype,
                allowed: float) -> str:  # fmt: skip
    """The first layer that is not its node; a layer is allowed `OWN_NOISE` times what the trace loses there in ``dtype``.

    errors: of the layers that are beyond ``allowed``, a fraction of the peak. Two runs of one operator in one type differ by
    parts of that loss, however badly the value is conditioned.
    """
    values = {node: value for node, value in steps(graph, given, dtype) if node in errors}
    for node, exact in steps(graph, given, torch.float64):
        if node not in errors:
            continue
        found = values.pop(node).to(exact.dtype)
        finite = exact.isfinite() & found.isfinite()
        lost = float(torch.where(finite, found - exact, 0.0).abs().max()) / (float(found[finite].abs().max()) or 1.0)
        bound = max(allowed, OWN_NOISE * lost)
        if not errors[node] <= bound:
            size = f"by {errors[node]:.3g} of its peak, allowed {bound:.3g}"
            return f"the module's layer '{heard.nodes[node]}' differs from its trace {size}"
    return ""


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of PyTorch's own layers without children that have one name.

    The user's may give something else than what they compute, a value that they read later, for one.
    """
    found = list(module.named_modules(remove_duplicate=False))
    names = Counter(id(child) for _, child in found)
    for name, child in found:
        if name and names[id(child)] == 1 and not any(child.children()) and type(child).__module__.startswith("torch.nn."):
            yield name, child


def _single(graph: Graph, names: set[str]) -> Iterator[tuple[fx.Node, str]]:
    """(node, layer) where a layer made one tensor of the trace."""
    made: dict[str, list[fx.Node]] = {}
    for node in graph.fx.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            made.setdefault(node.meta.get("module", ""), []).append(node)
    yield from ((nodes[0], name) for name, nodes in made.items() if len(nodes) == 1 and name in names)


def _thinned(value: Tensor) -> Tensor:
    step = -(-value.numel() // KEPT) | 1
    return value.detach().reshape(-1)[::step]

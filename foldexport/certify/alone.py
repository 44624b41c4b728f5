"""A network that does something else with one sample than with several, which a graph cannot: it has one way only."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foldexport.certify.agreement import disagreement
from foldexport.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foldexport.probes import Probe
    from foldexport.trace import Graph


def refuse_other_way(graph: Graph, probes: Sequence[Probe], noise: float = 0.0) -> None:
    """Raise UsageError where the module is its trace at a batch of two, and not at a batch of one.

    For a network that is known not to be its trace; PyTorch traces a free batch at two or more, so ``if len(x) == 1:`` is not in
    the graph. noise: as of `disagreement`.
    """
    given = next((each for each in probes if not each.optional), None)
    if given is None or graph.module is None or not graph.dynamic.get("batch"):
        return
    several, one = (dataclasses.replace(given, inputs=_at(given.inputs, batch)) for batch in (2, 1))
    if disagreement(graph, graph.module, several, noise) or not disagreement(graph, graph.module, one, noise):
        return
    name = type(graph.module).__name__
    raise UsageError(
        f"{name} computes something else at a batch of 1 than at a batch of 2, and a graph has one way only.\n"
        "Let forward do the same for every batch: no branch on x.shape[0] or len(x), and flatten(1) in place of squeeze()."
    )


def _at(inputs: Sequence[Any], batch: int) -> tuple[Any, ...]:
    """The first samples, repeated where there are fewer."""
    return tuple(
        value[torch.arange(batch) % len(value)] if isinstance(value, Tensor) and value.dim() else value for value in inputs
    )

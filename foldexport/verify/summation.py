"""Averages whose terms are added one vector after the other, as many runtimes do.

float32 says nothing about the order of a sum of N terms. PyTorch adds in blocks, whose error grows like log N; onnxruntime's and
XNNPACK's averages add in turn, with one partial sum for each lane of a vector, whose error grows like √N for terms that differ and
like N for terms that are equal, as behind a constant image (Higham 2002, "Accuracy and Stability of Numerical Algorithms", section
4.2); OpenVINO's average over space has one lane. Each is float32, so the noise of a training graph is the larger of the two.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from foldexport import interpret
from foldexport.fold.pending import name_of
from foldexport.trace import Graph, bound

LANES = 4  # of the narrowest vectors in use, 128 bits; a runtime that adds in another number has it as its exporter's ``lanes``
ADAPTIVE = re.compile(r"_?adaptive_avg_pool([123])d")


def outputs(graph: Graph, inputs: Sequence[Any], lanes: int = LANES) -> list[Any]:
    """The training graph's outputs in float32, every average over whole axes summed in turn in so many lanes."""
    return interpret.outputs(graph, inputs, torch.float32, instead=functools.partial(in_turn, lanes=lanes))


def averages(graph: Graph) -> bool:
    """Whether any operator averages whole axes, so that the order of its terms matters."""
    return any(node.op == "call_function" and _averaged(node) is not None for node in graph.fx.nodes)


def in_turn(node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], lanes: int = LANES) -> Tensor | None:
    """The value of a float32 average; None for every other operator."""
    axes = _averaged(node)
    if axes is None or not isinstance(args[0], Tensor) or args[0].dtype != torch.float32:
        return None
    value = args[0]
    axes = [axis % value.dim() for axis in axes] or list(range(value.dim()))
    kept = [axis for axis in range(value.dim()) if axis not in axes]
    terms = value.permute(*kept, *axes).reshape(*(value.shape[axis] for axis in kept), -1).numpy(force=True)
    count = terms.shape[-1]
    terms = np.pad(terms, [(0, 0)] * len(kept) + [(0, -count % lanes)]).reshape(*terms.shape[:-1], -1, lanes)
    partial = np.add.accumulate(terms, axis=-2, dtype=np.float32)[..., -1, :]
    mean = torch.as_tensor(partial.sum(-1, dtype=np.float32)) / count
    keep = name_of(node) != "mean" or bool(bound(node).get("keepdim", False))
    return mean.reshape([1 if axis in axes else value.shape[axis] for axis in range(value.dim())]) if keep else mean


def _averaged(node: fx.Node) -> list[int] | None:
    """The axes that an operator averages as a whole; an empty list for all of them."""
    name = name_of(node)
    if name == "mean":
        axes = bound(node).get("dim")
        return [axes] if isinstance(axes, int) else list(axes or [])
    found = ADAPTIVE.fullmatch(name)
    if found is None:
        return None
    size = bound(node)["output_size"]
    whole = all(each == 1 for each in (size if isinstance(size, list | tuple) else [size]))
    return [-1 - axis for axis in range(int(found[1]))] if whole else None

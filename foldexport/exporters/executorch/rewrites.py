"""Operators in a form of the same values that ExecuTorch runs better.

A split makes a list of tensors, which ExecuTorch does not resize to another batch; slices are resized. A clamp with bounds for each
channel is a maximum and a minimum, which XNNPACK takes. Norms: :mod:`foldexport.exporters.executorch.norms`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn

from foldexport.exporters.executorch import norms
from foldexport.exporters.ncnn import clamps as ncnn_clamps

ATEN = torch.ops.aten


def rewritten(module: nn.Module, apart: bool) -> nn.Module:
    """A copy in that form; ``module`` itself where nothing changes. apart: norms are taken apart too."""
    result = norms.separated(module) if apart else module
    nodes = list(result.graph.nodes) if isinstance(result, fx.GraphModule) else []
    if not any(node.target is torch.clamp or _parts(node) for node in nodes):
        return result
    result = copy.deepcopy(result) if result is module else result
    for node in list(result.graph.nodes):
        for user, call, args in _parts(node):
            user.target, user.args = call, args
    result.graph.eliminate_dead_code()
    return ncnn_clamps.separated(result)


def _parts(node: fx.Node) -> list[tuple[fx.Node, Callable, tuple]]:
    """(reader, operator, arguments) that gives it its part alone; empty where the node is no split, or is read as a whole."""
    make = PARTS.get(node.target)
    if make is None or node.kwargs or not all(user.target is operator.getitem for user in node.users):
        return []
    return [(user, *make(int(user.args[1]), *node.args)) for user in node.users]


def _split(at: int, x: Any, size: int, axis: int = 0) -> tuple[Callable, tuple]:
    return ATEN.slice.Tensor, (x, axis, at * size, (at + 1) * size)


def _split_with_sizes(at: int, x: Any, sizes: list[int], axis: int = 0) -> tuple[Callable, tuple]:
    ends = [0, *accumulate(sizes)]
    return ATEN.slice.Tensor, (x, axis, ends[at], ends[at + 1])


def _chunk(at: int, x: Any, count: int, axis: int = 0) -> tuple[Callable, tuple]:
    return _chunk_of, (x, count, axis, at)


def _chunk_of(x: Tensor, count: int, axis: int, at: int) -> Tensor:
    size = -(-x.shape[axis] // count)
    return ATEN.slice.Tensor(x, axis, at * size, (at + 1) * size)


def _unbind(at: int, x: Any, axis: int = 0) -> tuple[Callable, tuple]:
    return ATEN.select.int, (x, axis, at)


PARTS = {
    ATEN.split.Tensor: _split,
    ATEN.split_with_sizes.default: _split_with_sizes,
    ATEN.chunk.default: _chunk,
    ATEN.unbind.int: _unbind,
}

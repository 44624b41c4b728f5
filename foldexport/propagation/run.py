"""One network forwards and backwards, and the variance of values and gradients at some of its nodes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from foldexport.fold.rebuild import Program
from foldexport.probes import normal
from foldexport.trace import Graph

aten = torch.ops.aten


@dataclass
class Moments:
    """Mean and variance over all elements seen so far (Chan et al. 1979: what two batches know together)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # of the differences from the mean

    def add(self, values: Tensor) -> None:
        variance, mean = (float(value) for value in torch.var_mean(values.detach(), correction=0))
        n, apart = values.numel(), mean - self.mean
        total = self.count + n
        self.squares += variance * n + apart**2 * self.count * n / total
        self.mean += apart * n / total
        self.count = total

    @property
    def variance(self) -> float:
        return self.squares / self.count if self.count else math.nan


class Network(fx.Interpreter):
    """A graph in float64 with gradients: every float tensor is of that type, casts to float types too."""

    def __init__(self, graph: fx.Graph, module: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(module, garbage_collect_values=True, graph=graph)
        self._tensors, self._watched = tensors, frozenset[str]()
        self.values: dict[str, Tensor] = {}

    @classmethod
    def training(cls, graph: Graph) -> Network:
        return cls(graph.fx, nn.Module(), graph.tensors)

    @classmethod
    def folded(cls, program: Program) -> Network:
        return cls(program.module.graph, program.module)

    def differentiate(self, inputs: Sequence[Any], watched: frozenset[str], seed: int) -> tuple[dict, dict]:
        """Values of the nodes named in ``watched``, and the gradients there of ``Σ ⟨u, output⟩``, u drawn from ``seed``.

        u has independent elements of mean 0 and variance 1. A gradient is missing where no output depends on the value.
        """
        self._watched, self.values = watched, {}
        with _float64(), torch.enable_grad():
            outputs = pytree.tree_leaves(self.run(*(_leaf(value) for value in inputs)))
            ends = {at: each for at, each in enumerate(outputs) if isinstance(each, Tensor) and each.requires_grad}
            if not ends or not self.values:
                return self.values, {}
            cotangents = [cotangent(each.shape, seed, at) for at, each in ends.items()]
            found = torch.autograd.grad(list(ends.values()), list(self.values.values()), cotangents, allow_unused=True)
        return self.values, {name: each for name, each in zip(self.values, found, strict=True) if each is not None}

    def fetch_attr(self, target: str) -> Any:
        return super().fetch_attr(target) if self._tensors is None else _wide(self._tensors[target].detach())

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        args, kwargs = map_aggregate((args, kwargs), _ruled)
        # Strides here need not be those of the trace.
        return (aten.reshape.default if target is aten.view.default else target)(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._watched and isinstance(value, Tensor):
            # Behind an embedding nothing asks for a gradient yet.
            value = value if value.requires_grad else value.detach().requires_grad_()
            self.values[n.name] = value
        return value


def cotangent(shape: Sequence[int], seed: int, output: int) -> Tensor:
    """The vector u of one output: drawn by integer arithmetic, the same for every network with this output."""
    words = np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, zlib.crc32(f"cotangent/{output}".encode())]).random_raw
    return torch.from_numpy(normal(words, math.prod(shape))).reshape(tuple(shape))


def _leaf(value: Any) -> Any:
    """An input as a run reads it: floats in float64, followed by autograd."""
    value = _wide(value)
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _ruled(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument.is_floating_point else argument


@contextmanager
def _float64() -> Iterator[None]:
    """As the default type, which operators that make tensors of their own use."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)

"""What a network costs: operators, parameters, multiply-adds and bytes, the rows of the before/after table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from foldexport import interpret
from foldexport.trace import Graph


@dataclass(frozen=True)
class Costs:
    """Costs of one network.

    operators: how many of each kind; those on constants are left out.
    parameters: values in parameters, a shared one counted once.    weight_bytes: of parameters and buffers.
    multiply_adds: of convolutions and matrix products for one sample at the example's size; None where the network does
    not run without values.
    """

    operators: dict[str, int]
    parameters: int
    multiply_adds: int | None
    weight_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def of_graph(graph: Graph, module: nn.Module, operators: dict[str, int]) -> Costs:
    """Costs of the training graph of ``module``."""
    inputs = _meta(graph.example)
    count = _multiply_adds(lambda: interpret.outputs(graph, inputs, None, device="meta"), inputs)
    return Costs(operators, *_sizes(module, count))


def of_module(module: nn.Module, example: tuple, operators: dict[str, int]) -> Costs:
    """Costs of a folded network, whose tensors are all parameters and buffers."""
    inputs = _meta(example)

    def run() -> object:
        state = {name: tensor.to("meta") for name, tensor in module.state_dict(keep_vars=True).items()}
        return torch.func.functional_call(module, state, inputs)

    return Costs(operators, *_sizes(module, _multiply_adds(run, inputs)))


def _meta(example: Iterable) -> tuple:
    return tuple(value.to("meta") if isinstance(value, Tensor) else value for value in example)


def _multiply_adds(run: Callable[[], object], inputs: tuple) -> int | None:
    """A multiply-add is two of PyTorch's floating-point operations."""
    batch = next((value.shape[0] for value in inputs if isinstance(value, Tensor) and value.dim()), 1)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
    except Exception:  # whatever an operator raises that needs values to know its shape; the count is for display only
        return None
    return counter.get_total_flops() // 2 // max(1, batch)


def _sizes(module: nn.Module, multiply_adds: int | None) -> tuple[int, int | None, int]:
    parameters, buffers = list(module.parameters()), list(module.buffers())
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *buffers))
    return sum(parameter.numel() for parameter in parameters), multiply_adds, size

"""Shapes in a folded network, without computing a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx


def shapes_of(module: fx.GraphModule, example: Sequence[Any]) -> dict[str, list[int]]:
    """Node → shape of one sample; what follows an operator that does not run on shapes alone is missing."""
    run = _Meta(module)
    inputs = [value.to("meta", torch.float64) if _is_float(value) else _on_meta(value) for value in example]
    try:
        with torch.no_grad():
            run.run(*inputs)
    except Exception:  # whatever an operator raises that needs values to know its shape; shapes are for display only
        pass
    return run.shapes


class _Meta(fx.Interpreter):
    """On the device without memory; the network keeps its weights."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, list[int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = list(value.shape)[1:]
        return value

    def call_module(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        layer = self.fetch_attr(target)
        state = {name: tensor.to("meta") for name, tensor in layer.state_dict().items()}
        return torch.func.functional_call(layer, state, args, kwargs)

    def get_attr(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return _on_meta(super().get_attr(target, args, kwargs))


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()

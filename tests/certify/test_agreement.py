"""A trace that is not the user's module is found, whatever the fold does with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from foldexport.errors import EquivalenceError
from foldexport.trace import trace
from tests.hand_folds import IMAGE, copy_of, run
from tests.statistics import randomise


class Doubled(nn.Module):
    """A convolution, a mean, a scalar, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3)) * 2.0


def test_the_trace_is_compared_with_the_module():
    module = randomise(Doubled(), 0)
    graph = trace(module, IMAGE)
    assert run(graph, copy_of(graph), module=module).require().trace == ""
    graph.tensors["conv.weight"] = graph.tensors["conv.weight"].clone()
    with torch.no_grad():
        module.conv.weight[1, 0, 0, 0] += 0.01
    certificate = run(graph, copy_of(graph), module=module)
    assert not certificate.failures and not certificate.ok
    with pytest.raises(EquivalenceError, match="the module's output mul differs from its trace"):
        certificate.require()


def test_a_trace_that_holds_for_one_size_only_is_recorded():
    """The window is a number of the traced size in the graph, and follows the input in the module."""

    class Window(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.avg_pool2d(x, (x.shape[2], x.shape[3]))

    module = Window().eval()
    graph = trace(module, IMAGE)
    certificate = run(graph, copy_of(graph), module=module)
    assert certificate.ok and [name for name, _ in certificate.skipped] == ["second size"]
    assert "differs from its trace" in certificate.skipped[0][1]

"""A trace that is not the user's module is found, whatever the fold does with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import foldexport
from foldexport.errors import EquivalenceError
from foldexport.trace import calling, trace
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


class ByName(Doubled):
    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        return super().forward(x * mask)


class WritesIntoItsInput(Doubled):
    """Normalises in place, counts its calls, and prints."""

    def forward(self, x: Tensor) -> Tensor:
        print("calling")
        self.calls += 1
        return super().forward(x.sub_(0.4).div_(0.2))


CALLED = {
    "DataParallel": (lambda: nn.DataParallel(Doubled()), (IMAGE,), "conv.weight"),
    "TorchScript": (lambda: torch.jit.script(Doubled()), (IMAGE,), "conv.weight"),
    "a part in TorchScript": (lambda: nn.Sequential(torch.jit.script(Doubled())), (IMAGE,), "0.conv.weight"),
    "by keyword": (ByName, (IMAGE, torch.ones_like(IMAGE)), "conv.weight"),
    "in place": (WritesIntoItsInput, (IMAGE,), "conv.weight"),
}


@pytest.mark.parametrize(("make", "example", "weight"), CALLED.values(), ids=CALLED)
def test_whatever_tracing_takes_is_compared_with_its_trace(make, example, weight, capfd):
    module = randomise(make(), 0)
    graph = trace(module, example)
    assert run(graph, copy_of(graph), module=graph.module).require().trace == ""
    graph.tensors[weight] = graph.tensors[weight] * 1.01
    certificate = run(graph, copy_of(graph), module=graph.module)
    assert not certificate.failures and "differs from its trace" in certificate.trace
    assert capfd.readouterr() == ("", "")


def test_the_module_and_the_probes_are_as_they_were():
    module = randomise(WritesIntoItsInput(), 0)
    folded = foldexport.fold(module, IMAGE)
    assert folded.certificate.ok and float(module.calls) == 0.0 and not bool(IMAGE.any())
    inputs, outputs = folded.certificate.references[0]
    wanted = module.double()(inputs[0].clone()).detach()
    assert float((outputs[0] - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


class Clamps(Doubled):
    """Writes into its weight at every call, past autograd."""

    def forward(self, x: Tensor) -> Tensor:
        self.conv.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


@pytest.mark.parametrize("lazy_bytes", [0, 2**40], ids=["on write", "at once"])
def test_weights_that_forward_writes_into_are_copies(lazy_bytes, monkeypatch):
    monkeypatch.setattr(calling, "LAZY_BYTES", lazy_bytes)
    module = randomise(Clamps(), 0)
    before = module.conv.weight.detach().numpy().copy()
    (found,) = calling.run(module, (IMAGE + 1,), ())
    assert (module.conv.weight.detach().numpy() == before).all() and abs(before).max() > 0.1
    assert torch.equal(found, module(IMAGE + 1)) and float(module.conv.weight.abs().max()) <= 0.11


def test_fold_compares_with_what_was_traced(monkeypatch):
    """The planted mistake: tracing gives a weight that the network does not have."""
    module = nn.DataParallel(randomise(Doubled(), 0))
    honest = foldexport.api.trace

    def mistaken(*args):
        graph = honest(*args)
        graph.tensors["conv.bias"] = graph.tensors["conv.bias"] + 0.01
        return graph

    monkeypatch.setattr(foldexport.api, "trace", mistaken)
    with pytest.raises(EquivalenceError, match="differs from its trace"):
        foldexport.fold(module, IMAGE)

"""A trace that is not the user's module is found, whatever the fold does with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import foldexport.api
from foldexport.certify.alone import refuse_other_way
from foldexport.errors import EquivalenceError, ModelError, UsageError
from foldexport.probes import make
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

    def mistaken(*args, **options):
        graph = honest(*args, **options)
        graph.tensors["conv.bias"] = graph.tensors["conv.bias"] + 0.01
        return graph

    monkeypatch.setattr(foldexport.api, "trace", mistaken)
    with pytest.raises(EquivalenceError, match="differs from its trace"):
        foldexport.fold(module, IMAGE)


class Rectified(nn.Module):
    """Rectifies its input first, or its trace lost that."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.conv = first, nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(x) if self.first else x).mean((2, 3))


def test_a_trace_that_is_right_for_positive_inputs_only_is_found():
    module, other = Rectified(True).eval(), Rectified(False).eval()
    other.load_state_dict(module.state_dict())
    graph = trace(other, IMAGE)
    assert run(graph, copy_of(graph), module=other).require().trace == ""
    certificate = run(graph, copy_of(graph), module=module)
    assert not certificate.failures and "the module's output mean differs from its trace" in certificate.trace


def deep(layers: int = 40) -> nn.Sequential:
    blocks = [(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(inplace=True)) for _ in range(layers)]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 3), *(layer for block in blocks for layer in block), *last), 0)


def test_a_trace_that_is_wrong_where_no_output_shows_it_is_found():
    module = deep()
    graph = trace(module, IMAGE)
    assert run(graph, copy_of(graph), module=module).require().trace == ""
    graph.tensors["2.bias"] = graph.tensors["2.bias"].clone()
    with torch.no_grad():
        module[2].bias[1] += 0.01
        wanted, found = module(IMAGE + 1), deep()(IMAGE + 1)
    assert float((wanted - found).abs().max()) <= 1e-5 * float(found.abs().max()), "the outputs show it"
    certificate = run(graph, copy_of(graph), module=module)
    assert certificate.trace.startswith("the module's layer '2' differs from its trace by 0.0")


class Unusual(nn.Module):
    """Layers that are written into, called twice, skipped, hooked, or the same under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.twice, self.idle = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.other, self.hooked = self.twice, nn.Conv2d(4, 4, 1)
        self.hooked.register_forward_hook(lambda layer, given, result: result * 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, 1] = 3.0
        y.mul_(2)
        return self.hooked(self.twice(self.other(y.relu_()))).mean((2, 3))


def test_layers_that_are_used_in_unusual_ways_are_no_false_alarm():
    module = randomise(Unusual(), 0)
    graph = trace(module, IMAGE)
    assert run(graph, copy_of(graph), module=module).require().trace == ""
    assert not nn.modules.module._global_forward_hooks


class OneOrMore(nn.Module):
    """Something else for one sample alone."""

    def __init__(self, alone: float) -> None:
        super().__init__()
        self.conv, self.norm, self.alone = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), alone

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y * self.alone if x.shape[0] == 1 else y


def test_a_network_that_branches_on_a_batch_of_one_is_refused_by_that_name():
    with pytest.raises(UsageError, match="OneOrMore computes something else at a batch of 1 than at a batch of 2"):
        foldexport.fold(randomise(OneOrMore(1.5), 0), IMAGE[:1])
    assert foldexport.fold(randomise(OneOrMore(1.0), 0), IMAGE[:1]).certificate.ok


def test_a_trace_that_is_wrong_at_every_batch_is_no_matter_of_one():
    module = randomise(OneOrMore(1.0), 0)
    graph = trace(module, IMAGE)
    with torch.no_grad():
        module.conv.bias += 1.0
    graph.tensors["conv.bias"] = graph.tensors["conv.bias"] - 1.0
    refuse_other_way(graph, make(graph))


@pytest.mark.parametrize(
    ("source", "said"),
    [(lambda y: y + torch.randn(2), "Draw only where self.training"), (nn.functional.dropout, "Pass `training=self.training`")],
    ids=["randn", "dropout"],
)
def test_the_advice_about_random_operators_is_about_those(source, said):
    class Random(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return source(super().forward(x).mean((1, 2, 3))[:2])

    with pytest.raises(ModelError, match=said) as caught:
        foldexport.fold(Random(nn.Conv2d(3, 2, 1)).eval(), IMAGE)
    assert ("training=self.training" in str(caught.value)) == (source is nn.functional.dropout)

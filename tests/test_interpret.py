"""The training graph in a chosen float type, its memory, and what it says of constants and random operators."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foldexport import interpret
from foldexport.errors import ModelError, UsageError
from foldexport.trace import packet_name, trace
from tests.eager import Function
from tests.statistics import randomise


def small_network() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten()]
    return randomise(nn.Sequential(*layers, nn.Linear(8 * 9, 5)), 0)


IMAGE = torch.randn(2, 3, 8, 8)


def test_float64_run_is_the_float64_network():
    module = small_network()
    graph = trace(module, IMAGE)
    found = interpret.outputs(graph, IMAGE)[0]
    with torch.no_grad():
        assert torch.equal(found, module.double()(IMAGE.double()))
    assert graph.tensors["0.weight"].dtype == torch.float32


def test_a_planted_mistake_is_seen(monkeypatch):
    """Parameters left in float32 precision would pass unseen through a comparison at 1e-6, but not at 1e-12."""
    module = small_network()
    graph = trace(module, IMAGE)
    exact = interpret.outputs(graph, IMAGE)[0]
    original = interpret.cast
    monkeypatch.setattr(interpret, "cast", lambda t, dtype, device="cpu": original(t, dtype, device) * (1 + 1e-9))
    error = (interpret.outputs(graph, IMAGE)[0] - exact).abs().max()
    assert 1e-12 < error / exact.abs().max() < 1e-6


def rounding(x):
    y = x.half().float() * torch.full((3, 1, 1), 0.1) + x.to(torch.bfloat16)
    y = y.type_as(x) + torch.zeros(3, 1, 1, dtype=torch.float32) + torch.linspace(0, 1, 3).view(3, 1, 1)
    y = F.softmax(y, 1, dtype=torch.float32) + x.sum(1, keepdim=True, dtype=torch.float32)
    counts = (x > 0).sum(1, keepdim=True)
    return y + counts / 3, counts, x.to(torch.int64)


def exact(x):
    y = x * torch.full((3, 1, 1), 0.1, dtype=torch.float64) + x + torch.linspace(0, 1, 3).double().view(3, 1, 1)
    y = F.softmax(y, 1) + x.sum(1, keepdim=True)
    counts = (x > 0).sum(1, keepdim=True)
    return y + counts.double() / 3, counts, x.to(torch.int64)


def test_every_cast_to_a_float_type_is_one_to_the_runs_type():
    graph = trace(Function(rounding).eval(), IMAGE)
    found, wanted = interpret.outputs(graph, IMAGE), exact(IMAGE.double())
    assert found[0].dtype == torch.float64 and (found[0] - wanted[0]).abs().max() < 1e-15 * 100
    assert torch.equal(found[1], wanted[1]) and torch.equal(found[2], wanted[2])
    assert all(v.dtype in (torch.float64, torch.int64, torch.bool) for _, v in interpret.steps(graph, IMAGE))


def test_a_run_without_type_rounds_as_the_network_does():
    graph = trace(Function(rounding).eval(), IMAGE)
    for one, other in zip(interpret.outputs(graph, IMAGE, None), rounding(IMAGE)):
        assert torch.equal(one, other)


def test_global_settings_are_as_they_were():
    graph = trace(small_network(), IMAGE)
    torch.set_float32_matmul_precision("medium")
    try:
        for _ in interpret.steps(graph, IMAGE):
            assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_steps_yields_every_node_in_order_and_no_gradients():
    graph = trace(small_network(), IMAGE)
    pairs = list(interpret.steps(graph, IMAGE.requires_grad_(False)))
    assert [node for node, _ in pairs] == [node for node in graph.fx.nodes if node.op != "output"]
    assert not any(value.requires_grad for _, value in pairs)


def test_values_are_freed_after_their_last_use():
    depth = 30
    graph = trace(nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(depth))).eval(), IMAGE)
    references, alive = [], []
    for _, value in interpret.steps(graph, IMAGE):
        references.append(weakref.ref(value))
        del value
        gc.collect()
        alive.append(sum(reference() is not None for reference in references))
    assert max(alive) <= 4  # an input, a weight, a bias and the output


def test_wrong_number_of_inputs():
    graph = trace(small_network(), IMAGE)
    with pytest.raises(UsageError, match=r"takes 1 inputs \(input\), not 2"):
        interpret.outputs(graph, (IMAGE, IMAGE))


def test_an_operator_without_kernel_is_named():
    def forward(x):
        return torch.linalg.inv(x)

    graph = trace(Function(forward).eval(), torch.eye(3).expand(2, 3, 3).contiguous())
    assert interpret.outputs(graph, torch.eye(3).expand(1, 3, 3))[0].dtype == torch.float64
    message = r"'linalg_inv' \(test_interpret.py:\d+ in forward\) has no float16 kernel on cpu"
    with pytest.raises(UsageError, match=message):
        interpret.outputs(graph, torch.eye(3).expand(1, 3, 3), torch.float16)


# ---- constants


class Dirac(nn.Module):
    """A weight computed from parameters: alpha · delta + beta · normalize(W)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.alpha, self.beta = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("delta", nn.init.dirac_(torch.empty(4, 4, 3, 3)))

    def forward(self, x):
        view = (-1, 1, 1, 1)
        weight = self.alpha.view(view) * self.delta + self.beta.view(view) * F.normalize(self.weight.flatten(1)).view(
            4, 4, 3, 3
        )
        return F.conv2d(x, weight, padding=1) + torch.ones(4, 1, 1)


def test_constant_nodes_are_those_without_input():
    graph = trace(Dirac().eval(), torch.randn(2, 4, 5, 5))
    constant = interpret.constant_nodes(graph)
    nodes = [node for node in graph.fx.nodes if node.op != "output"]
    assert {packet_name(n.target) for n in nodes if n not in constant and n.op == "call_function"} == {"conv2d", "add"}
    assert all(node in constant for node in nodes if node.op == "get_attr")


def test_what_depends_on_the_input_or_is_random_is_not_constant():
    def forward(x):
        dynamic = torch.ones(x.shape[0], 1)
        return x + dynamic + torch.rand(4) * 2 + torch.ones(4)

    graph = trace(Function(forward).eval(), torch.randn(2, 4))
    names = {packet_name(n.target) for n in interpret.constant_nodes(graph)}
    assert names == {"ones"} and len(interpret.constant_nodes(graph)) == 1


# ---- random operators


class Head(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


def test_dropout_left_on_is_refused_by_name():
    graph = trace(nn.Sequential(nn.Linear(4, 4), Head()).eval(), torch.randn(2, 4))
    assert [node.meta["module"] for node in interpret.random_nodes(graph)] == ["1"]
    with pytest.raises(ModelError, match=r"'dropout' in module '1' \(test_interpret.py:\d+ in forward\)"):
        interpret.refuse_random(graph)


RANDOM = {
    "dropout": lambda x: F.dropout(x, 0.1, training=True),
    "dropout in place": lambda x: F.dropout(x + 0, 0.1, training=True, inplace=True),
    "dropout2d": lambda x: F.dropout2d(x, 0.1, training=True),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.1, training=True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "rand_like": lambda x: x + torch.rand_like(x),
    "randn": lambda x: x + torch.randn(3, 1, 1),
    "bernoulli": lambda x: x * torch.bernoulli(x.sigmoid()),
    "stochastic depth": lambda x: x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.9),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
}
STILL = {
    "dropout off": lambda x: F.dropout(x, 0.1, training=False),
    "dropout of none": lambda x: F.dropout(x, 0.0, training=True),
    "dropout2d off": lambda x: F.dropout2d(x, 0.1, training=False),
    "alpha dropout off": lambda x: F.alpha_dropout(x, 0.1, training=False),
    "rrelu off": lambda x: F.rrelu(x, training=False),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_operators_are_found(name):
    graph = trace(Function(RANDOM[name]).eval(), IMAGE)
    assert len(interpret.random_nodes(graph)) == 1
    with pytest.raises(ModelError, match="random in eval mode"):
        interpret.refuse_random(graph)


@pytest.mark.parametrize("name", STILL)
def test_operators_that_are_switched_off_are_not(name):
    graph = trace(Function(STILL[name]).eval(), IMAGE)
    assert not interpret.random_nodes(graph)
    interpret.refuse_random(graph)

"""TorchScript, whole or in part, traces as the Python it was made from: same numbers, same names, a free batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foldexport.errors import TraceError
from foldexport.trace import scripted, trace
from tests.statistics import randomise
from tests.trace.test_user_code import IMAGE, assert_same


class Block(nn.Module):
    def __init__(self, channels: int, scale: float = 1.0):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.2)
        self.down = None
        self.scale = scale

    def forward(self, x):
        y = self.drop(self.act(self.bn(self.conv(x)))) * self.scale
        if self.down is not None:
            x = self.down(x)
        y += x
        return y


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.body = nn.ModuleList([Block(4), Block(4, 0.5)])
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.up(self.stem(x))
        for block in self.body:
            x = block(x)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        y = F.adaptive_avg_pool2d(x, 1)
        return self.fc(torch.flatten(y, 1)), x.view(x.shape[0], -1)


class Control(nn.Module):
    """Branches, loops, lists and dicts of TorchScript."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.widths = [1, 2]

    def forward(self, x, times: int = 2):
        parts = []
        for i in range(times):
            if x.shape[2] > 4 and i % 2 == 0:
                parts.append(self.conv(x))
            else:
                parts.append(x * float(i))
        first, second = torch.split(x, self.widths, dim=1)
        named = {"a": torch.cat(parts, 1), "b": second}
        total = first.sum()
        count = 0
        while count < len(parts):
            total = total + parts[count].mean()
            count += 1
        return named["a"], named["b"], total


MAKERS = {
    "scripted": torch.jit.script,
    "traced": lambda network: torch.jit.trace(network, IMAGE),
    "loaded": lambda network: _loaded(torch.jit.script(network)),
}


def _loaded(source):
    import io

    buffer = io.BytesIO()
    torch.jit.save(source, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_whole_network(make):
    network = randomise(Net(), 0)
    graph = assert_same(make(network), IMAGE, called=network)
    assert graph.dynamic == {"batch": True}
    unused = {name for name in network.state_dict() if name.endswith("num_batches_tracked")}
    assert set(graph.tensors) == set(network.state_dict()) - unused
    kinds = {node.meta["module"]: node.meta["module_type"] for node in graph.fx.nodes if node.op == "call_function"}
    assert kinds["body.1.bn"] == "BatchNorm2d" and kinds["up"] == "ConvTranspose2d" and kinds["fc"] == "Linear"
    assert isinstance(graph.module, nn.Module) and torch.equal(graph.module(IMAGE)[0], network(IMAGE)[0])


def test_operators_are_those_of_eager_code():
    graph = trace(torch.jit.trace(randomise(Net(), 0), IMAGE), IMAGE)
    names = {node.target.name() for node in graph.fx.nodes if node.op == "call_function" and hasattr(node.target, "name")}
    assert "aten::conv2d" in names and not any("_convolution" in name for name in names)


def test_a_frozen_network_has_weights_without_names():
    network = randomise(Net(), 0)
    graph = trace(torch.jit.freeze(torch.jit.script(network)), IMAGE)
    assert graph.dynamic == {"batch": True} and all(name.startswith("lifted_tensor") for name in graph.tensors)


def test_branches_loops_lists_and_dicts():
    network = randomise(Control(), 0)
    assert_same(torch.jit.script(network), IMAGE, called=network)


class Partly(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.body = make(randomise(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), 0))

    def forward(self, x):
        return swish(self.body(self.conv(x)))


@torch.jit.script
def swish(x):
    return x * torch.sigmoid(x)


@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda part: torch.jit.trace(part, torch.randn(2, 4, 8, 8))], ids=["scripted", "traced"]
)
def test_a_part(make):
    network = Partly(make)
    for part in network.modules():
        part.eval() if isinstance(part, torch.jit.ScriptModule) else setattr(part, "training", False)
    body = network.body
    graph = assert_same(network, IMAGE)
    assert network.body is body and graph.module is network
    assert {"conv.weight", "body.0.weight", "body.1.running_mean"} <= set(graph.tensors)
    assert "body.1" in {node.meta.get("module") for node in graph.fx.nodes}


class Valued(nn.Module):
    def forward(self, x):
        if bool(x.sum() > 0):
            return x
        return x + 1


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.calls


def test_a_branch_on_values_is_refused():
    with pytest.raises(TraceError, match="cannot trace Valued: .*data-dependent"):
        trace(torch.jit.script(Valued().eval()), IMAGE)


def test_state_that_torchscript_keeps_is_refused():
    with pytest.raises(TraceError, match=r"cannot trace Stateful: .*sets self.calls at each call.*\n.*it was made from"):
        trace(torch.jit.script(Stateful().eval()), IMAGE)


def test_an_operator_that_is_run_wrong_is_caught(monkeypatch):
    source = torch.jit.script(randomise(Net(), 0))
    monkeypatch.setitem(scripted._SPECIAL, "aten::adaptive_avg_pool2d", lambda run, node: run.inputs(node)[0][:, :, :1, :1])
    with pytest.raises(TraceError, match="cannot trace Net: .*gives another result"):
        trace(source, IMAGE)

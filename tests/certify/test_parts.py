"""Tensors that hold several values side by side, on a chain made by hand: each part is held to the training graph."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor, fx, nn

from foldexport.certify import unvisited
from foldexport.certify.lockstep import Schedule
from foldexport.certify.rounding import worst_conditioned
from foldexport.fold.rebuild import Program
from foldexport.fold.records import Image, Record
from foldexport.probes import make
from foldexport.trace import Graph, trace
from tests.hand_folds import IMAGE, one, run
from tests.statistics import randomise

ORDER = torch.tensor([2, 0, 3, 1])  # the channels of y in the order in which they are carried
SCALE = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
SHIFT = torch.tensor([0.0, 1.0, -0.25, 0.0], dtype=torch.float64)


class Residual(nn.Module):
    """``y = f(x)``, then ``y[::2] + g(y)`` with g of stride 2."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y[:, :, ::2, ::2] + self.second(y)


def layers(module: Residual) -> nn.Module:
    """The layers of the chain: ``first``; ``wide`` makes [second(y); c], c = scale ⊙ y[:, order, ::2] + shift; ``last`` adds."""
    root = nn.Module()
    root.first = nn.Conv2d(3, 4, 3, padding=1)
    root.first.load_state_dict(module.first.state_dict())
    root.wide, root.relu, root.last = nn.Conv2d(4, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 4, 1)
    root.double()
    places = torch.arange(4)
    with torch.no_grad():
        for layer in (root.wide, root.last):
            layer.weight.zero_(), layer.bias.zero_()
        root.wide.weight[:4] = module.second.weight.double()
        root.wide.bias[:4] = module.second.bias.double() + 100  # beyond the ReLU's reach
        for start, sign in ((4, 1.0), (8, -1.0)):
            root.wide.weight[start + places, ORDER, 1, 1] = sign * SCALE
            root.wide.bias[start + places] = sign * SHIFT
            root.last.weight[ORDER, start + places, 0, 0] = sign / SCALE
        root.last.weight[places, places, 0, 0] = 1.0
        root.last.bias[ORDER] -= SHIFT / SCALE
        root.last.bias -= 100
    return root


def image(sign: float, *, rectified: bool) -> Image:
    return Image(ORDER, sign * SCALE, sign * SHIFT, (2, 2), rectified)


def parts(values: list[str], *, rectified: bool) -> list[Record]:
    """Records of the wide tensor: second(y) + 100, then both halves of what is carried."""
    y, branch = values
    records = [Record(branch, one(y).scale, one(y).shift - 100, None, torch.arange(4))]
    for start, sign in ((4, 1.0), (8, -1.0)):
        carried = dataclasses.replace(one(y), channels=torch.arange(start, start + 4), image=image(sign, rectified=rectified))
        records.append(carried)
    return records


@pytest.fixture
def case(monkeypatch) -> tuple[Graph, Program]:
    monkeypatch.setattr(unvisited, "FACTORS", ())  # the bias of 100 passes the ReLU for inputs of usual size only
    module = randomise(Residual(), 0)
    graph, root = trace(module.eval(), IMAGE), layers(module)
    names = {node.meta.get("module"): node.name for node in graph.fx.nodes if node.op == "call_function" and "conv" in node.name}
    values = [names["first"], names["second"]]
    folded = fx.Graph()
    last = folded.placeholder("x")
    nodes = {}
    for name in ("first", "wide", "relu", "last"):
        last = nodes[name] = folded.call_module(name, (last,))
    folded.output(last)
    output = graph.fx.output_node().args[0][0].name
    records = {
        "first": [one(values[0])], "wide": parts(values, rectified=False), "relu": parts(values, rectified=True),
        "last": [one(output)],
    }  # fmt: skip
    return graph, Program(fx.GraphModule(root, folded), records, {name: f"block.{name}" for name in nodes})


def test_parts_that_hold_are_proved(case):
    graph, program = case
    certificate = run(graph, program)
    assert certificate.ok and certificate.end_to_end.error < 1e-12
    assert certificate.n_nodes == 4 and certificate.n_values == 3


def test_a_chain_that_holds_for_inputs_of_usual_size_only_is_refused(case, monkeypatch):
    monkeypatch.setattr(unvisited, "FACTORS", (64.0,))
    failures = run(*case).failures
    assert {(failure.operator, failure.probe) for failure in failures} == {("relu", "normal times 64")}


@pytest.mark.parametrize(("row", "carried", "channel"), [(1, False, 1), (4, True, 2), (9, True, 0)])
def test_a_wrong_row_is_named_by_what_it_carries(case, row: int, carried: bool, channel: int):
    graph, program = case
    with torch.no_grad():
        program.module.wide.weight[row, 1, 0, 0] += 1e-8
    certificate = run(graph, program)
    assert {(f.operator, f.channel, f.carried) for f in certificate.failures} == {("wide", channel, carried)}
    words = "does not carry the training graph's 'first'" if carried else "does not give the training graph's 'second'"
    assert words in str(certificate.failures[0]) and f"channel {channel}" in str(certificate.failures[0])
    assert json.dumps(certificate.to_dict(), allow_nan=False)


@pytest.mark.parametrize("change", [
    {"scale": SCALE * (1 + 1e-9)}, {"shift": SHIFT + 1e-9}, {"index": ORDER.roll(1)}, {"rectified": True},
], ids=["scale", "shift", "index", "rectified"])  # fmt: skip
def test_a_wrong_image_is_named(case, change: dict):
    graph, program = case
    *rest, last = program.records["wide"]
    program.records["wide"] = [*rest, dataclasses.replace(last, image=dataclasses.replace(last.image, **change))]
    failures = run(graph, program).failures
    assert failures[0].operator == "wide" and all(f.carried for f in failures if f.operator == "wide")


def test_a_wrong_stride_is_named(case):
    graph, program = case
    *rest, last = program.records["wide"]
    program.records["wide"] = [*rest, dataclasses.replace(last, image=dataclasses.replace(last.image, stride=(1, 1)))]
    failures = run(graph, program).failures
    assert failures[0].operator == "wide" and "gives shape [3, 4, 5, 5], wanted [3, 4, 10, 10]" in failures[0].note


def test_a_reader_of_wrong_parts_is_innocent(case):
    """It is fed what the training graph has, not what the wide tensor came out as."""
    graph, program = case
    with torch.no_grad():
        program.module.wide.bias += 1.0
    assert {f.operator for f in run(graph, program).failures} == {"wide"}


def test_a_channel_that_no_record_knows_is_what_the_operator_gave(case):
    graph, program = case
    assert run(graph, program).ok
    for name in ("wide", "relu"):
        program.records[name] = program.records[name][:-1]
    assert run(graph, program).ok
    with torch.no_grad():
        program.module.wide.weight[9, 1, 0, 0] += 1e-8
    assert {f.operator for f in run(graph, program).failures} == {"last"}


def test_parts_have_a_condition_too(case):
    graph, program = case
    found = worst_conditioned(Schedule(graph, program), make(graph)[0])
    assert {blame.operator for blame in found} >= {"wide", "relu", "last"}

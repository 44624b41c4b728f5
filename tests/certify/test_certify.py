"""The certificate on folds made by hand: what holds must pass, and every planted mistake must be named."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, fx, nn

from foldexport import probes as probing
from foldexport.certify import certify
from foldexport.errors import EquivalenceError, FoldexportError
from foldexport.fold.rebuild import Program, Record
from foldexport.probes import Probe
from foldexport.trace import Graph, trace
from tests.hand_folds import IMAGE, column, copy_of, fold_chain, one, plain, plant, run
from tests.statistics import randomise


@pytest.fixture
def case() -> tuple[Graph, Program]:
    return fold_chain(plain(example=torch.randn(4, 3, 10, 10)), IMAGE)


# ---- what holds


def test_a_correct_fold_is_proved(case):
    graph, program = case
    certificate = run(graph, program, noise_probes=probing.noise_probes(graph))
    assert certificate.ok and certificate.require() is certificate
    assert certificate.n_values == 11 and certificate.n_nodes == 8
    names = [name for name, _ in certificate.probes]
    assert names == ["normal", "uniform", "constant", "impulse", "second size"]
    assert certificate.probes[0][1] == [[3, 3, 10, 10]] and certificate.probes[1][1] == [[1, 3, 10, 10]]
    assert certificate.worst.ratio < 0.01
    assert certificate.end_to_end.error < 1e-13 and certificate.end_to_end.informative
    assert 2**-24 <= certificate.noise32 < 1e-5 and 0.2 < certificate.folded32 < 4
    assert "11 values in 8 operators" in certificate.summary()


def test_the_record_is_plain_json(case):
    record = run(*case, noise_probes=probing.noise_probes(case[0])).to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["ok"] is True and record["end_to_end"]["informative"] is True


@pytest.mark.parametrize("gamma", [0.0, 1e-8, -1e-8])
def test_dead_and_tiny_channels_pass(gamma):
    net = plain()
    with torch.no_grad():
        net[1].weight[:3] = gamma
        net[4].weight[2] = gamma
        net[4].bias[2] = 0.0
        net[4].running_mean[2] = 0.0
    certificate = run(*fold_chain(net, IMAGE))
    assert certificate.ok, certificate.summary()


def test_a_constant_under_instance_norm_passes():
    """Its reference is rounding noise throughout, so only the operator's own condition can judge it."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4), nn.ReLU())
    assert run(*fold_chain(randomise(net, 0), IMAGE)).ok


def test_a_pending_shift_is_recovered():
    """The stored tensor of the first convolution is moved by τ; its reader takes it back."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1))
    graph, program = fold_chain(randomise(net, 0), IMAGE)
    first, second = program.module.folded0, program.module.folded1
    tau, rho = torch.tensor([3.0, -2.0, 0.5, 1e4]), torch.tensor([2.0, -1.0, 0.25, 8.0])
    with torch.no_grad():
        second.bias.add_(second.weight[:, :, 0, 0] @ tau.double())
        second.weight.mul_(rho.reshape(1, -1, 1, 1))
        first.bias.sub_(tau).div_(rho)
        first.weight.div_(rho.reshape(-1, 1, 1, 1))
    value = program.records["folded0"][0].value
    program.records["folded0"] = [Record(value, column(rho), column(tau))]
    assert run(graph, program).ok
    program.records["folded0"] = [Record(value, column(rho), column(tau + 1e-6))]
    assert {finding.operator for finding in run(graph, program).failures} == {"folded0", "folded1"}


# ---- what does not


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: conv.weight[4, 1, 2, 0].mul_(1 + 1e-6),
        lambda conv: conv.bias[4].add_(1e-6),
        lambda conv: conv.bias[4].zero_(),
        lambda conv: conv.weight[4].copy_(conv.weight[4].flip(-1)),
    ],
    ids=["weight", "bias", "dropped bias", "mirrored kernel"],
)
def test_a_wrong_term_is_named(case, change):
    graph, program = case
    plant(program, "folded3", change)
    certificate = run(graph, program)
    assert not certificate.ok
    assert {(f.operator, f.channel) for f in certificate.failures} == {("folded3", 4)}
    assert certificate.worst.ratio > 1
    with pytest.raises(EquivalenceError, match=r"'stage\.3' .*channel 4"):
        certificate.require()


def test_a_wrong_padding_is_named(case):
    graph, program = case
    program.module.folded3.padding_mode = "circular"
    program.module.folded3._reversed_padding_repeated_twice = [1, 1, 1, 1]
    assert {f.operator for f in run(graph, program).failures} == {"folded3"}


def test_another_output_size_is_named(case):
    graph, program = case
    program.module.folded3.stride = (2, 2)
    failures = run(graph, program).failures
    assert failures[0].operator == "folded3" and "shape [3, 6, 5, 5], wanted [3, 6, 10, 10]" in failures[0].note
    assert {f.operator for f in failures} == {"folded3"}


def test_a_missing_operator_is_named(case):
    graph, program = case
    program.module.folded2 = nn.Identity()
    assert {f.operator for f in run(graph, program).failures} == {"folded2"}


def test_an_operator_that_cannot_run_is_named(case):
    graph, program = case
    program.module.folded3 = nn.Conv2d(7, 6, 3).double()
    failures = run(graph, program).failures
    assert {f.operator for f in failures} == {"folded3"} and "cannot run" in failures[0].note


@pytest.mark.parametrize("part", ["scale", "shift"])
def test_a_wrong_record_is_named(case, part):
    graph, program = case
    alias = program.records["folded0"][0]
    changed = {"scale": alias.scale, "shift": alias.shift}
    changed[part] = changed[part].clone()
    changed[part][0, 2] += 1e-7
    program.records["folded0"][0] = Record(alias.value, changed["scale"], changed["shift"], alias.usable)
    assert [(f.value, f.channel) for f in run(graph, program).failures][:1] == [(alias.value, 2)]


def test_a_wrong_output_is_named(case):
    graph, program = case
    nodes = list(program.module.graph.nodes)
    nodes[-1].args = (nodes[-3],)
    program.module.recompile()
    assert run(graph, program).failures[0].operator == nodes[-3].name


def test_nan_fails(case):
    graph, program = case
    plant(program, "folded3", lambda conv: conv.bias[1].fill_(float("nan")))
    certificate = run(graph, program)
    assert not certificate.ok and certificate.worst.channel == 1
    assert certificate.to_dict()["worst"]["ratio"] == "inf"


def test_a_record_of_an_unknown_value_is_our_bug(case):
    graph, program = case
    program.records["folded2"] = [one("relu_77")]
    with pytest.raises(FoldexportError, match="relu_77"):
        run(graph, program)


def test_channels_that_no_probe_brings_to_life_are_counted(case):
    graph, program = fold_chain(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), IMAGE)
    assert run(graph, program).silent == {}
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with torch.no_grad():
        net[0].bias[1:3] = -1e3
    assert run(*fold_chain(net, IMAGE)).silent == {"1": 2}


# ---- probes that cannot be judged


def test_a_probe_without_finite_reference_is_dropped(case):
    graph, program = case
    image = torch.full((1, 3, 10, 10), float("inf"), dtype=torch.float64)
    certificate = certify(graph, program, [*probing.make(graph), Probe("data", (image,))])
    assert certificate.ok and [name for name, _ in certificate.dropped] == ["data"]
    alone = certify(graph, program, [Probe("data", (image,))])
    with pytest.raises(EquivalenceError, match="no probe can be judged"):
        alone.require()


def test_infinite_values_inside_are_compared_as_they_are():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([False, True, False]).reshape(1, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(self.mask, float("-inf")).softmax(1)

    graph = trace(Masked().eval(), IMAGE)
    program = copy_of(graph)
    assert run(graph, program).ok


def test_a_size_that_the_network_refuses_is_recorded():
    net = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5)), 0)
    certificate = run(*fold_chain(net, IMAGE))
    assert certificate.ok and [name for name, _ in certificate.skipped] == ["second size"]
    assert "does not take [[1, 3, 12, 14]]" in certificate.skipped[0][1]


def test_a_fold_that_rests_on_the_traced_size_is_recorded():
    """A mean over all of space, written as a pool of the traced size."""
    graph, program = fold_chain(nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1)), IMAGE)
    program.module.folded1 = nn.AvgPool2d(10)
    certificate = run(graph, program)
    assert certificate.ok and [name for name, _ in certificate.skipped] == ["second size"]
    assert "traced sizes only: 'stage.1'" in certificate.skipped[0][1]
    graph.dynamic["height"] = True
    assert not run(graph, program).ok


def test_rounding_inside_an_operator_without_record_is_allowed_for():
    """k·x + t is 0 in the training graph; the folded operators give the last digit of t, nothing recorded between."""

    class Moved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 0.3 + 0.7).clamp(max=0.0)

    graph = trace(Moved().eval(), IMAGE)
    value = [node.name for node in graph.fx.nodes if node.op == "call_function"][-1]
    folded = fx.Graph()
    clamped = folded.call_function(torch.clamp, (folded.placeholder("x"),), {"max": -0.7 / 0.3})
    scaled = folded.call_function(torch.mul, (clamped, 0.3))
    added = folded.call_function(torch.add, (scaled, 0.7))
    twice = folded.call_function(torch.mul, (added, 1.0))
    folded.output(twice)
    pending = Record(value, torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    records = {clamped.name: [pending], twice.name: [one(value)]}
    program = Program(fx.GraphModule(nn.Module(), folded), records, {})
    certificate = run(graph, program)
    assert certificate.ok, certificate.failures[0]

"""The certificate on folds made by hand: what holds must pass, and every planted mistake must be named."""

from __future__ import annotations

import copy
import json
import weakref

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from foldexport import probes as probing
from foldexport.certify import Certificate, certify
from foldexport.errors import EquivalenceError, FoldexportError
from foldexport.fold.rebuild import Program, Record
from foldexport.interpret import cast
from foldexport.probes import Probe
from foldexport.trace import Graph, trace
from tests.statistics import randomise


def column(vector: Tensor) -> Tensor:
    """``[C]`` as ``[1, C, 1, 1]`` in float64."""
    return vector.detach().double().reshape(1, -1, 1, 1)


def batch_norm_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """``k = γ/√(σ²+ε)`` and ``β − k·μ``."""
    k = norm.weight.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return k, norm.bias.detach().double() - k * norm.running_mean.double()


def fold_chain(net: nn.Sequential, example: Tensor) -> tuple[Graph, Program]:
    """conv → bn becomes one convolution that stores the batch norm's value; every other layer stays."""
    graph = trace(net.eval(), example)
    values = [node.name for node in graph.fx.nodes if node.op == "call_function"]
    root, folded, records, labels = nn.Module(), fx.Graph(), {}, {}
    last = folded.placeholder("x")
    for place, (name, layer) in enumerate(net.named_children()):
        if isinstance(layer, nn.BatchNorm2d):
            continue
        layer, identity = copy.deepcopy(layer).double(), [one(values[place])]
        after = net[place + 1] if place + 1 < len(net) else None
        if isinstance(layer, nn.Conv2d) and isinstance(after, nn.BatchNorm2d):
            k, shift = batch_norm_affine(after)
            bias = torch.zeros(len(k), dtype=torch.float64) if layer.bias is None else layer.bias.detach()
            layer.weight.data.mul_(k.reshape(-1, 1, 1, 1))
            layer.bias = nn.Parameter(k * bias + shift)
            inverse = torch.where(k == 0, 0.0, 1 / torch.where(k == 0, 1.0, k))
            alias = Record(values[place], column(inverse), column(-shift * inverse), column(k) != 0)
            identity = [alias, one(values[place + 1])]
        root.add_module(f"folded{name}", layer)
        last = folded.call_module(f"folded{name}", (last,))
        records[last.name], labels[last.name] = identity, f"stage.{name}"
    folded.output(last)
    return graph, Program(fx.GraphModule(root, folded), records, labels)


def one(value: str) -> Record:
    """The stored tensor is the training value."""
    return Record(value, torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64))


def plain(depth: int = 3, width: int = 6, seed: int = 0, **statistics) -> nn.Sequential:
    layers: list[nn.Module] = []
    for place in range(depth):
        layers += [nn.Conv2d(width if place else 3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [nn.Conv2d(width, 5, 1), nn.ReLU()]
    return randomise(nn.Sequential(*layers), seed, **statistics)


IMAGE = torch.zeros(2, 3, 10, 10)


@pytest.fixture
def case() -> tuple[Graph, Program]:
    return fold_chain(plain(example=torch.randn(4, 3, 10, 10)), IMAGE)


def run(graph: Graph, program: Program, **options) -> Certificate:
    return certify(graph, program, probing.make(graph), **options)


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


def plant(program: Program, name: str, change) -> None:
    with torch.no_grad():
        change(getattr(program.module, name))


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


# ---- the blindness of outputs


def deep(depth: int = 60) -> tuple[Graph, Program]:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for place in range(depth):
        layers += [nn.Conv2d(6 if place else 3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    net = randomise(nn.Sequential(*layers), 3)
    for norm in net:
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.mul_(8)
    return fold_chain(net, torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("change", [lambda c: c.weight[0, 0, 0, 0].add_(1e-6), lambda c: c.bias[0].zero_()])
def test_outputs_are_blind_in_a_deep_network_and_the_local_certificate_is_not(change):
    graph, program = deep()
    sound = run(graph, program)
    assert sound.ok and not sound.end_to_end.informative and "says little" in sound.summary()
    plant(program, "folded0", change)
    certificate = run(graph, program)
    assert certificate.end_to_end.ok and certificate.end_to_end.error < 1e-14
    assert not certificate.ok and {f.operator for f in certificate.failures} == {"folded0"}


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


def copy_of(graph: Graph) -> Program:
    """The training graph itself as a folded program, every value its own record."""
    folded, root, table, records = fx.Graph(), nn.Module(), {}, {}
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            root.register_buffer(node.target.replace(".", "_"), cast(graph.tensors[node.target], torch.float64))
            table[node] = folded.get_attr(node.target.replace(".", "_"))
        else:
            table[node] = folded.node_copy(node, table.__getitem__)
        if node.op == "call_function":
            records[table[node].name] = [Record(node.name, torch.ones(()).double(), torch.zeros(()).double())]
    return Program(fx.GraphModule(root, folded), records, {})


class Labels(nn.Module):
    """Scores, their class, and what a threshold leaves of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        scores = self.body(x)
        return scores.softmax(1), scores.argmax(1), (scores > 0).float() * scores


def test_behind_a_jump_inputs_are_compared_and_outputs_counted():
    graph = trace(randomise(Labels(), 0), torch.randn(2, 8))
    found = run(graph, copy_of(graph))
    assert found.ok and set(found.end_to_end.agreement.values()) == {1.0} and len(found.end_to_end.agreement) == 2
    top1 = next(iter(found.end_to_end.top1.values()))
    assert top1.agree == top1.judged == top1.samples and not top1.ties
    program = copy_of(graph)
    program.module.body_bias.data[1] += 1e-3
    assert {f.channel for f in run(graph, program).failures} == {1}


def test_several_outputs_and_tuples():
    class Split(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            a, b = (x + y).split([1, 2], 1)
            return {"b": b.relu(), "a": a, "x": x}

    graph = trace(Split().eval(), (IMAGE, IMAGE + 1))
    program = copy_of(graph)
    split = next(node.name for node in program.module.graph.nodes if "split" in node.name)
    del program.records[split]
    certificate = run(graph, program)
    assert certificate.ok and certificate.n_values == 5


# ---- rounding


def test_float32_trouble_is_measured_and_located():
    """A huge shift that is added and taken off again: perfect in float64, ruinous in float32."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1))
    graph, program = fold_chain(randomise(net, 0), IMAGE)
    first, second = program.module.folded0, program.module.folded1
    tau = torch.tensor([0.0, 0.0, 1e4, 0.0]).double()
    with torch.no_grad():
        second.bias.add_(second.weight[:, :, 0, 0] @ tau)
        first.bias.sub_(tau)
    value = program.records["folded0"][0].value
    program.records["folded0"] = [Record(value, column(torch.ones(4)), column(tau))]
    certificate = run(graph, program, noise_probes=probing.noise_probes(graph))
    assert certificate.ok and certificate.folded32 > 100
    worst = certificate.rounding.worst[0]
    assert (worst.module, worst.channel) == ("stage.0", 2)
    assert "'stage.0' channel 2" in certificate.rounding.warnings()[0]


def test_rounding_of_a_network_like_itself_is_one(case):
    graph, program = case
    found = certify(graph, program, probing.make(graph)[:1], noise_probes=probing.noise_probes(graph)).rounding
    assert found.samples == 8 and len(found.levels) == 1 and not found.worst and not found.warnings()


# ---- the trace


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


# ---- cost


class Cost(TorchDispatchMode):
    """Multiply-adds of convolutions, those in float32 at half, and the values of a size alive at each convolution."""

    def __init__(self, elements: int = 0) -> None:
        super().__init__()
        self.work, self.live, self._elements = 0.0, 0, elements
        self._values: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == self._elements:
            self._values.append(weakref.ref(result))
        if func is torch.ops.aten.convolution.default:
            self.work += (1.0 if result.dtype == torch.float64 else 0.5) * result.numel() * args[1][0].numel()
            alive = [value for value in (ref() for ref in self._values) if value is not None]
            self.live = max(self.live, len({value.untyped_storage().data_ptr() for value in alive}))
        return result


def test_the_proof_is_worth_at_most_60_passes():
    graph, program = fold_chain(plain(2, 4), torch.zeros(2, 3, 64, 64))
    with Cost() as whole:
        run(graph, program, noise_probes=probing.noise_probes(graph))
    with Cost() as single, torch.no_grad():
        program.module(torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    assert 20 < whole.work / single.work <= 45


@pytest.mark.parametrize("depth", [4, 16])
def test_memory_does_not_grow_with_depth(depth):
    graph, program = fold_chain(plain(depth, 4), torch.zeros(2, 3, 16, 16))
    with Cost(4 * 16 * 16) as cost:
        certify(graph, program, probing.make(graph)[1:2])
    assert 2 <= cost.live <= 9

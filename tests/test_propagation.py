"""Signal propagation: what is measured is what the networks hold, at the points that their graphs say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldexport import propagation
from foldexport.errors import FoldexportError, UsageError
from foldexport.fold.passes import fold_graph
from foldexport.fold.rebuild import rebuild
from foldexport.propagation import LAYER, SUM, Propagation
from foldexport.propagation.run import Moments, cotangent
from foldexport.trace import trace
from foldexport.zoo.nfresnet import ResidualBlock, nfresnet
from foldexport.zoo.preresnet import preresnet
from tests.statistics import randomise

EXACT = 1e-10
C = math.sqrt(0.5)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def both(network: nn.Module, x: Tensor, **more) -> Propagation:
    graph = trace(network.eval(), x)
    return propagation.measure(graph, rebuild(fold_graph(graph)).program, **more)


def consistent(found: Propagation) -> bool:
    """``Var[v] = a²·Var[s]`` and ``Var[∂s] = a²·Var[∂v]``, where a and t are one number each."""
    rows = zip(found.pending, found.training.activation, found.folded.activation,
               found.training.gradient, found.folded.gradient, strict=True)  # fmt: skip
    return all(
        math.isclose(v, each.scale**2 * s, rel_tol=EXACT) and math.isclose(ds, each.scale**2 * dv, rel_tol=EXACT)
        for each, v, s, dv, ds in rows
    )


# ---- what is measured


@pytest.mark.parametrize("scheme", ["idshort", "convshort", "nf"])
def test_values_and_gradients_are_those_of_the_users_own_blocks(scheme):
    network, x = nfresnet(18, scheme, width=4).eval(), normal(4, 3, 16, 16).double()
    found = propagation.measure(trace(network, x.float()), data=[x.numpy()], seed=5)
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    blocks = {name: each for name, each in network.double().named_modules() if isinstance(each, ResidualBlock)}
    for block in blocks.values():
        block.register_forward_hook(keep)
    logits = network(x)
    logits.backward(cotangent(logits.shape, 5, 0))
    assert found.names == list(blocks) and found.samples == 4
    wanted = [float(value.detach().var(correction=0)) for value in outputs]
    assert found.training.activation == pytest.approx(wanted, rel=EXACT)
    assert found.training.gradient == pytest.approx([float(v.grad.var(correction=0)) for v in outputs], rel=EXACT)


@pytest.mark.parametrize("scheme", ["idshort", "learnscalar", "convshort", "rescale", "nf", "batchnorm"])
def test_folded_trunk_differs_by_what_is_pending(scheme):
    found = both(nfresnet(18, scheme, width=4), normal(2, 3, 16, 16))
    assert found.kind == SUM and len(found.names) == 8
    assert consistent(found)


def test_sum_constants_pile_up_in_the_folded_trunk_until_a_convolution_reads_it():
    found = both(nfresnet(50, "idshort", width=4, blocks=(3, 2, 1)), normal(2, 3, 16, 16))
    assert [each.scale for each in found.pending] == pytest.approx([1, C, C**2, 1, C, 1])
    assert found.folded.activation[2] == pytest.approx(4 * found.training.activation[2], rel=1e-6)  # c is a float32


def test_shift_of_a_pre_activation_trunk_is_told():
    x = normal(2, 3, 16, 16)
    found = both(randomise(preresnet(20, width=4), 0, example=x), x)
    assert all(each.scale == each.smallest == each.largest == 1 for each in found.pending)
    assert all(each.shift > 0 for each in found.pending)
    assert found.folded.gradient == pytest.approx(found.training.gradient, rel=0.02)  # a is −1 where γ < 0: the mean moves
    assert found.folded.activation != pytest.approx(found.training.activation, rel=0.02)


def test_a_wrong_scale_is_seen():
    graph = trace(nfresnet(18, "idshort", width=4).eval(), normal(2, 3, 16, 16))
    program = rebuild(fold_graph(graph)).program
    value = propagation.points(graph)[1][1].value.name
    for records in program.records.values():
        records[:] = [replace(each, scale=each.scale * (1 + 1e-6)) if each.value == value else each for each in records]
    assert not consistent(propagation.measure(graph, program))


def test_value_that_the_fold_merges_away_is_a_gap():
    found = both(nfresnet(18, "skipinit", width=4), normal(2, 3, 16, 16))  # α = 0: convolutions in a row become one
    gaps = [math.isnan(value) for value in found.folded.activation]
    assert gaps == [math.isnan(value) for value in found.folded.gradient] == [math.isnan(each.scale) for each in found.pending]
    assert gaps == 6 * [True] + 2 * [False] and found.to_dict()["pending"][0]["scale"] is None
    assert all(value > 0 for value in found.training.gradient)


def test_moments_of_parts_are_those_of_the_whole():
    parts = [normal(3, 5) + 7, 4 * normal(2, 9), normal(1)]
    moments = Moments()
    for part in parts:
        moments.add(part.double())
    whole = torch.cat([part.double().flatten() for part in parts])
    assert moments.variance == pytest.approx(float(whole.var(correction=0)), rel=EXACT)


def test_seed_decides():
    graph = trace(nfresnet(18, width=2).eval(), normal(2, 3, 8, 8))
    first, again, other = (propagation.measure(graph, seed=seed) for seed in (1, 1, 2))
    assert first == again and first.training != other.training and first.folded is None


# ---- inputs


def test_users_own_data():
    graph = trace(nfresnet(18, width=2).eval(), normal(2, 3, 8, 8))
    data = normal(6, 3, 8, 8).numpy()
    found = propagation.measure(graph, data=[data])
    assert found.samples == 6
    assert found.training.activation != propagation.measure(graph).training.activation
    assert propagation.measure(graph, data=[np.repeat(data, 10, 0)]).samples == propagation.SAMPLES
    with pytest.raises(UsageError, match="the network takes"):
        propagation.measure(graph, data=[data[:, :, 0]])


def test_large_inputs_are_fewer(monkeypatch):
    monkeypatch.setattr(propagation.probes, "SMALL_SAMPLE", 3 * 8 * 8 - 1)
    graph = trace(nfresnet(18, width=2).eval(), normal(2, 3, 8, 8))
    assert propagation.measure(graph).samples == propagation.LARGE_SAMPLES


def test_fixed_batch():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.second(F.relu(self.first(x.reshape(3, 6))))

    found = both(Fixed(), normal(3, 2, 3))
    assert found.names == ["first"] and found.samples >= propagation.SAMPLES


def test_integer_inputs_and_outputs_without_gradient():
    class Words(nn.Module):
        def __init__(self, decided: bool):
            super().__init__()
            self.words, self.first, self.second = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.decided = decided

        def forward(self, x):
            result = self.second(F.relu(self.first(self.words(x))))
            return result.argmax(-1) if self.decided else result

    words = torch.randint(0, 11, (2, 7))
    assert both(Words(False), words).training.gradient[0] > 0
    decided = both(Words(True), words)
    assert decided.training.activation[0] > 0 and math.isnan(decided.training.gradient[0])


# ---- points


class Branches(nn.Module):
    """relu(conv3×3(x) + conv1×1(x) + x), as RepVGG's block without its batch norms."""

    def __init__(self, channels: int):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(channels, channels, 3, 1, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return F.relu(self.wide(x) + self.narrow(x) + x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Branches(3)

    def forward(self, x):
        return self.block(self.block(x))


class HandWrittenGelu(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Skip(nn.Module):
    """One skip over everything."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.body(x)


class Plain(nn.Module):
    """Residual sums without a module of their own, and squeeze-and-excitation, a bias and an addition that broadcasts."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.offset = nn.Parameter(torch.ones(3, 8, 8))

    def forward(self, x):
        x = x + self.a(F.relu(x)) + self.offset
        x = x - 0.5 * self.b(F.relu(x))
        return self.c(F.relu(x)) + x.mean((2, 3), keepdim=True)


def conv(channels: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1)


NETWORKS = {
    "bottlenecks": (lambda: nfresnet(50, width=2), SUM, [f"layer{s}.{b}" for s, n in enumerate((3, 4, 6, 3), 1) for b in range(n)]),
    "pre-activation": (lambda: preresnet(20, width=2), SUM, [f"layer{s}.{b}" for s in (1, 2, 3) for b in range(3)]),
    "original order": (lambda: preresnet(8, width=2, order="original"), SUM, ["layer1.0", "layer2.0", "layer3.0"]),
    "norm behind the sum": (lambda: preresnet(8, width=2, order="bn_after"), SUM, ["layer1.0", "layer2.0", "layer3.0"]),
    "branches": (lambda: nn.Sequential(Branches(3), Branches(3)), SUM, ["0", "1"]),
    "twice in a module": (lambda: nn.Sequential(conv(), Skip(Skip(conv(), nn.ReLU(), conv()), nn.ReLU(), conv())), SUM,
                          ["1.body.0", "1"]),
    "no module": (Plain, SUM, ["residual sum #1", "residual sum #2"]),
    "one skip": (lambda: Skip(conv(), nn.ReLU(), conv()), LAYER, ["body.0", "body.2"]),
    "chain": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU(), conv(), nn.ReLU(), conv()), LAYER, ["0", "3"]),
    "polynomial": (lambda: nn.Sequential(conv(), HandWrittenGelu(), conv(), HandWrittenGelu(), conv()), LAYER, ["0", "2"]),
    "output alone": (conv, LAYER, ["layer"]),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_points(name):
    build, kind, names = NETWORKS[name]
    network, x = build().eval(), normal(2, 3, 8, 8)
    found_kind, found = propagation.points(trace(network, x))
    assert (found_kind, [point.name for point in found]) == (kind, names)


def test_module_that_is_called_twice_is_numbered():
    _, found = propagation.points(trace(Twice().eval(), normal(2, 3, 8, 8)))
    assert [point.name for point in found] == ["block #1", "block #2"]


def test_point_is_behind_the_scalar_of_a_sum_and_the_batch_norm_of_a_layer():
    _, sums = propagation.points(trace(nfresnet(18, "idshort", width=2).eval(), normal(2, 3, 8, 8)))
    assert all("mul" in point.value.name for point in sums)
    _, layers = propagation.points(trace(NETWORKS["chain"][0]().eval(), normal(2, 3, 8, 8)))
    assert "batch_norm" in layers[0].value.name and "conv" in layers[1].value.name


# ---- the fold that is shown


def test_program_is_the_fold_with_these_operators():
    graph = trace(randomise(NETWORKS["chain"][0](), 0), normal(2, 3, 8, 8))
    for max_sigma in (4.0, 0.0):
        rebuilt = rebuild(fold_graph(graph, max_sigma))
        program = propagation.program_of(graph, rebuilt.counts)
        assert program.records.keys() == rebuilt.program.records.keys()
    with pytest.raises(FoldexportError, match="no fold of the network"):
        propagation.program_of(graph, {"conv": 99})

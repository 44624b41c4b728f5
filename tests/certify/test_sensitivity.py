"""Networks that rounding alone moves: the outputs are blind then, and nothing else is forgiven."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import foldexport
from foldexport import interpret, probes
from foldexport.certify import EndToEnd, sensitivity
from foldexport.certify.rounding import rounding
from foldexport.certify.sensitivity import expected_noise, moved_by_rounding
from foldexport.errors import EquivalenceError
from foldexport.trace import trace
from tests.statistics import randomise


class Chaos(nn.Module):
    """``x ← 3.99·x·(1 − x)`` forty-five times: every step doubles a difference, so 1e-16 becomes 1e-3 and more."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.unit(x).sigmoid()
        for _ in range(45):
            y = 3.99 * y * (1 - y)
        return y.mean((2, 3))


def test_one_roundoff_moves_a_chaotic_network_and_no_calm_one():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for network, low, high in ((Chaos(), 1e-6, 1.0), (nn.Conv2d(3, 4, 3), 0.0, 1e-14)):
        graph = trace(randomise(network, 0), x.float())
        name = graph.fx.output_node().all_input_nodes[0].name
        moved = moved_by_rounding(graph, (x,), {name})
        assert low <= moved[name] <= high


def test_a_chaotic_network_is_proved_value_by_value_and_its_outputs_are_called_blind():
    found = foldexport.fold(randomise(Chaos(), 0), torch.randn(1, 3, 8, 8)).certificate
    assert found.ok and not found.failures
    assert found.end_to_end.error > 1e-6 and not found.end_to_end.informative
    assert "says little" in found.summary()


def test_a_calm_network_is_allowed_no_more_for_it(monkeypatch):
    """Planted: outputs that differ by 1e-6 of their peak, though every operator agrees."""
    monkeypatch.setattr("foldexport.certify.endtoend._relative", lambda point: 1e-6)
    measured = []
    known = sensitivity.moved_by_rounding
    monkeypatch.setattr("foldexport.certify.moved_by_rounding", lambda *a: measured.append(known(*a)) or measured[-1])
    network = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), 0)
    with pytest.raises(EquivalenceError, match="the wiring differs"):
        foldexport.fold(network, torch.randn(1, 3, 8, 8))
    assert measured and max(measured[0].values()) < 1e-13


def test_what_is_allowed_is_in_proportion():
    assert EndToEnd(2e-9, 1e-9, "y", [], {}, {}).ok is False


def test_on_a_calm_network_the_expected_noise_is_the_usual():
    """Within its own spread: so a probe that is read in it is judged as strictly as by the noise of all probes."""
    net = nn.Sequential(*[nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(4)])
    graph = trace(randomise(net, 0), torch.zeros(2, 4, 8, 8))
    usual = rounding(graph, {}, probes.noise_probes(graph)).levels[0]
    for probe in probes.noise_probes(graph, seed=7):
        (there,) = expected_noise(graph, probe.inputs, interpret.outputs(graph, probe.inputs))
        assert 0.25 * usual < there < 3 * usual


class Cancels(nn.Module):
    """One of its two outputs adds a thousand and takes it off again."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x + 1e3) - 1e3, 2 * x


def test_the_expected_noise_is_that_of_float32_where_terms_cancel():
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    graph = trace(Cancels().eval(), x.float())
    wanted = interpret.outputs(graph, (x,))
    there, plain = expected_noise(graph, (x,), wanted)
    found = interpret.outputs(graph, (x,), torch.float32)[0]
    error = float((found - wanted[0]).square().mean().sqrt() / wanted[0].abs().max())
    assert 0.5 * error < there < 4 * error and error > 1e-5 and plain < 2**-23

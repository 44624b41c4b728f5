"""Parameters, multiply-adds and bytes, counted by hand for small networks."""

from __future__ import annotations

import torch
from torch import nn

import foldexport
from foldexport import costs
from foldexport.trace import trace


def test_counts_before_and_after():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)
    ).eval()
    folded = foldexport.fold(network, torch.zeros(1, 3, 8, 8), certify=False)
    before = costs.of_graph(folded.graph, network, folded.counts_before)
    after = costs.of_module(folded.module, folded.graph.example, folded.counts_after)
    conv, linear = 4 * 3 * 9 + 4, 256 * 5 + 5
    assert before.parameters == conv + 8 + linear and after.parameters == conv + linear
    assert before.multiply_adds == after.multiply_adds == 4 * 3 * 9 * 64 + 256 * 5
    assert after.weight_bytes == 4 * (conv + linear) and before.weight_bytes == 4 * (conv + 16 + linear) + 8
    assert before.operators["batch_norm"] == 1 and "batch_norm" not in after.operators


def test_multiply_adds_are_per_sample_and_groups_count():
    network = nn.Conv2d(4, 8, 3, groups=2, bias=False).eval()
    for batch in (1, 2, 5):
        graph = trace(network, torch.zeros(batch, 4, 6, 6))
        assert costs.of_graph(graph, network, {}).multiply_adds == 8 * 2 * 9 * 16


def test_a_shared_parameter_counts_once():
    layer = nn.Linear(6, 6)
    network = nn.Sequential(layer, nn.ReLU(), layer).eval()
    found = costs.of_graph(trace(network, torch.zeros(2, 6)), network, {})
    assert found.parameters == 42 and found.weight_bytes == 168 and found.multiply_adds == 72


def test_a_network_that_needs_values_has_unknown_multiply_adds():
    class Picky(nn.Module):
        def forward(self, x):
            if x.is_meta:
                raise RuntimeError("no values")
            return x

    assert costs.of_module(Picky(), (torch.zeros(1, 3),), {}).multiply_adds is None

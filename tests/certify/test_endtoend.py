"""Outputs: where they are blind, where they jump, and how several of them are told apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from foldexport.fold.rebuild import Program
from foldexport.trace import Graph, trace
from tests.hand_folds import IMAGE, copy_of, fold_chain, plant, run
from tests.statistics import randomise


def deep(depth: int = 60) -> tuple[Graph, Program]:
    """A plain network whose variances are above its activations', so that each layer forgets a part of its input."""
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

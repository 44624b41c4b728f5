"""The freedom of scale: any powers of two leave every bit, and a layer that is not compensated is found."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import foldexport
from foldexport.errors import EquivalenceError
from foldexport.precision import homogeneous, scales
from foldexport.precision.groups import ONE
from tests.precision.networks import Mixed, Trunk, far, folded, program_of, roots

NETWORKS = {"trunk": lambda: folded(Trunk), "mixed": lambda: folded(Mixed), "chain": lambda: far(0)}


def drawn(groups, seed: int = 0) -> dict[int, float]:
    generator = random.Random(seed)
    return {root: 2.0 ** generator.choice([-3, -2, -1, 1, 2, 3]) for root in roots(groups)}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_powers_of_two_change_no_bit(name, per_channel):
    module, groups, _, inputs = program_of(NETWORKS[name](), per_channel=per_channel)
    chosen = drawn(groups)
    assert chosen, "nothing is free"
    changed = scales.rescaled(module, groups, chosen)
    for each in inputs:
        assert scales.prove(module, changed, groups, chosen, each) > 5
    layers = [(a, b) for a, b in zip(module.parameters(), changed.parameters(), strict=True) if not torch.equal(a, b)]
    assert layers, "no weight has changed"


@pytest.mark.parametrize("name", NETWORKS)
def test_other_scales_change_rounding_only(name):
    module, groups, _, inputs = program_of(NETWORKS[name](), per_channel=True)
    generator = random.Random(1)
    chosen = {root: generator.uniform(0.2, 5.0) for root in roots(groups)}
    assert scales.prove(module, scales.rescaled(module, groups, chosen), groups, chosen, inputs[0])


@pytest.mark.parametrize("place", range(6))
def test_a_reader_that_is_not_compensated_is_found(place):
    module, groups, _, inputs = program_of(folded(Trunk))
    chosen = {root: 2.0**exponent for exponent, root in enumerate(roots(groups), start=1)}
    left_out = groups.layers[place]
    keep, groups.layers = groups.layers, [each for each in groups.layers if each is not left_out]
    changed = scales.rescaled(module, groups, chosen)
    groups.layers = keep
    with pytest.raises(EquivalenceError, match="was not compensated") as caught:
        scales.prove(module, changed, groups, chosen, inputs[0])
    assert f"'{left_out.node.name}'" in str(caught.value) and caught.value.exit_code == 4


def test_a_tie_that_is_forgotten_is_found():
    """The two sides of an addition in different groups."""
    module, groups, sizes, inputs = program_of(folded(Trunk))
    total = next(node for node in module.graph.nodes if node.op == "call_function" and node.target.__name__ == "add")
    second = groups.slots[total.args[1]]
    fresh = groups.fresh(total.args[1])
    groups.slots[total.args[1]] = fresh
    chosen = drawn(groups) | {int(fresh.ids[0]): 2.0**5}
    with pytest.raises(EquivalenceError, match="rescaling changed"):
        scales.prove(module, scales.rescaled(module, groups, chosen), groups, chosen, inputs[0])
    assert second is not fresh


def test_inputs_and_outputs_and_what_is_not_homogeneous_keep_their_scale():
    module, groups, _, _ = program_of(folded(Mixed))
    pinned = {node.name for node in groups.slots if set(groups.roots(node)) == {ONE}}
    kinds = {
        type(module.get_submodule(node.target)) for node in groups.slots if node.name in pinned and node.op == "call_module"
    }
    assert {nn.Sigmoid, nn.SiLU, nn.Softmax} <= kinds and "x" in pinned
    free = {node.name for node in groups.slots} - pinned
    assert free, "the branches in front of the last convolution are free"


def test_what_is_added_is_one_group():
    module, groups, _, _ = program_of(folded(Trunk))
    total = next(node for node in module.graph.nodes if node.op == "call_function" and node.target.__name__ == "add")
    assert groups.roots(total).tolist() == groups.roots(total.args[0]).tolist() == groups.roots(total.args[1]).tolist()
    assert set(groups.roots(total)) != {ONE}


SIZE = 8  # of every axis but the batch, so that nothing but the axis tells channels from rows


class Square(nn.Module):
    """8×8×8 values between two layers, and a function whose axes are alike in size."""

    def __init__(self, inside, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.inside = nn.Conv2d(3, SIZE, 3, padding=1), last, inside

    def forward(self, x):
        return self.last(self.inside(self.first(x).relu())).mean(2)


ALIKE = {
    "mean": lambda y: y.mean(1),
    "amax": lambda y: y.amax(1),
    "sum of rows": lambda y: y.sum(2),
    "mean of all but one": lambda y: y.mean((1, 2), keepdim=True).squeeze(1),
    "steps": lambda y: torch.div(y, 0.5, rounding_mode="floor").mean(1),
    "shifted channels": lambda y: nn.functional.pad(y, (0, 0, 0, 0, 1, -1)).mean(3),
    "pooled columns": lambda y: nn.functional.avg_pool1d(y.mean(1), 3, 1, 1),
}


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("name", ALIKE)
def test_an_axis_of_the_same_size_is_not_taken_for_the_channels(name, per_channel):
    torch.manual_seed(0)
    network = Square(ALIKE[name], nn.Conv1d(8 if name != "mean of all but one" else 1, 4, 1)).eval()
    module, groups, _, inputs = program_of(foldexport.fold(network, torch.randn(2, 3, SIZE, SIZE)), per_channel=per_channel)
    chosen = drawn(groups)
    assert scales.prove(module, scales.rescaled(module, groups, chosen), groups, chosen, inputs[0]) > 3


def test_a_reduced_channel_axis_that_is_overlooked_is_found(monkeypatch):
    """Planted: every axis in front of which sizes agree is the same axis."""
    monkeypatch.setattr(homogeneous, "_mixed", lambda node, rank: ())
    with pytest.raises(EquivalenceError, match="was not compensated"):
        test_an_axis_of_the_same_size_is_not_taken_for_the_channels("mean", True)

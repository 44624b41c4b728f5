"""Probes: the same bits everywhere, the right shapes and types, nothing that a network would refuse by its nature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foldexport import probes as probing
from foldexport.errors import UsageError
from foldexport.trace import trace

IMAGE = torch.zeros(2, 3, 32, 32)


class Mixed(nn.Module):
    """Tokens, a mask, an image and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)

    def forward(self, tokens: Tensor, mask: Tensor, image: Tensor, vector: Tensor) -> Tensor:
        words = (self.table(tokens) * mask.unsqueeze(-1)).sum(1)
        return words + image.mean((1, 2, 3)).unsqueeze(1) + vector


def mixed(batch: int = 2):
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[:, 3:] = False
    tokens = torch.zeros(batch, 5, dtype=torch.long)
    return Mixed().eval(), (tokens, mask, torch.zeros(batch, 3, 8, 8), torch.zeros(batch, 4))


def named(probes: list[probing.Probe]) -> dict[str, probing.Probe]:
    return {probe.name: probe for probe in probes}


def test_batches_of_three_and_one_and_a_second_size():
    graph = trace(nn.Conv2d(3, 4, 3).eval(), IMAGE)
    shapes = {probe.name: probe.shapes for probe in probing.make(graph)}
    assert shapes == {
        "normal": [[3, 3, 32, 32]],
        "uniform": [[1, 3, 32, 32]],
        "constant": [[1, 3, 32, 32]],
        "impulse": [[1, 3, 32, 32]],
        "second size": [[1, 3, 40, 48]],
    }
    assert [probe.optional for probe in probing.make(graph)] == [False] * 4 + [True]


def test_a_fixed_batch_stays():
    graph = trace(nn.Conv2d(3, 4, 3).eval(), IMAGE, dynamic=False)
    assert {probe.shapes[0][0] for probe in probing.make(graph)} == {2}
    assert sum(probe.samples for probe in probing.noise_probes(graph)) == 8


def test_a_large_image_stays_at_batch_one():
    graph = trace(nn.Conv2d(3, 1, 3, stride=8).eval(), torch.zeros(2, 3, 576, 576))
    shapes = named(probing.make(graph))
    assert shapes["normal"].shapes == shapes["impulse"].shapes == [[1, 3, 576, 576]]
    assert shapes["second size"].shapes == [[3, 3, 288, 320]]
    assert [probe.samples for probe in probing.noise_probes(graph)] == [1] * 8


def test_of_a_huge_image_one_probe_has_its_size():
    graph = trace(nn.Conv2d(3, 1, 3, stride=8).eval(), torch.zeros(2, 3, 1024, 1024))
    shapes = named(probing.make(graph))
    assert shapes["normal"].shapes == [[1, 3, 1024, 1024]] and not shapes["normal"].optional
    assert shapes["second size"].shapes == [[3, 3, 256, 288]]
    for name in probing.SPECIAL:
        assert shapes[name].optional and shapes[name].shapes == [[1, 3, 256, 288]]
        assert shapes[name].instead.shapes == [[1, 3, 1024, 1024]] and not shapes[name].instead.optional
    assert [probe.samples for probe in probing.noise_probes(graph)] == [1] * 4


@pytest.mark.parametrize(
    "size, second",
    [((224, 224), (192, 160)), ((32, 32), (40, 48)), ((8,), (10,)), ((512, 512), (480, 448))],
)
def test_second_sizes_differ_from_the_first_and_from_each_other(size, second):
    assert probing.second_size(torch.zeros(1, 3, *size), False) == second


def test_features_have_no_second_size():
    graph = trace(nn.Linear(8, 5).eval(), torch.zeros(2, 8))
    probes = named(probing.make(graph))
    assert "second size" not in probes
    assert probes["impulse"].inputs[0].tolist() == [[4.0, 0, 0, 0, 0, 0, 0, -3.0]]


def test_values_are_the_same_everywhere_and_exact_in_float32():
    graph = trace(nn.Conv2d(3, 4, 3).eval(), IMAGE)
    first, again, other = (named(probing.make(graph, seed=seed)) for seed in (5, 5, 6))
    for name, probe in first.items():
        assert torch.equal(probe.inputs[0], again[name].inputs[0])
        assert probe.inputs[0].dtype == torch.float64
        assert torch.equal(probe.inputs[0], probe.inputs[0].float().double())
    assert not torch.equal(first["normal"].inputs[0], other["normal"].inputs[0])
    assert not torch.equal(first["normal"].inputs[0][0], first["normal"].inputs[0][1])
    # The first words of Philox 4x64-10 for key (7, 0), so that no numpy release can change the probes unseen.
    drawn = probing.uniform(np.random.Philox(key=[7, 0]).random_raw, 3)
    assert drawn.tolist() == [0.8720703125, 0.2953643798828125, 0.4200897216796875]
    drawn = probing.normal(np.random.Philox(key=[7, 0]).random_raw, 2)
    assert drawn.tolist() == [-0.179107666015625, -0.5407562255859375]


def test_normal_values_are_normal():
    drawn = probing.normal(np.random.Philox(key=[1, 2]).random_raw, 100_000)
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.02 and 3.5 < np.abs(drawn).max() < 6


def test_an_impulse_sits_in_two_corners():
    graph = trace(nn.Conv2d(3, 4, 3).eval(), IMAGE)
    image = named(probing.make(graph))["impulse"].inputs[0]
    assert (image[:, :, 0, 0] == 4).all() and (image[:, :, -1, -1] == -3).all()
    assert int((image != 0).sum()) == 6


def test_integers_masks_and_several_inputs():
    network, example = mixed()
    graph = trace(network, example)
    for probe in probing.make(graph):
        tokens, mask, image, vector = probe.inputs
        assert tokens.dtype == torch.long and int(tokens.min()) >= 0 and int(tokens.max()) <= 10
        assert mask.dtype == torch.bool and {len(value) for value in probe.inputs} == {probe.samples}
        network.double()(*probe.inputs)
    tokens, mask, image, vector = probing.make(graph)[0].inputs
    assert len(tokens.unique()) > 4 and 0 < int(mask.sum()) < mask.numel()
    assert not torch.equal(image.flatten()[:4], vector.flatten()[:4])


def test_a_mask_that_was_all_true_stays_so():
    network, (tokens, mask, image, vector) = mixed()
    graph = trace(network, (tokens, torch.ones_like(mask), image, vector))
    assert all(bool(probe.inputs[1].all()) for probe in probing.make(graph))


def test_the_users_data():
    graph = trace(nn.Conv2d(3, 4, 3).eval(), IMAGE)
    data = np.random.default_rng(0).normal(size=(9, 3, 32, 32)).astype(np.float32)
    probe = named(probing.make(graph, data=[data]))["data"]
    assert probe.shapes == [[4, 3, 32, 32]] and np.array_equal(probe.inputs[0].numpy(), data[:4].astype(np.float64))
    fixed = trace(nn.Conv2d(3, 4, 3).eval(), IMAGE, dynamic=False)
    assert named(probing.make(fixed, data=[data[:1]]))["data"].shapes == [[2, 3, 32, 32]]


@pytest.mark.parametrize("data, message", [
    ([], "holds 0 arrays, the network takes 1"),
    ([np.zeros((3, 32, 32))], r"has shape \[3, 32, 32\], the network takes \[2, 3, 32, 32\]"),
])
def test_data_that_does_not_match_is_refused(data, message):
    graph = trace(nn.Conv2d(3, 4, 3).eval(), IMAGE)
    with pytest.raises(UsageError, match=message):
        probing.make(graph, data=data)

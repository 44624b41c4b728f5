"""What artifacts are compared with: batches, sizes and data as the artifact takes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from foldexport.exporters.options import ExportOptions
from foldexport.trace import trace
from foldexport.verify import Comparison
from foldexport.verify.reference import MORE_SAMPLES, reference
from tests.statistics import randomise


def network() -> nn.Module:
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1)), 0)


def batches(found) -> list[int]:
    return [inputs[0].shape[0] for inputs in found.inputs]


def test_references_are_the_network_in_float64():
    module, example = network(), (torch.zeros(1, 3, 8, 8),)
    found = reference(trace(module, example), example, ExportOptions())
    double = module.double()
    for inputs, outputs in zip(found.inputs, found.outputs, strict=True):
        with torch.no_grad():
            assert outputs[0].dtype == torch.float64
            torch.testing.assert_close(outputs[0], double(inputs[0].double()), rtol=1e-12, atol=1e-12)
    assert found.output_names == ["output"] and len(found.levels) == 1


@pytest.mark.parametrize(("dynamic", "batch", "wanted"), [(("batch",), 1, {1, 3, 4}), ((), 1, {1}), ((), 5, {5})])
def test_batches_are_those_that_the_artifact_takes(dynamic, batch, wanted):
    example = (torch.zeros(batch, 3, 8, 8),)
    found = reference(trace(network(), example), example, ExportOptions(dynamic=dynamic))
    assert set(batches(found)) == wanted
    assert [run["inputs"][0][0] for run in found.golden["runs"]] == ([1, 3] if dynamic else [batch])


def test_a_second_size_where_height_and_width_are_free():
    example = (torch.zeros(1, 3, 8, 8),)
    graph = trace(network(), example)
    fixed, free = (reference(graph, example, ExportOptions(dynamic=axes)) for axes in (("batch",), ("batch", "height")))
    assert {inputs[0].shape[2:] for inputs in fixed.inputs} == {(8, 8)}
    assert len({inputs[0].shape[2:] for inputs in free.inputs}) == 2


def test_more_samples_only_where_they_are_cheap():
    example = (torch.zeros(1, 3, 8, 8),)
    graph = trace(network(), example)
    cheap, dear = (reference(graph, example, ExportOptions(), multiply_adds=count) for count in (1000, 10**10))
    assert sum(batches(cheap)) - sum(batches(dear)) == MORE_SAMPLES


def test_all_of_the_user_s_samples_are_compared():
    example = (torch.zeros(1, 3, 8, 8),)
    data = [np.random.default_rng(0).normal(size=(19, 3, 8, 8)).astype(np.float32)]
    graph = trace(network(), example)
    without, given = (
        reference(graph, example, ExportOptions(), data=each, multiply_adds=10**10) for each in (None, data)
    )
    assert batches(given) == batches(without) + [8, 8, 3]


def test_a_probe_on_which_float32_means_nothing_is_left_out():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4)).eval()
    example = (torch.zeros(1, 3, 8, 8),)
    found = reference(trace(module, example), example, ExportOptions())
    assert "constant" in found.dropped and len(found.inputs) == len(found.outputs)


def test_a_wrong_artifact_is_seen_by_its_outputs():
    class Runtime:
        name = "planted"

        def __init__(self, error: float) -> None:
            self.error = error

        def load(self, path):
            return lambda x: [network()(torch.from_numpy(x)).detach().numpy() + self.error]

        def runtime(self):
            return "planted 1.0"

    example = (torch.zeros(1, 3, 8, 8),)
    found = reference(trace(network(), example), example, ExportOptions())
    right, wrong = (found.compare(Runtime(error), None, None) for error in (0.0, 1e-3))
    assert isinstance(right, Comparison) and right.ok and not wrong.ok

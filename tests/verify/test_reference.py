"""What artifacts are compared with: batches, sizes and data as the artifact takes them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from foldexport import interpret, verify
from foldexport.exporters.options import ExportOptions
from foldexport.trace import trace
from foldexport.verify import Comparison, compare
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


def test_a_probe_on_which_the_network_itself_rounds_worse_is_judged_by_that():
    """A large constant image through an odd pair of layers: float32 cancels there, in the training graph as in any file."""

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return y + 0.3 * (x.mean((1, 2, 3), keepdim=True) * 40.0 - 40.0 * x.mean((1, 2, 3), keepdim=True))

    class Runtime:
        name = "planted"

        def __init__(self, error: float) -> None:
            self.error = error

        def load(self, path):
            return lambda x: [module(torch.from_numpy(x)).detach().numpy() * (1 + self.error)]

        def runtime(self):
            return "planted 1.0"

    torch.manual_seed(0)
    module, example = Cancelling().eval(), (torch.zeros(1, 3, 8, 8),)
    found = reference(trace(module, example), example, ExportOptions())
    assert len(found.factors) == len(found.inputs) and all(1 <= each <= 4 for run in found.factors for each in run)
    right, wrong = (found.compare(Runtime(error), None, None) for error in (0.0, 1e-4))
    assert right.ok and right.noise_multiple < 4 and not wrong.ok


def test_the_factor_is_the_noise_of_that_probe_alone():
    reference_, output = [[torch.ones(1, 4, dtype=torch.float64)]], np.ones((1, 4)) + 6e-7
    ways = {"planted": None, "rounds worse there": [[3.0]]}
    found = {
        name: compare(reference_, lambda *_: [output], [(torch.zeros(1),)], 1e-7, format="f", label="l", factors=factors)
        for name, factors in ways.items()
    }
    assert found["planted"].noise_multiple == pytest.approx(3 * found["rounds worse there"].noise_multiple)


class Classes(nn.Module):
    """A map of the largest of six scores."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 6, 1))

    def forward(self, x):
        return self.layers(x).argmax(1)


def test_a_map_of_classes_is_judged_by_what_its_type_changes():
    """bfloat16 moves some classes of any network, in whoever runs it; a wrong bias moves more."""
    torch.manual_seed(0)
    network, example = Classes().eval(), (torch.randn(1, 3, 24, 24),)
    graph = trace(network, example)
    found = reference(graph, example, ExportOptions(), unit="bf16",
                      low=lambda inputs: interpret.outputs(graph, inputs, torch.bfloat16))  # fmt: skip
    assert 2 * verify.DISCRETE_DIFFERENCES < found.discrete[0] < verify.DISCRETE_MOST
    assert found.golden["discrete"] == found.discrete
    assert reference(graph, example, ExportOptions()).discrete == [verify.DISCRETE_DIFFERENCES]

    def judged(wrong: nn.Module) -> verify.Comparison:
        run = lambda x: [wrong(torch.from_numpy(x).bfloat16()).detach().numpy()]  # noqa: E731
        return verify.compare(found.outputs, run, found.inputs, 1e-3, format="f", label="l", discrete=found.discrete)

    narrow = copy.deepcopy(network).bfloat16()
    assert judged(narrow).ok
    with torch.no_grad():
        narrow.layers[2].bias[1] += 0.3
    assert "differs in" in judged(narrow).message

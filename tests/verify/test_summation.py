"""Averages summed in turn: the same means, with the rounding that other runtimes have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import foldexport
from foldexport import interpret
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.options import ExportOptions
from foldexport.trace import trace
from foldexport.verify import summation
from foldexport.verify.reference import reference

IMAGE = (2, 3, 33, 31)


class Means(nn.Module):
    def __init__(self, mean) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, x):
        return self.mean(x)


@pytest.mark.parametrize("mean", [
    nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((1, 1)), nn.AdaptiveAvgPool2d((3, 1)), lambda x: x.mean(), lambda x: x.mean(-1),
    lambda x: x.mean((2, 3)), lambda x: x.mean((1, -1), keepdim=True), lambda x: x.flatten(2).mean(1, keepdim=True),
], ids=["pool", "pair", "rows", "all", "last", "space", "kept", "middle"])  # fmt: skip
def test_the_means_are_the_means(mean) -> None:
    graph = trace(Means(mean).eval(), (torch.randn(IMAGE),))
    inputs = (torch.randn(IMAGE).double(),)
    for wanted, given in zip(interpret.outputs(graph, inputs, torch.float64), summation.outputs(graph, inputs), strict=True):
        assert given.shape == wanted.shape and (given - wanted).abs().max() < 1e-5


def test_equal_terms_drift_as_they_do_in_onnxruntime(tmp_path) -> None:
    """A bound for what it does, and none that lets everything through."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()
    x = torch.full((1, 3, 96, 96), 0.7)
    graph = trace(network, (x,))
    OnnxExporter().export(network, (x,), tmp_path / "net.onnx", ExportOptions(dynamic=()))
    (exact,) = interpret.outputs(graph, (x.double(),), torch.float64)
    (blocks,), (in_turn,) = interpret.outputs(graph, (x.double(),), torch.float32), summation.outputs(graph, (x.double(),))
    theirs = torch.from_numpy(OnnxExporter().load(tmp_path / "net.onnx")(x.numpy())[0])
    error = {name: float((value - exact).abs().max() / exact.abs().max())
             for name, value in {"blocks": blocks, "in turn": in_turn, "onnxruntime": theirs}.items()}  # fmt: skip
    assert error["onnxruntime"] > 3 * error["blocks"] and error["onnxruntime"] < 2 * error["in turn"] < 1e-4


def test_a_network_with_a_wide_average_is_not_refused(tmp_path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(32, 10)).eval()  # fmt: skip
    folded = foldexport.fold(network, torch.randn(1, 3, 96, 96))
    assert foldexport.export(folded, "onnx", tmp_path / "net.onnx").comparison.noise_multiple < 4


def test_the_usual_probes_keep_their_unit() -> None:
    """Only constant, impulse and uniform images are judged by it: a mistake still fails on the normal ones."""
    network = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()
    example = (torch.randn(1, 3, 64, 64),)
    found = reference(trace(network, example), example, ExportOptions())
    assert sum(factors == [1.0] for factors in found.factors) >= len(found.factors) - 3


def test_one_lane_is_what_openvino_has_and_hides_no_mistake(tmp_path) -> None:
    """A faultless file of a wide average passes; one weight row off by a thousandth does not, nor would the file by four lanes."""
    pytest.importorskip("openvino")
    from foldexport.exporters.openvino.exporter import OpenVinoExporter

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
                            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()  # fmt: skip
    example = (torch.randn(1, 3, 192, 192),)
    found = reference(trace(network, example), example, ExportOptions(dynamic=()), multiply_adds=10**10)
    exporter = OpenVinoExporter()
    exporter.export(network, example, tmp_path / "net.xml", ExportOptions(dynamic=()))
    passed = found.compare(exporter, tmp_path / "net.xml", network)
    assert passed.ok and passed.probes >= 2 and passed.units, passed
    exporter.lanes = 4
    assert not found.compare(exporter, tmp_path / "net.xml", None).ok, "the probes do not tell one lane from four"
    with torch.no_grad():
        network[0].weight[0] *= 1.001
    exporter.lanes = 1
    exporter.export(network, example, tmp_path / "net.xml", ExportOptions(dynamic=()))
    assert found.compare(exporter, tmp_path / "net.xml", None).noise_multiple > 100

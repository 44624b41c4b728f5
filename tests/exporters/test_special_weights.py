"""Weights of which writers make something else: all zero, all one, equal in two layers. A faultless file is not refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import foldexport
from foldexport.errors import EquivalenceError
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.weights import expected_weights, match_weights
from tests.statistics import randomise

EXAMPLE = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
SUFFIXES = {"onnx": ".onnx", "torchscript": ".torchscript.pt", "pytorch": ".py", "openvino": ".xml"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise, self.fc = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        y = y + self.bn(self.b(y))
        return self.fc((self.depthwise(self.c(y).relu()).relu() + y).mean((2, 3)))


def zero_biases(net: Net) -> None:
    for each in (net.a.bias, net.b.bias, net.c.bias, net.fc.bias, net.bn.bias, net.bn.running_mean):
        each.zero_()


def biases_of_one(net: Net) -> None:
    for each in (net.a.bias, net.c.bias, net.fc.bias):
        each.fill_(1.0)


def zero_weight(net: Net) -> None:
    net.c.weight.zero_()


def zero_gamma(net: Net) -> None:
    net.bn.weight.zero_()


def equal_layers(net: Net) -> None:
    net.c.weight.copy_(net.b.weight)
    net.c.bias.copy_(net.b.bias)


def box_filters(net: Net) -> None:
    net.depthwise.weight.fill_(1.0)


def folded(change: Callable[[Net], None]) -> foldexport.Folded:
    net = randomise(Net(), seed=1, example=EXAMPLE)
    with torch.no_grad():
        change(net)
    return foldexport.fold(net, EXAMPLE)


@pytest.mark.parametrize("kind", SUFFIXES)
@pytest.mark.parametrize(
    "change", [zero_biases, biases_of_one, zero_weight, zero_gamma, equal_layers, box_filters], ids=lambda each: each.__name__
)
def test_is_written(change, kind, tmp_path):
    if kind == "openvino":
        pytest.importorskip("openvino", reason="pip install 'foldexport[openvino]'")
    found = foldexport.export(folded(change), kind, tmp_path / f"net{SUFFIXES[kind]}").comparison
    assert found.weights_identical[0] == found.weights_identical[1]


def test_a_bias_of_zeros_that_became_something_is_found(monkeypatch, tmp_path):
    """It is not absent: the file has another one, too small for the outputs to show."""
    write = OnnxExporter.export

    def wrong(self, module, example, path, options=None):
        with torch.no_grad():
            module.fc.bias[0] = 1e-9
            notes = write(self, module, example, path, options)
            module.fc.bias[0] = 0.0
        return notes

    monkeypatch.setattr(OnnxExporter, "export", wrong)
    with pytest.raises(EquivalenceError, match=r"fc\.bias"):
        foldexport.export(folded(zero_biases), "onnx", tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_only_a_bias_may_be_absent():
    layer = nn.Conv2d(3, 4, 1)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    assert match_weights(expected_weights(layer), {"weight": np.zeros((4, 3, 1, 1), np.float32)}).ok
    assert match_weights(expected_weights(layer), {"bias": np.ones(4, np.float32)}).missing == ("weight", "bias")


def test_another_array_in_its_place_is_no_absence():
    layer = nn.Conv2d(3, 4, 1)
    nn.init.zeros_(layer.bias)
    held = {"weight": layer.weight.numpy(force=True), "val_3": np.full(4, 1e-30, np.float32)}
    assert match_weights(expected_weights(layer), held).missing == ("bias",)

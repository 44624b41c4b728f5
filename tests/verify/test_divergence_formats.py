"""Every format that shows inner values: an artifact that goes wrong inside is reported by the user's layer, a right one by none."""

from __future__ import annotations

import copy
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from foldexport.errors import MissingDependencyError
from foldexport.exporters.graph_inner import module_operators
from foldexport.exporters.web import node
from foldexport.exporters.weights import expected_weights, match_weights
from foldexport.verify.alignment import align
from foldexport.verify.divergence import clause, locate
from foldexport.verify.judgement import forms, judgement
from foldexport.verify.naming import named
from tests.exporters.installed import need
from tests.statistics import randomise
from tests.verify.test_divergence import EXAMPLE, Residual, activation, dilation, exported, residual, weight

FORMATS = ("openvino", "pt2", "pytorch", "onnxruntime-web", "ort", "ncnn", "litert")
FUSING = ("ort", "ncnn", "litert")  # write a convolution and its ReLU as one


def third(module):
    module.layer1[0].conv2.weight.data[1, 2, 0, 0] += 0.25


PLANTED = {third: "layer1.0.conv2", weight: "layer1.1.conv1", dilation: "layer1.1.conv1", activation: "layer1.1.relu"}


def exporter_of(name: str):
    if name == "onnxruntime-web":
        try:
            node.require()
        except MissingDependencyError as error:
            (pytest.fail if os.environ.get("FOLDEXPORT_TEST_WEB") else pytest.skip)(str(error))
    return need(name)


@cache
def module() -> fx.GraphModule:
    return residual()


def written(name: str, spoil, folder: Path):
    """The exporter and an artifact in which ``spoil`` was done to the network."""
    exporter, wrong = exporter_of(name), randomise(Residual(), 0)
    spoil(wrong)
    return exporter, exported(exporter, fx.symbolic_trace(wrong), folder)


@pytest.mark.parametrize("spoil", PLANTED, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("name", FORMATS)
def test_the_layer_with_the_mistake_is_named(name, spoil, tmp_path):
    exporter, path = written(name, spoil, tmp_path)
    missing = match_weights(expected_weights(module()), exporter.weights(path)).missing
    said = clause(exporter, path, module(), EXAMPLE, missing=missing)
    fused = "`layer1.1.conv1` to `layer1.1.relu`" if name in FUSING and not missing else f"`{PLANTED[spoil]}`"
    assert f"first differs in `{PLANTED[spoil]}` (max error" in said or f"first differs in {fused} (max error" in said
    assert list(missing) == [f"{PLANTED[spoil]}.weight"] * (spoil in (third, weight))
    assert all(f": its weight `{name}` differs" in said for name in missing)


@pytest.mark.parametrize("name", FORMATS)
def test_a_right_artifact_has_right_values_and_no_place(name, tmp_path):
    exporter, path = written(name, lambda network: None, tmp_path)
    artifact, mine = exporter.inner(path), module_operators(module())
    assert locate(artifact, module(), EXAMPLE) is None
    seen = align(mine, named(artifact, mine, dict(module().named_parameters())))
    lost = [each.output for each in mine.operators if each.output not in seen]
    fused = {"ort": ["conv1"], "ncnn": ["conv1"], "litert": ["conv1", "add"]}.get(name, [])
    assert all(any(kind in each for kind in fused) for each in lost)
    value = artifact.run([seen["stem"]], [EXAMPLE[0].numpy()])[0]
    with torch.no_grad():
        stem = module().stem(EXAMPLE[0])
    assert not judgement(forms(value, artifact.channels_last), stem.double(), stem).wrong


@pytest.mark.parametrize("name", ["executorch", "coreml"])
def test_without_inner_values_the_weight_that_differs_is_named(name, tmp_path):
    exporter, path = written(name, third, tmp_path)
    missing = match_weights(expected_weights(module()), exporter.weights(path)).missing
    assert clause(exporter, path, module(), EXAMPLE, missing=missing) == ""
    assert missing == ("layer1.0.conv2.weight",)  # which every failure's message has


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.one(x))
        y = self.two(x)
        y += x
        return self.relu(y).mean((2, 3))


@pytest.mark.parametrize("name", ["onnx", "torchscript", "pt2", "pytorch"])
def test_a_value_that_is_overwritten_later_is_compared_as_it_was(name, tmp_path):
    exporter, network = need(name), randomise(InPlace(), 0).eval()
    right, wrong = fx.symbolic_trace(network), copy.deepcopy(network)
    assert locate(exporter.inner(exported(exporter, right, tmp_path)), right, EXAMPLE) is None
    wrong.two.bias.data[1] += 0.25
    assert locate(exporter.inner(exported(exporter, fx.symbolic_trace(wrong), tmp_path)), right, EXAMPLE).layer == "two"

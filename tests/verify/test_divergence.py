"""An artifact that goes wrong inside is reported by the layer in which it does, whatever comes after."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn

from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.torchscript.exporter import TorchScriptExporter
from foldexport.precision.half import in_half
from foldexport.precision.types import HALF
from foldexport.trace import trace
from foldexport.verify import divergence
from foldexport.verify.divergence import AT_ONCE, clause, locate
from foldexport.verify.reference import reference
from tests.statistics import randomise

EXPORTERS = [OnnxExporter, TorchScriptExporter]
formats = pytest.mark.parametrize("exporter", [each() for each in EXPORTERS], ids=[each.name for each in EXPORTERS])


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(self.relu(self.conv1(x))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(Block(4), Block(4))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(self.stem(x)).mean((2, 3))).softmax(1)


def residual() -> fx.GraphModule:
    return fx.symbolic_trace(randomise(Residual(), 0)).eval()


EXAMPLE = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)


def exported(exporter, module: nn.Module, folder: Path, precision: str = "fp32") -> Path:
    path = folder / f"net{exporter.suffix}"
    exporter.export(module, EXAMPLE, path, ExportOptions(precision=precision))
    return path


def weight(module):
    module.layer1[1].conv1.weight.data[1, 2, 0, 0] += 0.5


def bias(module):
    module.layer1[1].conv1.bias.data[3] += 0.1


def dilation(module):
    module.layer1[1].conv1.dilation, module.layer1[1].conv1.padding = (2, 2), (2, 2)


def activation(module):
    module.layer1[1].relu = nn.Sigmoid()


def activation_of_several_operators(module):
    module.layer1[1].relu = nn.SiLU()


def operator_more(module):
    module.layer1[1].relu = nn.Sequential(nn.ReLU(), nn.Hardtanh(-0.1, 0.1))


def first(module):
    module.stem.weight.data[0, 0, 0, 0] += 0.5


def last_layer(module):
    module.fc.bias.data[0] += 0.1


PLANTED = {
    weight: "layer1.1.conv1", bias: "layer1.1.conv1", dilation: "layer1.1.conv1", activation: "layer1.1.relu",
    activation_of_several_operators: "layer1.1.relu", operator_more: "layer1.1.relu", first: "stem", last_layer: "fc",
}  # fmt: skip


@formats
@pytest.mark.parametrize("spoil", PLANTED, ids=lambda spoil: spoil.__name__)
def test_the_layer_with_the_mistake_is_named(exporter, spoil, tmp_path):
    network = randomise(Residual(), 0)
    module, wrong = fx.symbolic_trace(network), copy.deepcopy(network)
    spoil(wrong)
    path = exported(exporter, fx.symbolic_trace(wrong), tmp_path)
    place = locate(exporter.inner(path), module, EXAMPLE)
    assert place is not None and place.layer == PLANTED[spoil]
    assert f"first differs in `{PLANTED[spoil]}` (max error " in clause(exporter, path, module, EXAMPLE)


@formats
def test_nothing_is_named_in_a_right_artifact(exporter, tmp_path):
    module = residual()
    assert locate(exporter.inner(exported(exporter, module, tmp_path)), module, EXAMPLE) is None


@formats
def test_only_the_last_operator_is_wrong(exporter, tmp_path):
    module = residual()
    wrong = copy.deepcopy(module)
    last = next(node for node in wrong.graph.nodes if node.op == "output").args[0]
    last.target = "log_softmax"
    wrong.recompile()
    said = clause(exporter, exported(exporter, wrong, tmp_path), module, EXAMPLE)
    assert "softmax" in said and "first differs in" in said


def test_a_file_that_was_changed_is_named_with_its_weight(tmp_path):
    """Through the comparison that export and pipeline make: one weight of the third convolution, changed in the file."""
    module, exporter = residual(), OnnxExporter()
    path = exported(exporter, module, tmp_path)
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        if tensor.name == "layer1.0.conv2.weight":
            values = numpy_helper.to_array(tensor).copy()
            values[1, 1, 1, 1] += 0.25
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, str(path))
    expected = reference(trace(module, EXAMPLE), EXAMPLE, ExportOptions())
    found = expected.compare(exporter, path, module)
    assert not found.ok
    assert "first differs in `layer1.0.conv2` (max error" in found.message
    assert "its weight `layer1.0.conv2.weight` differs" in found.message


def test_a_weight_too_close_to_show_is_named_by_its_layer(tmp_path):
    module, exporter = residual(), OnnxExporter()
    said = clause(exporter, exported(exporter, module, tmp_path), module, EXAMPLE, missing=["layer1.0.conv2.weight"])
    assert said == "of `layer1.0.conv2`, though no inner value shows it"


def test_an_attribute_changed_in_the_file(tmp_path):
    module, exporter = residual(), OnnxExporter()
    path = exported(exporter, module, tmp_path)
    model = onnx.load(str(path))
    node = next(each for each in model.graph.node if "layer1.0.conv2.weight" in each.input)
    next(each for each in node.attribute if each.name == "pads").ints[:] = [2, 1, 0, 1]  # sizes stay 8
    onnx.save(model, str(path))
    assert "first differs in `layer1.0.conv2`" in clause(exporter, path, module, EXAMPLE)


def deep(depth: int = 60) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    return randomise(nn.Sequential(*layers), 3)


class Counted:
    """An artifact's inner values, with what was asked for."""

    def __init__(self, inner) -> None:
        self.operators, self.inputs, self.outputs = inner.operators, inner.inputs, inner.outputs
        self.constants, self.channels_last = inner.constants, inner.channels_last
        self._run, self.asked = inner.run, []

    def run(self, names, arrays):
        self.asked.append(len(names))
        return self._run(names, arrays)


@pytest.mark.parametrize("place", [0, 46, 118])
def test_runs_grow_with_the_logarithm_and_values_are_bounded(place, tmp_path):
    module = deep()
    wrong = copy.deepcopy(module)
    wrong[place].bias.data += 0.5
    artifact = Counted(OnnxExporter().inner(exported(OnnxExporter(), wrong, tmp_path)))
    found = locate(artifact, module, EXAMPLE)
    assert found.layer == str(place) and max(artifact.asked) <= AT_ONCE
    assert found.runs == len(artifact.asked) <= 2 + 2 * math.ceil(math.log(120, AT_ONCE + 1))


@formats
def test_a_layer_that_overflows_in_half_is_to_stay_in_float32(exporter, tmp_path):
    module = residual().double()
    with torch.no_grad():
        module.get_submodule("layer1.0.conv1").weight.mul_(5e4)
        module.get_submodule("layer1.0.conv2").weight.mul_(1 / 5e4)
    real = {node.name for node in module.graph.nodes if node.op != "output"}
    half = in_half(module, real, HALF["fp16"])
    path = exported(exporter, half, tmp_path, "fp16")
    said = clause(exporter, path, half, EXAMPLE, unit="fp16")
    assert "first differs in `layer1.0.conv1` (not finite), its largest value" in said
    assert said.endswith("beyond fp16's 65504: keep it in float32 with --keep-fp32 layer1.0.conv1")


@formats
def test_a_right_artifact_in_half_has_no_such_place(exporter, tmp_path):
    module = residual().double()
    half = in_half(module, {node.name for node in module.graph.nodes if node.op != "output"}, HALF["fp16"])
    assert locate(exporter.inner(exported(exporter, half, tmp_path, "fp16")), half, EXAMPLE, kind=HALF["fp16"]) is None


def test_a_search_that_fails_is_told_and_never_raised(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"not a model")
    assert clause(OnnxExporter(), path, residual(), EXAMPLE).startswith("the place was not found (")
    assert clause(object(), path, residual(), EXAMPLE) == ""
    monkeypatch.setattr(divergence, "locate", lambda *given, **more: 1 / 0)
    good = exported(OnnxExporter(), residual(), tmp_path)
    assert clause(OnnxExporter(), good, residual(), EXAMPLE) == "the place was not found (division by zero)"


def test_inner_values_are_those_of_the_module(tmp_path):
    module = residual()
    for exporter in (OnnxExporter(), TorchScriptExporter()):
        inner = exporter.inner(exported(exporter, module, tmp_path))
        conv = next(each for each in inner.operators if "stem.weight" in each.weights)
        value = inner.run([conv.output], [EXAMPLE[0].numpy()])[0]
        np.testing.assert_allclose(value, module.stem(EXAMPLE[0]).detach().numpy(), atol=1e-5)


def clamped(layers: int = 100) -> fx.GraphModule:
    """Outputs that show nothing of the first layer."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(4 if place else 3, 4, 3, padding=1), nn.ReLU6()) for place in range(layers)]
    network = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return fx.symbolic_trace(network).eval()


@pytest.mark.parametrize("bound", [6.0, 5.0])
def test_what_no_output_shows_is_found_inside(bound, tmp_path):
    """Planted: the first clamp has another bound, which is no weight, and 99 layers hide it."""
    module, exporter = clamped(), OnnxExporter()
    path = exported(exporter, module, tmp_path)
    model = onnx.load(path)
    clip = next(node for node in model.graph.node if node.op_type == "Clip")
    model.graph.initializer.append(numpy_helper.from_array(np.array(bound, np.float32), "mine"))
    clip.input[2] = "mine"
    onnx.save(model, path)
    found = reference(trace(module, EXAMPLE), EXAMPLE, ExportOptions()).compare(exporter, path, module)
    assert found.noise_multiple < 4, "the outputs show it"
    assert found.ok == (bound == 6.0), found.message
    assert found.ok or "inner values do not: first differs in `0.1`" in found.message


def test_a_value_that_was_taken_for_another_is_no_mistake(monkeypatch, tmp_path):
    """What reads it is right then."""
    module, exporter = clamped(12), OnnxExporter()
    path = exported(exporter, module, tmp_path)
    honest = divergence._Search.judge

    def mistaken(self, points):
        found = honest(self, points)
        for point in list(found)[3:4]:
            found[point] = self.judged[point] = divergence.Judged(0.5, 1e-6, 1.0)
        return found

    monkeypatch.setattr(divergence._Search, "judge", mistaken)
    assert divergence.hidden(exporter, path, module, EXAMPLE) == ""

"""The precision is read back from the file: what is not delivered is refused with exit 6."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import foldexport
from foldexport import exporters
from foldexport.api import in_precision
from foldexport.errors import PrecisionError, UsageError
from foldexport.exporters.onnx import types as onnx_types
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.torchscript.exporter import TorchScriptExporter
from foldexport.precision.readback import delivered, require_delivered
from tests.exporters import networks
from tests.precision.networks import Large, Trunk, folded

EXAMPLE = (torch.zeros(1, *networks.IMAGE),)
BASES = [OnnxExporter, TorchScriptExporter]


class InHalf(nn.Module):
    """A chain in half between casts."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = networks.chain().to(dtype), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x.to(self.dtype)).float()


class StoredInHalf(nn.Module):
    """Weights in half on the disk only: the convolutions compute in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3).half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.conv.weight.float(), self.conv.bias.float())


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_types_of_a_file(base, precision, tmp_path):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    name = str(dtype).removeprefix("torch.")
    module, path = InHalf(dtype).eval(), tmp_path / f"net{base.suffix}"
    base().export(module, EXAMPLE, path, ExportOptions(precision=precision))
    found = require_delivered(base(), path, module, dtype)
    assert found.layers == {name: 4} and found.share(name) == 1.0
    run = base().load(path)
    x = torch.randn(3, *networks.IMAGE)
    (y,) = run(x.numpy())
    with torch.no_grad():
        wanted = module(x).numpy()
    assert y.dtype == np.float32 and np.abs(y - wanted).max() <= 4 * torch.finfo(dtype).eps * np.abs(wanted).max()


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_a_file_in_float32_is_refused(base, tmp_path):
    module, path = InHalf(torch.float16).eval(), tmp_path / f"net{base.suffix}"
    base().export(networks.chain(), EXAMPLE, path)
    with pytest.raises(PrecisionError, match="100 % of its weight bytes in other types") as caught:
        require_delivered(base(), path, module, torch.float16)
    assert caught.value.exit_code == 6


def test_weights_that_are_half_on_the_disk_only_are_refused(tmp_path):
    path = tmp_path / "net.onnx"
    OnnxExporter().export(StoredInHalf().eval(), EXAMPLE, path)
    if delivered(OnnxExporter(), path).weight_bytes.get("float16", 0) == 0:
        path = _stored_in_half(path)
    module = nn.Conv2d(3, 8, 3).half()
    with pytest.raises(PrecisionError, match="1 of 1 layers compute in another type"):
        require_delivered(OnnxExporter(), path, module, torch.float16)


def _stored_in_half(path):
    """Casts behind half initializers, should the writer have folded them."""
    model = onnx.load(path)
    weights = [each for each in model.graph.initializer if each.data_type == TensorProto.FLOAT]
    for tensor in weights:
        half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{tensor.name}.half")
        model.graph.node.insert(0, helper.make_node("Cast", [half.name], [tensor.name], to=TensorProto.FLOAT))
        tensor.CopyFrom(half)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_an_exporter_that_ignores_the_precision_leaves_no_file(base, tmp_path, monkeypatch):
    def ignoring(self, module, example, path, options=None, **more):
        return plain(self, copy.deepcopy(found.module), tuple(each.float() for each in example), path, ExportOptions())

    plain, found = base.export, folded(Trunk)
    monkeypatch.setattr(base, "export", ignoring)
    with pytest.raises(PrecisionError, match="asked for float16"):
        foldexport.export(found, base.name, tmp_path / "net", precision="fp16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_layers_that_stay_in_float32_are_no_breach(base, tmp_path):
    found = folded(Large)
    artifact = foldexport.export(found, base.name, tmp_path / f"net{base.suffix}", precision="fp16")
    read = delivered(exporters.exporter(exporters.get(base.name)), artifact.path)
    assert read.layers["float16"] >= 1 and read.layers["float32"] >= 1
    assert artifact.comparison.unit == "fp16" and artifact.comparison.weights_identical[0] > 0


def test_layers_of_unknown_type_are_no_half(tmp_path, monkeypatch):
    """Planted: a file that does not tell what one of its convolutions computes in."""
    prep = in_precision(folded(Trunk), "fp16")
    path = tmp_path / "net.onnx"
    OnnxExporter().export(prep.module, (torch.zeros(1, 3, 8, 8),), path, ExportOptions(precision="fp16"))
    read = OnnxExporter().precision_of(path)
    assert read == {"float16": 6} and prep.require_delivered(OnnxExporter(), path)
    monkeypatch.setattr(OnnxExporter, "precision_of", lambda self, path: {"float16": 5, "unknown": 1})
    with pytest.raises(PrecisionError, match="the file does not tell what 1 of 6 layers"):
        prep.require_delivered(OnnxExporter(), path)


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(self.layer(x).relu()).relu())


def test_a_shared_layer_in_float32_counts_each_time(tmp_path):
    found = foldexport.fold(Twice().eval(), torch.randn(1, 3, 8, 8))
    made = foldexport.export(found, "onnx", tmp_path / "net.onnx", precision="fp16", keep_fp32=["layer"])
    assert delivered(OnnxExporter(), made.path).layers == {"float32": 2, "float16": 1}


def test_half_inputs_and_outputs(tmp_path):
    artifact = foldexport.export(folded(Trunk), "onnx", tmp_path / "net.onnx", precision="fp16", half_io=True)
    model = onnx.load(artifact.path)
    kinds = {each.type.tensor_type.elem_type for each in (*model.graph.input, *model.graph.output)}
    assert kinds == {TensorProto.FLOAT16} and not [node for node in model.graph.node if node.op_type == "Cast"]
    with pytest.raises(UsageError, match="fp16 only"):
        foldexport.export(folded(Trunk), "onnx", tmp_path / "b.onnx", precision="bf16", half_io=True)


def test_bfloat16_is_really_rounded_in_onnxruntime(tmp_path):
    """Were its casts optimised away, the run would have float32's digits."""
    module, path = InHalf(torch.bfloat16).eval(), tmp_path / "net.onnx"
    OnnxExporter().export(module, EXAMPLE, path, ExportOptions(precision="bf16"))
    assert onnx_types.has_bfloat16(onnx.load(path))
    (y,) = OnnxExporter().load(path)(torch.randn(2, *networks.IMAGE).numpy())
    assert not (y.view(np.int32) & 0xFFFF).any(), "an output has more digits than bfloat16"


def test_bfloat16_needs_its_opset(tmp_path):
    asked = ExportOptions(precision="bf16", opset=18)
    with pytest.raises(UsageError, match="from opset 22"):
        OnnxExporter().export(InHalf(torch.bfloat16).eval(), EXAMPLE, tmp_path / "n.onnx", asked)

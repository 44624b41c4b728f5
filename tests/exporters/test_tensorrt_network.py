"""RTX: the parsed network holds the folded weights bit for bit, has no batch norm left, and unsupported nodes are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import foldexport
from foldexport.errors import EquivalenceError
from foldexport.exporters import scales
from foldexport.exporters.tensorrt import network
from foldexport.exporters.tensorrt.network import prove, weights
from foldexport.exporters.tensorrt.profile import Profile
from foldexport.exporters.weights import expected_weights, match_weights
from foldexport.fold.rebuild import in_dtype
from foldexport.zoo.preresnet import preresnet
from tests.exporters.networks import Tied, Views, chain
from tests.exporters.tensorrt_parts import Determinant, Layers, Preactivation, parsed, perturb, rtx, write
from tests.fold.test_blocks import ReadElsewhere
from tests.statistics import randomise


def _arrays(found) -> dict[str, np.ndarray]:
    return {each.name or f"{each.layer} {each.role}": each.values for each in weights(found) if each.values is not None}


@pytest.mark.parametrize(
    ("module", "shape"), [(chain(), (1, 3, 16, 16)), (Layers(), (1, 3, 16, 16)), (Views(), (2, 3, 8, 8)), (Tied(), (1, 4, 8, 8))],
    ids=["chain", "layers", "views", "tied"],
)  # fmt: skip
def test_every_kernel_and_bias_is_the_modules_own(module, shape, tmp_path):
    rtx()
    initializers = write(module, tmp_path / "net.onnx", shape)
    found = parsed(tmp_path / "net.onnx")
    proof = prove(found, initializers)
    match = match_weights(expected_weights(module), _arrays(found))
    assert match.ok, match.missing
    assert proof.identical >= match.total - 1  # equal weights are stored once
    assert not proof.scale and not proof.unreadable


def test_convolutions_are_known_by_the_users_names(tmp_path):
    rtx()
    write(Layers(), tmp_path / "net.onnx")
    named = {(each.name, each.role) for each in weights(parsed(tmp_path / "net.onnx")) if each.role != "constant"}
    kernels = {(f"{name}.weight", "kernel") for name in ("conv", "depthwise", "up")}
    assert named == kernels | {("conv.bias", "bias"), ("up.bias", "bias")}


def test_unfolded_batch_norm_is_a_scale_layer_and_is_caught(tmp_path):
    """The control: the check sees what a fold must leave nothing of."""
    rtx()
    module = randomise(Preactivation(), 0)
    initializers = write(module, tmp_path / "net.onnx")
    found = parsed(tmp_path / "net.onnx")
    with pytest.raises(EquivalenceError, match="1 SCALE layer in the parsed network, the first `norm`: a batch norm was left"):
        prove(found, initializers)
    assert len(prove(found, initializers, kept=None).scale) == 1


def test_a_batch_norm_that_stays_for_a_reason_is_compared_too(tmp_path):
    """Its convolution is read elsewhere: γ and β are the folded module's bit for bit, and one more SCALE layer is a mistake."""
    rtx()
    torch.manual_seed(0)
    folded = foldexport.fold(randomise(ReadElsewhere(), 0), torch.randn(2, 8, 8, 8))
    module = in_dtype(folded.module, torch.float32)
    assert scales.count(module) == 1
    initializers = write(scales.without_statistics(module), tmp_path / "net.onnx", (1, 8, 8, 8))
    found = parsed(tmp_path / "net.onnx")
    assert len(prove(found, initializers, kept=1).scale) == 1 and "unit.bn.weight" in _arrays(found)
    with pytest.raises(EquivalenceError, match="1 SCALE layer"):
        prove(found, initializers)
    perturb(tmp_path / "net.onnx", "unit.bn.bias")
    with pytest.raises(EquivalenceError, match=r"shift of `unit.bn` differs in 1 of \d+ values"):
        prove(parsed(tmp_path / "net.onnx"), initializers, kept=1)


def test_clamps_that_onnxruntime_gets_otherwise_are_proved_as_they_were_written(tmp_path):
    """A pre-activation network with γ of both signs: the ONNX format rewrites its clamps, the file of an engine does not."""
    rtx()
    folded = foldexport.fold(randomise(preresnet(8, width=4), 0), torch.randn(2, 3, 32, 32))
    assert folded.counts_after["clamp"]
    batches = Profile(*(((each, 3, 32, 32),) for each in (1, 2, 4)))
    made = foldexport.export(folded, "tensorrt", tmp_path / "net.engine", profile=batches)
    same, total = made.comparison.weights_identical
    assert made.comparison.ok and same == total and "no SCALE layer" in " ".join(made.comparison.instead)


def test_folded_network_has_no_scale_layer(tmp_path):
    rtx()
    folded = foldexport.fold(randomise(Preactivation(), 0), torch.randn(2, 3, 16, 16))
    initializers = write(folded.module, tmp_path / "net.onnx")
    proof = prove(parsed(tmp_path / "net.onnx"), initializers)
    assert proof.scale == () and proof.identical >= 5


@pytest.mark.parametrize("name", ["conv.weight", "conv.bias", "depthwise.weight", "up.weight", "head.bias", "low"])
def test_perturbed_weight_is_caught_with_its_name(name, tmp_path):
    """One value of the file that is parsed moves by one unit in the last place."""
    rtx()
    initializers = write(Layers(), tmp_path / "net.onnx")
    perturb(tmp_path / "net.onnx", name)
    where = name if name in ("head.bias", "low") else name.partition(".")[0]
    with pytest.raises(EquivalenceError, match=rf"`{where}` differs in 1 of \d+ values"):
        prove(parsed(tmp_path / "net.onnx"), initializers)


def test_perturbed_kernel_of_the_parsed_network_is_caught(tmp_path):
    trt = rtx()
    initializers = write(Layers(), tmp_path / "net.onnx")
    found = parsed(tmp_path / "net.onnx")
    layer = next(each for each in found.layers() if each.type == trt.LayerType.CONVOLUTION)
    layer.__class__ = trt.IConvolutionLayer
    kernel = layer.kernel.copy()
    kernel[5] += 1e-3
    layer.kernel = kernel
    with pytest.raises(EquivalenceError, match="kernel of `conv` differs in 1 of 216 values"):
        prove(found, initializers)


def test_every_unsupported_node_is_listed(tmp_path):
    rtx()
    write(nn.Sequential(nn.Conv2d(3, 4, 1), Determinant()), tmp_path / "net.onnx", (1, 3, 4, 4))
    found = network.parse(rtx(), tmp_path / "net.onnx")
    assert isinstance(found, list) and [each.operator for each in found] == ["Det"]


def test_bfloat16_weights_are_said_to_be_unreadable(tmp_path):
    """TensorRT's Python API hands bfloat16 out as an object without values: the proof says so, and claims nothing."""
    rtx()
    from foldexport.exporters.options import ExportOptions

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3).bfloat16()

        def forward(self, x):
            return self.conv(x.bfloat16()).float()

    options = ExportOptions(dynamic=(), precision="bf16")
    initializers = write(Half(), tmp_path / "net.onnx", options=options)
    proof = prove(parsed(tmp_path / "net.onnx"), initializers)
    assert proof.identical == 0 and set(proof.unreadable) == {"conv.weight", "conv.bias"}

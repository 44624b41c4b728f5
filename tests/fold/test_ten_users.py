"""Ten networks as people write them: folded, proved, run by ONNX Runtime, and two of them by the command line.

Statistics are random and gammas of both signs; every network comes down to the operators that are asserted, and a batch
norm that stays has its reason.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

import foldexport
from tests.command import foldexport as command
from tests.fold import user_networks as users
from tests.fold.checks import assert_same, fold64, inputs, operators, relative_error, tensors
from tests.statistics import randomise

IMAGE = (3, 12, 12)
TEN = {
    users.FunctionalNet: {"conv": 2, "relu": 2, "avg_pool": 1, "linear": 1},
    users.AliasedLists: {"conv": 3, "relu": 2, "avg_pool": 1},
    users.CalledOften: {"conv": 6, "relu": 4, "avg_pool": 1},
    users.TensorFlowPadding: {"conv": 3, "pad": 2, "clamp": 1},
    users.PReLUFace: {"conv": 3, "prelu": 2, "add": 2, "max_pool": 1, "linear": 1,
                      "linalg_vector_norm": 1, "clamp": 1, "expand_as": 1, "mul": 1},
    users.DenseBlock: {"conv": 4, "cat": 3, "clamp": 3, "relu": 1, "add": 2, "avg_pool": 1, "linear": 1},
    users.OddEps: {"conv": 2, "elu": 1, "clamp": 1, "conv_transpose": 1, "tanh": 1},
    users.MaxoutPool: {"conv": 3, "max_pool": 1, "avg_pool": 1},
    users.Transposed: {"conv": 3, "slice": 2, "add": 1, "relu": 1, "permute": 4, "linear": 1, "layer_norm": 1},
    users.HidesModules: {"conv": 3, "leaky_relu": 2},
}  # fmt: skip
#: Batch norms whose shift stays as one addition, and why.
KEPT = {
    users.PReLUFace: {"res_layer.0": "its shift meets the zero padding of `res_layer.1`"},
    users.DenseBlock: {
        "norm1": "its shift meets the zero padding behind `relu_1`", "norm2": "its shift meets the zero padding behind `relu_2`",
    },
}  # fmt: skip


def made(network: type[nn.Module]) -> nn.Module:
    """With random statistics; the layers of one that hides ``modules()`` are drawn one by one."""
    module = network()
    for name, child in nn.Module.named_modules(module):
        if not isinstance(getattr(child, "modules", None), list):
            randomise(child, len(name))
    for _, child in nn.Module.named_modules(module):
        child.training = False
    return module


def network_id(value: object) -> str:
    return getattr(value, "__name__", "")


@pytest.mark.parametrize(("network", "expected"), TEN.items(), ids=network_id)
def test_folds_to(network, expected):
    module = made(network)
    (example,) = inputs([IMAGE], batch=2, dtype=torch.float32)
    folded = foldexport.fold(module, example)
    assert folded.certificate.ok and folded.certificate.trace == ""
    assert operators(folded.counts_after) == expected
    kept = {entry.module: entry.reason for entry in folded.ledger if entry.status == "kept" and entry.rule == "batch_norm"}
    reasons = KEPT.get(network, {})
    assert kept.keys() == reasons.keys() and all(kept[name].startswith(reasons[name]) for name in reasons)
    assert_same(folded, module, IMAGE, tolerance=1e-5, dtype=torch.float32)


@pytest.mark.parametrize("network", TEN, ids=network_id)
def test_onnxruntime_agrees(network, tmp_path: Path):
    module = made(network)
    (example,) = inputs([IMAGE], batch=2, dtype=torch.float32)
    artifact = foldexport.export(foldexport.fold(module, example), "onnx", tmp_path / "net.onnx")
    assert artifact.comparison.ok
    session = onnxruntime.InferenceSession(artifact.path)
    found = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    with torch.no_grad():
        wanted = tensors(module(example))
    assert all(relative_error(torch.from_numpy(one), other) < 1e-5 for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("network", [users.AliasedLists, users.HidesModules, users.FunctionalNet], ids=network_id)
def test_by_the_command_line(network, tmp_path: Path):
    module = made(network)
    torch.save({"epoch": 12, "state_dict": module.state_dict()}, tmp_path / "model_best.pth")
    spec = f"{users.__file__}:{network.__name__}"
    result = command(tmp_path / "model_best.pth", "--to", "onnx", "--arch", spec, "--input-shape", "1x3x12x12", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["certificate"]["ok"] and operators(found["costs"]["after"]["operators"]) == TEN[network]
    (example,) = inputs([IMAGE], batch=1, dtype=torch.float32)
    (output,) = onnxruntime.InferenceSession(tmp_path / "model_best.onnx").run(None, {"input": example.numpy()})
    assert relative_error(torch.from_numpy(output), module(example).detach()) < 1e-5


@pytest.mark.parametrize("kernel", [(1, 2, 2), (2, 2, 2), (4, 1, 1)], ids=str)
def test_a_3d_pool_over_channels_is_no_convolution(kernel):
    """Behind a 1×1 convolution, with which a pool over space alone would change places."""
    layers = [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.AvgPool3d(kernel), nn.Conv2d(8 // kernel[0], 4, 1)]
    module = randomise(nn.Sequential(*layers), 0).double()
    folded = fold64(module, IMAGE)
    assert operators(folded.counts_after) == {"conv": 2, "avg_pool": 1}
    assert_same(folded, module, IMAGE)

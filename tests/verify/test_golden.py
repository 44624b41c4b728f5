"""Golden sets: drawn again with the same bits, small, and able to tell a wrong artifact."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from foldexport.errors import CheckpointError
from foldexport.verify import FAIL_ABOVE
from foldexport.verify.golden import check_golden, golden, golden_inputs
from tests.exporters import networks
from tests.exporters.networks import IMAGE, N32


def reference(module: nn.Module):
    double = copy.deepcopy(module).double()
    return lambda *inputs: [double(*inputs)]


def runtime(module: nn.Module):
    def run(*arrays):
        with torch.no_grad():
            return [module(*map(torch.from_numpy, arrays)).numpy()]

    return run


def record(module: nn.Module, **options) -> dict:
    return json.loads(json.dumps(golden(reference(module), [[1, *IMAGE]], n32=N32, **options)))


def check(made: dict, module: nn.Module):
    return check_golden(made, runtime(module), format="onnx", label="onnxruntime 1.2.3")


def test_inputs_have_known_bits():
    first, second = golden_inputs([[2, 3], [4]], 5)
    assert first.dtype == torch.float32 and first.shape == (2, 3) and second.shape == (4,)
    assert torch.equal(golden_inputs([[2, 3]], 5)[0], first) and not torch.equal(golden_inputs([[2, 3]], 6)[0], first)
    assert (first.numpy().astype(np.float64) * 65536 % 1 == 0).all()
    large = golden_inputs([[40000]], 0)[0]
    assert abs(float(large.mean())) < 0.02 and abs(float(large.std()) - 1) < 0.02
    assert (first[0] * 65536).tolist() == KNOWN


KNOWN = [-71202.0, -42234.0, 74867.0]


def test_the_network_itself_passes():
    module = networks.chain()
    made = record(module, output_names=["scores"])
    assert [run["inputs"] for run in made["runs"]] == [[[1, *IMAGE]], [[3, *IMAGE]]]
    found = check(made, module)
    assert found.ok and found.batches == (1, 3) and found.worst.startswith("output 'scores', channel")
    assert found.top1.counted + len(found.top1.near_ties) == 4


@pytest.mark.parametrize("dense", [False, True])
def test_a_wrong_network_fails(dense):
    module = networks.chain()[:5] if dense else networks.chain()
    made = record(module)
    wrong = copy.deepcopy(module)
    with torch.no_grad():
        wrong[0].weight[0, 0, 0, 0] += 1e-3
    found = check(made, wrong)
    assert not found.ok and found.noise_multiple > FAIL_ABOVE


def test_long_outputs_are_thinned_below_the_limit():
    module = nn.Sequential(nn.Conv2d(3, 40, 3, padding=1), nn.ReLU()).eval()
    made = record(module)
    assert made["step"] == 11 and len(json.dumps(made)) < 65536
    found = check(made, module)
    assert found.ok and found.probes == 2
    moved = check_golden(made, lambda x: [runtime(module)(x)[0][:, :, :-1]], format="onnx", label="onnxruntime")
    assert not moved.ok and "[[1, 40, 15, 16]] where the manifest has [[1, 40, 16, 16]]" in moved.message


def test_a_record_that_is_not_ours():
    made = record(networks.chain(4))
    with pytest.raises(CheckpointError, match="no 'runs'"):
        check({}, networks.chain(4))
    del made["runs"][0]["outputs"][0]["values"]
    with pytest.raises(CheckpointError, match="no 'values'"):
        check(made, networks.chain(4))


def test_inputs_that_cannot_be_drawn_again():
    made = record(networks.chain(4))
    made["runs"][1]["inputs_sha256"] = "0" * 64
    with pytest.raises(CheckpointError, match="cannot be drawn again"):
        check(made, networks.chain(4))


def test_the_same_record_twice():
    assert json.dumps(record(networks.chain())) == json.dumps(record(networks.chain()))

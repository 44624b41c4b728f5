"""The benchmark's runtimes on a GPU: two networks side by side in one process, as they are timed. TF32 is off.

python -m pytest tests/gpu -rs
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import foldexport
from foldexport import device as devices
from foldexport.benchmark import contest, plan
from foldexport.benchmark.runtimes import get, missing, unsuited
from tests.command import tiny

BATCH = 4
RUNTIMES = ("eager", "compile", "torchscript", "pt2", "cudagraphs", "onnxruntime", "onnxruntime-plain")


@pytest.fixture(scope="module")
def folded():
    torch.manual_seed(0)
    return foldexport.fold(tiny(), torch.zeros(1, 3, 32, 32))


@pytest.fixture
def switches():
    """What runtimes set for a process of their own is put back."""
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark
    with devices.full_float32():
        yield
    torch.set_num_threads(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.mark.parametrize("name", RUNTIMES)
def test_two_networks_side_by_side(name, folded, there, switches, tmp_path):
    """The second one is loaded into memory that the first no longer needs, and must not need."""
    row, device = get(name), devices.kind(there)
    if reason := missing(row, device) or unsuited(row, device):
        pytest.skip(f"{name}: {reason}")
    networks = plan.Networks(
        folded.source, folded.module, folded.graph, folded.example, tmp_path, folded.certificate.rounding.levels
    )
    case = networks.case(row, BATCH)
    ready = [row.load(each.file, case.arrays, 1, device) for each in case.variants]
    rounds = [[each.outputs(each.run()) for each in ready] for _ in range(3)]
    for computed in rounds:
        for one in contest.check(case, computed, None, device):
            assert one.ok and one.noise_multiple < 8, str(one)
    assert all(np.isfinite(array).all() for outputs in rounds[-1] for array in outputs)


def test_the_benchmark(folded, gpu):
    timing = foldexport.benchmark(folded, ["eager", "cudagraphs"], batch=BATCH, device=gpu, rounds=5, processes=2, threads=1)
    for made in timing.to_dict()["measurements"]:
        assert made["device"] == gpu and made["transfers"].startswith("none")
        assert all(each["device_memory_bytes"] > 0 for each in made["variants"])

"""Every shipped checkpoint on a GPU, against the training graph in float64: training graph, folded module, files. TF32 is off.

    python -m pytest tests/gpu -rs
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import foldexport
from foldexport import device as devices
from foldexport import exporters
from foldexport.api import Folded
from foldexport.exporters.options import ExportOptions
from foldexport.fold.rebuild import in_dtype
from foldexport.recognise import recognise
from foldexport.verify import Comparison, compare, on_device
from foldexport.verify.reference import Reference, reference

CHECKPOINTS = sorted((Path(__file__).resolve().parents[2] / "models").glob("*.pth"))
FORMATS = ("onnx", "torchscript", "pytorch", "pt2")
WARM_RUNS = 3
TF32_AT_LEAST = 100.0  # times the float32 noise: 2^-11 against 2^-24, less what cancels on the way
TF32_SINCE = (8, 0)  # compute capability
Run = Callable[..., list[np.ndarray]]


@dataclass(frozen=True)
class Subject:
    """A folded checkpoint and what it is held against on the device."""

    folded: Folded
    expected: Reference
    comparisons: list[Comparison]

    @property
    def module(self) -> nn.Module:
        return in_dtype(self.folded.module, torch.float32)

    def compare(self, run: Run, name: str) -> Comparison:
        return compare(
            self.expected.outputs, run, self.expected.inputs, self.expected.levels_there, format=name,
            label=f"on {self.expected.device}", output_names=self.expected.output_names,
        )  # fmt: skip


@pytest.fixture(scope="module", params=CHECKPOINTS, ids=lambda path: path.stem)
def subject(request, there) -> Subject:
    network = recognise(request.param)
    example = (torch.zeros(1, *network.preprocessing["input_size"]),)
    folded = foldexport.fold(network.module, example)
    levels = folded.certificate.rounding.levels
    expected = reference(folded.graph, example, ExportOptions(), levels=levels, device=there)
    found = on_device.prove(folded.graph, in_dtype(folded.module, torch.float32), expected, levels=levels)
    return Subject(folded, expected, found)


@pytest.fixture(scope="module")
def one(there) -> Subject:
    """A small network for what takes long."""
    from tests.command import tiny

    torch.manual_seed(0)
    example = (torch.zeros(1, 3, 32, 32),)
    folded = foldexport.fold(tiny(), example)
    levels = folded.certificate.rounding.levels
    expected = reference(folded.graph, example, ExportOptions(), levels=levels, device=there)
    found = on_device.prove(folded.graph, in_dtype(folded.module, torch.float32), expected, levels=levels)
    return Subject(folded, expected, found)


def test_training_graph_and_folded_module(subject):
    own, folded = subject.comparisons
    assert own.ok and folded.ok and own.device == folded.device == subject.expected.device
    assert own.probes == folded.probes == len(subject.expected.inputs) and {1, 3} <= set(own.batches)
    assert own.noise_multiple < 64 and folded.noise_multiple < 8, (str(own), str(folded))


@pytest.mark.parametrize("name", FORMATS)
def test_every_file(name, subject, there, tmp_path):
    made = foldexport.export(subject.folded, name, tmp_path / f"net{exporters.get(name).suffix}", device=there)
    assert made.comparison.ok and made.comparison.noise_multiple < 8
    assert [each.format for each in made.on_device] == [on_device.TRAINING, on_device.FOLDED]
    if made.comparison.device != there:
        pytest.skip(f"compared on the {made.comparison.runtime}")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["torchscript", "pytorch"])
def test_half_types(name, precision, subject, there, tmp_path):
    """The folded module and its file in half kernels, in units of the training graph's own noise in the type."""
    path = tmp_path / f"net{exporters.get(name).suffix}"
    made = foldexport.export(subject.folded, name, path, precision=precision, device=there)
    folded = made.on_device[1]
    assert made.comparison.ok and made.comparison.device == there and made.comparison.unit == folded.unit == precision
    assert folded.ok and folded.noise_multiple < 8


def test_onnx_in_half(one, there, tmp_path):
    made = foldexport.export(one.folded, "onnx", tmp_path / "net.onnx", precision="fp16", device=there)
    assert made.comparison.ok
    if made.comparison.device != there:
        pytest.skip(f"compared on the {made.comparison.runtime}")


def test_cuda_graphs(subject, gpu):
    """The module's kernels captured once for each size, and replayed on other values."""
    module = copy.deepcopy(subject.module).to(gpu)
    captured: dict[tuple, tuple] = {}

    def run(array: np.ndarray) -> list[np.ndarray]:
        given = torch.from_numpy(array).to(gpu)
        with devices.full_float32(), torch.no_grad():
            if array.shape not in captured:
                captured[array.shape] = _captured(module, torch.zeros_like(given))
            graph, held, result = captured[array.shape]
            held.copy_(given)
            graph.replay()
            return [result.numpy(force=True)]

    found = subject.compare(run, "CUDA graph")
    assert found.ok, str(found)


def _captured(module: nn.Module, held: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_RUNS):
            module(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = module(held)
    return graph, held, result


def test_torch_compile(one, gpu):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("torch.compile needs triton on a GPU, which is not installed")
    module = copy.deepcopy(one.module).to(gpu)
    with devices.full_float32():  # what is compiled remembers it
        compiled = torch.compile(module, dynamic=True)

        def run(array: np.ndarray) -> list[np.ndarray]:
            with torch.no_grad():
                return [compiled(torch.from_numpy(array).to(gpu)).numpy(force=True)]

        found = one.compare(run, "torch.compile")
    assert found.ok, str(found)


def _with_tf32(module: nn.Module, there: str) -> Run:
    """Planted: the module with TF32 in its convolutions and products."""
    moved = copy.deepcopy(module).to(there)

    def run(array: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            return [moved(torch.from_numpy(array).to(there)).numpy(force=True)]

    return run


def test_tf32_would_be_noticed(subject, gpu):
    """So a proof that holds says that TF32 was off."""
    if torch.cuda.get_device_capability(gpu) < TF32_SINCE:
        pytest.skip(f"{torch.cuda.get_device_name(gpu)} has no TF32")
    found = subject.compare(_with_tf32(subject.module, gpu), "with TF32")
    assert not found.ok and found.noise_multiple > TF32_AT_LEAST, str(found)


def test_tf32_that_the_process_has_on_is_off_in_the_proof(one, gpu, tmp_path):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        made = foldexport.export(one.folded, "torchscript", tmp_path / "net.pt", device=gpu)
        assert made.comparison.ok and all(each.ok for each in made.on_device)
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_a_wrong_module_is_caught(one, there):
    """Planted: the first layer of the folded module is off by a thousandth."""
    from foldexport.errors import EquivalenceError

    wrong = copy.deepcopy(one.module)
    with torch.no_grad():
        next(wrong.parameters()).mul_(1.001)
    with pytest.raises(EquivalenceError, match="folded module.*times the training graph's float32 noise"):
        on_device.prove(one.folded.graph, wrong, one.expected, levels=one.expected.levels)


def test_the_command_and_verify(there, tmp_path):
    from foldexport import pipeline, recheck
    from tests.command import save_dirac

    question = pipeline.Question(save_dirac(tmp_path / "net.pth"))
    done = pipeline.convert(question, pipeline.Order(tuple(exporters.resolve(",".join(FORMATS))), device=there))
    record = done.manifest["device"]
    assert record["name"] == there and [each["ok"] for each in record["comparisons"]] == [True, True]
    assert all(each.comparison.ok for each in done.artifacts)
    assert all(each.ok for each in recheck.recheck(done.manifest_path, device=there))

"""ExecuTorch, LiteRT and ncnn: batches, every weight, the same bytes, nothing printed, a mistake caught, precision delivered."""

from __future__ import annotations

import dataclasses
import struct
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import foldexport
from foldexport import exporters
from foldexport.errors import EquivalenceError, MissingDependencyError, PrecisionError, UsageError
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.weights import match_weights
from foldexport.exporters.widened import widened
from tests import command
from tests.exporters import formats, networks
from tests.exporters.formats import EXAMPLE
from tests.exporters.installed import need
from tests.exporters.networks import IMAGE

NAMES = ("executorch", "litert", "ncnn")


class Layers(nn.Module):
    """Every kind of layer whose kernel a runtime stores in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.grouped = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.head = nn.Linear(4, 5)
        self.register_buffer("low", torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.maximum(self.conv(x), self.low))
        return self.head((self.up(x) + self.grouped(x)).mean((2, 3)))


@cache
def _written(name: str, folder: Path) -> tuple[nn.Module, Path, dict, str]:
    """`formats.Skip`, folded, in one file that many tests look at, and what was printed meanwhile."""
    row, module = exporters.get(name), formats.folded()
    path = folder / f"a telling name{row.suffix}"
    return module, path, need(name).export(module, EXAMPLE, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mobile")


@pytest.fixture(params=NAMES)
def made(request, folder):
    """(exporter, module, path, notes)"""
    exporter = need(request.param)
    return exporter, *_written(request.param, folder)


def test_batches_one_and_three_with_every_weight(made):
    exporter, module, path, notes = made
    found = formats.found(exporter, module, path)
    assert found.ok and found.batches == (1, 3), found
    assert found.weights_identical == (8, 8)
    assert len(notes["inputs"]) == len(notes["outputs"]) == 1


def test_more_samples_than_the_file_takes_at_once(made):
    exporter, module, path, _ = made
    assert networks.proof(exporter, module, networks.probes(IMAGE, batches=(11,)), path).ok


def test_no_path_and_no_name_inside(made):
    exporter, _, path, _ = made
    for each in (path, *exporters.get(exporter.name).beside(path)):
        assert networks.local_traces(each) == [] and b"telling" not in each.read_bytes()


def test_only_the_files_of_the_format_are_left(made):
    exporter, _, path, _ = made
    row = exporters.get(exporter.name)
    there = {each for each in path.parent.iterdir() if each.name.startswith("a telling name")}
    assert {path, *row.beside(path)} <= there and not [each for each in path.parent.iterdir() if each.name.startswith(".")]


@pytest.mark.parametrize("name", NAMES)
def test_same_bytes_from_another_process_and_folder_and_nothing_printed(name, tmp_path, capfd, recwarn):
    row, exporter = exporters.get(name), need(name)
    path = tmp_path / f"net{row.suffix}"
    capfd.readouterr()
    exporter.export(networks.chain(), EXAMPLE, path)
    exporter.load(path)(np.zeros((3, *IMAGE), np.float32))
    assert capfd.readouterr() == ("", "") and not list(recwarn)
    others = formats.from_another_process(row, tmp_path)
    assert [each.read_bytes() for each in others] == [each.read_bytes() for each in (path, *row.beside(path))]


@pytest.mark.parametrize("name", NAMES)
def test_kernels_come_back_in_the_order_of_pytorch(name, tmp_path):
    exporter, module = need(name), Layers().eval()
    path = tmp_path / f"net{exporter.suffix}"
    exporter.export(module, (torch.zeros(1, 3, 12, 12),), path)
    found = formats.found(exporter, module, path, (3, 12, 12))
    assert found.ok and found.weights_identical == (11, 11), found


@pytest.mark.parametrize("name", NAMES)
def test_several_inputs_and_outputs(name, tmp_path):
    exporter, module = need(name), networks.TwoByThree().eval()
    path = tmp_path / f"net{exporter.suffix}"
    notes = exporter.export(module, (torch.zeros(1, *IMAGE), torch.zeros(1, 5)), path)
    assert (len(notes["inputs"]), len(notes["outputs"])) == (2, 3)
    assert networks.proof(exporter, module, networks.probes(IMAGE, (5,)), path).ok


def _perturbed(path: Path, module: nn.Module) -> None:
    """Move one value of the first kernel by one unit in the last place, in the file's own bytes."""
    value = next(iter(module.parameters())).detach().reshape(-1)[0].item()
    formats.replace(path, struct.pack("<f", value), struct.pack("<f", np.nextafter(np.float32(value), np.float32(np.inf))))


@pytest.mark.parametrize("name", NAMES)
def test_one_perturbed_weight_fails_the_export_and_leaves_no_file(name, folder, tmp_path, monkeypatch):
    exporter = need(name)
    row, kind = exporters.get(name), type(exporter)
    honest = kind.export

    def perturbing(self, module, example, path, options=None):
        notes = honest(self, module, example, path, options)
        _perturbed(next(iter(row.beside(path)), Path(path)), module)
        return notes

    monkeypatch.setattr(kind, "export", perturbing)
    folded = foldexport.fold(formats.randomise(formats.Skip(), 5), EXAMPLE, certify=False)
    with pytest.raises(EquivalenceError, match="1 of 8 weights differ from the module's in their bits"):
        foldexport.export(folded, name, tmp_path / f"net{row.suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_network_is_found(name, folder, tmp_path):
    exporter = need(name)
    _, path, _ = _written(name, folder)
    other = formats.api.fold(formats.randomise(formats.Skip(), 6), EXAMPLE, certify=False).module
    found = formats.found(exporter, other, path, weights=False)
    assert not found.ok and "float32 noise" in found.message


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_none(name, tmp_path):
    exporter, row = need(name), exporters.get(name)
    path = tmp_path / f"net{row.suffix}"
    for each in (path, *row.beside(path)):
        each.write_bytes(b"no such thing at all, though long enough to look like one")
    for read in (exporter.load, exporter.weights):
        with pytest.raises(EquivalenceError, match=f"^{name}: "):
            read(path)


@pytest.mark.parametrize("name", NAMES)
def test_fp16_is_in_the_file_and_bf16_is_refused(name, tmp_path):
    need(name)
    folded = foldexport.fold(formats.randomise(formats.Skip(), 5), EXAMPLE, certify=False)
    row = exporters.get(name)
    made = foldexport.export(folded, name, tmp_path / f"net{row.suffix}", precision="fp16")
    assert made.comparison.ok and made.comparison.weights_identical == (8, 8) and made.comparison.unit == "fp16"
    exporter = exporters.exporter(row)
    kinds = {str(each.dtype) for each in exporter.weights(made.path).values() if each.dtype.kind == "f"}
    assert "float16" in kinds
    if name == "executorch":
        assert exporter.precision_of(made.path) == {"float16": 4}
    with pytest.raises(PrecisionError, match=f"{name} is written in fp32 or fp16, not bf16"):
        foldexport.export(folded, name, tmp_path / f"other{row.suffix}", precision="bf16")


@pytest.mark.parametrize("name", ("litert", "ncnn"))
def test_half_inputs_are_refused(name, tmp_path):
    options = ExportOptions(precision="fp16", half_io=True)
    with pytest.raises(PrecisionError, match="inputs and outputs are float32 in this format: leave out --half-io"):
        need(name).export(networks.chain().half(), (EXAMPLE[0].half(),), tmp_path / "net", options)


@pytest.mark.parametrize("name", ("litert", "ncnn"))
def test_other_heights_and_widths(name, tmp_path):
    exporter, module = need(name), formats.folded()
    path = tmp_path / f"net{exporter.suffix}"
    exporter.export(module, EXAMPLE, path, ExportOptions(dynamic=("batch", "height", "width")))
    assert formats.found(exporter, module, path, (3, 24, 20)).ok


def test_sizes_that_a_format_cannot_leave_free(tmp_path):
    with pytest.raises(UsageError, match="executorch: cannot leave the height free: pass --dynamic batch"):
        need("executorch").export(formats.folded(), EXAMPLE, tmp_path / "net.pte", ExportOptions(dynamic=("batch", "height")))


def test_ncnn_takes_no_fixed_batch(tmp_path):
    with pytest.raises(UsageError, match="one sample at a time, and a batch of 2 is fixed here"):
        need("ncnn").export(formats.folded(), (torch.zeros(2, *IMAGE),), tmp_path / "net.ncnn.param", ExportOptions(dynamic=()))
    assert not list(tmp_path.iterdir())


def test_ncnn_names_the_operator_that_it_lacks(tmp_path):
    class Gamma(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.lgamma(x)

    with pytest.raises(UsageError, match="ncnn: has no torch.lgamma: export to onnx"):
        need("ncnn").export(Gamma().eval(), EXAMPLE, tmp_path / "net.ncnn.param")
    assert not list(tmp_path.iterdir())


class Refused(nn.Module):
    """A network with one function somewhere inside."""

    def __init__(self, function) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), nn.Sequential(Apply(function)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))


class Apply(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(8, 8, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


@pytest.mark.parametrize("name, function, message", [
    ("litert", torch.lgamma, r"litert-torch cannot convert `body\.1\.0` \(lgamma\): .*aten\.lgamma.*; export to onnx"),
    ("litert", lambda x: torch.topk(x, 3, 1)[0], r"does not take what litert-torch writes for `body\.1\.0` \(topk\): .*_SORT"),
    ("litert", lambda x: torch.fft.rfft2(x).abs(), r"litert-torch cannot convert `body\.1\.0` \(fft_rfft2\): Only 1D FFT"),
    ("ncnn", torch.lgamma, r"has no torch\.lgamma \(`body\.1\.0`\): export to onnx"),
    ("ncnn", lambda x: _heads(x), r"torch\.unbind \(`body\.1\.0`\)"),
    ("executorch", torch.lgamma, r"cannot write `body\.1\.0` \(lgamma\): Operator .*aten\.lgamma"),
], ids=["litert-lgamma", "litert-topk", "litert-fft", "ncnn-lgamma", "ncnn-unbind", "executorch-lgamma"])  # fmt: skip
def test_a_refusal_names_the_module_and_the_operator(name, function, message, tmp_path):
    need(name)
    folded = foldexport.fold(Refused(function).eval(), (torch.zeros(1, 3, 8, 8),), certify=False)
    with pytest.raises(UsageError, match=message) as refused:
        foldexport.export(folded, name, tmp_path / f"net{exporters.get(name).suffix}")
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def _heads(x: Tensor) -> Tensor:
    """Queries and keys of two heads, [N, 8, …] → [N, 2, L, L], with the batch on the second axis in between."""
    queries, keys = x.flatten(2).transpose(1, 2).reshape(x.shape[0], -1, 2, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
    return queries @ keys.transpose(-2, -1)


def test_litert_says_which_batch_a_file_keeps(tmp_path):
    """What is taken apart along another axis than the batch keeps it, whatever the interpreter is resized to."""
    exporter = need("litert")
    notes = exporter.export(Refused(_heads).eval(), (torch.zeros(1, 3, 12, 12),), tmp_path / "net.tflite")
    assert notes["batch"] == 1 and "computes something else" in notes["fixed"]
    run = exporter.load(tmp_path / "net.tflite")
    run(np.ones((3, 3, 12, 12), np.float32))
    assert "in batches of 1" in exporter.runtime()


@pytest.mark.parametrize("name", (*NAMES, "coreml"))
def test_a_missing_package_is_exit_5_with_the_command(name, monkeypatch, tmp_path):
    row = dataclasses.replace(exporters.get(name), packages=("surely_not_installed",))
    monkeypatch.setitem(exporters.FORMATS, name, row)
    checkpoint, arch = command.save_plain(tmp_path)
    ran = command.foldexport(checkpoint, "--arch", arch, "--input-shape", "1x3x8x8", "--to", name, "-o", tmp_path / "out")
    assert ran.code == MissingDependencyError.exit_code == 5
    assert f"pip install 'foldexport[{row.extra}]'" in ran.message and not (tmp_path / "out").exists()


def test_a_half_may_lie_in_a_file_as_float32_of_the_same_value_and_of_no_other():
    half = {"bias": torch.tensor([1.5, -0.25, 2**-14], dtype=torch.float16)}
    wide = half["bias"].float().numpy()
    assert match_weights(half, {"0.bias": wide}).ok
    assert not match_weights(half, {"0.bias": np.nextafter(wide, np.float32(9))}).ok
    assert not match_weights({"bias": half["bias"].float()}, {"0.bias": half["bias"].numpy()}).ok  # not the other way round


def test_a_half_module_widened_has_the_same_values_and_no_casts():
    from foldexport.precision.prepare import prepare
    from foldexport.precision.types import HALF

    folded = foldexport.fold(formats.randomise(formats.Skip(), 5), EXAMPLE, certify=False)
    half = prepare(folded.graph, folded.refold(), HALF["fp16"], module=folded.module).module
    wide = widened(half)
    assert {each.dtype for each in wide.parameters()} == {torch.float32}
    assert all(torch.equal(a.float(), b) for a, b in zip(half.parameters(), wide.parameters(), strict=True))
    assert not [node for node in wide.graph.nodes if node.op == "call_method" and node.target == "to"]
    assert {each.dtype for each in half.parameters()} == {torch.float16}

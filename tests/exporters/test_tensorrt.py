"""RTX: engines built for three generations of GPUs on a machine without one, and everything that is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import foldexport
from foldexport import exporters
from foldexport.errors import CheckpointError, EquivalenceError, MissingDependencyError, UsageError
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.tensorrt import driver, flavour
from foldexport.exporters.tensorrt.exporter import TensorRTExporter
from foldexport.exporters.tensorrt.options import TensorRTOptions
from foldexport.exporters.tensorrt.profile import Profile
from tests import command
from tests.exporters.tensorrt_parts import FIXED, TARGETS, Determinant, Preactivation, perturb, rtx
from tests.statistics import randomise

IMAGE = (1, 3, 16, 16)
MODEL = Path(__file__).parents[2] / "models" / "preresnet20_cifar10.pth"
BATCHES = Profile(((1, 3, 16, 16),), ((4, 3, 16, 16),), ((8, 3, 16, 16),))
LINEAR = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))
"""
ODD = """
import torch
from torch import nn

class Odd(nn.Module):
    def forward(self, x):
        return torch.linalg.det(x[:, :, :4, :4])

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd = Odd()
        self.fc = nn.Linear(4, 6)

    def forward(self, x):
        return self.fc(self.odd(x))

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Head())
"""


@pytest.fixture
def no_gpu() -> str:
    rtx()
    reason = driver.why_none()
    if not reason:
        pytest.skip("there is a GPU here; tests/gpu runs the engines")
    return reason


@pytest.fixture(scope="module")
def folded():
    torch.manual_seed(0)
    return foldexport.fold(randomise(Preactivation(), 0), torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("target", [*TARGETS, ",".join(TARGETS)])
def test_builds_for_each_generation(target, tmp_path, folded, no_gpu):
    options = TensorRTOptions(compute_capabilities=tuple(target.split(",")))
    made = foldexport.export(folded, "tensorrt", tmp_path / "net.engine", tensorrt=options)
    assert made.path.stat().st_size > 100_000
    assert made.notes["targets"] == target.split(",") and made.notes["flavour"] == "rtx"
    assert made.comparison.ok and made.comparison.not_run == f"built, not run: no GPU ({no_gpu})"
    assert made.comparison.weights_identical[0] == made.comparison.weights_identical[1] >= 5
    assert made.comparison.to_dict()["max_error"] is None  # nothing was measured of the engine
    assert command.files(tmp_path) == ["net.engine"]


def test_the_command(tmp_path, no_gpu):
    """The model of the repository, for three generations of GPUs: what is in place, and what the manifest says."""
    ran = command.foldexport(MODEL, "--to", "tensorrt", "--compute-capability", ",".join(TARGETS), "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert command.files(tmp_path) == ["out", "out/preresnet20_cifar10.engine", "out/preresnet20_cifar10.manifest.json"]
    record = json.loads((tmp_path / "out" / "preresnet20_cifar10.manifest.json").read_text())
    (artifact,) = record["artifacts"]
    notes = artifact["notes"]
    assert artifact["comparison"]["not_run"].startswith("built, not run: no GPU (cu")
    assert notes["network"]["scale_layers"] == [] and notes["network"]["weights_identical"] >= 40
    assert notes["onnx"]["comparison"]["ok"] and notes["onnx"]["comparison"]["probes"] >= 8
    assert notes["targets"] == list(TARGETS) and not notes["tf32"]
    assert notes["layer_types"] == {"float32": len(notes["layers"])}
    convolutions = {name for layer in notes["layers"] for name in layer["modules"]}
    assert {"conv1", "layer1.0.conv1", "layer3.2.conv2", "fc"} <= convolutions
    assert notes["profiles"] == [{"input": dict.fromkeys(("min", "opt", "max"), [1, 3, 32, 32])}]
    assert "differ from build to build" in notes["warning"] and notes["log"]
    assert str(tmp_path) not in json.dumps(notes)
    assert record["inputs"][0]["shape"] == [1, 3, 32, 32]


def test_the_engine_is_bare(tmp_path, folded, no_gpu):
    """trtexec and Triton read the file from its first byte."""
    made = foldexport.export(folded, "trt", tmp_path / "net.engine")
    assert made.path.read_bytes()[1:4] == b"trt"  # TensorRT's own magic


def test_profile(tmp_path, folded, no_gpu):
    made = foldexport.export(folded, "engine", tmp_path / "net.engine", profile=BATCHES)
    assert made.notes["profiles"] == [{"input": {"min": [1, *IMAGE[1:]], "opt": [4, *IMAGE[1:]], "max": [8, *IMAGE[1:]]}}]


def test_profile_over_sizes_on_the_command_line(tmp_path, no_gpu):
    """Height and width in the profile are free in every file, and proved at a second size; onnx gets them too."""
    checkpoint, arch = command.save_plain(tmp_path)
    shapes = ["--min-shape", "1x3x16x16", "--opt-shape", "2x3x32x32", "--max-shape", "4x3x96x96"]
    ran = command.foldexport(
        checkpoint, "--arch", arch, "--input-shape", "1x3x32x32", "--to", "onnx,tensorrt", *shapes, "-o", tmp_path / "out", "--json"
    )
    assert ran.code == 0, ran.err
    assert ran.document["inputs"][0]["shape"] == ["batch", 3, "height", "width"]


def test_dynamic_input_without_a_profile(tmp_path, no_gpu):
    checkpoint, arch = command.save_plain(tmp_path)
    before = command.files(tmp_path)
    ran = command.foldexport(checkpoint, "--arch", arch, "--input-shape", "1x3x16x16", "--to", "tensorrt", "--dynamic", "batch")
    assert ran.code == 2 and "pass --min-shape, --opt-shape and --max-shape" in ran.message
    assert command.files(tmp_path) == before


def test_dynamic_input_without_a_profile_is_named_by_the_exporter(tmp_path, no_gpu):
    with pytest.raises(UsageError, match=r"the batch of input 'input' \(1x3x16x16\) is to be free.*--min-shape"):
        TensorRTExporter().export(Preactivation().eval(), (torch.randn(IMAGE),), tmp_path / "a.engine", ExportOptions())
    assert command.files(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--min-shape", "1x3x16x16"], 2, "wanted all three, once per input"),
        (["--min-shape", "4x3x16x16", "--opt-shape", "2x3x16x16", "--max-shape", "8x3x16x16"], 2, "wanted min ≤ opt ≤ max"),
        (["--min-shape", "1x3x16x16", "--opt-shape", "1x4x16x16", "--max-shape", "1x5x16x16"], 2, "axis 1 varies"),
        (["--min-shape", "1x3x32x32", "--opt-shape", "2x3x32x32", "--max-shape", "8x3x32x32"], 2, "axis 2 of input 'input' is 16"),
        (["--min-shape", "1x3x32x16", "--opt-shape", "2x3x48x16", "--max-shape", "8x3x64x16"], 2, "the height of input 'input'"),
        (["--compute-capability", "9.0"], 2, "builds for 7.5, 8.0, 8.6, 8.9, 12.0, 12.1; for other GPUs"),
        (["--compute-capability", "new"], 2, "wanted a version such as 8.6"),
        (["--workspace", "2"], 2, "wanted a number with its unit, such as 2GiB"),
        (["--workspace", "1kB"], 2, "--workspace 1000B: TensorRT-RTX"),
        (["--compute-capability", "7.5"], 2, "`3` is a float32 matrix product"),
        (["--optimisation-level", "6"], 2, "wanted 0 to 5"),
        (["--hardware-compatibility", "ampere-plus"], 2, "TensorRT-RTX has no such levels"),
        (["--version-compatible"], 2, "work in the version that built them"),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, list) else None,
)
def test_refused(words, code, message, tmp_path, no_gpu):
    checkpoint, arch = command.save_plain(tmp_path, LINEAR)
    before = command.files(tmp_path)
    asked = ("--to", "tensorrt", "--flavour", "rtx", "-o", tmp_path / "out", *words)
    ran = command.foldexport(checkpoint, "--arch", arch, "--input-shape", "1x3x16x16", *asked)
    assert ran.code == code and message in ran.message, ran.err
    assert command.files(tmp_path) == before


def test_full_tensorrt_needs_its_library_and_a_gpu(tmp_path, no_gpu, monkeypatch):
    checkpoint, arch = command.save_plain(tmp_path)
    words = (checkpoint, "--arch", arch, "--input-shape", "1x3x16x16", "--to", "trt", "--flavour", "full")
    if not flavour.FULL.module():
        ran = command.foldexport(*words)
        assert ran.code == 5 and ran.message == "--flavour full: TensorRT is not installed: pip install 'foldexport[tensorrt]'"
    monkeypatch.setattr(flavour.Flavour, "module", lambda self: "tensorrt")
    ran = command.foldexport(*words)
    assert ran.code == 5 and f"there is none here ({no_gpu})" in ran.message and "--flavour rtx" in ran.message


def test_neither_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(flavour.Flavour, "module", lambda self: "")
    checkpoint, arch = command.save_plain(tmp_path)
    ran = command.foldexport(checkpoint, "--arch", arch, "--input-shape", "1x3x16x16", "--to", "trt")
    assert ran.code == 5
    assert "pip install 'foldexport[tensorrt-rtx]'" in ran.message and "pip install 'foldexport[tensorrt]'" in ran.message
    row = next(each for each in exporters.status() if each.format.name == "tensorrt")
    assert not row.works and "pip install 'foldexport[tensorrt-rtx]'" in row.reason


def test_the_list_of_formats_says_what_works_here(no_gpu):
    ran = command.foldexport("formats", "--json")
    row = next(each for each in ran.document["formats"] if each["name"] == "tensorrt")
    assert row["works"] and row["runtime"].startswith("TensorRT") and no_gpu in row["reason"]


def test_an_option_of_tensorrt_alone():
    ran = command.foldexport("nothing.pth", "--to", "onnx", "--workspace", "1GiB")
    assert ran.code == 2 and ran.message == "--workspace: is for tensorrt, which --to does not name."


@pytest.mark.parametrize("fold", [[], ["--no-fold"]], ids=["folded", "as it is"])
def test_unsupported_operator_is_named_before_anything_is_built(fold, tmp_path, no_gpu):
    checkpoint, arch = command.save_plain(tmp_path, ODD)
    before = command.files(tmp_path)
    asked = ("--to", "tensorrt", "-o", tmp_path / "out", *fold)
    ran = command.foldexport(checkpoint, "--arch", arch, "--input-shape", "1x3x8x8", *asked)
    assert ran.code == 2, ran.err
    assert "does not take Det (node 'n0', in `2.odd`)" in ran.message and "Nothing was built" in ran.message
    assert command.files(tmp_path) == before


def test_a_network_as_it_is_through_the_exporter_alone(tmp_path, no_gpu):
    """As the benchmark writes the unfolded network: nothing says that it was folded, so its batch norm is no mistake."""
    notes = TensorRTExporter().export(Preactivation().eval(), (torch.randn(IMAGE),), tmp_path / "a.engine", FIXED)
    assert len(notes["network"]["scale_layers"]) == 1


def test_unsupported_operator_in_a_layer_without_weights(tmp_path, no_gpu):
    module = nn.Sequential(nn.Conv2d(3, 4, 1), Determinant())
    with pytest.raises(UsageError, match=r"does not take Det \(node '.+', in `1`\)"):
        TensorRTExporter().export(module.eval(), (torch.randn(1, 3, 4, 4),), tmp_path / "a.engine", FIXED)


def test_batch_norms_stay_where_nothing_is_folded(tmp_path, no_gpu):
    source = command.PLAIN.replace("nn.BatchNorm2d(width), nn.ReLU()", "nn.ReLU(), nn.BatchNorm2d(width)")
    checkpoint, arch = command.save_plain(tmp_path, source)
    asked = ("--to", "tensorrt", "-o", tmp_path / "out", "--no-fold", "--json")
    ran = command.foldexport(checkpoint, "--arch", arch, "--input-shape", "1x3x16x16", *asked)
    assert ran.code == 0, ran.err
    assert len(ran.document["artifacts"][0]["notes"]["network"]["scale_layers"]) == 1


@pytest.mark.parametrize("name", ["conv.weight", "head.bias"])
def test_perturbed_weight_ends_the_command(name, tmp_path, folded, no_gpu, monkeypatch):
    """Planted: the ONNX file that the engine is to be built from has one wrong value."""
    plain = OnnxExporter.export

    def wrong(self, module, example, path, options=None, **rest):
        notes = plain(self, module, example, path, options, **rest)
        perturb(path, name)
        return notes

    monkeypatch.setattr(OnnxExporter, "export", wrong)
    with pytest.raises(EquivalenceError, match=rf"the ONNX file to build from.*1 of \d+ weights differ.*{name}.*nothing was built"):
        foldexport.export(folded, "tensorrt", tmp_path / "net.engine")
    assert command.files(tmp_path) == []


def test_wrong_kernel_in_the_parsed_network_ends_the_command(tmp_path, folded, no_gpu, monkeypatch):
    """Planted: the file is right, and the parser changes a kernel."""
    from foldexport.exporters.tensorrt import exporter as module

    trt, plain = rtx(), module.parse

    def wrong(library, file):
        found = plain(library, file)
        layer = next(each for each in found.layers() if each.type == trt.LayerType.CONVOLUTION)
        layer.__class__ = trt.IConvolutionLayer
        found.kept += (layer.kernel * 1.001,)
        layer.kernel = found.kept[-1]
        return found

    monkeypatch.setattr(module, "parse", wrong)
    with pytest.raises(EquivalenceError, match=r"kernel of `stem` differs in \d+ of 216 values"):
        foldexport.export(folded, "tensorrt", tmp_path / "net.engine")
    assert command.files(tmp_path) == []


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_precision_is_read_back_from_the_engine(precision, tmp_path, folded, no_gpu):
    made = foldexport.export(folded, "tensorrt", tmp_path / "net.engine", precision=precision)
    kind = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    assert made.notes["layer_types"].get(kind, 0) >= 3 and "float32" not in made.notes["layer_types"]


def test_an_engine_that_is_not_in_the_asked_type_is_refused(tmp_path, no_gpu):
    """Planted: fp16 is asked for, and the network that is handed over is in float32."""
    from foldexport.errors import PrecisionError

    options = ExportOptions(dynamic=(), precision="fp16")
    with pytest.raises(PrecisionError, match="asked for fp16, but no convolution of the engine computes in it"):
        TensorRTExporter().export(nn.Conv2d(3, 4, 3).eval(), (torch.randn(IMAGE),), tmp_path / "a.engine", options)


def test_verify_checks_the_hash_and_says_that_it_cannot_run(tmp_path, no_gpu):
    checkpoint, arch = command.save_plain(tmp_path)
    words = (checkpoint, "--arch", arch, "--input-shape", "1x3x16x16", "--to", "tensorrt,onnx", "-o", tmp_path / "out")
    assert command.foldexport(*words).code == 0
    manifest = tmp_path / "out" / "net.manifest.json"
    ran = command.foldexport("verify", manifest)
    assert ran.code == 5 and f"net.engine: no GPU ({no_gpu})" in ran.message
    with open(tmp_path / "out" / "net.engine", "ab") as file:
        file.write(b"x")
    ran = command.foldexport("verify", manifest)
    assert ran.code == 4 and "net.engine" in ran.message


def test_an_engine_is_opened_only_where_a_manifest_names_its_hash(tmp_path, no_gpu):
    engine = tmp_path / "net.engine"
    engine.write_bytes(b"not ours")
    with pytest.raises(CheckpointError, match="in no manifest beside it.*executable code"):
        TensorRTExporter().load(engine)
    entry = {"files": [{"name": "net.engine", "sha256": "0" * 64}], "notes": {"flavour": "rtx", "targets": []}}
    (tmp_path / "net.manifest.json").write_text(json.dumps({"artifacts": [entry]}))
    with pytest.raises(CheckpointError, match="differs from the one in its manifest"):
        TensorRTExporter().load(engine)
    entry["files"][0]["sha256"] = hashlib.sha256(b"not ours").hexdigest()
    (tmp_path / "net.manifest.json").write_text(json.dumps({"artifacts": [entry]}))
    with pytest.raises(MissingDependencyError, match="cannot be run here: no GPU"):
        TensorRTExporter().load(engine)


def test_two_inputs_and_three_outputs(tmp_path, no_gpu):
    from tests.exporters.networks import TwoByThree

    example = (torch.randn(2, 3, 8, 8), torch.randn(2, 5))
    folded = foldexport.fold(TwoByThree().eval(), example)
    shapes = (((1, 3, 8, 8), (1, 5)), ((2, 3, 8, 8), (2, 5)), ((4, 3, 8, 8), (4, 5)))
    made = foldexport.export(folded, "tensorrt", tmp_path / "net.engine", profile=Profile(*shapes), input_names=("image", "vector"))
    assert set(made.notes["profiles"][0]) == {"image", "vector"} and made.comparison.ok
    with pytest.raises(UsageError, match="--min-shape is given 1 times, but the network has 2 inputs"):
        foldexport.export(folded, "tensorrt", tmp_path / "other.engine", profile=Profile(*(each[:1] for each in shapes)))

"""The stages together: nothing is put in place before the last proof, and the library makes the same calls."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import foldexport
from foldexport import exporters, pipeline
from foldexport.arch import load_arch
from foldexport.destination import plan
from foldexport.errors import EquivalenceError, MissingDependencyError, ModelError, UsageError
from foldexport.exporters import resolve
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.torchscript.exporter import TorchScriptExporter
from foldexport.verify import Tolerance
from tests.command import PLAIN, files, save_dirac, save_plain, tiny
from tests.statistics import randomise

PLANTED = 1e-6


def order(formats: str = "ts", **more) -> pipeline.Order:
    return pipeline.Order(tuple(exporters.resolve(formats)), **more)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(2))


def spoilt(exporter: type) -> type:
    """The exporter with a mistake: the first weight is off by 1e-6 of itself."""

    class Spoilt(exporter):
        def export(self, module, example, path, options=None, **more):
            wrong = copy.deepcopy(module)
            with torch.no_grad():
                next(wrong.parameters()).view(-1)[0].mul_(1 + PLANTED)
            return super().export(wrong, example, path, options, **more)

    return Spoilt


@pytest.fixture
def planted(monkeypatch):
    """Plants a mistake in the exporters of some formats."""
    classes = {"onnx": OnnxExporter, "torchscript": TorchScriptExporter}

    def plant(*names: str):
        chosen = {name: spoilt(kind) if name in names else kind for name, kind in classes.items()}
        monkeypatch.setattr(exporters, "exporter", lambda row: chosen[row.name]())

    return plant


# ---- proofs before files


@pytest.mark.parametrize("name", ["onnx", "torchscript"])
def test_an_exporter_s_mistake_leaves_no_file(tmp_path, planted, name):
    planted(name)
    question = pipeline.Question(save_dirac(tmp_path / "small.pth"))
    words = f"{name}.*differ from the module's in their bits: features.conv.weight"
    with pytest.raises(EquivalenceError, match=words) as caught:
        pipeline.convert(question, order(name))
    assert caught.value.exit_code == 4 and files(tmp_path) == ["small.pth"]


def test_one_format_that_fails_takes_the_others_with_it(tmp_path, planted):
    planted("torchscript")
    for name in ("small.onnx", "small.torchscript.pt", "small.manifest.json"):
        (tmp_path / name).write_text(f"old {name}")
    with pytest.raises(EquivalenceError):
        pipeline.convert(pipeline.Question(save_dirac(tmp_path / "small.pth")), order("onnx,ts", overwrite=True))
    assert files(tmp_path) == ["small.manifest.json", "small.onnx", "small.pth", "small.torchscript.pt"]
    assert (tmp_path / "small.onnx").read_text() == "old small.onnx"


def test_an_unfolded_export_is_judged_by_its_outputs(tmp_path, planted):
    planted("torchscript")
    question = pipeline.Question(save_dirac(tmp_path / "small.pth"), fold=False)
    with pytest.raises(EquivalenceError, match="allowed: 1e-12"):
        pipeline.convert(question, order(tolerance=Tolerance(relative=1e-12)))
    assert files(tmp_path) == ["small.pth"]


def test_every_stage_has_its_seconds(tmp_path):
    steps = []
    done = pipeline.convert(pipeline.Question(save_dirac(tmp_path / "small.pth")), order(), steps.append)
    stages = ["read", "trace", "fold", "certify", "round", "count", "reference"]
    stages += ["export torchscript", "verify torchscript"]
    assert list(done.study.seconds) == stages and list(done.manifest["seconds"]) == stages
    assert [step for step in steps if step in stages] == [each for each in stages if each not in ("certify", "round")]
    assert "probe normal" in steps and "float32 rounding" in steps


# ---- what is refused before any work


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"precision": "int8"}, UsageError, "ONNX only"),
        ({"precision": "int7"}, UsageError, "int7"),
        ({"opset": 17}, UsageError, "--opset"),
        ({"input_names": ("a", "a")}, UsageError, "distinct"),
        ({"output": "net.onnx"}, UsageError, "named as onnx"),
    ],
)
def test_refused_before_the_checkpoint_is_read(tmp_path, asked, error, words):
    with pytest.raises(error, match=words):
        pipeline.convert(pipeline.Question(tmp_path / "not there.pth"), order(**asked))


def test_cuda_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        done = pipeline.convert(pipeline.Question(save_dirac(tmp_path / "small.pth")), order(device="cuda"))
        assert done.artifacts[0].comparison.ok
        return
    with pytest.raises(MissingDependencyError, match="--device cuda: .*--device cpu"):
        pipeline.convert(pipeline.Question(tmp_path / "not there.pth"), order(device="cuda"))


def test_destinations(tmp_path):
    checkpoint = save_dirac(tmp_path / "net.torchscript.pt")
    question = pipeline.Question(checkpoint)
    with pytest.raises(UsageError, match="2 formats"):
        pipeline.convert(question, order("onnx,ts", output=tmp_path / "net.onnx"))
    with pytest.raises(UsageError, match="the checkpoint itself"):
        pipeline.convert(question, order("ts", output=checkpoint, overwrite=True))
    done = pipeline.convert(question, order("ts", output=tmp_path / "model.pt"))
    assert done.manifest_path == tmp_path / "model.manifest.json" and done.artifacts[0].path == tmp_path / "model.pt"
    assert files(tmp_path) == ["model.manifest.json", "model.pt", "net.torchscript.pt"]


@pytest.mark.parametrize("name", ["net.pth", "net.pth.tar", "net.pt", "net"])
def test_names_come_from_the_checkpoint(name):
    found = plan(Path("runs") / name, None, resolve("onnx"))
    assert found.artifacts == (Path("runs/net.onnx"),) and found.manifest == Path("runs/net.manifest.json")


@pytest.mark.parametrize("output", ["out/v1.0", "out/2026.11.21", "out/v1", "out/build.release", "out/trt61.5G", "out/net.fp16"])
def test_what_ends_as_no_format_does_is_a_folder(output, tmp_path):
    assert plan(Path("net.pth"), tmp_path / output, resolve("onnx")).artifacts == (tmp_path / output / "net.onnx",)


@pytest.mark.parametrize(("output", "format"), [("net.pt", "ts"), ("net.plan", "trt"), ("net.ONNX", "onnx"), ("a.b.py", "pytorch")])
def test_a_format_s_own_suffix_is_a_file(output, format, tmp_path):
    assert plan(Path("net.pth"), tmp_path / output, resolve(format)).artifacts == (tmp_path / output,)


@pytest.mark.parametrize(
    ("output", "format", "said"),
    [("net.pt", "onnx", "named as torchscript"), ("net.bin", "onnx", "named as openvino or ncnn"), ("a.xml", "ort", "openvino")],
)
def test_a_file_named_as_another_format_is_refused(output, format, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        plan(Path("net.pth"), tmp_path / output, resolve(format))


def test_python_source_is_named_so(tmp_path):
    folded = foldexport.fold(nn.Conv2d(3, 2, 1).eval(), torch.randn(1, 3, 4, 4), certify=False)
    with pytest.raises(UsageError, match=r"a\.pytorch: files of pytorch end with \.py, for example .*a\.py"):
        foldexport.export(folded, "pytorch", tmp_path / "a.pytorch")


# ---- networks of other kinds

FIXED = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(64, 5)

    def forward(self, x):
        return self.fc(self.conv(x).reshape(2, -1))
"""
INTEGERS = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.fc = nn.Embedding(10, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.words(x).mean(1))
"""


def test_a_network_that_fixes_its_batch(tmp_path):
    checkpoint, arch = save_plain(tmp_path, FIXED)
    question = pipeline.Question(checkpoint, arch=arch, input_shapes=((2, 3, 6, 6),))
    done = pipeline.convert(question, order())
    assert done.manifest["inputs"][0]["shape"] == [2, 3, 6, 6] and done.manifest["outputs"][0]["shape"] == [2, 5]
    assert any("fixes its batch at 2" in note for note in done.study.network.notes)
    with pytest.raises(UsageError, match="--dynamic none"):
        pipeline.convert(question, order(dynamic=("batch",), overwrite=True))


def test_integer_inputs_come_from_the_data(tmp_path):
    checkpoint, arch = save_plain(tmp_path, INTEGERS)
    np.savez(tmp_path / "words.npz", x=np.arange(40).reshape(5, 8) % 10)
    done = pipeline.convert(pipeline.Question(checkpoint, arch=arch, data=tmp_path / "words.npz"), order())
    assert done.manifest["inputs"] == [{"name": "input", "shape": ["batch", 8], "type": "int64"}]
    assert done.manifest["golden"] is None and done.artifacts[0].comparison.ok


@pytest.mark.parametrize("kind", ["float16", "float64"])
def test_artifacts_are_float32_whatever_the_network_is(tmp_path, kind):
    checkpoint, arch = save_plain(tmp_path, PLAIN + f"        self.to(__import__('torch').{kind})\n")
    done = pipeline.convert(pipeline.Question(checkpoint, arch=arch, input_shapes=((1, 3, 6, 6),)), order("onnx"))
    weights = OnnxExporter().weights(done.artifacts[0].path)
    assert {value.dtype.name for value in weights.values() if value.dtype.kind == "f"} == {"float32"}


def test_statistics_of_a_constant_image_are_not_held_against_a_file(tmp_path):
    source = PLAIN.replace("nn.BatchNorm2d(width)", "nn.BatchNorm2d(width, track_running_stats=False)")
    checkpoint, arch = save_plain(tmp_path, source)
    done = pipeline.convert(pipeline.Question(checkpoint, arch=arch, input_shapes=((1, 3, 8, 8),)), order("onnx,ts"))
    assert done.manifest["probes_left_out"] == ["constant"] and all(each.comparison.ok for each in done.artifacts)


# ---- the library


def test_load_fold_export(tmp_path):
    network = foldexport.load(save_dirac(tmp_path / "small.pth"))
    assert not any(child.training for child in network.modules())
    folded = foldexport.fold(network, torch.zeros(1, 3, 32, 32))
    artifact = foldexport.export(folded, "onnx", tmp_path / "net.onnx", output_names=["scores"])
    assert artifact.path == tmp_path / "net.onnx" and artifact.comparison.ok
    assert artifact.comparison.weights_identical == (16, 16)
    assert artifact.notes["outputs"] == ["scores"] and files(tmp_path) == ["net.onnx", "small.pth"]
    with pytest.raises(UsageError, match="exists already"):
        foldexport.export(folded, "onnx", tmp_path / "net.onnx")
    assert foldexport.export(folded, "onnx", str(tmp_path / "net.onnx"), overwrite=True, dynamic=()).comparison.ok


def test_export_of_a_wrong_network_is_refused(tmp_path):
    folded = foldexport.fold(randomise(plain(), 0), torch.zeros(1, 3, 8, 8))
    with torch.no_grad():
        next(folded.module.parameters()).view(-1)[0].add_(0.01)
    with pytest.raises(EquivalenceError, match="float32 noise"):
        foldexport.export(folded, "ts", tmp_path / "net.pt")
    assert files(tmp_path) == []


def test_export_of_a_float64_network_is_float32(tmp_path):
    folded = foldexport.fold(randomise(plain(), 0).double(), torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert {value.dtype for value in folded.module.parameters()} == {torch.float64}
    artifact = foldexport.export(folded, "ts", Path(tmp_path / "net.pt"))
    assert artifact.comparison.ok and {value.dtype for value in folded.module.parameters()} == {torch.float64}
    assert {value.dtype for value in torch.jit.load(str(artifact.path)).parameters()} == {torch.float32}


def test_library_refuses_train_mode():
    with pytest.raises(ModelError, match=r"train mode.*BatchNorm2d"):
        foldexport.fold(plain().train(), torch.zeros(1, 3, 8, 8))


def test_uncertified_fold_is_still_compared(tmp_path):
    folded = foldexport.fold(randomise(plain(), 0), torch.zeros(1, 3, 8, 8), certify=False)
    assert foldexport.export(folded, "ts", tmp_path / "net.pt").comparison.ok


def test_load_with_the_user_s_network(tmp_path):
    checkpoint, arch = save_plain(tmp_path)
    network = foldexport.load(checkpoint, arch=arch, arch_args={"width": 4})
    assert type(network).__name__ == "Net" and not network.training


def test_a_whole_pickled_network(tmp_path):
    torch.save(tiny(), tmp_path / "whole.pth")
    assert type(foldexport.load(tmp_path / "whole.pth", trust_pickle=True)).__name__ == "DiracNet"
    torch.save(randomise(plain(), 0).train(), tmp_path / "own.pth")
    loaded = foldexport.load(tmp_path / "own.pth", trust_pickle=True)
    assert isinstance(loaded, nn.Sequential) and not loaded.training


SIZED = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc((self.conv(x) * torch.linspace(0.5, 1.5, x.shape[-1])).relu().mean((2, 3)))
"""


def test_a_network_of_one_size_is_not_given_free_height_and_width(tmp_path):
    """Its constant has the width of the example: at any other size the file would be another network."""
    (tmp_path / "sized.py").write_text(SIZED)
    arch = f"{tmp_path / 'sized.py'}:Net"
    torch.save(load_arch(arch).state_dict(), tmp_path / "sized.pth")
    question = pipeline.Question(tmp_path / "sized.pth", arch=arch, input_shapes=((1, 3, 16, 16),))
    with pytest.raises(UsageError, match="height and width cannot be free"):
        pipeline.convert(question, pipeline.Order(tuple(exporters.resolve("onnx")), dynamic=("batch", "height", "width")))
    assert not list(tmp_path.glob("*.onnx"))

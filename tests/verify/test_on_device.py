"""The networks and files on the device that was asked for, here the CPU by a name of its own, so that everything is run."""

from __future__ import annotations

import copy
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import foldexport
from foldexport import device, exporters, interpret, pipeline, recheck
from foldexport.errors import EquivalenceError, MissingDependencyError
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.torchscript.exporter import TorchScriptExporter
from foldexport.precision.emulate import own_run
from foldexport.precision.types import HALF
from foldexport.verify import on_device
from foldexport.verify.reference import reference
from tests import command
from tests.statistics import randomise

HERE = "cpu:0"
IMAGE = (3, 8, 8)


def network() -> nn.Module:
    return randomise(nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ), 0)  # fmt: skip


@pytest.fixture(scope="module")
def folded():
    torch.manual_seed(0)
    return foldexport.fold(network(), torch.zeros(1, *IMAGE))


@pytest.fixture
def expected(folded):
    example = (torch.zeros(1, *IMAGE),)
    levels = folded.certificate.rounding.levels
    return reference(folded.graph, example, ExportOptions(), levels=levels, device=HERE)


def tf32(graph, inputs, dtype, *, device):
    """Planted: every value keeps 11 digits, as TF32 does."""
    return own_run(graph, HALF["fp16"])(tuple(inputs))


def ten_times(graph, inputs, dtype, *, device):
    """As a GPU's fast convolutions may round: float64 with noise of ten times float32's."""
    exact = interpret.outputs(graph, inputs, torch.float64)
    generator = torch.Generator().manual_seed(int(1e6 * float(inputs[0].sum())) % 2**31)
    noise = 10 * LEVEL["n32"] * exact[0].abs().max()
    return [(exact[0] + noise * torch.randn(exact[0].shape, generator=generator, dtype=torch.float64)).float()]


LEVEL: dict[str, float] = {}


def test_both_are_measured_in_the_training_graph_s_noise(folded, expected):
    own, module = on_device.prove(folded.graph, folded.module, expected, levels=expected.levels)
    assert (own.format, module.format) == ("training graph", "folded module") and own.ok and module.ok
    assert own.runtime == module.runtime == f"torch {torch.__version__} on {HERE}" and own.device == module.device == HERE
    assert own.probes == module.probes == len(expected.inputs) and 0 < own.noise_multiple < 8
    assert all(a >= b for a, b in zip(expected.levels_there, expected.levels, strict=True))
    assert expected.levels_on(HERE) == expected.levels_there and expected.levels_on("cpu") == expected.levels


def test_the_noise_is_measured_where_there_is_no_certificate(folded, expected):
    own, _ = on_device.prove(folded.graph, folded.module, expected)
    assert own.ok and own.noise_multiple < 8


def test_tf32_is_noticed(folded, expected, monkeypatch):
    monkeypatch.setattr(on_device, "interpret", SimpleNamespace(outputs=tf32))
    said = rf"training graph.* times as far from float64 on {HERE} as on the cpu \(64 allowed\)"
    with pytest.raises(EquivalenceError, match=said):
        on_device.prove(folded.graph, folded.module, expected, levels=expected.levels)


def test_a_device_that_rounds_more_is_the_unit_there_and_only_there(folded, expected, monkeypatch, tmp_path):
    LEVEL["n32"] = expected.levels[0]
    monkeypatch.setattr(on_device, "interpret", SimpleNamespace(outputs=ten_times))
    own, there = on_device.training_graph(folded.graph, expected, expected.levels)
    monkeypatch.undo()
    assert own.ok and 5 < there[0] / expected.levels[0] < 15 and "that is the unit of what follows" in own.message
    assert 5 < own.noise_multiple < 25
    expected.levels_there = there
    TorchScriptExporter().export(folded.module, (torch.zeros(1, *IMAGE),), tmp_path / "net.pt")
    found = expected.compare(TorchScriptExporter(), tmp_path / "net.pt", folded.module)
    expected.levels_there = expected.levels
    assert found.noise_multiple < 0.5 * expected.compare(TorchScriptExporter(), tmp_path / "net.pt", None).noise_multiple


def test_a_runtime_with_a_device_of_its_own_is_measured_in_the_noise_there(folded, monkeypatch):
    """An engine runs on a GPU also where nobody asked for one."""
    example, levels = (torch.zeros(1, *IMAGE),), folded.certificate.rounding.levels
    expected = reference(folded.graph, example, ExportOptions(), levels=levels)
    LEVEL["n32"] = expected.levels[0]
    monkeypatch.setattr(on_device, "interpret", SimpleNamespace(outputs=ten_times))
    assert 5 < expected.levels_on(HERE)[0] / expected.levels[0] < 15 and expected.levels_on("cpu") == expected.levels
    monkeypatch.setattr(on_device, "interpret", SimpleNamespace(outputs=tf32))
    assert reference(folded.graph, example, ExportOptions(), levels=levels).levels_on(HERE) == levels  # no unit hides TF32
    if device.why_not("cuda"):
        assert expected.levels_on("cuda") == expected.levels


def test_a_wrong_module_is_named(folded, expected):
    wrong = copy.deepcopy(folded.module)
    with torch.no_grad():
        next(wrong.parameters()).view(-1)[0].add_(0.01)
    with pytest.raises(EquivalenceError, match="folded module, run by torch .*times the training graph's float32 noise"):
        on_device.prove(folded.graph, wrong, expected, levels=expected.levels)


def test_a_module_that_does_not_run_is_named(folded, expected):
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no kernel image is available")

    with pytest.raises(EquivalenceError, match="folded module.*does not run on an input of 1x3x8x8: no kernel image"):
        on_device.prove(folded.graph, Broken(), expected, levels=expected.levels)


def test_a_training_graph_that_does_not_run_is_named(folded, expected, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(on_device, "interpret", SimpleNamespace(outputs=fails))
    with pytest.raises(EquivalenceError, match="training graph.*does not run.*CUDA out of memory"):
        on_device.prove(folded.graph, folded.module, expected, levels=expected.levels)


def test_the_module_stays_where_it_is(folded):
    before = {name: (each, each.data_ptr()) for name, each in folded.module.named_parameters()}
    on_device.on(folded.module, "meta")
    assert all(each is before[name][0] and each.data_ptr() == before[name][1] for name, each in folded.module.named_parameters())
    assert not any(each.is_meta for each in folded.module.parameters())


def test_tensors_that_a_graph_makes_itself_are_made_there():
    class Makes(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((1,), 2.0))

        def forward(self, x):
            return x * torch.arange(4.0, device=torch.device("cpu")) * self.scale

    module = fx.symbolic_trace(Makes())
    if not any(device.named_in(node) for node in module.graph.nodes):  # traced to a constant
        node = next(each for each in module.graph.nodes if each.op == "call_function")
        with module.graph.inserting_before(node):
            made = module.graph.call_function(torch.arange, (4.0,), {"device": torch.device("cpu")})
        node.replace_input_with(node.args[1], made)
        module.recompile()
    moved = device.with_device(module, "meta")
    devices = {each.kwargs["device"] for each in moved.graph.nodes if "device" in each.kwargs}
    assert devices == {torch.device("meta")} and moved.scale is module.scale
    assert {each.kwargs["device"] for each in module.graph.nodes if "device" in each.kwargs} == {torch.device("cpu")}


class OnlyThere(TorchScriptExporter):
    """Planted: a runtime that is wrong on the device and right on the CPU."""

    def load(self, path, *, device="cpu", **more):
        run = super().load(path, device=device, **more)
        return run if device == "cpu" else lambda *arrays: [each * np.float32(1.001) for each in run(*arrays)]


def test_a_file_that_is_wrong_on_the_device_only(folded, expected, tmp_path):
    on_device.prove(folded.graph, folded.module, expected, levels=expected.levels)
    OnlyThere().export(folded.module, (torch.zeros(1, *IMAGE),), tmp_path / "net.pt")
    found = expected.compare(OnlyThere(), tmp_path / "net.pt", folded.module)
    assert not found.ok and found.device == HERE
    assert found.message.endswith("run on the cpu the file is right, so the difference is the device's")


# ---- the library and the command


def test_the_library(folded, tmp_path):
    made = foldexport.export(folded, "ts", tmp_path / "net.pt", device=HERE)
    assert [each.format for each in made.on_device] == ["training graph", "folded module"]
    assert made.comparison.device == HERE and made.comparison.runtime.endswith(f"on {HERE}")
    assert foldexport.export(folded, "ts", tmp_path / "other.pt").on_device == ()


def test_the_main_command_s_stages(tmp_path):
    question = pipeline.Question(command.save_dirac(tmp_path / "net.pth"))
    order = pipeline.Order(tuple(exporters.resolve("ts")), device=HERE, precision="fp16")
    done = pipeline.convert(question, order)
    record = done.manifest["device"]
    assert record["name"] == HERE and len(record["float32_noise"]) == 1
    assert [(each["format"], each["unit"]) for each in record["comparisons"]] == [
        ("training graph", "float32"), ("folded module", "fp16"),
    ]  # fmt: skip
    assert done.artifacts[0].comparison.device == HERE and f"run on {HERE}" in done.study.seconds
    from rich.console import Console

    from foldexport.report import console

    screen = Console(record=True, width=150, file=open("/dev/null", "w"))  # noqa: SIM115 - closed with the process
    console.outcome(screen, done)
    shown = " ".join(screen.export_text().split())
    assert f" on {HERE} " in shown and "✓ training graph torch" in shown and "✓ folded module torch" in shown
    checked = recheck.recheck(done.manifest_path, device=HERE)
    assert all(each.ok for each in checked) and checked[0].comparison.device == HERE


def test_on_the_cpu_nothing_is_added(tmp_path):
    question = pipeline.Question(command.save_dirac(tmp_path / "net.pth"))
    done = pipeline.convert(question, pipeline.Order(tuple(exporters.resolve("ts"))))
    assert "device" not in done.manifest and done.on_device == [] and done.artifacts[0].comparison.device == "cpu"


@pytest.mark.parametrize("measured", [False, True])
def test_verify_says_whose_noise_it_judges_by(measured, tmp_path, monkeypatch):
    """A file that rounds 200 times as much there as on the CPU, as far as anybody measured that before."""
    question = pipeline.Question(command.save_dirac(tmp_path / "net.pth"))
    done = pipeline.convert(question, pipeline.Order(tuple(exporters.resolve("ts")), device=HERE if measured else "cpu"))
    document = json.loads(done.manifest_path.read_text())
    noise = 200 * document["golden"]["n32"][0]
    if measured:
        document["device"]["float32_noise"] = [noise]
        done.manifest_path.write_text(json.dumps(document))
    place = recheck.placing.place

    def rough(*given):
        found = place(*given)
        run = lambda *arrays: [each + noise * np.abs(each).max() for each in found.run(*arrays)]  # noqa: E731
        return dataclasses.replace(found, run=run)

    monkeypatch.setattr(recheck.placing, "place", rough)
    (found,) = recheck.recheck(done.manifest_path, device=HERE)
    assert found.ok is measured
    assert measured or found.reason.endswith(f"since {HERE}'s is not in the manifest: --device cuda measures it at export")


def test_a_failure_there_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(on_device, "interpret", SimpleNamespace(outputs=tf32))
    question = pipeline.Question(command.save_dirac(tmp_path / "net.pth"))
    with pytest.raises(EquivalenceError, match="training graph") as caught:
        pipeline.convert(question, pipeline.Order(tuple(exporters.resolve("ts")), device=HERE))
    assert caught.value.exit_code == 4 and command.files(tmp_path) == ["net.pth"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_verify_without_a_gpu(tmp_path):
    (tmp_path / "net.manifest.json").write_text("{}")
    ran = command.foldexport("verify", tmp_path / "net.manifest.json", "--device", "cuda")
    assert ran.code == 5 and ran.message.startswith("--device cuda: ")
    with pytest.raises(MissingDependencyError, match="--device cuda: "):
        foldexport.export(foldexport.fold(network(), torch.zeros(1, *IMAGE)), "ts", tmp_path / "net.pt", device="cuda")

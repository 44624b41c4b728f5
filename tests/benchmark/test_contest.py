"""From files to records: real processes, the check in front of the timing, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import foldexport
from foldexport.benchmark import files, plan, processes
from foldexport.benchmark.contest import Case, Settings, check, hold
from foldexport.benchmark.runtimes import get
from foldexport.benchmark.worker import Task
from foldexport.errors import EquivalenceError, UsageError
from foldexport.exporters.onnx.exporter import OnnxExporter

QUICK = Settings(threads=1, seconds=0.02, rounds=3, processes=2)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(2)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("files")
    for name, seed in (("net", 0), ("other", 1)):
        OnnxExporter().export(network(seed), (torch.randn(2, 3, 8, 8),), made / f"{name}.onnx")
    return made


def case(*paths: Path, runtime: str = "onnxruntime") -> Case:
    return plan.of_files([(path, get(runtime)) for path in paths], plan.drawn([((2, 3, 8, 8), files.FLOAT)], 0))


def test_a_network_is_measured_against_itself(folder):
    found = hold(case(folder / "net.onnx", folder / "net.onnx"), QUICK)
    base, other = found.entries
    assert (base.name, other.name) == ("net.onnx", "net.onnx (2)") and base.ratio is None and other.ratio.processes == 2
    assert found.rounds == 6 and base.latency.runs == 6 and base.latency.p99_ms is None
    assert base.throughput_per_s == pytest.approx(2e3 / base.latency.median_ms)
    assert base.peak_memory_bytes > base.memory_above_libraries_bytes > 0 and base.file_bytes > 500
    assert other.max_error == 0 and base.operators >= 2 and found.batch == 2 and found.sizes == "2x3x8x8"
    json.dumps(found.to_dict())


def test_a_wrong_network_is_not_timed(folder):
    with pytest.raises(EquivalenceError, match=r"other.onnx, run by .* does not compute what net.onnx computes.*--rtol"):
        hold(case(folder / "net.onnx", folder / "other.onnx"), QUICK)


def test_the_check_is_against_the_training_graph_where_there_is_one(folder):
    wrong = Case(case(folder / "net.onnx").variants, [np.zeros((1, 3, 4, 4), np.float32)], 0, [torch.ones(1, 4, 4)], [1e-7])
    check(wrong, [[np.ones((1, 4, 4), np.float32)]], None)
    planted = np.ones((1, 4, 4), np.float32)
    planted[0, 2, 1] += 1e-4
    with pytest.raises(EquivalenceError, match="what the training graph computes, so it was not timed"):
        check(wrong, [[planted]], None)
    check(wrong, [[planted]], 1e-3)


@pytest.mark.parametrize(("times", "holds"), [(10, True), (1000, False)])
def test_on_a_gpu_the_unit_is_the_training_graph_s_noise_there(folder, times, holds):
    """Fast convolutions round more, in the unfolded network too; TF32 would be thousands of times as much."""
    levels, wanted = [1e-7], torch.ones(1, 4, 64, dtype=torch.float64)
    generator = np.random.default_rng(0)
    found = [[(1 + times * levels[0] * generator.standard_normal((1, 4, 64))).astype(np.float32)] for _ in range(2)]
    both = Case(case(folder / "net.onnx", folder / "net.onnx").variants, [np.zeros((1, 3, 4, 4), np.float32)], 0, [wanted], levels)
    with pytest.raises(EquivalenceError):
        check(both, found, None)
    if holds:
        check(both, found, None, "cuda")
        found[1][0][0, 2, 1] += 1e-4
    with pytest.raises(EquivalenceError, match=r"net\.onnx \(2\), run by" if holds else r"net\.onnx, run by"):
        check(both, found, None, "cuda")


def test_a_variant_that_does_not_run_is_named(folder, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    made = dataclasses.replace(case(folder / "net.onnx").variants[0], name="broken", file=broken)
    with pytest.raises(processes.VariantFailed, match="INVALID_PROTOBUF|Fail|InvalidProtobuf") as error:
        hold(Case([case(folder / "net.onnx").variants[0], made], [np.zeros((2, 3, 8, 8), np.float32)]), QUICK)
    assert error.value.variant == 1


def test_every_order_of_loading_comes_equally_often():
    task = Task([("a", "x"), ("b", "y")], [], "", "", "", "", 1, "cpu", 6.0, None, 0)
    made = processes.plan(task, 6, seed=1)
    assert sorted(each.order[0] for each in made) == [0, 0, 0, 1, 1, 1] and {each.seconds for each in made} == {1.0}
    assert len({each.seed for each in made}) == 6 and made == processes.plan(task, 6, seed=1)


def test_the_library_times_a_fold(folder):
    module = network()
    timing = foldexport.benchmark(
        foldexport.fold(module, torch.randn(1, 3, 8, 8)), ["onnxruntime"], batch=[1, 3], threads=1, rounds=3, processes=2
    )
    assert [each.batch for each in timing.measurements] == [1, 3]
    assert [entry.name for entry in timing.measurements[0].entries] == ["unfolded", "folded"]
    assert timing.measurements[0].entries[1].max_error < 1e-5 and "onnxruntime 3x3x8x8 folded:" in str(timing)
    document = timing.to_dict()
    assert document["settings"]["level"] == 0.99 and document["environment"]["tf32"] == "off"


def test_a_batch_that_the_network_does_not_have_is_refused():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x).reshape(2, -1)

    folded = foldexport.fold(Fixed().eval(), torch.randn(2, 3, 8, 8))
    with pytest.raises(UsageError, match="--batch 5: the network works at a batch of 2 only"):
        foldexport.benchmark(folded, ["onnxruntime"], batch=5, rounds=2, processes=2)


def test_inputs_are_read_from_files(folder, tmp_path):
    known = files.inputs(folder / "net.onnx")
    assert known == [((None, 3, 8, 8), np.dtype("float32"))]
    assert files.shapes(known, None, None, folder) == [(1, 3, 8, 8)] and files.shapes(known, None, 7, folder) == [(7, 3, 8, 8)]
    with pytest.raises(UsageError, match="takes [?]x3x8x8, not 1x3x9x9"):
        files.check(known, [(1, 3, 9, 9)], folder / "net.onnx")
    archive = tmp_path / "net.torchscript.pt"
    assert files.inputs(archive) is None
    with pytest.raises(UsageError, match="pass --input-shape"):
        files.shapes(None, None, None, archive)
    record = {"name": "x", "shape": ["batch", 3, 8, 8], "type": "float32"}
    (tmp_path / "net.manifest.json").write_text(json.dumps({"artifacts": [{"file": archive.name}], "inputs": [record]}))
    assert files.inputs(archive) == known
    assert [row.name for row in files.readers(archive)] == ["torchscript"]


def test_names_of_files_are_told_apart():
    paths = [Path("a/net.onnx"), Path("b/net.onnx"), Path("a/net.onnx")]
    assert plan.distinct(paths) == ["a/net.onnx", "b/net.onnx", "a/net.onnx (2)"]
    assert plan.distinct([Path("a/one.onnx"), Path("b/two.onnx")]) == ["one.onnx", "two.onnx"]
    assert plan.distinct([Path("/long/way/to/a/net.onnx"), Path("/long/way/to/b/net.onnx")]) == ["a/net.onnx", "b/net.onnx"]
    assert plan.distinct([Path("net.onnx"), Path("b/net.onnx"), Path("c.ort")]) == ["net.onnx", "b/net.onnx", "c.ort"]

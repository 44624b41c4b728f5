"""Runtimes of the formats: which file each reads, which are timed unasked, and that each computes the network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from foldexport import exporters
from foldexport.artifact import sha256
from foldexport.benchmark import files
from foldexport.benchmark.library import Wish, available, settings_of
from foldexport.benchmark.runtimes import RUNTIMES, get, missing, version
from foldexport.commands.bench import _is_checkpoint
from foldexport.errors import CheckpointError
from foldexport.exporters.aotinductor import compiler
from foldexport.exporters.web import node
from tests.exporters import networks
from tests.exporters.installed import need

ASKED_FOR = ("source", "pt2", "aotinductor", "onnxruntime-web", "executorch", "litert", "ncnn")
FILES = [
    ("source", "pytorch"), ("pt2", "pt2"), ("openvino", "openvino"), ("onnxruntime", "ort"), ("web", "web"),
    ("executorch", "executorch"), ("litert", "litert"), ("ncnn", "ncnn"),
]  # fmt: skip
READ = {
    "net.onnx": "onnxruntime", "net.ort": "onnxruntime", "net.xml": "openvino", "net.pt2": "pt2", "net.aoti.pt2": "aotinductor",
    "net.web.onnx": "onnxruntime-web", "net.torchscript.pt": "torchscript", "net.pte": "executorch", "net.tflite": "litert",
    "net.ncnn.param": "ncnn", "net.py": "source",
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_the_usual_runtime_of_a_file(name):
    assert files.readers(Path(name))[0].name == READ[name]


def test_a_program_alone_is_a_checkpoint_and_a_package_is_not():
    assert _is_checkpoint(Path("net.pt2"), {"arch": None}) and not _is_checkpoint(Path("net.aoti.pt2"), {"arch": None})


def test_some_are_timed_only_when_asked_for():
    rows, reasons = available(Wish(settings_of(1, "cpu", 1.0, None, 2, 0.99, 0, None)))
    assert not {*ASKED_FOR} & {*reasons, *(row.name for row in rows)} and {"eager", "onnxruntime"} <= {row.name for row in rows}
    assert [row.name for row in RUNTIMES.values() if not row.by_default] == [*ASKED_FOR]


def test_node_that_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(node.shutil, "which", lambda name: None)
    assert "npm install onnxruntime-web" in missing(get("web"), "cpu")


@pytest.mark.parametrize(("runtime", "format"), FILES)
def test_what_is_timed_is_the_network(runtime, format, tmp_path):
    row, wanted = get(runtime), exporters.get(format)
    if row.name == "onnxruntime-web" and (reason := missing(row, "cpu")):
        pytest.skip(reason)
    module, path = networks.chain(), tmp_path / f"net{wanted.suffix}"
    need(wanted.name).export(module, (torch.zeros(1, *networks.IMAGE),), path)
    (probe,) = networks.probes(networks.IMAGE, batches=(3,))
    ready = row.load(path, [probe[0].numpy()], 1, "cpu")
    for _ in range(2):
        found = ready.outputs(ready.run())
    assert len(found) == 1 and np.abs(found[0] - module(probe[0]).detach().numpy()).max() < 1e-6
    assert version(row).split()[-1][0].isdigit()


def test_a_package_that_no_manifest_names_is_not_timed(tmp_path):
    path = tmp_path / "net.aoti.pt2"
    path.write_bytes(b"anything")
    with pytest.raises(CheckpointError, match="executable code"):
        get("aoti").load(path, [], 1, "cpu")


def test_a_package_is_timed_beside_its_manifest(tmp_path):
    if compiler.lacks():
        pytest.skip(f"aotinductor {compiler.lacks()}")
    module, path = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval(), tmp_path / "net.aoti.pt2"
    exporters.exporter(exporters.get("aoti")).export(module, (torch.zeros(1, 3, 8, 8),), path)
    entry = {"file": path.name, "files": [{"name": path.name, "sha256": sha256(path)}], "notes": {}}
    (tmp_path / "net.manifest.json").write_text(json.dumps({"artifacts": [entry]}))
    x = torch.randn(2, 3, 8, 8)
    ready = get("aoti").load(path, [x.numpy()], 1, "cpu")
    assert np.abs(ready.outputs(ready.run())[0] - module(x).detach().numpy()).max() < 1e-6

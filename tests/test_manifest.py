"""The manifest: complete, relative, the same on every run, and refused where it is none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from foldexport import exporters, manifest, pipeline, recheck
from foldexport.errors import MissingDependencyError, UsageError
from foldexport.exporters import Format
from tests.command import files, save_dirac

KEYS = [
    "foldexport", "command", "checkpoint", "architecture", "preprocessing", "costs", "evaluated", "ledger",
    "certificate", "extremes", "inputs", "outputs", "precision", "artifacts", "tolerance",
    "probes_left_out", "golden", "versions", "seconds",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pipeline.Outcome:
    folder = tmp_path_factory.mktemp("manifest")
    checkpoint = save_dirac(folder / "small.pth")
    order = pipeline.Order(
        tuple(exporters.resolve("ts")), output=f"{folder}/out/", command=("foldexport", str(checkpoint))
    )
    return pipeline.convert(pipeline.Question(checkpoint), order)


def test_it_is_complete_and_strict_json(made):
    text = made.manifest_path.read_text(encoding="utf-8")
    document = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert list(document) == KEYS and text == manifest.dumps(document) and document == made.manifest
    assert document["checkpoint"]["sha256"] == _sha256(made.manifest_path.parents[1] / "small.pth")
    assert document["checkpoint"]["taken"] == "params + stats" and document["checkpoint"]["ema"] is False
    assert document["architecture"]["description"].startswith("DiracNet v2, CIFAR, depth 10")
    assert document["preprocessing"]["input_size"] == [3, 32, 32] and len(document["preprocessing"]["mean"]) == 3
    assert document["inputs"] == [{"name": "input", "shape": ["batch", 3, 32, 32], "type": "float32"}]
    assert document["outputs"] == [{"name": "output", "shape": ["batch", 10], "type": "float32"}]
    assert document["versions"]["torch"] == torch.__version__
    assert {entry["status"] for entry in document["ledger"]} == {"folded"} and document["certificate"]["ok"]


def test_artifacts_are_named_beside_it_with_their_digests(made):
    (entry,) = made.manifest["artifacts"]
    assert [each["name"] for each in entry["files"]] == [entry["file"]] == ["small.torchscript.pt"]
    path = made.manifest_path.parent / entry["file"]
    assert entry["files"][0] == {"name": path.name, "sha256": _sha256(path), "size_bytes": path.stat().st_size}
    assert entry["comparison"]["ok"] and entry["comparison"]["weights_identical"] == [16, 16]


def test_it_names_no_folder_of_this_machine(made):
    text = made.manifest_path.read_text(encoding="utf-8")
    assert str(made.manifest_path.parent.parent) not in text and made.manifest["command"] == ["foldexport", "small.pth"]


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("net.pth", "net.pth"),
        ("/home/me/net.pth", "net.pth"),
        ("../a/net.py:Net", "net.py:Net"),
        ("--arch=/home/me/net.py:Net", "--arch=net.py:Net"),
        ("build/", "build"),
        ("--to=onnx,ts", "--to=onnx,ts"),
        ("1x3x224x224", "1x3x224x224"),
        ("/home/a name/net.pth", "net.pth"),
    ],
)
def test_without_folders(word, wanted):
    assert manifest.without_folders(word) == wanted


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", '{"foldexport": {}}', '{"ok": true}'])
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match="manifest"):
        manifest.read(tmp_path / "x.json")


def test_missing_and_newer_manifests(tmp_path, made):
    with pytest.raises(UsageError, match="no such file"):
        manifest.read(tmp_path / "x.json")
    with pytest.raises(UsageError, match="manifest"):
        manifest.read(tmp_path)
    newer = {**made.manifest, "foldexport": {"version": "9.0", "schema": 99}}
    (tmp_path / "x.json").write_text(manifest.dumps(newer))
    with pytest.raises(UsageError, match="9.0, which is newer"):
        manifest.read(tmp_path / "x.json")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry: entry.pop("files"),
        lambda entry: entry.update(files=[]),
        lambda entry: entry.update(files=[{"name": "small.torchscript.pt"}]),
        lambda entry: entry["files"][0].update(name="../small.torchscript.pt"),
        lambda entry: entry.update(file="../other.pt"),
    ],
)
def test_a_spoilt_list_of_artifacts_is_refused(tmp_path, made, spoil):
    document = json.loads(manifest.dumps(made.manifest))
    spoil(document["artifacts"][0])
    path = tmp_path / "x.manifest.json"
    path.write_text(manifest.dumps(document))
    with pytest.raises(UsageError):
        recheck.recheck(path)
    assert files(tmp_path) == ["x.manifest.json"]


EDITS = {
    "no runs": (lambda document: document["golden"].update(runs=[]), "no runs"),
    "runs without outputs": (lambda document: [run.update(outputs=[]) for run in document["golden"]["runs"]], "no runs"),
    "no golden set": (lambda document: document.update(golden=None), "no golden inputs"),
    "values that are none": (lambda document: document["golden"]["runs"][0]["outputs"][0].update(values="?"), "was cut"),
    "noise of the peak": (lambda document: document["golden"].update(n32=[1.0]), "not the one that was measured"),
    "noise that is none": (lambda document: document["golden"].update(n32=["1"]), "no noise"),
    "noise without its proof": (lambda document: document.update(
        golden=document["golden"] | {"n32": [1.0]}, certificate=None), "above 1% of the peak"),
    "units of text": (lambda document: document["artifacts"][0]["comparison"].update(units={"0": "x"}), "wanted numbers per run"),
    "a number for the tolerance": (lambda document: document.update(tolerance=1), "its tolerance is 1"),
    "a tolerance of text": (lambda document: document.update(tolerance={"absolute": "x"}), "its tolerance is"),
    "another tolerance": (lambda document: document.update(tolerance={"rtol": 1.0}), "its tolerance is"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "said"), EDITS.values(), ids=EDITS)
def test_a_manifest_that_would_let_any_file_pass_is_refused(tmp_path, made, edit, said):
    document = json.loads(manifest.dumps(made.manifest))
    (tmp_path / "small.torchscript.pt").write_bytes((made.manifest_path.parent / "small.torchscript.pt").read_bytes())
    path = tmp_path / "small.manifest.json"
    path.write_text(manifest.dumps(document))
    assert [each.ok for each in recheck.recheck(path)] == [True]
    edit(document)
    path.write_text(manifest.dumps(document))
    with pytest.raises(UsageError, match=said):
        recheck.recheck(path)


def test_a_runtime_that_is_not_installed_does_not_keep_the_others_from_being_checked(made, tmp_path, monkeypatch):
    """It is named, with the command that installs it, and the exit code says that not all was proved."""
    document = json.loads(manifest.dumps(made.manifest))
    document["artifacts"].append({**document["artifacts"][0], "format": "pt2"})
    for name in ("small.torchscript.pt", "small.manifest.json"):
        (tmp_path / name).write_bytes((made.manifest_path.parent / name).read_bytes())
    (tmp_path / "small.manifest.json").write_text(manifest.dumps(document))
    plain = Format.missing
    monkeypatch.setattr(Format, "missing", lambda row: ["nowhere"] if row.name == "pt2" else plain(row))
    ran, left = recheck.recheck(tmp_path / "small.manifest.json")
    assert ran.comparison.ok and "nowhere is not installed" in left.unrun
    with pytest.raises(MissingDependencyError, match="1 of 2 artifacts could not be run here"):
        recheck.require([ran, left])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

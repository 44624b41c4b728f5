"""AOTInductor packages: compiled once here, then looked at from all sides, since a build takes half a minute."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from foldexport import exporters
from foldexport.artifact import sha256
from foldexport.errors import CheckpointError, EquivalenceError, MissingDependencyError, PrecisionError
from foldexport.exporters import get
from foldexport.exporters.aotinductor import compiler, package
from foldexport.exporters.aotinductor.exporter import AOTInductorExporter
from foldexport.exporters.options import ExportOptions
from tests.command import foldexport, save_plain
from tests.exporters import formats, networks
from tests.exporters.formats import EXAMPLE
from tests.exporters.networks import IMAGE

EXPORTER = AOTInductorExporter()


OF_TODAY = pytest.mark.skipif("needs PyTorch" in compiler.lacks(), reason=f"aotinductor {compiler.lacks()}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    if compiler.lacks():
        pytest.skip(f"aotinductor {compiler.lacks()}")
    module, path = formats.folded(), tmp_path_factory.mktemp("aoti") / "a telling name.aoti.pt2"
    return module, path, EXPORTER.export(module, EXAMPLE, path)


@pytest.fixture
def beside_manifest(made, tmp_path) -> Path:
    """A copy of the package beside a manifest that names its SHA-256."""
    path = tmp_path / "net.aoti.pt2"
    shutil.copy(made[1], path)
    entry = {"file": path.name, "files": [{"name": path.name, "sha256": sha256(path)}], "notes": {}}
    (tmp_path / "net.manifest.json").write_text(json.dumps({"artifacts": [entry]}))
    return path


def test_batches_one_and_three_with_every_weight(made):
    module, path, notes = made
    found = formats.found(EXPORTER, module, path)
    assert found.ok and not found.message and found.batches == (1, 3) and found.weights_identical == (8, 8), found
    assert (notes["inputs"], notes["outputs"]) == (["input"], ["output"])
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_no_path_no_date_no_name_inside(made):
    path = made[1]
    content = path.read_bytes()
    assert networks.local_traces(path) == [] and b"telling" not in content and package.PREFIX.encode() not in content
    assert b"torchinductor" not in content
    with zipfile.ZipFile(path) as archive:
        assert {each.date_time for each in archive.infolist()} == {package.EPOCH}
        assert not [each for each in archive.namelist() if each.endswith(".cpp")]


def test_same_bytes_from_another_process_and_folder(made, tmp_path):
    (other,) = formats.from_another_process(get("aoti"), tmp_path, formats.FOLDED_SCRIPT)
    assert other.read_bytes() == made[1].read_bytes()


@pytest.mark.parametrize("digest", ["caaa", "czzz"])
def test_the_order_of_sources_is_not_that_of_their_digests(digest):
    """A digest of the build folder's name is part of what a kernel's source is called."""
    sources = {f"{package.MODEL}{digest}.kernel.cpp": "// /tmp/build/x\nkernel", f"{package.MODEL}cmmm.wrapper.cpp": "wrapper"}
    assert package._stems(sources, "/tmp/build") == [digest, "cmmm"]


def test_code_for_avx2_at_most(made, tmp_path):
    """The exporting processor may have AVX-512, whose registers are called zmm."""
    if not shutil.which("objdump"):
        pytest.skip("objdump is not here")
    with zipfile.ZipFile(made[1]) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith(".so")]
        archive.extract(name, tmp_path)
    text = subprocess.run(["objdump", "-d", tmp_path / name], capture_output=True, text=True, check=True).stdout
    assert "%zmm" not in text and text.count("\n") > 1000


def test_a_wrong_weight_in_the_file_is_caught(made, tmp_path):
    module, path = made[0], tmp_path / "net.aoti.pt2"
    shutil.copy(made[1], path)
    right = module.get_parameter("body.3.weight").detach().numpy()
    wrong = right.copy()
    wrong.flat[5] *= np.float32(1 + 2**-20)
    formats.rewrite_zip(path, right.tobytes(), wrong.tobytes())
    (tmp_path / "net.manifest.json").write_text(
        json.dumps({"artifacts": [{"file": path.name, "files": [{"name": path.name, "sha256": sha256(path)}], "notes": {}}]})
    )
    found = formats.found(EXPORTER, module, path)
    assert not found.ok and "1 of 8 weights differ from the module's in their bits: body.3.weight" in found.message


def test_code_is_opened_only_beside_a_manifest_that_names_it(made, beside_manifest, tmp_path):
    (probe,) = networks.probes(IMAGE, batches=(2,))
    wanted = EXPORTER.load(made[1])(probe[0].numpy())[0]
    assert np.array_equal(AOTInductorExporter().load(beside_manifest)(probe[0].numpy())[0], wanted)
    with pytest.raises(CheckpointError, match="is in no manifest beside it .*executable code, so it is not opened"):
        AOTInductorExporter().load(made[1])
    beside_manifest.write_bytes(beside_manifest.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match="its SHA-256 differs from the one in its manifest"):
        AOTInductorExporter().load(beside_manifest)


def test_nothing_is_printed_by_loading(beside_manifest, capfd, recwarn):
    AOTInductorExporter().load(beside_manifest)
    assert capfd.readouterr() == ("", "") and not list(recwarn)


def test_files_of_other_formats(tmp_path):
    with zipfile.ZipFile(tmp_path / "net.aoti.pt2", "w") as archive:
        archive.writestr("network/version", "1")
    with pytest.raises(EquivalenceError, match="net.aoti.pt2 holds no table of its weights"):
        EXPORTER.weights(tmp_path / "net.aoti.pt2")


def test_an_older_pytorch_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.11.0+cu130")
    with pytest.raises(MissingDependencyError, match=r"aotinductor needs PyTorch 2\.13 or newer, this is 2\.11\.0\+cu130"):
        exporters.require_writable(get("aoti"))


@OF_TODAY
def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MissingDependencyError, match="aotinductor needs a C\\+\\+ compiler .*apt install g\\+\\+") as caught:
        exporters.require_writable(get("aoti"))
    assert caught.value.exit_code == 5
    (row,) = [each for each in exporters.status() if each.format.name == "aotinductor"]
    assert not row.works and "apt install g++" in row.reason
    checkpoint, arch = save_plain(tmp_path)
    result = foldexport(checkpoint, "--arch", arch, "--input-shape", "1x3x8x8", "--to", "aoti")
    assert result.code == 5 and "apt install g++" in result.message and len(list(tmp_path.glob("*.pt2"))) == 0


def test_int8_is_refused(tmp_path):
    with pytest.raises(PrecisionError, match="aotinductor is written in"):
        EXPORTER.export(networks.chain(4), EXAMPLE, tmp_path / "net.aoti.pt2", ExportOptions(precision="int8"))


def test_constants_with_strides_and_offsets_are_read_in_their_order():
    blob = torch.arange(12, dtype=torch.float32).numpy().tobytes()
    row = {"type": "float32", "shape": [3, 2], "stride": [1, 3], "bytes": [0, 48], "offset": 2}
    assert package._array(row, blob).tolist() == [[2, 5], [3, 6], [4, 7]]


@OF_TODAY
def test_a_compiler_that_fails_is_told(tmp_path):
    """What is called g++ here compiles nothing; in a process of its own, since Inductor remembers what a compiler could do."""
    (tmp_path / "g++").write_text("#!/bin/sh\n[ \"$1\" = --version ] && exec echo g++ 12\necho 'x.cpp:1: error: no' >&2\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    path = tmp_path / "net.aoti.pt2"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(formats.ROOT)}
    environment.pop("CXX", None)
    command = [sys.executable, "-c", formats.EXPORT_SCRIPT, "aotinductor", str(path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "MissingDependencyError: aotinductor: the C++ compiler fails: " in ran.stderr and not path.exists(), ran.stderr[-2000:]

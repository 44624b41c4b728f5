"""Core ML packages: written, not run here, and said so everywhere; read back bit for bit; the same bytes; folders put in place."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import foldexport
from foldexport import exporters
from foldexport.artifact import contents
from foldexport.errors import EquivalenceError, MissingDependencyError, PrecisionError, UsageError
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.weights import expected_weights, match_weights
from tests import command
from tests.exporters import formats, networks
from tests.exporters.formats import EXAMPLE
from tests.exporters.installed import need
from tests.exporters.networks import IMAGE
from tests.exporters.test_mobile import Layers

WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="on macOS packages are run, as every other format is")


@pytest.fixture(scope="module")
def folded():
    need("coreml")
    return foldexport.fold(formats.randomise(formats.Skip(), 5), EXAMPLE, certify=False)


@pytest.fixture(scope="module")
def made(folded, tmp_path_factory):
    return foldexport.export(folded, "coreml", tmp_path_factory.mktemp("coreml") / "a telling name.mlpackage")


def everything(package: Path) -> dict[str, bytes]:
    return {name.partition("/")[2]: each.read_bytes() for name, each in contents(package)}


def test_it_is_unproven_and_says_so(made):
    found = made.comparison
    assert found.not_run == "written, not run: Core ML runs on macOS only, and this is Linux"
    assert not found.proven and found.ok and str(found).startswith("– coreml")
    record = found.to_dict()
    assert record["proven"] is False and record["max_error"] is None and record["probes"] == 0


def test_its_weights_and_its_program_are_read_back(made):
    assert made.comparison.weights_identical == (8, 8)
    (said,) = made.comparison.instead
    assert said.startswith("its program computed here in float64: within ") and float(said.split()[-5]) < 1e-6


def test_files_and_digests_are_those_in_the_folder(made):
    assert sorted(made.sha256) == sorted(name for name, _ in contents(made.path)) and made.files == (made.path,)
    assert sorted(name.partition("/")[2] for name in made.sha256) == [
        "Data/com.apple.CoreML/model.mlmodel", str(WEIGHTS), "Manifest.json"
    ]  # fmt: skip


def test_same_bytes_from_another_process_and_nothing_printed(tmp_path, capfd, recwarn):
    exporter, path = need("coreml"), tmp_path / "net.mlpackage"
    capfd.readouterr()
    exporter.export(networks.chain(), EXAMPLE, path)
    assert capfd.readouterr() == ("", "") and not list(recwarn)
    (other,) = formats.from_another_process(exporters.get("coreml"), tmp_path)
    assert everything(path) == everything(other)


def test_no_path_no_date_no_name_inside(made):
    for _, each in contents(made.path):
        assert networks.local_traces(each) == [] and b"telling" not in each.read_bytes()
    assert b"conversion_date" not in (made.path / "Data/com.apple.CoreML/model.mlmodel").read_bytes()


def test_every_layer_is_computed_by_its_definition(tmp_path):
    exporter, module = need("coreml"), Layers().eval()
    notes = exporter.export(module, (torch.zeros(1, 3, 12, 12),), tmp_path / "net.mlpackage", ExportOptions())
    assert notes["batch"] == [1, 16] and "float64" in notes["instead_of_running"][0]
    assert match_weights(expected_weights(module), exporter.weights(tmp_path / "net.mlpackage")).ok


class TwoByTwo(networks.TwoByThree):
    def forward(self, image, vector):
        y, _, _ = super().forward(image, vector)
        return y.relu(), y.mean((2, 3))


def test_several_inputs_and_outputs_by_name(tmp_path):
    example = (torch.zeros(1, *IMAGE), torch.zeros(1, 5))
    options = ExportOptions(input_names=("image", "vector"), dynamic=())
    notes = need("coreml").export(TwoByTwo().eval(), example, tmp_path / "net.mlpackage", options)
    assert notes["inputs"] == ["image", "vector"] and notes["outputs"] == ["output_0", "output_1"]
    assert "float64" in notes["instead_of_running"][0]
    with pytest.raises(UsageError, match="coreml: output 'output_1' is 'image' itself, and a value has one name there"):
        need("coreml").export(networks.TwoByThree().eval(), example, tmp_path / "other.mlpackage", options)


def test_one_perturbed_weight_fails_the_export_and_leaves_nothing(folded, tmp_path, monkeypatch):
    kind = type(need("coreml"))
    first = next(name for name, value in folded.module.named_parameters() if value.dim() == 4)
    monkeypatch.setattr(kind, "export", _perturbing(kind.export, first))
    with pytest.raises(EquivalenceError, match="1 of 8 weights differ from the module's in their bits"):
        foldexport.export(folded, "coreml", tmp_path / "net.mlpackage")
    assert not list(tmp_path.iterdir())


def _perturbing(honest, name):
    def export(self, module, example, path, options=None):
        notes = honest(self, module, example, path, options)
        value = module.get_parameter(name).detach().reshape(-1)[0].item()
        after = np.nextafter(np.float32(value), np.float32(np.inf))
        formats.replace(Path(path) / WEIGHTS, struct.pack("<f", value), struct.pack("<f", after))
        return notes

    return export


def test_a_program_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    """A stride that the converter got wrong: no weight differs."""
    from foldexport.exporters.coreml import evaluate

    monkeypatch.setitem(evaluate.OPERATORS, "max_pool", lambda given: evaluate._pool(given, False) * 1.001)
    with pytest.raises(EquivalenceError, match="the program read back is .* of peak off from the folded module"):
        need("coreml").export(networks.chain(), EXAMPLE, tmp_path / "net.mlpackage")


def test_an_operator_that_is_not_computed_here_is_named(tmp_path, monkeypatch):
    from foldexport.exporters.coreml import evaluate

    monkeypatch.delitem(evaluate.OPERATORS, "max_pool")
    notes = need("coreml").export(networks.chain(), EXAMPLE, tmp_path / "net.mlpackage")
    assert notes["instead_of_running"] == ["its program was not computed here: max_pool is not known here"]


def test_fp16_is_in_the_package(folded, tmp_path):
    made = foldexport.export(folded, "coreml", tmp_path / "net.mlpackage", precision="fp16")
    exporter = need("coreml")
    assert exporter.precision_of(made.path) == {"float16": 4} and made.comparison.weights_identical == (8, 8)
    with pytest.raises(PrecisionError, match="coreml is written in fp32 or fp16, not bf16"):
        foldexport.export(folded, "coreml", tmp_path / "other.mlpackage", precision="bf16")


def test_what_it_cannot_leave_free(tmp_path):
    with pytest.raises(UsageError, match="coreml: cannot leave the width free"):
        need("coreml").export(networks.chain(), EXAMPLE, tmp_path / "net.mlpackage", ExportOptions(dynamic=("width",)))


def test_it_is_not_loaded_here(made):
    with pytest.raises(MissingDependencyError, match="cannot be run here: Core ML runs on macOS only"):
        need("coreml").load(made.path)


def test_a_broken_package_is_refused(made, tmp_path):
    broken = tmp_path / "net.mlpackage"
    shutil.copytree(made.path, broken)
    content = (broken / WEIGHTS).read_bytes()
    (broken / WEIGHTS).write_bytes(content[:100])
    with pytest.raises(EquivalenceError, match="the weight file ends before|has no weight at byte"):
        need("coreml").weights(broken)
    shutil.rmtree(broken / "Data")
    with pytest.raises(EquivalenceError, match="the package cannot be read"):
        need("coreml").weights(broken)


def test_the_command_and_verify(tmp_path):
    """Written with exit 0 and a dash; `verify`, which is to prove, ends with 5, and with 4 where a file in the folder changed."""
    need("coreml")
    checkpoint, arch = command.save_plain(tmp_path)
    words = (checkpoint, "--arch", arch, "--input-shape", "1x3x8x8", "--to", "coreml")
    ran = command.foldexport(*words, "-o", tmp_path / "net.mlpackage")
    assert ran.code == 0, ran.err
    said = " ".join(ran.out.split())
    assert "– coreml" in said and "✓ coreml" not in said and "not proven here: net.mlpackage; verify it" in said
    package, manifest = tmp_path / "net.mlpackage", tmp_path / "net.manifest.json"
    (entry,) = json.loads(manifest.read_text())["artifacts"]
    assert entry["file"] == "net.mlpackage" and entry["comparison"]["proven"] is False
    assert {each["name"] for each in entry["files"]} == {name for name, _ in contents(package)}
    again = command.foldexport(*words, "-o", package)
    assert again.code == 2 and "exists already: pass --overwrite" in again.message
    before = everything(package)
    assert command.foldexport(*words, "-o", package, "--overwrite").code == 0 and everything(package) == before
    checked = command.foldexport("verify", manifest)
    assert checked.code == 5 and "Core ML runs on macOS only" in " ".join(checked.err.split())
    (package / "Data" / "odd.bin").write_bytes(b"1")
    assert command.foldexport("verify", manifest).code == 4
    (package / "Data" / "odd.bin").unlink()
    formats.replace(package / "Manifest.json", b"CoreML Model Specification", b"CoreML Model Specificatioo")
    changed = command.foldexport("verify", manifest)
    assert changed.code == 4 and "net.mlpackage/Manifest.json differs from the manifest's" in " ".join(changed.out.split())

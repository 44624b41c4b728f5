"""A bundle proves itself in another place, and says what was changed in it."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from foldexport.bundle import CARD, GOLDEN, SUMS, VERIFY
from foldexport.exporters.torchscript.exporter import TorchScriptExporter
from foldexport.recheck import Checked, require
from tests.bundle.places import environment, here, verify
from tests.command import files, foldexport, save_dirac, save_plain

NAMES = ["README.md", "SHA256SUMS", "golden.npz", "small.manifest.json", "small.onnx", "small.torchscript.pt", "verify.py"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    result = foldexport(save_dirac(folder / "small.pth"), "--to", "onnx,ts", "--bundle", folder / "out")
    assert result.code == 0, result.err
    assert files(folder / "out") == NAMES and files(folder) == ["out", *(f"out/{name}" for name in NAMES), "small.pth"]
    return folder / "out"


@pytest.fixture(scope="module")
def lean(tmp_path_factory) -> Path:
    """A Python with numpy and onnxruntime alone, which starts in a moment."""
    return environment(tmp_path_factory.mktemp("lean"), "numpy", "onnxruntime")


@pytest.fixture
def moved(made, tmp_path) -> Path:
    """A copy in an empty folder."""
    return Path(shutil.copytree(made, tmp_path / "elsewhere"))


def repair(bundle: Path) -> None:
    """Checksums of the files as they are now, in the manifest and in SHA256SUMS: somebody who covers his tracks."""
    path = next(bundle.glob("*.manifest.json"))
    document = json.loads(path.read_text())
    for entry in document["artifacts"]:
        for each in entry["files"]:
            each["sha256"] = hashlib.sha256((bundle / each["name"]).read_bytes()).hexdigest()
    path.write_text(json.dumps(document))
    names = [line.split("  ")[1] for line in (bundle / SUMS).read_text().splitlines()]
    sums = [f"{hashlib.sha256((bundle / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (bundle / SUMS).write_text("".join(sums))


def plain(folder: Path, *more: object) -> tuple:
    """Words of a command on a tiny network of the user's own."""
    folder.mkdir(exist_ok=True)
    checkpoint, arch = save_plain(folder)
    return checkpoint, "--arch", arch, "--input-shape", "1x3x6x6", *more


def change_one_weight(path: Path) -> None:
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda each: len(each.raw_data))
    values = numpy_helper.to_array(weight).copy()
    values.flat[np.abs(values).argmax()] *= 1.001
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, path)


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


# ---- elsewhere


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_it_verifies_itself_where_there_is_one_runtime_only(moved, tmp_path, runtime):
    code, said = verify(environment(tmp_path, "numpy", runtime), moved)
    assert code == 0, said
    lines = said.splitlines()
    line = rf"ok +small\.onnx  {runtime} [\d.]+  max error \S+ of peak \([\d.]+x float32 noise\)  top-1 \d+/\d+"
    assert re.fullmatch(line, lines[0])
    assert lines[1] == "not run  small.torchscript.pt  its runtime is not installed: pip install torch"
    assert "1 of 2 artifacts ran, and all that ran agree" in lines[2] and len(lines) == 3
    assert files(moved) == NAMES


def test_without_a_runtime_and_without_numpy(moved, tmp_path):
    code, said = verify(environment(tmp_path, "numpy"), moved)
    assert code == 5 and "pip install onnxruntime or pip install openvino" in said and "none could be run here" in said
    code, said = verify(environment(tmp_path), moved)
    assert code == 5 and "numpy is not installed" in said


def test_every_runtime_that_is_here(moved):
    code, said = here(moved)
    assert code == 0 and "2 of 2 artifacts ran" in said
    result = foldexport("verify", moved)
    assert result.code == 0 and "✓ onnx" in result.out and "✓ torchscript" in result.out


# ---- changed


def test_one_changed_weight_is_told_by_its_checksum(moved, lean):
    change_one_weight(moved / "small.onnx")
    code, said = verify(lean, moved)
    assert code == 4 and "FAILED   small.onnx  small.onnx was changed" in said
    result = foldexport("verify", moved)
    assert result.code == 4 and "small.onnx was changed" in result.out and "✓ torchscript" in result.out


def test_one_changed_weight_is_told_by_its_outputs(moved, lean):
    change_one_weight(moved / "small.onnx")
    repair(moved)
    code, said = verify(lean, moved)
    assert code == 4 and re.search(r"FAILED +small.onnx +onnxruntime .* 8 times the noise are allowed", said), said
    result = foldexport("verify", moved)
    assert result.code == 4 and "(8 allowed)" in result.out


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (SUMS, VERIFY)])
def test_one_flipped_bit_anywhere(moved, lean, name):
    flip(moved / name)
    code, said = verify(lean, moved)
    assert code == 4 and f"{name} was changed: its SHA-256 is not the one in SHA256SUMS" in said
    result = foldexport("verify", moved)
    assert result.code == 4 and name in result.out + result.err


def test_a_changed_verify_py_is_told_by_foldexport(moved, lean):
    path = moved / VERIFY
    path.write_text(path.read_text().replace("ALLOWED = 8.0", "ALLOWED = 8e9"))
    result = foldexport("verify", moved)
    assert result.code == 4 and "verify.py was changed" in result.out
    assert verify(lean, moved)[0] == 4


def test_golden_outputs_that_were_changed(moved, lean):
    with np.load(moved / GOLDEN) as stored:
        arrays = dict(stored)
    arrays["run0_output0"] = arrays["run0_output0"] * (1 + 1e-4)
    np.savez(moved / GOLDEN, **arrays)
    code, said = verify(lean, moved)
    assert code == 4 and "golden.npz was changed" in said and "not run  small.onnx  golden.npz is not as it was" in said
    repair(moved)
    code, said = verify(lean, moved)
    assert code == 4 and "golden.npz" not in said and said.count("8 times the noise are allowed") == 1


def test_a_missing_file(moved, lean):
    (moved / "small.torchscript.pt").unlink()
    code, said = verify(lean, moved)
    assert code == 4 and "FAILED   small.torchscript.pt  small.torchscript.pt is missing" in said and "ok       small.onnx" in said
    result = foldexport("verify", moved)
    assert result.code == 4 and "small.torchscript.pt is missing" in result.out


def test_what_is_no_bundle(moved, lean, tmp_path):
    (moved / SUMS).unlink()
    code, said = verify(lean, moved)
    assert code == 2 and "is no bundle" in said
    (tmp_path / "empty").mkdir()
    result = foldexport("verify", tmp_path / "empty")
    assert result.code == 2 and "is no bundle: wanted one NAME.manifest.json" in result.message


def test_a_bundle_is_made_for_several_machines():
    ran, unrun = Checked("onnx", "a.onnx"), Checked("tensorrt", "a.engine", unrun="no GPU")
    require([ran, unrun], every=False)
    with pytest.raises(Exception, match="1 of 1 artifacts could not be run here") as caught:
        require([unrun], every=False)
    assert caught.value.exit_code == 5


# ---- the zip


def test_a_zip_has_the_same_bytes_again_and_is_verified(tmp_path):
    words = plain(tmp_path, "--to", "ts")
    for name in ("a", "b"):
        done = foldexport(*words, "--bundle", tmp_path / name / "net.zip")
        assert done.code == 0 and files(tmp_path / name) == ["net.zip"] and "net.zip" in done.out
    first, second = ((tmp_path / name / "net.zip").read_bytes() for name in "ab")
    assert first == second
    with zipfile.ZipFile(tmp_path / "a" / "net.zip") as archive:
        assert archive.namelist() == sorted(archive.namelist()) and "net/net.torchscript.pt" in archive.namelist()
        assert {each.date_time for each in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        archive.extractall(tmp_path / "unpacked")
    code, said = here(tmp_path / "unpacked" / "net")
    assert code == 0, said
    result = foldexport("verify", tmp_path / "a" / "net.zip")
    assert result.code == 0 and "✓ torchscript" in result.out
    shutil.copy(tmp_path / "a" / "net.zip", tmp_path)
    flip(tmp_path / "net.zip", 0.3)
    result = foldexport("verify", tmp_path / "net.zip")
    assert result.code == 4 and "net.zip: cannot be unpacked" in result.message


def test_a_zip_whose_names_lead_out_of_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("../out.txt", "x")
    result = foldexport("verify", tmp_path / "bad.zip")
    assert result.code == 3 and "leads out of it" in result.message and files(tmp_path) == ["bad.zip"]


# ---- put in place whole or not at all


def test_what_exists_is_refused_without_overwrite(tmp_path):
    checkpoint = save_dirac(tmp_path / "small.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "net.zip").write_text("mine")
    for name in ("out", "net.zip"):
        result = foldexport(checkpoint, "--to", "ts", "--bundle", tmp_path / name)
        assert result.code == 2 and "exists already" in result.message


@pytest.mark.parametrize("kind", ["foreign", "sums", "file", "zip"])
def test_overwrite_replaces_no_folder_of_somebody_else(tmp_path, kind):
    checkpoint, target = save_dirac(tmp_path / "small.pth"), tmp_path / ("net.zip" if kind == "zip" else "out")
    if kind in ("file", "zip"):
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
        if kind == "sums":
            (target / SUMS).write_text("0  thesis.txt\n")
    before = files(tmp_path)
    result = foldexport(checkpoint, "--to", "ts", "--bundle", target, "--overwrite")
    assert result.code == 2 and "so it is never replaced" in result.message and files(tmp_path) == before


def test_overwrite_replaces_a_bundle_and_nothing_that_was_added(moved, tmp_path):
    words = plain(tmp_path, "--to", "ts", "--bundle", moved, "--overwrite")
    (moved / "notes.txt").write_text("mine")
    result = foldexport(*words)
    assert result.code == 2 and "holds notes.txt, which is not of the bundle" in result.message
    (moved / "notes.txt").unlink()
    assert foldexport(*words).code == 0
    assert files(moved) == [CARD, SUMS, GOLDEN, "net.manifest.json", "net.torchscript.pt", VERIFY]


def test_a_proof_that_fails_leaves_the_old_bundle(moved, tmp_path, monkeypatch):
    def spoilt(self, module, example, path, options=None):
        wrong = copy.deepcopy(module)
        with torch.no_grad():
            next(wrong.parameters()).view(-1)[0].mul_(1 + 1e-6)
        return original(self, wrong, example, path, options)

    def content():
        return {path: (tmp_path / path).read_bytes() for path in files(tmp_path) if (tmp_path / path).is_file()}

    original, words = TorchScriptExporter.export, plain(tmp_path, "--to", "ts")
    before, names = content(), files(tmp_path)
    monkeypatch.setattr(TorchScriptExporter, "export", spoilt)
    for place in (["--bundle", moved, "--overwrite"], ["--bundle", tmp_path / "new" / "net.zip"]):
        result = foldexport(*words, *place)
        assert result.code == 4 and "differ" in result.message
        assert content() == before and files(tmp_path) == names


def test_refused_before_any_work(tmp_path):
    result = foldexport(tmp_path / "none.pth", "--to", "ts", "--bundle", tmp_path / "out", "-o", tmp_path / "x")
    assert result.code == 2 and "leave one of the two out" in result.message
    result = foldexport(tmp_path / "verify.pth", "--to", "pytorch", "--bundle", tmp_path / "out")
    assert result.code == 2 and "has a verify.py of its own" in result.message
    assert files(tmp_path) == []


# ---- what golden inputs there are


def test_large_outputs_are_thinned_alike(tmp_path, lean):
    checkpoint, arch = save_plain(tmp_path)
    words = ["--arch", arch, "--input-shape", "1x3x40x40", "--to", "onnx"]
    result = foldexport(checkpoint, *words, "--bundle", tmp_path / "out")
    assert result.code == 0, result.err
    with np.load(tmp_path / "out" / GOLDEN) as stored:
        assert int(stored["step"]) > 1 and list(stored["run1_shape0"]) == [3, 6, 1444]
        assert stored["run0_output0"].shape == (-(-6 * 1444 // int(stored["step"])) + 1,)
    code, said = verify(lean, tmp_path / "out")
    own = json.loads(foldexport("verify", tmp_path / "out", "--json").out)["artifacts"][0]["comparison"]
    assert code == 0 and f"({own['noise_multiple']:.1f}x float32 noise)" in said
    change_one_weight(tmp_path / "out" / "net.onnx")
    repair(tmp_path / "out")
    assert verify(lean, tmp_path / "out")[0] == 4


INTEGERS = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.conv, self.norm = nn.Embedding(11, 4), nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)

    def forward(self, words):
        return self.norm(self.conv(self.table(words).transpose(1, 2))).relu().mean(2)
"""


def test_inputs_that_no_seed_draws_are_in_the_bundle(tmp_path):
    checkpoint, arch = save_plain(tmp_path, INTEGERS)
    np.savez(tmp_path / "data.npz", words=np.arange(40, dtype=np.int64).reshape(5, 8) % 11)
    words = [checkpoint, "--arch", arch, "--data", tmp_path / "data.npz", "--to", "onnx,ts"]
    result = foldexport(*words, "--bundle", tmp_path / "out")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "out" / "net.manifest.json").read_text())["golden"] is None
    code, said = here(tmp_path / "out")
    assert code == 0 and "2 of 2 artifacts ran" in said, said
    assert "max error" in foldexport("verify", tmp_path / "out").out
    change_one_weight(tmp_path / "out" / "net.onnx")
    repair(tmp_path / "out")
    assert here(tmp_path / "out")[0] == foldexport("verify", tmp_path / "out").code == 4


@pytest.mark.parametrize("words", [["fp16", "--half-io"], ["bf16"]])
def test_half_precision(tmp_path, words):
    result = foldexport(*plain(tmp_path, "--to", "onnx,ts", "--bundle", tmp_path / "out", "--precision", *words))
    assert result.code == 0, result.err
    code, said = here(tmp_path / "out")
    assert code == 0 and f"x {words[0]} noise" in said, said


def test_a_tolerance_of_the_user_goes_with_it(tmp_path, lean):
    assert foldexport(*plain(tmp_path, "--to", "onnx", "--rtol", "1e-2", "--bundle", tmp_path / "out")).code == 0
    change_one_weight(tmp_path / "out" / "net.onnx")
    repair(tmp_path / "out")
    code, said = verify(lean, tmp_path / "out")
    assert code == 0 and float(re.search(r"\(([\d.]+)x", said)[1]) > 8, said
    path = tmp_path / "out" / "net.manifest.json"
    path.write_text(path.read_text().replace('"relative": 0.01', '"relative": 1e-7'))
    repair(tmp_path / "out")
    code, said = verify(lean, tmp_path / "out")
    assert code == 4 and "output 0 differs by" in said, said


def test_the_card_says_how_it_was_proven(made):
    text = (made / CARD).read_text()
    for words in ("# small", "pip install numpy onnxruntime\npython verify.py", "bit-identical", "`airplane`", "| `small.onnx` |"):
        assert words in text, words
    assert str(made) not in text and "foldexport small.pth --to onnx,ts --bundle out" in text


def test_the_checkpoint_s_own_card_is_taken_in(tmp_path):
    words = plain(tmp_path, "--to", "ts", "--bundle", tmp_path / "out")
    (tmp_path / "small.png").write_bytes(b"picture")
    (tmp_path / "net.md").write_text(
        "# Mine\n\nSee [the recipe](../train.py) and [a paper](https://example.org).\n\n![curve](small.png)\n![gone](no.png)\n\n"
        "```\n# [kept](as/it/is)\n```\n"
    )
    assert foldexport(*words).code == 0
    text = (tmp_path / "out" / CARD).read_text()
    assert "### Mine" in text and "See the recipe and [a paper](https://example.org)." in text and "*gone*" in text
    assert "![curve](small.png)" in text and "# [kept](as/it/is)" in text
    assert (tmp_path / "out" / "small.png").read_bytes() == b"picture"
    assert here(tmp_path / "out")[0] == 0

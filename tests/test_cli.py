"""The command line end to end: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from foldexport import exporters
from foldexport.artifact import sha256
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.fold.rebuild import rebuild
from tests.command import PLAIN, Result, files, foldexport, save_dirac, save_plain, tiny

HEAVY = ("torch", "onnx", "onnxruntime", "rich", "numpy", "safetensors")


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> tuple[Path, Result]:
    """One export to both formats, shared: (folder, result)."""
    folder = tmp_path_factory.mktemp("exported")
    result = foldexport(save_dirac(folder / "small.pth"), "--to", "onnx,ts")
    assert result.code == 0, result.err
    return folder, result


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    """The exported folder, to be spoilt."""
    return Path(shutil.copytree(exported[0], tmp_path / "copy"))


# ---- help


@pytest.mark.parametrize("words", [["--help"], [], ["inspect", "--help"], ["formats", "-h"], ["--version"]])
def test_help_and_version_import_nothing_heavy(words):
    code = (
        "import sys; from foldexport.cli import main; code = main(sys.argv[1:]);"
        f"print(code, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []" and not done.stderr


def test_help_names_every_command_and_option():
    shown = foldexport("--help").out
    assert foldexport().out == shown and foldexport("net.pth", "--help").out == shown
    options = (
        "--to -o, --output --arch --arch-arg --input-shape --dynamic --precision --opset --device --no-fold --data --chain"
    )
    options += (
        " --seed --atol --rtol --json --quiet --overwrite --trust-pickle --ema --debug --input-name --output-name"
    )
    options += " --half-io --max-drop"
    for word in [*options.replace(",", "").split(), "inspect", "bench", "verify", "formats"]:
        assert word in shown, word
    assert max(map(len, shown.splitlines())) <= 80


def test_version_is_the_package_s():
    import foldexport as package

    assert foldexport("--version").out == f"foldexport {package.__version__}\n"


def test_misspelt_command_and_option():
    assert "did you mean: foldexport inspect?" in foldexport("inspct", "net.pth").message
    assert "--overwrite" in foldexport("net.pth", "--to", "onnx", "--overwrit").message


def test_format_is_asked_for():
    result = foldexport("net.pth")
    assert result.code == 2 and "--to onnx" in result.message


def test_checkpoint_named_as_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_dirac(tmp_path / "formats")
    assert "torchscript" in foldexport("formats").out
    assert "DiracNet" in foldexport("inspect", "./formats").out
    assert foldexport("./formats", "--to", "ts").code == 0 and (tmp_path / "formats.torchscript.pt").exists()


# ---- formats


def test_formats():
    shown = foldexport("formats").out
    assert "NAME.onnx" in shown and "NAME.torchscript.pt" in shown and f"onnxruntime {onnxruntime.__version__}" in shown
    document = foldexport("formats", "--json").document
    assert [row["name"] for row in document["formats"]] == list(exporters.FORMATS) and document["ok"]


def test_formats_tells_what_to_install(monkeypatch):
    row = replace(exporters.FORMATS["onnx"], packages=("torch", "surely_not_there"), extra="onnx")
    monkeypatch.setitem(exporters.FORMATS, "onnx", row)
    assert "pip install 'foldexport[onnx]'" in foldexport("formats").out


def test_closed_pipe_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "foldexport", "formats"]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert "Traceback" not in done.stderr and "bug" not in done.stderr


# ---- the main command


def test_golden_path_files_and_console(exported):
    folder, result = exported
    assert files(folder) == ["small.manifest.json", "small.onnx", "small.pth", "small.torchscript.pt"]
    for words in (
        "small.pth is DiracNet v2, CIFAR, depth 10", "recognised by", "params + stats",
        "7 batch norms folded into 7 layers", "6 DiracConv2d weights evaluated", "✓ float64", "✓ onnx",
        f"onnxruntime {onnxruntime.__version__}", "✓ torchscript",
        "of peak (", "× float32 noise)", "weights 16/16 identical", "top-1 ", "small.onnx", "kB",
        "next: foldexport verify",
    ):  # fmt: skip
        assert words in result.out, words
    assert result.err == ""
    assert not any(line != line.rstrip() for line in result.out.splitlines())


def test_artifacts_compute_what_the_training_graph_does(exported):
    folder, _ = exported
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        wanted = tiny()(x).numpy()
        scripted = torch.jit.load(str(folder / "small.torchscript.pt"))(x).numpy()
    session = onnxruntime.InferenceSession(str(folder / "small.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(["output"], {"input": x.numpy()})
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(scripted, wanted, atol=1e-5 * np.abs(wanted).max())
    kinds = {node.op_type for node in onnx.load(folder / "small.onnx").graph.node}
    assert kinds <= {"Conv", "Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "Flatten", "Reshape", "Gemm"}


def test_eighty_columns(copy, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = foldexport(copy / "small.pth", "--to", "ts", "--overwrite").out
    assert all(len(line) <= 80 or line.startswith("next: ") or str(copy) in line for line in shown.splitlines())
    assert "✓ torchscript" in shown


def test_json_is_one_document_and_the_rest_goes_to_stderr(tmp_path):
    checkpoint, arch = save_plain(tmp_path, "print('hello')\n" + PLAIN)
    result = foldexport(checkpoint, "--arch", arch, "--input-shape", "1x3x6x6", "--to", "ts", "--json")
    assert result.code == 0 and result.document["ok"]
    assert [Path(each).name for each in result.document["files"]] == ["net.torchscript.pt"]
    assert result.document["certificate"]["ok"] and result.document["artifacts"][0]["comparison"]["ok"]
    assert "hello" in result.err and "✓ torchscript" in result.err


def test_json_of_an_error():
    result = foldexport("missing.pth", "--to", "onnx", "--json")
    assert result.code == 3 and not result.document["ok"] and result.document["error"]["exit_code"] == 3
    assert "missing.pth" in result.document["error"]["message"] and "missing.pth" in result.message


def test_quiet(tmp_path):
    result = foldexport(save_dirac(tmp_path / "small.pth"), "--to", "ts", "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_same_bytes_again(exported, tmp_path):
    folder, _ = exported
    assert foldexport(save_dirac(tmp_path / "small.pth"), "--to", "onnx,ts", "-o", f"{tmp_path}/made/it/").code == 0
    again = tmp_path / "made" / "it"
    for name in ("small.onnx", "small.torchscript.pt"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    first, second = (json.loads((each / "small.manifest.json").read_text()) for each in (folder, again))
    for each in (first, second):
        del each["seconds"], each["command"], each["checkpoint"]["sha256"]
    assert first == second


def test_user_s_network_is_put_into_eval_mode_and_told(tmp_path):
    checkpoint, arch = save_plain(tmp_path)
    result = foldexport(checkpoint, "--arch", arch, "--arch-arg", "width=4", "--input-shape", "2x3x6x6", "--to", "ts",
                        "--input-name", "image", "--output-name", "scores", "--dynamic", "none")  # fmt: skip
    assert result.code == 0, result.err
    assert "called .eval(): Net came in train mode" in result.out and "is Net(width=4)" in result.out
    manifest = json.loads((tmp_path / "net.manifest.json").read_text())
    assert manifest["inputs"] == [{"name": "image", "shape": [2, 3, 6, 6], "type": "float32"}]
    assert manifest["outputs"] == [{"name": "scores", "shape": [2, 6, 16], "type": "float32"}]


def test_free_height_and_width(tmp_path):
    checkpoint, arch = save_plain(tmp_path)
    result = foldexport(checkpoint, "--arch", arch, "--input-shape", "1x3x6x6", "--to", "onnx", "--opset", "17",
                        "--dynamic", "batch,height,width", "-o", tmp_path / "free.onnx")  # fmt: skip
    assert result.code == 0, result.err
    session = onnxruntime.InferenceSession(str(tmp_path / "free.onnx"), providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": np.zeros((3, 3, 9, 7), np.float32)})[0].shape == (3, 6, 35)
    assert onnx.load(tmp_path / "free.onnx").opset_import[0].version == 17
    assert (tmp_path / "free.manifest.json").exists()


def test_no_fold(tmp_path):
    result = foldexport(save_dirac(tmp_path / "small.pth"), "--to", "ts", "--no-fold")
    assert result.code == 0 and "not folded, as asked" in result.out and "✓ torchscript" in result.out
    assert json.loads((tmp_path / "small.manifest.json").read_text())["ledger"] is None


def test_own_data(tmp_path):
    checkpoint = save_dirac(tmp_path / "small.pth")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(10, 3, 32, 32)).astype(np.float32))
    result = foldexport(checkpoint, "--to", "ts", "--data", tmp_path / "data.npz", "--json")
    assert result.code == 0 and "data" in [probe["name"] for probe in result.document["certificate"]["probes"]]
    assert result.document["artifacts"][0]["comparison"]["batches"][5:7] == [8, 2]


def test_folder_of_images(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pillow reads the images")
    checkpoint, images = save_dirac(tmp_path / "small.pth"), tmp_path / "images" / "cats"
    images.mkdir(parents=True)
    for name, size in (("a.png", (32, 32)), ("b.jpg", (50, 40))):
        image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(images / name)
    result = foldexport("inspect", checkpoint, "--data", tmp_path / "images", "--json")
    assert result.code == 0, result.err
    assert {"name": "data", "shapes": [[2, 3, 32, 32]]} in result.document["certificate"]["probes"]


def test_tolerance_of_the_user_is_kept_and_printed(tmp_path):
    checkpoint = save_dirac(tmp_path / "small.pth")
    result = foldexport(checkpoint, "--to", "ts", "--rtol", "1e-12")
    assert result.code == 4 and "allowed: 1e-12 of peak" in result.message and files(tmp_path) == ["small.pth"]
    assert foldexport(checkpoint, "--to", "ts", "--rtol", "1e-3").code == 0
    manifest = json.loads((tmp_path / "small.manifest.json").read_text())
    assert manifest["tolerance"] == {"absolute": 0.0, "relative": 1e-3}
    assert foldexport("verify", tmp_path / "small.manifest.json").code == 0


def test_a_mistake_of_the_fold_leaves_no_file(tmp_path, monkeypatch):
    def wrong(folded):
        rebuilt = rebuild(folded)
        with torch.no_grad():
            next(rebuilt.program.module.parameters()).view(-1)[0].mul_(1 + 1e-6)
        return rebuilt

    monkeypatch.setattr("foldexport.api.rebuild", wrong)
    result = foldexport(save_dirac(tmp_path / "small.pth"), "--to", "onnx,ts")
    assert result.code == 4 and "features.conv" in result.message and files(tmp_path) == ["small.pth"]


# ---- endings


class Spoilt(OnnxExporter):
    """Raises what it is told when it is to write."""

    error: BaseException

    def export(self, module, example, path, options=None, **more):
        Path(path).write_bytes(b"half")
        raise self.error


@pytest.fixture
def spoil(monkeypatch):
    def plant(error):
        monkeypatch.setattr(Spoilt, "error", error, raising=False)
        monkeypatch.setattr("foldexport.exporters.exporter", lambda row: Spoilt())

    return plant


def test_a_mistake_of_ours_is_one_line_unless_debugged(tmp_path, spoil):
    spoil(ZeroDivisionError("planted"))
    checkpoint = save_dirac(tmp_path / "small.pth")
    result = foldexport(checkpoint, "--to", "onnx")
    assert result.code == 1 and "this is a bug of ours: ZeroDivisionError: planted" in result.message
    assert "--debug" in result.message and files(tmp_path) == ["small.pth"]
    debugged = foldexport(checkpoint, "--to", "onnx", "--debug")
    assert debugged.code == 1 and "Traceback" in debugged.err


def test_interrupt_leaves_nothing(tmp_path, spoil):
    spoil(KeyboardInterrupt())
    result = foldexport(save_dirac(tmp_path / "small.pth"), "--to", "onnx", "-o", tmp_path / "made")
    assert result.code == 130 and files(tmp_path) == ["small.pth"] and "interrupted" in result.err


def test_kill_leaves_nothing(tmp_path, monkeypatch):
    checkpoint, before = save_dirac(tmp_path / "small.pth"), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(OnnxExporter, "export", lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        foldexport(checkpoint, "--to", "onnx")
    assert ended.value.code == 143 and files(tmp_path) == ["small.pth"] and signal.getsignal(signal.SIGTERM) is before


# ---- inspect


def test_inspect_writes_nothing(tmp_path):
    result = foldexport("inspect", save_dirac(tmp_path / "small.pth"))
    assert result.code == 0 and files(tmp_path) == ["small.pth"]
    for words in ("is DiracNet v2, CIFAR, depth 10", "features.group2.block1.bn", "batch norm", "✓ float64"):
        assert words in result.out, words
    document = foldexport("inspect", tmp_path / "small.pth", "--json").document
    assert document["architecture"]["name"] == "DiracNet" and len(document["ledger"]) == 8  # 7 batch norms and a repeated ReLU


# ---- verify


def test_verify(exported):
    folder, _ = exported
    result = foldexport("verify", folder / "small.manifest.json")
    assert result.code == 0 and "✓ onnx" in result.out and "✓ torchscript" in result.out
    assert foldexport("verify", folder / "small.manifest.json", "--json").document["ok"]


@pytest.mark.parametrize("name", ["small.onnx", "small.torchscript.pt"])
def test_verify_sees_one_changed_byte(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    result = foldexport("verify", copy / "small.manifest.json")
    assert result.code == 4 and name in result.message and "SHA-256" in result.out
    shown = foldexport("verify", copy / "small.manifest.json", "--json")
    assert shown.code == 4 and not shown.document["ok"]


def test_verify_sees_another_network_behind_a_forged_digest(copy, tmp_path):
    network, other = tiny(), tmp_path / "other"
    with torch.no_grad():
        network.features.group0.block0.bn.bias[0] += 1e-3
    other.mkdir()
    assert foldexport(save_dirac(other / "small.pth", network), "--to", "ts").code == 0
    shutil.copy(other / "small.torchscript.pt", copy)
    manifest = json.loads((copy / "small.manifest.json").read_text())
    manifest["artifacts"][1]["files"][0]["sha256"] = sha256(copy / "small.torchscript.pt")
    (copy / "small.manifest.json").write_text(json.dumps(manifest))
    result = foldexport("verify", copy / "small.manifest.json")
    assert result.code == 4 and "✗ torchscript" in result.out and "✓ onnx" in result.out


def test_verify_without_the_file_and_without_the_runtime(copy, monkeypatch):
    (copy / "small.onnx").unlink()
    result = foldexport("verify", copy / "small.manifest.json")
    assert result.code == 4 and "small.onnx is not beside" in result.out and "✓ torchscript" in result.out
    assert foldexport("verify", copy / "small.manifest.json", "--format", "ts").code == 0
    row = replace(exporters.FORMATS["torchscript"], packages=("surely_not_there",), extra="torchscript")
    monkeypatch.setitem(exporters.FORMATS, "torchscript", row)
    result = foldexport("verify", copy / "small.manifest.json", "--format", "ts")
    assert result.code == 5 and "pip install 'foldexport[torchscript]'" in result.message

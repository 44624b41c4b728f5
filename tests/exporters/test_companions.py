"""Formats of two files: both are planned, checked, placed, digested, verified and timed; neither ever costs the user a file."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import foldexport as library
from foldexport import artifact, destination, exporters
from foldexport.benchmark import files as bench_files
from foldexport.benchmark.plan import beside
from foldexport.errors import UsageError
from foldexport.exporters import get, named, resolve
from tests.command import files, foldexport, save_plain

IR = get("openvino")


def export(folder: Path, *more: object, to: str = "openvino"):
    checkpoint, arch = save_plain(folder)
    return foldexport(checkpoint, "--arch", arch, "--input-shape", "1x3x8x8", "--to", to, *more)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ir")
    result = export(folder)
    assert result.code == 0, result.err
    return folder


# ---- names


def test_companions_have_the_base_name():
    assert IR.beside("runs/net.xml") == (Path("runs/net.bin"),) and IR.file_names == "NAME.xml + NAME.bin"
    assert get("onnx").beside("anything.foo") == () and get("onnx").file_names == "NAME.onnx"


@pytest.mark.parametrize(("wrong", "wanted"), [("net.bin", "net.xml"), ("net.ir", "net.xml"), ("a.b.bin", "a.b.xml")])
def test_another_name_is_refused_with_the_right_one(wrong, wanted):
    with pytest.raises(UsageError, match=f"openvino is NAME.xml and NAME.bin, found by these names: wanted {wanted}"):
        destination.plan(Path("net.pth"), wrong, [IR])
    row = dataclasses.replace(IR, suffix=".ncnn.param", companions=(".ncnn.bin",))
    with pytest.raises(UsageError, match="wanted net.ncnn.param"):
        row.beside("net.ncnn.bin")


def test_the_longest_suffix_names_the_format():
    assert named("net.aoti.pt2").name == "aotinductor" and named("net.pt2").name == "pt2"
    assert named("net.web.onnx").name == "onnxruntime-web" and named("net.pth") is None
    with pytest.raises(UsageError, match="named as aotinductor, but --to asks for pt2"):
        destination.plan(Path("net.pth"), "net.aoti.pt2", resolve("pt2"))


def test_plan(tmp_path):
    found = destination.plan(Path("net.pth"), str(tmp_path), resolve("onnx,openvino"))
    assert found.artifacts == (tmp_path / "net.onnx", tmp_path / "net.xml")
    assert found.companions == ((), (tmp_path / "net.bin",))
    one = destination.plan(Path("net.pth"), tmp_path / "a.xml", [IR])
    assert one.companions == ((tmp_path / "a.bin",),) and one.manifest == tmp_path / "a.manifest.json"


# ---- no file is lost


def check(folder: Path, checkpoint: str, overwrite: bool) -> None:
    destination.check(destination.plan(folder / checkpoint, None, [IR]), folder / checkpoint, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_checkpoint_called_bin_is_not_replaced(tmp_path, overwrite):
    (tmp_path / "pytorch_model.bin").write_text("weights")
    with pytest.raises(UsageError, match="pytorch_model.bin is the checkpoint itself: choose another name or folder with -o"):
        check(tmp_path, "pytorch_model.bin", overwrite)


def test_an_existing_companion_is_refused_before_any_work(tmp_path):
    (tmp_path / "net.bin").write_text("another network's weights")
    with pytest.raises(UsageError, match="net.bin exists already: pass --overwrite"):
        check(tmp_path, "net.pth", False)
    result = export(tmp_path)
    assert result.code == 2 and "net.bin exists already" in result.message
    assert (tmp_path / "net.bin").read_text() == "another network's weights" and not (tmp_path / "net.xml").exists()


def test_a_companion_that_belongs_to_nothing_is_never_replaced(tmp_path):
    (tmp_path / "net.bin").write_text("another network's weights")
    with pytest.raises(UsageError, match="net.bin exists, but not the net.xml that it would belong to, so it is never replaced"):
        check(tmp_path, "net.pth", True)
    (tmp_path / "net.xml").write_text("graph")
    check(tmp_path, "net.pth", True)


def test_a_folder_in_the_companion_s_place(tmp_path):
    (tmp_path / "net.xml").write_text("graph")
    (tmp_path / "net.bin").mkdir()
    with pytest.raises(UsageError, match="net.bin is a folder"):
        check(tmp_path, "net.pth", True)


def test_two_formats_with_one_companion(tmp_path):
    net, other = tmp_path / "a.xml", tmp_path / "b.xml"
    shared = (tmp_path / "a.bin",)
    with (
        pytest.raises(UsageError, match="a.bin would be written twice"),
        artifact.staged([net, other], companions=[shared, shared]),
    ):
        pytest.fail("the work began")


def test_both_are_placed_or_neither(tmp_path):
    net, data = tmp_path / "net.xml", tmp_path / "net.bin"
    net.write_text("old graph"), data.write_text("old weights")
    with pytest.raises(OSError), artifact.staged([net], overwrite=True, companions=[(data,)]) as (path,):
        path.write_text("graph"), path.with_name("net.bin").write_text("weights")
        path.with_name("scratch").write_text("stays behind")
        net.unlink(), net.mkdir(), (net / "in the way").touch()
    assert data.read_text() == "old weights" and files(tmp_path) == ["net.bin", "net.xml", "net.xml/in the way"]


def test_what_is_not_declared_stays_behind(tmp_path):
    with artifact.staged([tmp_path / "net.xml"], companions=[(tmp_path / "net.bin",)]) as (path,):
        for name in ("net.xml", "net.bin", "net.log", "net.xml.data"):
            path.with_name(name).write_text(name)
    assert files(tmp_path) == ["net.bin", "net.xml", "net.xml.data"]


# ---- what comes after


def test_the_manifest_has_both_with_digests_and_sizes(made):
    (entry,) = json.loads((made / "net.manifest.json").read_text())["artifacts"]
    assert entry["file"] == "net.xml" and [each["name"] for each in entry["files"]] == ["net.xml", "net.bin"]
    for each in entry["files"]:
        assert each["sha256"] == artifact.sha256(made / each["name"])
        assert each["size_bytes"] == (made / each["name"]).stat().st_size


def test_overwrite_gives_the_same_bytes(made, tmp_path):
    for name in ("net.xml", "net.bin"):
        (tmp_path / name).write_text("old")
    assert export(tmp_path, "--overwrite").code == 0
    assert all((tmp_path / name).read_bytes() == (made / name).read_bytes() for name in ("net.xml", "net.bin"))


def test_verify_reads_both(made, tmp_path):
    for name in ("net.xml", "net.bin", "net.manifest.json"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    assert foldexport("verify", tmp_path / "net.manifest.json").code == 0
    spoilt = bytearray((made / "net.bin").read_bytes())
    spoilt[0] ^= 1
    (tmp_path / "net.bin").write_bytes(spoilt)
    result = foldexport("verify", tmp_path / "net.manifest.json")
    assert result.code == 4 and "SHA-256 of net.bin differs" in result.out
    (tmp_path / "net.bin").unlink()
    result = foldexport("verify", tmp_path / "net.manifest.json")
    assert result.code == 4 and "net.bin is not beside" in result.out


def test_bench_counts_both_and_misses_one(made, tmp_path):
    assert beside(made / "net.xml") == [made / "net.xml", made / "net.bin"]
    assert [row.name for row in bench_files.choose(made / "net.xml", ())] == ["openvino"]
    (tmp_path / "net.xml").write_bytes((made / "net.xml").read_bytes())
    with pytest.raises(UsageError, match="its net.bin is not beside it"):
        bench_files.choose(tmp_path / "net.xml", ())


def test_the_library_places_both(tmp_path):
    torch.manual_seed(0)
    folded = library.fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.zeros(1, 3, 8, 8))
    done = library.export(folded, "openvino", tmp_path / "net.xml")
    assert done.path == tmp_path / "net.xml" and sorted(done.size_bytes) == ["net.bin", "net.xml"]
    assert done.comparison.ok and done.comparison.weights_identical == (2, 2)
    with pytest.raises(UsageError, match="exists already"):
        library.export(folded, "openvino", tmp_path / "net.xml")
    with pytest.raises(UsageError, match="wanted .*net.xml"):
        library.export(folded, "openvino", tmp_path / "net.bin")
    assert files(tmp_path) == ["net.bin", "net.xml"]


def test_formats_are_listed_with_all_their_files():
    assert "NAME.xml + NAME.bin" in foldexport("formats").out
    (row,) = [each for each in foldexport("formats", "--json").document["formats"] if each["name"] == "openvino"]
    assert row["suffix"] == ".xml" and row["companions"] == [".bin"]
    assert exporters.FORMATS["openvino"].extra == "openvino"


@pytest.mark.parametrize("name", ["openvino", "pt2", "ort"])
def test_an_exporter_s_mistake_is_exit_4_and_leaves_no_file(name, tmp_path, monkeypatch):
    row = get(name)
    right = type(exporters.exporter(row))

    class Spoilt(right):
        """The first weight is off by 1e-6 of itself."""

        def export(self, module, example, path, options=None):
            wrong = copy.deepcopy(module)
            with torch.no_grad():
                next(wrong.parameters()).view(-1)[0].mul_(1 + 1e-6)
            return super().export(wrong, example, path, options)

    monkeypatch.setattr(exporters, "exporter", lambda row: Spoilt())
    result = export(tmp_path, to=name)
    assert result.code == 4 and "differ from the module's in their bits: 0.weight" in result.message
    assert files(tmp_path) == ["net.pth", "net.py"]

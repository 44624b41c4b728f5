"""Artifacts that are folders: put in place whole or not at all, replaced only where they are packages, named as files are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from foldexport import artifact, destination
from foldexport.artifact import PACKAGE_MARK, check_destination, contents, describe, size_bytes, staged
from foldexport.errors import UsageError
from foldexport.exporters import get
from foldexport.recheck import _require_whole, _unknown

NAME = "net.mlpackage"


def fill(folder: Path, word: str) -> Path:
    (folder / "Data").mkdir(parents=True)
    (folder / PACKAGE_MARK).write_text("{}")
    (folder / "Data" / "weight.bin").write_text(word)
    return folder


def read(folder: Path) -> str:
    return (folder / "Data" / "weight.bin").read_text()


def test_put_in_place_with_every_file_in_the_record(tmp_path):
    with staged([tmp_path / NAME]) as (path,):
        fill(path, "new")
    assert read(tmp_path / NAME) == "new" and [each.name for each in tmp_path.iterdir()] == [NAME]
    made = describe(tmp_path / NAME, "coreml", [tmp_path / NAME])
    assert list(made.sha256) == [f"{NAME}/Data/weight.bin", f"{NAME}/Manifest.json"]
    assert sum(made.size_bytes.values()) == size_bytes(tmp_path / NAME) == 5


def test_replaced_only_when_asked(tmp_path):
    fill(tmp_path / NAME, "old")
    with pytest.raises(UsageError, match="exists already: pass --overwrite"), staged([tmp_path / NAME]):
        pass
    with staged([tmp_path / NAME], overwrite=True) as (path,):
        fill(path, "new")
        (path / "more").write_text("")
    assert read(tmp_path / NAME) == "new" and [each.name for each in tmp_path.iterdir()] == [NAME]
    with staged([tmp_path / NAME], overwrite=True) as (path,):
        fill(path, "newer")
    assert read(tmp_path / NAME) == "newer" and not (tmp_path / NAME / "more").exists()


def test_a_folder_that_is_no_package_is_never_replaced(tmp_path):
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="is a folder without Manifest.json, so no package, and is never replaced"):
        check_destination(tmp_path / NAME, overwrite=True)
    (tmp_path / "net.onnx").mkdir()
    with pytest.raises(UsageError, match="is a folder: name the file to write"):
        check_destination(tmp_path / "net.onnx", overwrite=True)


@pytest.mark.parametrize("there", ["a folder", "a file", "a link", "nothing"])
def test_what_was_there_comes_back_when_a_later_move_fails(tmp_path, monkeypatch, there):
    target = tmp_path / NAME
    if there == "a folder":
        fill(target, "old")
    elif there == "a file":
        target.write_text("old")
    elif there == "a link":
        target.symlink_to(fill(tmp_path / "elsewhere", "old"))
    before = {str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*")}
    honest = os.replace

    def failing(source, place):
        if Path(place).name == "net.manifest.json":
            raise OSError(28, "No space left on device")
        honest(source, place)

    monkeypatch.setattr(artifact.os, "replace", failing)
    targets = [target, tmp_path / "net.manifest.json"]
    with pytest.raises(UsageError, match="No space left"), staged(targets, overwrite=True) as (folder, manifest):
        fill(folder, "new")
        manifest.write_text("{}")
    assert {str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*")} == before
    assert there == "nothing" or (target.read_text() if target.is_file() else read(target)) == "old"
    assert target.is_symlink() == (there == "a link")


def test_an_error_in_the_block_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), staged([tmp_path / NAME]) as (path,):
        fill(path, "new")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [NAME, f"{NAME}/"])
def test_an_existing_package_is_what_is_written_not_where_to(tmp_path, text):
    fill(tmp_path / NAME, "old")
    places = destination.plan(tmp_path / "net.pth", f"{tmp_path}/{text}", [get("coreml")])
    assert places.artifacts == (tmp_path / NAME,) and places.manifest == tmp_path / "net.manifest.json"
    both = destination.plan(tmp_path / "net.pth", f"{tmp_path}/out/", [get("coreml"), get("onnx")])
    assert both.artifacts == (tmp_path / "out" / NAME, tmp_path / "out" / "net.onnx")


@pytest.mark.parametrize(
    ("file", "names"),
    [
        (NAME, [f"{NAME}/../../secret"]), (NAME, [f"{NAME}/Manifest.json", "other/file"]), (NAME, [f"{NAME}//x"]), ("..", ["../x"]),
        (NAME, ["/etc/passwd"]), (NAME, ["net.onnx"]), (NAME, [f"{NAME}\\..\\x/y"]), (NAME, []),
    ],
)  # fmt: skip
def test_a_manifest_that_names_what_is_not_in_the_folder(tmp_path, file, names):
    with pytest.raises(UsageError, match="is not one of the files beside it"):
        _require_whole(tmp_path, {"file": file, "files": [{"name": name, "sha256": ""} for name in names]})


def test_a_manifest_of_a_folder(tmp_path):
    fill(tmp_path / NAME, "new")
    entry = {"file": NAME, "files": [{"name": name, "sha256": ""} for name, _ in contents(tmp_path / NAME)]}
    _require_whole(tmp_path, entry)
    assert _unknown(tmp_path, entry) == []
    (tmp_path / NAME / ".DS_Store").write_text("")
    (tmp_path / NAME / "Data" / "odd").write_text("")
    assert _unknown(tmp_path, entry) == [f"{NAME}/Data/odd"]

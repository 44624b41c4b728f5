"""Which files of a folder are checkpoints, and which are not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from foldexport.checkpoint.sniff import CHECKPOINT_SUFFIXES
from foldexport.exporters import FORMATS
from foldexport.many import find
from foldexport.many.find import SUFFIXES


def put(folder: Path, *names: str, content: bytes = b"x") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def names(folder: Path, **options: bool) -> list[str]:
    found = find.find([folder], **options)
    assert not found.problems
    return [str(path.relative_to(folder)) for path in found.checkpoints]


def test_by_suffix_in_the_order_of_names(tmp_path):
    put(tmp_path, "b.pth", "a.safetensors", "c.PT", "e.pth.tar", "d.ckpt", "f.bin", "g.pt2")
    put(tmp_path, "read.md", "data.npz", "labels.pkl", "data.tar", "train.py", ".hidden.pth", "pth")
    assert names(tmp_path) == ["a.safetensors", "b.pth", "c.PT", "d.ckpt", "e.pth.tar", "f.bin", "g.pt2"]


def test_every_suffix_is_one_that_reading_knows():
    assert {Path(f"net{suffix}").suffix for suffix in SUFFIXES} <= set(CHECKPOINT_SUFFIXES)


@pytest.mark.parametrize("row", FORMATS.values(), ids=lambda row: row.name)
def test_what_we_wrote_is_no_checkpoint(tmp_path, row):
    written = [path.name for path in (Path(f"net{row.suffix}"), *row.beside(f"net{row.suffix}"))]
    listed = [{"name": name, "size_bytes": 1, "sha256": ""} for name in written]
    (tmp_path / "net.manifest.json").write_text(json.dumps({"artifacts": [{"files": listed}]}))
    put(tmp_path, "net.pth", *written)
    assert names(tmp_path) == ["net.pth"]


def test_companions_and_weights_of_source_are_ours_without_a_manifest(tmp_path):
    put(tmp_path, "net.pth", "net.py", "net.py.safetensors", "net.torchscript.pt", "net.onnx.data")
    for row in FORMATS.values():
        put(tmp_path, *(path.name for path in row.beside(f"net{row.suffix}")) if row.companions else ())
        put(tmp_path, *([f"net{row.suffix}"] if row.companions else []))
    assert names(tmp_path) == ["net.pth"]


def test_a_manifest_names_our_file_until_another_lies_there(tmp_path):
    entry = {"name": "net.pt", "size_bytes": 1, "sha256": ""}
    (tmp_path / "net.manifest.json").write_text(json.dumps({"artifacts": [{"files": [entry]}]}))
    put(tmp_path, "net.pth", "net.pt")
    assert names(tmp_path) == ["net.pth"]
    put(tmp_path, "net.pt", content=b"a checkpoint since")
    assert names(tmp_path) == ["net.pt", "net.pth"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"artifacts": 3}', '{"artifacts": [{}]}', "[" * 100_000])
def test_a_manifest_of_somebody_else_is_passed_over(tmp_path, text):
    (tmp_path / "a.manifest.json").write_text(text)
    put(tmp_path, "a.pth")
    assert names(tmp_path) == ["a.pth"]


def test_recursive(tmp_path):
    put(tmp_path, "b.pth", "a/c.pth", "a/d/e.pth", ".git/f.pth", "net.mlpackage/Data/weights.bin")
    assert names(tmp_path) == ["b.pth"]
    (tmp_path / "net.mlpackage").rename(tmp_path / "z.folder")
    assert names(tmp_path, recursive=True) == ["b.pth", "a/c.pth", "a/d/e.pth", "z.folder/Data/weights.bin"]


def test_links_that_lead_back_end(tmp_path):
    put(tmp_path, "a/b.pth")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to("self")
    (tmp_path / "again").symlink_to(tmp_path / "a")
    assert names(tmp_path, recursive=True) == ["a/b.pth"]


def test_a_link_to_a_file_counts_by_its_name_and_one_to_nowhere_is_reported(tmp_path):
    put(tmp_path, "epoch9.pth")
    (tmp_path / "last.pth").symlink_to("epoch9.pth")
    (tmp_path / "lost.pth").symlink_to("gone.pth")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    assert names(tmp_path) == ["epoch9.pth", "last.pth", "loop.pth", "lost.pth"]


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    put(tmp_path, "net.pth")
    assert names(tmp_path) == ["net.pth"]


def test_named_twice_is_taken_once(tmp_path, monkeypatch):
    put(tmp_path, "a.pth", "b.pth")
    monkeypatch.chdir(tmp_path)
    found = find.find([Path("b.pth"), tmp_path, tmp_path / "b.pth", Path(".")])
    assert found.checkpoints == [Path("b.pth"), tmp_path / "a.pth"] and not found.problems


def test_named_files_are_taken_whatever_they_are_called(tmp_path):
    named = [tmp_path / "weights", tmp_path / "net.onnx", tmp_path / "missing.pth"]
    assert find.find(named).checkpoints == named


def test_a_folder_without_any_is_told(tmp_path):
    put(tmp_path, "full/a.pth", "empty/deep/b.pth", "empty/read.md")
    found = find.find([tmp_path / "full", tmp_path / "empty"])
    assert found.checkpoints == [tmp_path / "full" / "a.pth"]
    ((path, reason),) = found.problems
    assert path == tmp_path / "empty" and "no checkpoint file" in reason and "--recursive" in reason
    (tmp_path / "empty" / "deep" / "b.pth").unlink()
    assert "--recursive" not in find.find([tmp_path / "empty"], recursive=True).problems[0][1]


def test_a_folder_that_cannot_be_read_is_told_and_the_others_are_taken(tmp_path, monkeypatch):
    put(tmp_path, "a/b.pth", "c.pth", "locked/d.pth")
    scandir = os.scandir

    def refuse(place):  # the superuser may read whatever its mode is
        if Path(place).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find.find([tmp_path], recursive=True)
    assert [path.name for path in found.checkpoints] == ["c.pth", "b.pth"]
    assert found.problems == [(tmp_path / "locked", f"{tmp_path / 'locked'}: cannot be looked into: Permission denied.")]

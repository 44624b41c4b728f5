"""Files appear whole and proven, or not at all."""

from __future__ import annotations

import os

import pytest

from foldexport import artifact
from foldexport.errors import EquivalenceError, UsageError


def listing(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_and_companions_are_placed(tmp_path):
    with artifact.staged([tmp_path / "net.onnx", tmp_path / "net.manifest.json"]) as (net, manifest):
        net.write_text("graph")
        net.with_name("net.onnx.data").write_text("weights")
        manifest.write_text("{}")
        assert not [name for name in listing(tmp_path) if not name.startswith(".foldexport-")]
    assert listing(tmp_path) == ["net.manifest.json", "net.onnx", "net.onnx.data"]
    assert (tmp_path / "net.onnx").read_text() == "graph"


@pytest.mark.parametrize(
    "error",
    [EquivalenceError("no"), KeyboardInterrupt(), SystemExit(1), ValueError("bug")],
    ids=lambda e: type(e).__name__,
)
def test_nothing_is_left_when_the_work_fails(error, tmp_path):
    (tmp_path / "net.onnx").write_text("before")
    with (
        pytest.raises(type(error)),
        artifact.staged([tmp_path / "net.onnx", tmp_path / "b.pt"], overwrite=True) as (net, _),
    ):
        net.write_text("half")
        raise error
    assert listing(tmp_path) == ["net.onnx"] and (tmp_path / "net.onnx").read_text() == "before"


def test_existing_output_is_refused_before_any_work(tmp_path):
    (tmp_path / "net.onnx").write_text("before")
    with (
        pytest.raises(UsageError, match="net.onnx exists already: pass --overwrite"),
        artifact.staged([tmp_path / "net.onnx"]),
    ):
        pytest.fail("the work began")
    assert (tmp_path / "net.onnx").read_text() == "before" and listing(tmp_path) == ["net.onnx"]


def test_dangling_link_counts_as_existing(tmp_path):
    (tmp_path / "net.onnx").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists already"):
        artifact.check_destination(tmp_path / "net.onnx")


def test_existing_companion_is_not_replaced(tmp_path):
    (tmp_path / "net.onnx.data").write_text("another network's")
    with (
        pytest.raises(UsageError, match="net.onnx.data exists already"),
        artifact.staged([tmp_path / "net.onnx"]) as (net,),
    ):
        net.write_text("graph")
        net.with_name("net.onnx.data").write_text("weights")
    assert listing(tmp_path) == ["net.onnx.data"] and (tmp_path / "net.onnx.data").read_text() == "another network's"


def test_overwrite_replaces(tmp_path):
    (tmp_path / "net.onnx").write_text("before")
    with artifact.staged([tmp_path / "net.onnx"], overwrite=True) as (net,):
        net.write_text("after")
    assert listing(tmp_path) == ["net.onnx"] and (tmp_path / "net.onnx").read_text() == "after"


def test_a_failing_move_takes_the_others_back(tmp_path):
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    first.write_text("before")
    with pytest.raises(OSError), artifact.staged([first, second], overwrite=True) as (a, b):
        a.write_text("after")
        b.write_text("after")
        second.mkdir()
        (second / "in the way").touch()
    assert (
        first.read_text() == "before"
        and listing(tmp_path) == ["a.onnx", "b.onnx"]
        and listing(second) == ["in the way"]
    )


def test_missing_folder(tmp_path):
    with pytest.raises(UsageError, match="the folder .*absent does not exist"):
        artifact.check_destination(tmp_path / "absent" / "net.onnx")
    assert not listing(tmp_path)


def test_folder_given_as_file(tmp_path):
    with pytest.raises(UsageError, match="is a folder: name the file to write"):
        artifact.check_destination(tmp_path)


@pytest.mark.skipif(
    not os.path.isdir("/proc/self"), reason="needs a file system that refuses new files from every user"
)
def test_unwritable_folder():
    with pytest.raises(UsageError, match="cannot write /proc/self/net.onnx: "):
        artifact.check_destination("/proc/self/net.onnx")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot write .*Permission denied"):
        artifact.check_destination(tmp_path / "net.onnx")


def test_one_path_for_two_formats(tmp_path):
    with pytest.raises(UsageError, match="would be written twice"), artifact.staged([tmp_path / "net"] * 2):
        pytest.fail("the work began")
    assert not listing(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_disk_is_reported_with_the_destination(tmp_path):
    with (
        pytest.raises(UsageError, match="cannot write .*net.onnx: No space left"),
        artifact.staged([tmp_path / "net.onnx"]),open("/dev/full", "wb", buffering=0) as full
    ):
        full.write(b"x")
    assert not listing(tmp_path)

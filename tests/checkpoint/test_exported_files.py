"""Files that were exported already are refused by what they are, not as web pages or unknown archives."""

from __future__ import annotations

import zipfile

import pytest

from foldexport.checkpoint.sniff import kind
from foldexport.errors import CheckpointError


def package(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("network/data/aotinductor/model/c.wrapper.so", b"code")
        archive.writestr("network/archive_format", "pt2")


MADE = {
    "net.xml": ("an OpenVINO graph", lambda path: path.write_text('<?xml version="1.0"?>\n<net name="net" version="11">\n')),
    "net.ort": ("an onnxruntime model", lambda path: path.write_bytes(b"\x24\x00\x00\x00ORTM" + bytes(64))),
    "net.aoti.pt2": ("compiled by AOTInductor", package),
}


@pytest.mark.parametrize("name", MADE)
def test_an_exported_file_is_no_checkpoint(name, tmp_path):
    said, make = MADE[name]
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{said}.*already exported; foldexport reads the PyTorch checkpoint it came from"):
        kind(tmp_path / name)

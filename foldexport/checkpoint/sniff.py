"""What a file is, from its bytes: a checkpoint's format, or an error that names what it is instead."""

from __future__ import annotations

import difflib
import html
import json
import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

from foldexport.errors import CheckpointError

HEAD_BYTES = 1 << 16
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".tar", ".safetensors", ".pt2", ".t7", ".pkl", ".model")

# The pickled long 0x1950a86a20f9469cfc6c that opens torch.save's files before the zip format (torch/serialization.py).
LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e"

# What zipfile raises on damaged bytes (bad names, offsets, lengths, unknown or encrypted compression).
ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, ValueError, RuntimeError,
    IndexError,
)  # fmt: skip

# Pickles of protocol 0 are text: a global, or an empty dict or list with its memo.
PROTOCOL_0 = re.compile(rb"c[\w.]+\n[\w.]+\n|\([dl]p?\d*\n")

# ModelProto opens with field 1, ir_version, then producer_name, producer_version, domain, graph or opset_import
# (onnx.proto).
ONNX_HEAD = re.compile(rb"\x08[\x01-\x20][\x12\x1a\x22\x3a\x42]")

# Leading bytes (offset, magic) of files that are often passed by mistake, and what to do with them.
STRANGERS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x1f\x8b", "is compressed by gzip; decompress it first"),
    (0, b"BZh", "is compressed by bzip2; decompress it first"),
    (0, b"\xfd7zXZ\x00", "is compressed by xz; decompress it first"),
    (0, b"\x28\xb5\x2f\xfd", "is compressed by Zstandard; decompress it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it and pass the checkpoint inside"),
    (0, b"Rar!", "is a RAR archive; unpack it and pass the checkpoint inside"),
    (0, b"\x89HDF\r\n", "is an HDF5 file (Keras weights?); foldexport reads PyTorch checkpoints"),
    (4, b"TFL3", "is a TensorFlow Lite model, already exported; foldexport reads the PyTorch checkpoint it came from"),
    (4, b"ORTM", "is an onnxruntime model, already exported; foldexport reads the PyTorch checkpoint it came from"),
    (0, b"GGUF", "is a GGUF model; foldexport reads PyTorch checkpoints"),
    (0, b"\x93NUMPY", "is a single NumPy array; foldexport reads PyTorch checkpoints"),
    (0, b"\x89PNG", "is a PNG picture; foldexport reads PyTorch checkpoints"),
    (0, b"\xff\xd8\xff", "is a JPEG picture; foldexport reads PyTorch checkpoints"),
    (0, b"%PDF", "is a PDF document; foldexport reads PyTorch checkpoints"),
)


def kind(path: Path) -> str:
    """One of "torch zip", "torch legacy", "torchscript", "pt2", "safetensors" and "pickle".

    Raises :class:`CheckpointError` for anything else, saying what it is.
    """
    head = _head(path)
    if not head:
        raise CheckpointError(f"{path}: the file is empty (0 bytes); download or copy it again.")
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if _is_safetensors(head):
        return "safetensors"
    # A legacy file cut within its first bytes is still that.
    if head[2:].startswith(LEGACY_MAGIC) or (
        head[:1] == b"\x80" and len(head) > 2 and LEGACY_MAGIC.startswith(head[2:])
    ):
        return "torch legacy"
    _refuse_strangers(path, head)
    if (head[:1] == b"\x80" and head[1:2] <= b"\x05") or PROTOCOL_0.match(head):
        return "pickle"
    if path.suffix == ".onnx" or ONNX_HEAD.match(head):
        raise CheckpointError(
            f"{path}: looks like an ONNX model, already exported; foldexport reads the PyTorch checkpoint it came from."
        )
    _refuse_text(path, head)
    if tarfile.is_tarfile(path):
        _refuse_tar(path)
    raise CheckpointError(
        f"{path}: not a checkpoint that foldexport knows ({_size(path)}, starts with {head[:8].hex(' ')}).\n"
        "Wanted: a file written by torch.save, a .safetensors file, a TorchScript archive or a .pt2 program."
    )


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name the checkpoint file in it{_checkpoints_in(path)}.")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file{_nearest(path)}")
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a regular file; name a checkpoint file.")
    try:
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error


def _checkpoints_in(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix in CHECKPOINT_SUFFIXES)
    if not names:
        return " (it has none)"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f": {', '.join(names[:3])}{more}"


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; the folder {folder} does not exist."
    names = [entry.name for entry in folder.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean {folder / close[0]}?" if close else "."


def _size(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes"


def _is_safetensors(head: bytes) -> bool:
    # Layout: u64 little-endian header length, then the JSON header (safetensors README, "Format").
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100 << 20


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            found = _zip_content(names)
            if found:
                _check_records(archive)
    except ZIP_ERRORS as error:
        why = "its directory, at the end, is missing" if "not a zip file" in str(error) else str(error).rstrip(".")
        raise CheckpointError(
            f"{path}: truncated or damaged: a zip file of {_size(path)} that cannot be read ({why}).\n"
            "Download or copy it again."
        ) from error
    if found:
        return found
    if names and all(name.endswith(".npy") for name in names):
        raise CheckpointError(
            f"{path}: a NumPy .npz archive of {len(names)} arrays; foldexport reads PyTorch checkpoints."
        )
    if any("/data/aotinductor/" in f"/{name}" for name in names):
        raise CheckpointError(
            f"{path}: is a network compiled by AOTInductor, already exported; foldexport reads the PyTorch checkpoint it came from."
        )
    raise CheckpointError(f"{path}: a zip archive without a checkpoint layout, of {_listed(names)}; {_unpack(names)}.")


def _zip_content(names: list[str]) -> str | None:
    leaves = {name.split("/", 1)[-1] for name in names}
    if (
        "serialized_exported_program.json" in names
        or any(leaf.startswith("models/") for leaf in leaves)
        and ("archive_format" in leaves)
    ):
        return "pt2"
    if "data.pkl" in leaves:
        return "torchscript" if "constants.pkl" in leaves else "torch zip"
    return None


def _check_records(archive: zipfile.ZipFile) -> None:
    """Raise BadZipFile where a record does not match its CRC-32: torch itself reads a flipped bit without a word."""
    for info in archive.infolist():
        # torch.serialization.set_crc32_options(False) stores 0.
        if info.CRC == 0:
            continue
        with archive.open(info) as record:
            while record.read(1 << 20):
                pass


def _refuse_tar(path: Path) -> None:
    with tarfile.open(path) as archive:
        names = archive.getnames()
    if {"storages", "tensors", "pickle"} <= set(names):
        raise CheckpointError(
            f"{path}: written by PyTorch 0.1.1 or older (a tar file), which cannot be read safely.\n"
            "Load it with an old PyTorch where you trust it, and save its state_dict() again."
        )
    raise CheckpointError(f"{path}: a tar archive of {_listed(names)}; {_unpack(names)}.")


def _listed(names: list[str]) -> str:
    if not names:
        return "no files"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _unpack(names: list[str]) -> str:
    inside = [name for name in names if Path(name).suffix in CHECKPOINT_SUFFIXES]
    return f"unpack it and pass {inside[0]}" if inside else "pass a file written by torch.save or a .safetensors file"


def _refuse_strangers(path: Path, head: bytes) -> None:
    for offset, magic, what in STRANGERS:
        if head[offset : offset + len(magic)] == magic:
            raise CheckpointError(f"{path}: {what}.")


def _refuse_text(path: Path, head: bytes) -> None:
    if b"\x00" in head:
        return
    # The head may end inside a character.
    text = head.decode("utf-8", errors="ignore").lstrip("\ufeff \t\r\n")
    if len(text.encode()) < 0.9 * len(head.strip()):
        return
    if text.startswith("version https://git-lfs.github.com/spec/"):
        _refuse_lfs_pointer(path, text)
    if re.match(r"(<\?xml[^>]*>\s*)?<net\s", text):
        raise CheckpointError(
            f"{path}: is an OpenVINO graph, already exported; foldexport reads the PyTorch checkpoint it came from."
        )
    if re.match(r"<(!doctype html|html|head|\?xml)", text, re.IGNORECASE):
        _refuse_html(path, text)
    if text.startswith("{"):
        _refuse_json(path)
    first = text.splitlines()[0][:60] if text else ""
    raise CheckpointError(f"{path}: a text file, not a checkpoint; it begins {json.dumps(first)}.")


def _refuse_lfs_pointer(path: Path, text: str) -> None:
    oid = re.search(r"^oid sha256:([0-9a-f]+)", text, re.MULTILINE)
    size = re.search(r"^size (\d+)", text, re.MULTILINE)
    raise CheckpointError(
        f"{path}: a git-LFS pointer (sha256 {oid.group(1)[:12] if oid else '?'}…, "
        f"{int(size.group(1)) if size else 0:,} bytes), not the checkpoint itself.\n"
        f"Fetch it: git lfs pull --include {path.name}"
    )


def _refuse_html(path: Path, text: str) -> None:
    title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
    shown = " ".join(html.unescape(title.group(1)).split())[:80] if title else ""
    titled = f" (title: {json.dumps(shown, ensure_ascii=False)})" if shown else ""
    raise CheckpointError(
        f"{path}: a web page saved as a checkpoint{titled}.\n"
        "The download failed or needs a login; download the file itself again."
    )


def _refuse_json(path: Path) -> None:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return
    if "weight_map" in content:
        parts = sorted(set(content["weight_map"].values()))
        raise CheckpointError(
            f"{path}: the index of a checkpoint in {len(parts)} parts ({_listed(parts)}), not weights; "
            "merge the parts into one .safetensors file and pass that."
        )
    raise CheckpointError(
        f"{path}: a JSON document with {_listed([json.dumps(key) for key in content])}, not a checkpoint."
    )

"""AOTInductor's archive, rewritten to hold what is needed to run it and nothing of the machine that wrote it.

Inductor packs its C++ sources, which begin with the compiler's command line, and names files after digests of sources that hold
the build folder; the library holds the build folder, the headers' folders and a digest of it all. Sources go; names and paths
are replaced by text of the same length, since they lie inside of compiled data. What the sources say of the weights (name, type,
shape, where) is kept as ``extra/weights.json``. Format: PyTorch's "PT2 Archive" specification.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foldexport.errors import EquivalenceError

PREFIX = "foldexport-"  # of build folders
FOLDER = "network"
MODEL = "data/aotinductor/model/"
TABLE = "extra/weights.json"
DROPPED = re.compile(r"\.cpp$|(^|/)\.data/serialization_id$")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date of a zip
STEM = re.compile(rf"{MODEL}(\w+)\.(wrapper|kernel)\.cpp$")
FIELD = re.compile(r'constants_info_\[(\d+)\]\.(name|dtype|offset|data_size|shape|stride|original_fqn) = "?([^;"]*)"?;')
#: The note in which linkers put a digest of the library: lengths of owner and content, kind 3, "GNU".
BUILD_ID = re.compile(rb"(\x04\0\0\0(?:\x14|\x10|\x08)\0\0\0\x03\0\0\0GNU\0)([\s\S]{20}|[\s\S]{16}|[\s\S]{8})")


def rewrite(source: Path, target: Path, folder: Path) -> None:
    """Copy a package without what is local. folder: the one that it was built in."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        records = {name.partition("/")[2]: name for name in old.namelist()}
        sources = {short: old.read(full).decode() for short, full in records.items() if STEM.search(short)}
        names = {stem: f"c{place:0{len(stem) - 1}d}" for place, stem in enumerate(_stems(sources, str(folder)))}
        kept = {_renamed(short, names): old.read(full) for short, full in records.items() if not DROPPED.search(short)}
        wrapper = next(full for short, full in records.items() if short.endswith(".wrapper.cpp"))
        kept[TABLE] = json.dumps(_table(old.read(wrapper).decode()), indent=1).encode()
        for short in sorted(kept):
            content = _anonymous(kept[short], names, folder) if short.endswith(".so") else kept[short]
            entry = zipfile.ZipInfo(f"{FOLDER}/{short}", EPOCH)
            entry.create_system = 3
            new.writestr(entry, content)


def _stems(sources: dict[str, str], folder: str) -> list[str]:
    """Names of the sources, ordered by what they are and say: the names themselves are digests that the build folder is part of."""
    found = {}
    for short, text in sources.items():
        match = STEM.search(short)
        found[match[1]] = (match[2], [line for line in text.splitlines() if folder not in line])
    return sorted(found, key=found.__getitem__)


def weights(path: str | Path) -> dict[str, np.ndarray]:
    """Every constant of a package that `rewrite` has written, by the module's names. Raises EquivalenceError for another file."""
    try:
        with zipfile.ZipFile(path) as archive:
            shorts = {name.partition("/")[2]: name for name in archive.namelist()}
            table = json.loads(archive.read(shorts[TABLE]))
            blobs = [archive.read(full) for short, full in shorts.items() if short.endswith("_weights.blob")]
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise EquivalenceError(f"aotinductor: {Path(path).name} holds no table of its weights ({error}).") from error
    return {each["name"]: _array(each, blobs[0] if blobs else b"") for each in table}


def _renamed(text: str, names: dict[str, str]) -> str:
    for stem, name in names.items():
        text = text.replace(stem, name)
    return text


def _table(source: str) -> list[dict[str, Any]]:
    """What the wrapper's source says of its constants; each begins where the one before it ends."""
    found: dict[int, dict[str, Any]] = {}
    for place, field, value in FIELD.findall(source):
        found.setdefault(int(place), {})[field] = value
    rows, at = [], 0
    for _, each in sorted(found.items()):
        kind = each["dtype"].removeprefix("cached_torch_dtype_")
        lists = {key: [int(part) for part in each[key].strip("{}").split(",") if part.strip()] for key in ("shape", "stride")}
        rows.append({
            "name": each.get("original_fqn") or each["name"], "type": kind, **lists,
            "bytes": [at, at + int(each["data_size"])], "offset": int(each["offset"]),
        })  # fmt: skip
        at += int(each["data_size"])
    return rows


def _array(row: dict[str, Any], blob: bytes) -> np.ndarray:
    """The constant in its logical order of elements."""
    import ml_dtypes  # comes with onnx

    kind = np.dtype(ml_dtypes.bfloat16 if row["type"] == "bfloat16" else row["type"])
    flat = np.frombuffer(blob[slice(*row["bytes"])], kind)[row["offset"] :]
    if not flat.size:
        return flat.reshape(row["shape"])
    strides = [each * kind.itemsize for each in row["stride"]]
    return np.lib.stride_tricks.as_strided(flat, row["shape"], strides, writeable=False)


def _anonymous(library: bytes, names: dict[str, str], folder: Path) -> bytes:
    for stem, name in names.items():
        library = library.replace(stem.encode(), name.encode())
    for local in _local(folder):
        inside = re.compile(re.escape(local.encode()) + (rb"[\x21-\x7e]*" if local == str(folder) else b""))
        library = inside.sub(lambda match: _filler(len(match[0])), library)
    return BUILD_ID.sub(lambda match: match[1] + bytes(len(match[2])), library)


def _local(folder: Path) -> list[str]:
    """Folders of this machine, inner ones first: a whole path in the build folder is local, elsewhere its beginning is."""
    packages = str(Path(torch.__file__).parent)
    return [str(folder), packages, *sorted({sys.prefix, sys.base_prefix, str(Path.home())} - {"/"}, key=len, reverse=True)]


def _filler(length: int) -> bytes:
    """A path that is none, of the same length."""
    return (b"/" + b"-" * length)[:length]

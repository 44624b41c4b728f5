"""Files that were exported earlier: which runtimes read them, and what their inputs are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foldexport import exporters
from foldexport.benchmark.runtimes import RUNTIMES, Runtime
from foldexport.errors import UsageError

Inputs = list[tuple[tuple[int | None, ...], Any]]  # (shape, dtype) of every input; None where a length is free
FLOAT = np.dtype("float32")


def suffixes() -> dict[str, list[Runtime]]:
    """Suffix → the runtimes that read it, the usual one first; of the formats that this version writes."""
    found: dict[str, list[Runtime]] = {}
    for row in RUNTIMES.values():
        format = exporters.FORMATS.get(row.reads)
        for suffix in (*((format.suffix,) if format else ()), *row.also):
            found.setdefault(suffix, []).append(row)
    return found


def readers(path: Path) -> list[Runtime]:
    """The runtimes that read a file, by its name; none for a checkpoint."""
    known = suffixes()
    fitting = [suffix for suffix in known if path.name.lower().endswith(suffix)]
    return known[max(fitting, key=len)] if fitting else []


def choose(path: Path, asked: Sequence[Runtime]) -> list[Runtime]:
    """The asked runtimes, or the usual one of the file's format. Raises UsageError where one does not read it."""
    there = readers(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file.")
    if not there:
        known = ", ".join(suffixes())
        raise UsageError(f"{path}: several files are timed against one another, and this one is none of {known}.")
    format = exporters.named(path)
    for each in format.beside(path) if format is not None else ():
        if not each.is_file():
            raise UsageError(f"{path}: its {each.name} is not beside it: copy it there.")
    for row in asked:
        if row not in there:
            names = ", ".join(each.name for each in there)
            raise UsageError(f"{path}: {row.name} does not read it; it is read by {names}.")
    return list(asked) or there[:1]


def inputs(path: Path) -> Inputs | None:
    """What the file takes: from the manifest beside it, or from itself; None where neither says."""
    if path.suffix == ".onnx":
        return _of_onnx(path)
    return _of_manifest(path)


def shapes(found: Inputs | None, given: Sequence[tuple[int, ...]] | None, batch: int | None, path: Path) -> list[tuple[int, ...]]:
    """Sizes to time: those given, else the file's own with ``batch`` or 1 for a free batch. Raises UsageError."""
    if given is not None:
        if found is not None and len(found) != len(given):
            raise UsageError(f"--input-shape: {len(given)} inputs given, {path.name} has {len(found)}; join them with +.")
        return [_batched(shape, batch) for shape in given]
    if found is None or any(None in shape[1:] for shape, _ in found):
        raise UsageError(f"{path}: nothing says what size its input is: pass --input-shape, for example 1x3x224x224.")
    return [_batched(tuple(1 if size is None else size for size in shape), batch) for shape, _ in found]


def check(found: Inputs | None, wanted: Sequence[tuple[int, ...]], path: Path) -> None:
    """Raise UsageError where the file fixes another size."""
    for (shape, _), size in zip(found or [], wanted, strict=False):
        if len(shape) != len(size) or any(a is not None and a != b for a, b in zip(shape, size, strict=True)):
            text, asked = ("x".join("?" if each is None else str(each) for each in one) for one in (shape, size))
            raise UsageError(f"{path}: takes {text}, not {asked}.")


def _batched(shape: tuple[int, ...], batch: int | None) -> tuple[int, ...]:
    return (batch, *shape[1:]) if batch is not None and shape else shape


def _of_onnx(path: Path) -> Inputs:
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's errors share no base class
        raise UsageError(f"{path}: is no ONNX file ({str(error).splitlines()[0]}).") from error
    constant = {each.name for each in graph.initializer}
    found = []
    for value in graph.input:
        if value.name in constant:
            continue
        kind = value.type.tensor_type
        shape = tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in kind.shape.dim)
        found.append((shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)))
    return found


def _of_manifest(path: Path) -> Inputs | None:
    for manifest in sorted(path.parent.glob("*.manifest.json")):
        try:
            document = json.loads(manifest.read_text(encoding="utf-8"))
            if any(each["file"] == path.name for each in document["artifacts"]):
                return [_recorded(each) for each in document["inputs"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _recorded(record: dict[str, Any]) -> tuple[tuple[int | None, ...], Any]:
    sizes = tuple(size if isinstance(size, int) else None for size in record["shape"])
    return sizes, np.dtype(record.get("type", "float32"))

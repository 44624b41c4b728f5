"""Archives that are not pickles: safetensors, TorchScript, ``.pt2`` exported programs."""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foldexport.checkpoint.pickles import reason
from foldexport.errors import CheckpointError, MissingDependencyError

# TorchScript runs `__setstate__` while it is loaded, and these operators write or map files
# (torch/csrc/jit/runtime/register_prim_ops.cpp, torchvision's image operators). Any mention counts: the language
# allows spaces and line breaks inside a dotted name.
TORCHSCRIPT_ACTS = re.compile(rb"\b(__setstate__|save|from_file|write_file|write_jpeg|write_png)\b")

# torch/_export/serde/schema.py, ScalarType.
PT2_TYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 9: torch.complex32, 10: torch.complex64, 11: torch.complex128, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and the header's ``__metadata__`` (text to text)."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingDependencyError(f"{path}: needs the safetensors package: pip install safetensors") from error
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            # safe_open has keys() and is not iterable.
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: truncated or damaged safetensors file ({path.stat().st_size:,} bytes; {error}).\n"
            "Download or copy it again."
        ) from error


def read_torchscript(path: Path, trust_pickle: bool) -> nn.Module:
    """The scripted network, on the CPU.

    Loading runs no Python, but may run TorchScript: an archive that could act needs trust.
    """
    try:
        acts = "" if trust_pickle else _torchscript_acts(path)
        if acts:
            raise CheckpointError(
                f"{path}: this TorchScript archive wants to run {acts} of its own; nothing was run.\n"
                "Where you trust its author pass --trust-pickle; else ask for the weights alone: "
                "torch.save(model.state_dict(), ...)."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(str(path), map_location="cpu")
    except RuntimeError as error:
        raise CheckpointError(f"{path}: this TorchScript archive does not load: {reason(error)}.") from error


def _torchscript_acts(path: Path) -> str:
    # PyTorch's own zip reader: what it finds under a name is what torch.jit.load will run.
    reader = torch._C.PyTorchFileReader(str(path))
    for name in reader.get_all_records():
        lowered = name.lower()
        if lowered.startswith("code/") and lowered.endswith(".py"):
            found = TORCHSCRIPT_ACTS.search(reader.get_record(name))
            if found:
                return f"`{found.group(1).decode()}`"
        if lowered == "data.pkl" and b"__torch__.torch.classes." in reader.get_record(name):
            return "`__setstate__` of a C++ class"
    return ""


def read_pt2(path: Path, trust_pickle: bool) -> tuple[dict[str, Tensor], nn.Module | None, list[str]]:
    """The weights of an exported program; the program itself only with trust.

    ``torch.export.load`` evaluates expressions of the file (``sympy.sympify``), builds Python source from its names,
    and falls back to the real unpickler (torch/_export/serde/serialize.py), so it is code.
    """
    if not trust_pickle:
        note = "the program in the .pt2 was not opened, only its weights (opening it may run code; --trust-pickle does)"
        return _pt2_weights(path), None, [note]
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            program = torch.export.load(file)
            return dict(program.state_dict), program.module(), ["opened with trust: the .pt2 program may have run code"]
    # The reader of another version's program raises anything.
    except Exception as error:
        raise CheckpointError(f"{path}: this .pt2 program does not load: {reason(error)}.") from error


def _pt2_weights(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_pt2_weights(archive)
    # A forged or foreign layout surfaces as whatever is missing first.
    except Exception as error:
        raise CheckpointError(
            f"{path}: the weights of this .pt2 program cannot be read safely: {reason(error)}.\n"
            "Save its state_dict() with torch.save, or pass --trust-pickle where you trust its author."
        ) from error


def _read_pt2_weights(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    names = archive.namelist()
    pickled = [n for n in names if n == "serialized_state_dict.pt" or re.search(r"(^|/)data/weights/[^/]*\.pt$", n)]
    if pickled:
        return torch.load(io.BytesIO(archive.read(pickled[0])), map_location="cpu", weights_only=True)
    configs = sorted((n for n in names if n.endswith("_weights_config.json")), key=lambda n: "/model_w" not in n)
    if not configs:
        raise ValueError("it has no weights_config.json")
    folder = configs[0].rsplit("/", 1)[0]
    entries = json.loads(archive.read(configs[0]))["config"]
    return {key: _pt2_tensor(archive, f"{folder}/{entry['path_name']}", entry) for key, entry in entries.items()}


def _pt2_tensor(archive: zipfile.ZipFile, record: str, entry: dict[str, Any]) -> Tensor:
    payload = archive.read(record)
    if entry["use_pickle"]:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    meta = entry["tensor_meta"]
    sizes = [size["as_int"] for size in meta["sizes"]]
    strides = [stride["as_int"] for stride in meta["strides"]]
    dtype = PT2_TYPES[meta["dtype"]]
    if not payload:
        return torch.empty(sizes, dtype=dtype)
    # as_strided refuses a view beyond the payload's storage. clone: weights that share a payload become their own.
    flat = torch.frombuffer(bytearray(payload), dtype=dtype)
    return flat.as_strided(sizes, strides, meta["storage_offset"]["as_int"]).clone()

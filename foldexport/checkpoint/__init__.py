"""A checkpoint file → plain CPU tensors and metadata, without running code found in the file.

    path ─ sniff ─▶ format ─ pickles / archives ─▶ whatever the file holds ─ select ─▶ weights + what lay beside them
         ─ tensors.plain ─▶ Checkpoint

Everything is read weights-only. A pickle with code in it, a TorchScript archive whose code acts while it is loaded,
and the program of a ``.pt2`` are opened with ``trust_pickle=True`` only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foldexport.checkpoint import archives, pickles, select, sniff
from foldexport.checkpoint.tensors import check_finite, check_running_var, describe_precision, plain

__all__ = ["Checkpoint", "check_finite", "check_running_var", "read", "sha256"]


@dataclass(eq=False)
class Checkpoint:
    """What a checkpoint file holds.

    ``tensors`` are contiguous plain CPU tensors under the network's own names, in the file's order. ``taken`` is the
    key path of the weights in the file ("state_dict", "model.params + stats"), empty where the file is the state dict
    itself; ``prefix`` was stripped from every key ("module."). ``metadata`` is JSON-able. ``module`` is set where the
    file holds the network itself (TorchScript, a trusted ``.pt2`` or whole pickled module), whatever ``prefix`` is.
    """

    path: Path
    tensors: dict[str, Tensor]
    taken: str
    prefix: str
    ema: bool
    notes: list[str]
    sha256: str
    format: str
    metadata: dict[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None


def read(path: str | Path, *, trust_pickle: bool = False, use_ema: bool | None = None) -> Checkpoint:
    """Read the weights in ``path``.

    ``use_ema``: ``True`` takes the exponential moving average of the weights, ``False`` never does, ``None`` does only
    where the file has nothing else. What was taken, and what was left, is in ``notes``.

    Raises :class:`~foldexport.errors.CheckpointError` for everything that is not a readable checkpoint, in one or two
    lines.
    """
    path = Path(path)
    kind = sniff.kind(path)
    loaded = _load(path, kind, trust_pickle)
    chosen = select.choose(loaded.content, path, use_ema)
    named, prefix = select.strip_prefix(chosen.tensors)
    tensors = {key: plain(key, tensor, path) for key, tensor in named.items()}
    notes = [*loaded.notes, *chosen.notes, *describe_precision(tensors)]
    if prefix:
        notes.append(f"stripped the prefix `{prefix}` from all {len(tensors)} keys")
    metadata = {**chosen.metadata, **loaded.metadata}
    return Checkpoint(
        path=path,
        tensors=tensors,
        taken=chosen.taken,
        prefix=prefix,
        ema=chosen.ema,
        notes=notes,
        sha256=sha256(path),
        format="pickled module" if chosen.module is not None and kind.startswith(("torch", "pickle")) else kind,
        metadata=metadata,
        module=loaded.module if loaded.module is not None else chosen.module,
    )


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, streamed."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass
class _Loaded:
    content: Any
    notes: list[str] = field(default_factory=list)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None


def _load(path: Path, kind: str, trust_pickle: bool) -> _Loaded:
    if kind == "safetensors":
        tensors, metadata = archives.read_safetensors(path)
        return _Loaded(tensors, metadata=metadata)
    if kind == "torchscript":
        module = archives.read_torchscript(path, trust_pickle)
        return _Loaded(module.state_dict(), module=module)
    if kind == "pt2":
        tensors, module, notes = archives.read_pt2(path, trust_pickle)
        return _Loaded(tensors, notes=notes, module=module)
    content, notes = pickles.load(path, kind, trust_pickle)
    return _Loaded(content, notes=notes)

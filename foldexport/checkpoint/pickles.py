"""Files written by ``torch.save`` (zip and legacy) and plain pickles: weights-only, with code only where trusted."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from pathlib import Path
from typing import IO, Any

import torch
from torch import _weights_only_unpickler

from foldexport.checkpoint.standins import STANDINS, safe_globals
from foldexport.errors import CheckpointError

# A legacy file is the magic number, the protocol version, the system's facts and the object, each a pickle of its own.
LEGACY_PICKLES = 4


def load(path: Path, kind: str, trust_pickle: bool) -> tuple[Any, list[str]]:
    """What ``path`` (of :func:`sniff.kind` ``kind``) holds, and notes.

    Raises :class:`CheckpointError`: code in the pickle and no trust, truncated or damaged, written for classes that are
    not here.
    """
    if kind == "pickle":
        return _load_plain_pickle(path, trust_pickle)
    try:
        with warnings.catch_warnings(), safe_globals():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True), []
    # Damaged bytes surface as whatever the reader stumbles over: EOFError, IndexError, struct.error, …
    except Exception as error:
        unsafe = unsafe_globals(path, kind)
        if unsafe and not trust_pickle:
            raise _wants_to_run(path, unsafe) from error
        if not trust_pickle or not _is_whole(path, kind):
            raise _unreadable(path, kind, error) from error
    return _load_trusted(path, unsafe, lambda: torch.load(path, map_location="cpu", weights_only=False))


def unsafe_globals(path: Path, kind: str) -> list[str]:
    """The globals a pickle names outside of what the weights-only reader allows, found without running it, in order."""
    allowed = {*_weights_only_unpickler._get_allowed_globals(), *STANDINS}
    with _open_pickle(path, kind) as stream:
        names = [name for _ in range(LEGACY_PICKLES if kind == "torch legacy" else 1) for name in _globals_in(stream)]
    return [name for name in dict.fromkeys(names) if name not in allowed]


def _is_whole(path: Path, kind: str) -> bool:
    """Whether every pickle in the file reaches its end."""
    try:
        with _open_pickle(path, kind) as stream:
            for _ in range(LEGACY_PICKLES if kind == "torch legacy" else 1):
                for _ in pickletools.genops(stream):
                    pass
    # pickletools raises ValueError, UnicodeDecodeError, struct.error, … on bytes that are no pickle.
    except Exception:
        return False
    return True


def _open_pickle(path: Path, kind: str) -> IO[bytes]:
    if kind != "torch zip":
        return open(path, "rb")
    with zipfile.ZipFile(path) as archive:
        record = next(name for name in archive.namelist() if name.split("/", 1)[-1] == "data.pkl")
        return io.BytesIO(archive.read(record))


def _globals_in(stream: IO[bytes]) -> list[str]:
    found: list[str] = []
    strings: list[str] = []
    memo: dict[int, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                found.append(_modern_name(*argument.split(" ", 1)))
            elif opcode.name == "STACK_GLOBAL":
                found.append(_modern_name(*strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = strings[-1] if strings else ""
            elif "PUT" in opcode.name:
                memo[argument] = strings[-1] if strings else ""
            elif "GET" in opcode.name:
                strings.append(memo.get(argument, ""))
    # Bytes that are no pickle (truncated, damaged, forged) end the search; what was named before them stands.
    except Exception:
        return found
    return found


def _modern_name(module: str = "?", name: str = "?") -> str:
    """The Python 3 name; ``posix`` and ``nt`` are written as users know them."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{'os' if module in ('posix', 'nt') else module}.{name}"


def _wants_to_run(path: Path, unsafe: list[str]) -> CheckpointError:
    more = f" and {len(unsafe) - 1} more" if len(unsafe) > 1 else ""
    network = any(name.startswith("torch.nn.") for name in unsafe)
    whole = " (a whole pickled network, not only weights)" if network else ""
    return CheckpointError(
        f"{path}: the file wants to run `{unsafe[0]}`{more}{whole}; nothing was run.\n"
        "Where you trust its author pass --trust-pickle; else ask for the weights alone: "
        "torch.save(model.state_dict(), ...)."
    )


def _unreadable(path: Path, kind: str, error: Exception) -> CheckpointError:
    size = f"{path.stat().st_size:,} bytes"
    protocol = _protocol(path, kind)
    if isinstance(error, pickle.UnpicklingError) and protocol > 2 and "nsupported operand" in str(error):
        return CheckpointError(
            f"{path}: written with pickle protocol {protocol}, which the weights-only reader does not know.\n"
            "Save it again with torch.save's own protocol (2), or pass --trust-pickle where you trust its author."
        )
    if isinstance(error, pickle.UnpicklingError) and _is_whole(path, kind):
        return CheckpointError(
            f"{path}: the weights-only reader refuses it ({reason(error)}; {size}); nothing was run.\n"
            "Pass --trust-pickle where you trust its author, or download it again."
        )
    if isinstance(error, pickle.UnpicklingError):
        return CheckpointError(f"{path}: truncated or damaged ({size}).\nDownload or copy it again.")
    if isinstance(error, ValueError) and "NumPy" in str(error):
        return CheckpointError(f"{path}: {error}; save the weights alone: torch.save(model.state_dict(), ...).")
    if isinstance(error, TypeError) and "not available" in str(error):
        return CheckpointError(
            f"{path}: {error} Save it again on the CPU: torch.save(state_dict with .cpu() tensors, ...)."
        )
    return CheckpointError(f"{path}: truncated or damaged ({size}; {reason(error)}).\nDownload or copy it again.")


def reason(error: Exception) -> str:
    """The reader's own reason in one line, without torch's advice to open the file unsafely."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    paragraphs = text.split("\n")
    if text.startswith("Weights only load failed"):
        paragraphs = [line for line in paragraphs[1:] if "nsupported" in line or "WeightsUnpickler error" in line]
    line = next((line.strip() for line in paragraphs if line.strip()), type(error).__name__)
    return line.split("WeightsUnpickler error: ")[-1].split(". Please use")[0][:160].rstrip(".")


def _protocol(path: Path, kind: str) -> int:
    with _open_pickle(path, kind) as stream:
        head = stream.read(2)
    return head[1] if head[:1] == b"\x80" else 0


def _load_plain_pickle(path: Path, trust_pickle: bool) -> tuple[Any, list[str]]:
    unsafe = unsafe_globals(path, "pickle")
    if unsafe and not trust_pickle:
        raise _wants_to_run(path, unsafe)
    if not trust_pickle:
        raise CheckpointError(
            f"{path}: a Python pickle that torch.save did not write, which the weights-only reader does not open.\n"
            "Save its weights with torch.save(weights, ...), or pass --trust-pickle where you trust its author."
        )
    with open(path, "rb") as file:
        return _load_trusted(path, unsafe, lambda: pickle.load(file))


def _load_trusted(path: Path, unsafe: list[str], opened) -> tuple[Any, list[str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = opened()
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: its pickled code is not importable here: {reason(error)}.\n"
            "Run where that module can be imported (PYTHONPATH), or get the weights alone: "
            "torch.save(model.state_dict(), ...)."
        ) from error
    # The file's own code may raise anything.
    except Exception as error:
        if not unsafe:
            raise CheckpointError(
                f"{path}: truncated or damaged ({reason(error)}).\nDownload or copy it again."
            ) from error
        raise CheckpointError(
            f"{path}: its own code failed while it was opened: {type(error).__name__}: {reason(error)}."
        ) from error
    named = ", ".join(f"`{name}`" for name in unsafe[:3]) + (f" and {len(unsafe) - 3} more" if len(unsafe) > 3 else "")
    return content, [f"opened with trust: code in the file may have run ({named or 'plain pickle'})"]

"""A module on its way to another process: pickled where its classes can be imported there, else as an exported program."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, fx, nn

from foldexport.errors import UsageError

BY_FILE = "_foldexport_arch_"  # modules of --arch path/file.py, which no import finds


def save(module: nn.Module, example: Sequence[Tensor], path: Path, *, free_batch: bool) -> tuple[Path, str]:
    """Write ``module`` beside ``path``; returns the file to load and, where it is not the module itself, why not.

    Raises UsageError where it can be sent in neither form.

    example: inputs at a batch of two or more. The reader is `runtimes.pytorch`.
    """
    reason = _unportable(module)
    if not reason:
        try:
            torch.save(module, path.with_suffix(".module"))
            torch.save({"folders": _folders(module), "files": _files(module)}, path.with_suffix(".torch"))
            return path.with_suffix(".torch"), ""
        except (pickle.PicklingError, RuntimeError, AttributeError, TypeError) as error:
            reason = str(error).splitlines()[0][:120]
            path.with_suffix(".module").unlink(missing_ok=True)
    axes = tuple({0: torch.export.Dim("batch")} if free_batch and value.dim() else None for value in example)
    try:
        with torch.no_grad():
            program = torch.export.export(module, tuple(example), dynamic_shapes=axes if any(axes) else None)
        torch.export.save(program, path.with_suffix(".pt2"))
    except Exception as error:  # torch.export raises what it meets
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"PyTorch times a network in a process of its own, and this one cannot be sent there: {reason}; "
            f"as an exported program neither: {lines[0][:200]}"
        ) from error
    return path.with_suffix(".pt2"), reason


def _unportable(module: nn.Module) -> str:
    """Why another process could not build the module's classes; empty where it can."""
    for each in module.modules():
        kind = type(each)
        if isinstance(each, fx.GraphModule):  # which pickles as its code
            continue
        if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
            return f"{kind.__qualname__} is defined where no other process can import it"
    return ""


def _sources(module: nn.Module) -> list[ModuleType]:
    names = {type(each).__module__ for each in module.modules()}
    return [sys.modules[name] for name in sorted(names) if getattr(sys.modules.get(name), "__file__", None)]


def _files(module: nn.Module) -> dict[str, str]:
    return {each.__name__: str(each.__file__) for each in _sources(module) if each.__name__.startswith(BY_FILE)}


def _folders(module: nn.Module) -> list[str]:
    """Where the classes' modules are imported from, and what a file of the user's imports beside itself."""
    found = []
    for each in _sources(module):
        file = Path(str(each.__file__)).resolve()
        depth = 0 if each.__name__.startswith(BY_FILE) else each.__name__.count(".") + (file.name == "__init__.py")
        found.append(str(file.parents[depth]))
    return list(dict.fromkeys(found))

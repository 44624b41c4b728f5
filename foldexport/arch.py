"""A network that the user names, and the weights of a checkpoint in it.

``--arch package.module:callable`` or ``--arch path/file.py:callable``, with ``--arch-arg key=value``.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from foldexport.checkpoint.fit import load_weights
from foldexport.errors import UsageError

__all__ = ["load_arch", "load_weights", "parse_arch_args"]

SHOWN_KEYS = 5

# Literals of other languages that would otherwise be true as text.
WORDS = {"true": True, "false": False, "none": None, "null": None}


def parse_arch_args(pairs: Sequence[str]) -> dict[str, Any]:
    """``["depth=50", "widths=(64, 128)", "act=relu"]`` → ``{"depth": 50, "widths": (64, 128), "act": "relu"}``.

    Values are Python literals (also true, false, none in any case), else text. Raises :class:`UsageError` for
    anything that is not ``key=value`` and for a key given twice.
    """
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            close = key.replace("-", "_")
            hint = f" (did you mean {close}?)" if equals and close.isidentifier() else ""
            raise UsageError(f"--arch-arg {pair}: wanted key=value with a Python argument name{hint}.")
        if key in arguments:
            raise UsageError(f"--arch-arg {key} is given twice ({arguments[key]!r} and {value}); give it once.")
        arguments[key] = _literal(value)
    return arguments


def _literal(text: str) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def load_arch(spec: str, arch_args: Mapping[str, Any] | None = None) -> nn.Module:
    """Build the network that ``spec`` names: a callable that returns an ``nn.Module``, or an ``nn.Module`` itself.

    Modules are looked for in the current folder too, and those that a file imports beside the file. Raises
    :class:`UsageError`, with the user's own message and line where the user's code raised.
    """
    place, colon, attribute = spec.rpartition(":")
    if not colon or not place or not attribute:
        raise UsageError(f"--arch {spec}: wanted a zoo name, package.module:callable or path/file.py:callable.")
    is_file = place.endswith(".py") or os.sep in place
    folder = str(Path(place).resolve().parent) if is_file else os.getcwd()
    with _importable_from(folder):
        module = _import_file(spec, Path(place)) if is_file else _import_module(spec, place)
        return _build(spec, _attribute(spec, module, place, attribute), dict(arch_args or {}))


@contextlib.contextmanager
def _importable_from(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _import_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"--arch {spec}: no such file: {path}.")
    name = f"_foldexport_arch_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise UsageError(f"--arch {spec}: {path} is not a Python file.")
    module = importlib.util.module_from_spec(found)
    # Dataclasses and pickles look their module up by name.
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    # User code: it may raise anything, and a script without a main guard may exit.
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise _import_failed(spec, str(path), error) from error
    return module


def _import_module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(
                f"--arch {spec}: there is no module {error.name} here "
                f"(looked in {os.getcwd()} and the installed packages).\n"
                "Install it, run from the folder that holds it, or name the file: --arch path/file.py:callable."
            ) from error
        raise _import_failed(spec, name, error) from error
    # User code: it may raise anything, and a script without a main guard may exit.
    except (Exception, SystemExit) as error:
        raise _import_failed(spec, name, error) from error


def _import_failed(spec: str, place: str, error: BaseException) -> UsageError:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return UsageError(f"--arch {spec}: {place} imports {error.name}, which is not installed here{_where(error)}.")
    if isinstance(error, SystemExit):
        return UsageError(
            f"--arch {spec}: {place} exits while it is imported{_where(error)}; "
            'put what it runs under if __name__ == "__main__".'
        )
    return UsageError(f"--arch {spec}: {place} does not import: {type(error).__name__}: {error}{_where(error)}.")


def _where(error: BaseException) -> str:
    """The user's line that raised: the innermost that is not in this file or the import machinery."""
    if isinstance(error, SyntaxError):
        return ""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and "importlib" not in frame.filename
    ]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _attribute(spec: str, module: ModuleType, place: str, dotted: str) -> Any:
    found: Any = module
    for name in dotted.split("."):
        if not hasattr(found, name):
            raise UsageError(f"--arch {spec}: {place} has no {name}{_nearest(name, found)}.")
        found = getattr(found, name)
    return found


def _nearest(name: str, owner: Any) -> str:
    public = [key for key, value in vars(owner).items() if not key.startswith("_") and callable(value)]
    close = difflib.get_close_matches(name, public, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; it has {', '.join(public[:SHOWN_KEYS])}" if public else ""


def _build(spec: str, target: Any, arguments: dict[str, Any]) -> nn.Module:
    if isinstance(target, nn.Module):
        if arguments:
            name = next(iter(arguments))
            raise UsageError(f"--arch {spec}: is a network already, not a callable, so it takes no --arch-arg {name}.")
        return target
    if not callable(target):
        kind = type(target).__name__
        raise UsageError(f"--arch {spec}: is not callable (of type {kind}); wanted a class or function of the network.")
    try:
        network = target(**arguments)
    # User code: it may raise anything.
    except (Exception, SystemExit) as error:
        takes = f"; it takes {_signature(target)}" if isinstance(error, TypeError) else ""
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise UsageError(
            f"--arch {spec}: calling it with ({given}) raised {type(error).__name__}: {error}{_where(error)}{takes}."
        ) from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"--arch {spec}: returned a {type(network).__name__}; wanted a torch.nn.Module.")
    return network


def _signature(target: Any) -> str:
    try:
        return str(inspect.signature(target))
    except (ValueError, TypeError):
        return "arguments of its own"

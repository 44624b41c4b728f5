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
import re
import sys
import traceback
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from foldexport.builder import Builder, builder_of
from foldexport.checkpoint import fit
from foldexport.errors import UsageError
from foldexport.trace.calling import answer_hidden_methods, refuse_hidden_methods, unwrapped

__all__ = ["load_arch", "load_weights", "parse_arch_args"]

SHOWN_KEYS = 5

#: How the networks that are in use were built, for suggestions where their weights do not fit.
_BUILDERS: weakref.WeakKeyDictionary[nn.Module, Builder] = weakref.WeakKeyDictionary()

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


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path = "checkpoint") -> list[str]:
    """``checkpoint.fit.load_weights``, which for a network of ``load_arch`` also says with which arguments it would fit."""
    return fit.load_weights(module, tensors, source, _BUILDERS.get(module))


def load_arch(spec: str, arch_args: Mapping[str, Any] | None = None) -> nn.Module:
    """Build the network that ``spec`` names: a callable that returns an ``nn.Module``, or an ``nn.Module`` itself.

    A network in a tuple, list or dict is taken out of it where it is the only one, and out of ``nn.DataParallel``. Modules
    are looked for in the current folder too, and those that a file imports beside the file; a file in a package is imported
    as part of it. Raises :class:`UsageError`, with the user's own message and line where the user's code raised.
    """
    place, colon, attribute = spec.rpartition(":")
    if not colon or not place or not attribute:
        raise UsageError(f"--arch {spec}: wanted a zoo name, package.module:callable or path/file.py:callable.")
    is_file = place.endswith(".py") or os.sep in place
    folder, name = _package_of(Path(place)) if is_file else (os.getcwd(), place)
    with _importable_from(folder):
        module = _import_file(spec, Path(place)) if is_file and "." not in name else _import_module(spec, name)
        return _build(spec, _attribute(spec, module, place, attribute), dict(arch_args or {}))


def _package_of(path: Path) -> tuple[str, str]:
    """The folder to import a file from, and its name there: dotted where the file is part of a package."""
    folder, name = path.resolve().parent, path.stem
    while path.is_file() and (folder / "__init__.py").is_file():
        folder, name = folder.parent, f"{folder.name}.{name}"
    return str(folder), name


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
    if "no known parent package" in str(error):
        return UsageError(
            f"--arch {spec}: {place} imports from its package{_where(error)}, and its folder has no __init__.py.\n"
            "Name it from the folder above: --arch package.module:callable."
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
        return _ready(target)
    if not callable(target):
        kind = type(target).__name__
        inside = f"; it has {_callables(target)}" if isinstance(target, ModuleType) else ""
        raise UsageError(
            f"--arch {spec}: is not callable (of type {kind}); wanted a class or function of the network{inside}."
        )
    _refuse_arguments(spec, target, arguments)
    try:
        made = target(**arguments)
    # User code: it may raise anything.
    except (Exception, SystemExit) as error:
        takes = f"; it takes {_signature(_called(error, target))}" if isinstance(error, TypeError) else ""
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise UsageError(
            f"--arch {spec}: calling it with ({given}) raised {type(error).__name__}: {error}{_where(error)}{takes}."
            f"{_text_hint(arguments)}"
        ) from error
    network = _network_in(spec, made)
    _BUILDERS[network] = builder_of(lambda **changed: _network_in(spec, target(**changed)), arguments, network)
    return network


def _ready(network: nn.Module) -> nn.Module:
    network = unwrapped(network)
    refuse_hidden_methods(network)
    answer_hidden_methods(network)
    return network


def _network_in(spec: str, made: Any) -> nn.Module:
    """The network that a callable returned, alone or the only one in a tuple, list or dict."""
    if isinstance(made, nn.Module):
        return _ready(made)
    items = made if isinstance(made, dict) else dict(enumerate(made)) if isinstance(made, list | tuple) else {}
    networks = {key: value for key, value in items.items() if isinstance(value, nn.Module)}
    if len(networks) == 1:
        return _ready(next(iter(networks.values())))
    kind = type(made).__name__
    if networks:
        names = ", ".join(f"{key}: {type(value).__name__}" for key, value in networks.items())
        raise UsageError(
            f"--arch {spec}: returned a {kind} with {len(networks)} networks ({names}).\n"
            "Wanted one: name a function that returns it alone."
        )
    raise UsageError(f"--arch {spec}: returned a {kind}; wanted a torch.nn.Module.")


def _refuse_arguments(spec: str, target: Any, arguments: Mapping[str, Any]) -> None:
    """Raises UsageError for names that a callable does not take, and for those that it needs and were not given."""
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):
        return
    parameters = signature.parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [key for key in arguments if key not in named]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        close = difflib.get_close_matches(unknown[0], named, n=1, cutoff=0.5)
        near = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(
            f"--arch {spec}: got an unexpected keyword argument '{unknown[0]}'{near}\nit takes {_signature(target)}."
        )
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_ONLY)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in kinds and p.name not in arguments]
    if needed:
        options = " ".join(f"--arch-arg {name}=…" for name in needed)
        raise UsageError(
            f"--arch {spec}: needs {' and '.join(needed)}: pass {options}; it takes {_signature(target)}.\n"
            "What is no number, text, list or dict (a class, a function) needs a function of your own that passes it."
        )


def _called(error: BaseException, target: Any) -> Any:
    """What a TypeError says was called with the wrong arguments, found beside what was named: the class in a function."""
    found = re.match(r"(\w+)(\.__init__)?\(\) (got|missing|takes)", str(error))
    space = getattr(target, "__globals__", {})
    return space.get(found.group(1), target) if found else target


def _text_hint(arguments: Mapping[str, Any]) -> str:
    texts = [key for key, value in arguments.items() if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w.]*", value)]
    if not texts:
        return ""
    return f"\n{texts[0]}={arguments[texts[0]]!r} is passed as text; a class or function needs a function of your own."


def _callables(owner: Any) -> str:
    return ", ".join([key for key, value in vars(owner).items() if not key.startswith("_") and callable(value)][:SHOWN_KEYS])


def _signature(target: Any) -> str:
    try:
        text = str(inspect.signature(target))
    except (ValueError, TypeError):
        return "arguments of its own"
    return text if len(text) <= 300 else text[:297] + "…)"

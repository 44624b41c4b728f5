"""Where in the user's code something happened: the file and line, the expression, and the module whose code it is."""

from __future__ import annotations

import ast
import functools
import linecache
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import torch
from torch import nn

_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep
_OWN_DIR = os.path.dirname(os.path.dirname(__file__)) + os.sep
_STANDARD_DIR = sysconfig.get_paths()["stdlib"] + os.sep
_FOREIGN = re.compile(r"[/\\](site|dist)-packages[/\\](numpy|sympy|functorch|torchgen)[/\\]")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')

Names = dict[int, tuple[str, str]]


@dataclass(frozen=True)
class Place:
    """A line of the user's code.

    expression: the part of the line that was being evaluated, '' where Python does not tell. module, kind: the name of
    the module whose code it is ('' for the network itself, None where that is not known), and its class.
    """

    file: str
    line: int
    function: str
    expression: str = ""
    module: str | None = None
    kind: str = ""

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line} in {self.function}"

    @property
    def code(self) -> str:
        return linecache.getline(self.file, self.line).strip()


def is_users(file: str) -> bool:
    """Whether a source file is neither PyTorch's, NumPy's, Python's nor ours."""
    if file.startswith((_TORCH_DIR, _OWN_DIR, "<", "torch/")) or _FOREIGN.search(file):
        return False
    return not file.startswith(_STANDARD_DIR) or "-packages" in file


def last_user_frame(text: str) -> str:
    """``net.py:12 in forward`` for the innermost of the user's lines in the text of a traceback; '' without one."""
    users = [frame for frame in _FRAME.findall(text) if is_users(frame[0])]
    if not users:
        return ""
    file, line, name = users[-1]
    return f"{os.path.basename(file)}:{line} in {name}"


def names_of(module: nn.Module) -> Names:
    """Every submodule's name and class, found by its attributes: tracing hands out stand-ins that share them."""
    return {id(vars(child)): (name, type(child).__name__) for name, child in nn.Module.named_modules(module)}


def place_of(error: BaseException | None, names: Names) -> Place | None:
    """The user's innermost line that error went through: from its traceback, that of its causes, or its text."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        walked = list(traceback.walk_tb(error.__traceback__))
        for (frame, line), summary in reversed(list(zip(walked, traceback.extract_tb(error.__traceback__)))):
            if is_users(frame.f_code.co_filename):
                return _at(frame, line, names, _expression(summary))
        texts = [found for found in _FRAME.findall(str(error)) if is_users(found[0])]
        if texts:
            file, line, name = texts[-1]
            return Place(file, int(line), name)
        error = error.__cause__ or error.__context__
    return None


def here(names: Names) -> Place | None:
    """The user's innermost line that is running now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return None if frame is None else _at(frame, frame.f_lineno, names)


def _at(frame: FrameType, line: int | None, names: Names, expression: str = "") -> Place:
    module, kind = _module_at(frame, names)
    return Place(frame.f_code.co_filename, line or 0, frame.f_code.co_name, expression, module, kind)


def _module_at(frame: FrameType | None, names: Names) -> tuple[str | None, str]:
    """The module that a frame works for: its ``self``, or that of the nearest caller which has one."""
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(vars(owner)) in names:
            return names[id(vars(owner))]
        frame = frame.f_back
    return None, ""


def _expression(summary: traceback.FrameSummary) -> str:
    """The text between the columns that were being evaluated (Python 3.11 and later)."""
    start, end = getattr(summary, "colno", None), getattr(summary, "end_colno", None)
    if start is None or end is None or summary.end_lineno != summary.lineno:
        return ""
    raw = linecache.getline(summary.filename, summary.lineno or 0).encode()
    return raw[start:end].decode(errors="replace").strip()


# ---- what kind of code a line is


@functools.lru_cache(maxsize=64)
def _parsed(file: str, lines: tuple[str, ...]) -> ast.Module | None:
    try:
        return ast.parse("".join(lines), file)
    except (SyntaxError, ValueError):
        return None


def enclosing(place: Place, *kinds: type[ast.AST]) -> ast.AST | None:
    """The innermost node of these kinds around a line; with a ``test``, only where the line is in the test."""
    tree = _parsed(place.file, tuple(linecache.getlines(place.file)))
    found = [node for node in ast.walk(tree) if isinstance(node, kinds) and _covers(node, place.line)] if tree else []
    return min(found, key=lambda node: _span(node), default=None)


def _covers(node: ast.AST, line: int) -> bool:
    part = getattr(node, "test", node)
    return part.lineno <= line <= (part.end_lineno or part.lineno)


def _span(node: ast.AST) -> int:
    return (node.end_lineno or node.lineno) - node.lineno


def functions_of(module: nn.Module) -> Iterator[object]:
    """The functions and cached functions in the classes of the user's modules."""
    seen: set[type] = set()
    for child in nn.Module.modules(module):
        for base in type(child).__mro__:
            if base in seen or not is_users(getattr(sys.modules.get(base.__module__), "__file__", None) or "<"):
                continue
            seen.add(base)
            for value in vars(base).values():
                yield getattr(value, "__func__", value)

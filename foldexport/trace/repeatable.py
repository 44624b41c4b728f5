"""Networks that give another result at each call are refused: a graph is one of them only.

They are found by what their forward did while it was traced: it changed attributes, drew from Python's or NumPy's random
generators, or reads a clock. Only then is the network itself called a few times.
"""

from __future__ import annotations

import dis
import random
import sys
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from foldexport.errors import ModelError
from foldexport.trace.calling import Inputs, run
from foldexport.trace.explain import headline
from foldexport.trace.exporting import quiet
from foldexport.trace.kept import kept
from foldexport.trace.user_code import Place, functions_of, is_users

_CLOCKS = frozenset({"time", "time_ns", "perf_counter", "monotonic", "now", "today", "utcnow", "urandom", "uuid4", "token_bytes"})
_DRAWS = frozenset({"random", "rand", "randn", "randint", "uniform", "normal", "choice", "shuffle", "default_rng", "gauss"})
_CALLS = 8  # of a network that draws at random: a branch of probability 1/10 is missed with probability 0.9^7 = 0.48
_TOLERANCE = 1e-5


def refuse_changing(module: nn.Module, inputs: Inputs, keywords: tuple[str, ...], changed: list[str], drawn: list[str]) -> None:
    """Raises ModelError, with the line or attribute, if equal calls of module differ by more than rounding.

    changed, drawn: the attributes that its forward changed and the generators it used while it was traced. Networks that
    cannot run on inputs are let through.
    """
    clocks = _clocks(module)
    if not (clocks or changed or drawn):
        return
    with kept(module), quiet():
        try:
            results = [pytree.tree_leaves(each) for each in run(module, inputs, keywords, _CALLS if drawn else 2)]
        except Exception:  # the user's forward may raise anything, and is told of elsewhere
            return
    if all(same_values(results[0], other) for other in results[1:]):
        return
    name = type(module).__name__
    if drawn:
        first = headline(f"{name} is random in eval mode", _draws(module, inputs, keywords), "a random number")
        raise ModelError(f"{first}\nA graph holds one draw. Draw only where self.training is true, or pass the number as an input.")
    if clocks and not changed:
        first = headline(f"{name} gives another result at each call", clocks[0], "a clock")
        raise ModelError(f"{first}\nA graph holds one reading. Pass the time as an input, or leave it out.")
    shown = ", ".join(f"self.{each}" for each in changed[:3])
    raise ModelError(
        f"{name} gives another result at each call, which changes {shown}.\n"
        "A graph holds one call. Make the output independent of what earlier calls left behind."
    )


def same_values(one: list[Any], other: list[Any]) -> bool:
    """Whether two lists of results are equal but for rounding."""
    return len(one) == len(other) and all(map(_same_value, one, other))


def _same_value(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return not isinstance(one, int | float) or one == other
    if one.shape != other.shape:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    peak = float(one[one.isfinite()].abs().max()) if bool(one.isfinite().any()) else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=_TOLERANCE * peak, equal_nan=True)


# ---- where


def _clocks(module: nn.Module) -> list[Place]:
    """The lines of the user's methods that name a clock."""
    return _lines_that_name(module, _CLOCKS)


def _lines_that_name(module: nn.Module, names: frozenset[str]) -> list[Place]:
    found = []
    for function in functions_of(module):
        code = getattr(getattr(function, "__wrapped__", function), "__code__", None)
        if not isinstance(code, CodeType) or not names & set(code.co_names):
            continue
        at = next(step.offset for step in dis.get_instructions(code) if step.argval in names)
        line = next((line for start, end, line in code.co_lines() if start <= at < end), None)
        found.append(Place(code.co_filename, line or code.co_firstlineno, code.co_name))
    return found


def _draws(module: nn.Module, inputs: Inputs, keywords: tuple[str, ...]) -> Place | None:
    """The first of the user's lines that draws from Python's or NumPy's generators."""
    found: list[Place] = []

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if found or event not in ("call", "c_call"):
            return
        owner = getattr(argument, "__self__", None)
        library = frame.f_code.co_filename == random.__file__
        caller: FrameType | None = frame.f_back if event == "call" else frame
        drawn = library if event == "call" else isinstance(owner, random.Random)
        if drawn and caller is not None and is_users(caller.f_code.co_filename):
            found.append(Place(caller.f_code.co_filename, caller.f_lineno, caller.f_code.co_name))

    with kept(module), quiet():
        sys.setprofile(watch)
        try:
            run(module, inputs, keywords)
        finally:
            sys.setprofile(None)
    # NumPy's methods are compiled in a way that Python's profiler does not see.
    return next(iter(found or _lines_that_name(module, _DRAWS)), None)

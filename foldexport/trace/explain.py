"""Why a network cannot be traced, in the user's terms: the line, the module, the reason, and what helps.

``REASONS`` is read from the top; the first that applies is told. A message is two lines, the first of them short.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from foldexport.errors import TraceError
from foldexport.trace.exporting import Failed, UnknownSize, is_too_deep
from foldexport.trace.forward import Untraceable
from foldexport.trace.user_code import Place, enclosing, names_of, place_of

FIRST_LINE = 120
_NAMES = {"index": "x[mask]", "_unique2": "unique", "slice": "a slice", "split_with_sizes": "split"}
_CONDITIONS = (ast.If, ast.IfExp, ast.While, ast.Assert)


@dataclass(frozen=True)
class Failure:
    """An error of one way, its text, and where in the user's code it was raised."""

    error: Exception
    text: str
    place: Place | None

    @property
    def code(self) -> str:
        return self.place.code if self.place is not None else ""


@dataclass(frozen=True)
class Reason:
    """applies: to which failures. what: a few words for the first line. why, help: sentences for the second."""

    applies: Callable[[Failure], bool]
    what: str
    why: str | Callable[[Failure], str]
    help: str | Callable[[Failure], str]


def untraceable(module: nn.Module, failed: Failed) -> TraceError:
    """The error for a network that runs but that no way could trace."""
    names = names_of(module)
    failures = [Failure(error, str(error), place_of(error, names)) for _, error in failed.errors]
    failure, reason = _clearest(failures)
    why, help = (said if isinstance(said, str) else said(failure) for said in (reason.why, reason.help))
    first = headline(f"cannot trace {type(module).__name__}", failure.place, reason.what)
    return TraceError(f"{first}\n{whose(failure.place)}{why}. {help}.")


def _clearest(failures: list[Failure]) -> tuple[Failure, Reason]:
    """The failure to tell: the last of the user's own Python (with constants known it gets furthest), then Dynamo's; one
    that has a reason before one that has none, one that knows its line before one that does not."""
    ordered = [*reversed(failures[:-1]), failures[-1]]
    reasons = [next(reason for reason in REASONS if reason.applies(failure)) for failure in ordered]
    told = list(zip(ordered, reasons))
    special = [each for each in told if each[1] not in REASONS[-2:]] or [each for each in told if each[1] is not REASONS[-1]]
    return next((each for each in special if each[0].place is not None), (special or told)[0])


def headline(what: str, place: Place | None, reason: str) -> str:
    """``what at net.py:12 in forward (`code`): reason``, the code cut so that it stays short."""
    if place is None:
        return f"{what}: {reason}"
    start = f"{what} at {place}"
    room = max(24, FIRST_LINE - len(start) - len(reason) - len(" (``): "))
    code = place.code if len(place.code) <= room else place.code[: room - 1] + "…"
    return f"{start} (`{code}`): {reason}" if code else f"{start}: {reason}"


def whose(place: Place | None) -> str:
    """``In module 'layers.1' (Block): ``, where that is known and is not the network itself."""
    return f"In module '{place.module}' ({place.kind}): " if place is not None and place.module else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= 200 else line[:197] + "..."


# ---- what is said of a failure


def _says(*patterns: str) -> Callable[[Failure], bool]:
    found = re.compile("|".join(patterns), re.IGNORECASE)
    return lambda failure: found.search(failure.text) is not None


def _is(*names: str) -> Callable[[Failure], bool]:
    return lambda failure: type(failure.error).__name__ in names


def _condition(failure: Failure) -> str:
    """The condition that a branch was decided by."""
    if failure.place is None:
        return "a condition"
    node = enclosing(failure.place, *_CONDITIONS)
    whole = ast.unparse(node.test) if node is not None else failure.place.expression or failure.code
    return f"`{whole[:80]}`"


def _in_statement(*kinds: type[ast.AST]) -> Callable[[Failure], bool]:
    return lambda failure: failure.place is not None and enclosing(failure.place, *kinds) is not None


def _values(failure: Failure) -> bool:
    return "data-dependent" in failure.text.lower()


def _expression(failure: Failure) -> str:
    place = failure.place
    return f"`{(place.expression or place.code)[:80]}`" if place is not None else "an expression"


def _output_type(failure: Failure) -> str:
    found = re.search(r"<class '([^']+)'>", failure.text)
    return f"forward returns a {found.group(1) if found else 'value'}, in which PyTorch finds no tensors"


REASONS = (
    Reason(
        lambda f: isinstance(f.error, Untraceable),
        "a graph cannot hold it",
        lambda f: f.error.why,
        lambda f: f.error.help,
    ),
    Reason(
        lambda f: is_too_deep(f.error),
        "modules or calls are nested too deep",
        "Python's recursion limit is met",
        "Call sys.setrecursionlimit with a larger number, or put the layers in one nn.Sequential",
    ),
    Reason(
        lambda f: isinstance(f.error, UnknownSize),
        "a data-dependent size",
        lambda f: f"how many values {_NAMES.get(f.error.operator, f.error.operator)} gives depends on the input's values",
        "Keep the size fixed: torch.where(mask, a, b) instead of x[mask], topk with a fixed k instead of nonzero or unique",
    ),
    Reason(
        lambda f: _values(f) and _in_statement(ast.While)(f),
        "a data-dependent loop",
        lambda f: f"how often it runs depends on the input's values ({_condition(f)})",
        "Use a fixed number of steps",
    ),
    Reason(
        lambda f: _values(f) and _in_statement(ast.Assert)(f),
        "a data-dependent assertion",
        lambda f: f"{_condition(f)} depends on the input's values in more than one way",
        "Write one assert for each condition, or leave it out for the export",
    ),
    Reason(
        lambda f: _values(f) and _in_statement(*_CONDITIONS)(f),
        "a data-dependent branch",
        lambda f: f"{_condition(f)} depends on the input's values, and a graph has one way only",
        "Compute both and choose with torch.where(condition, a, b), or decide by a setting of the network",
    ),
    Reason(
        _values,
        "a data-dependent number",
        lambda f: f"{_expression(f)} needs a Python number that depends on the input's values",
        "Keep it a tensor (x.mean() instead of int(x.mean()), torch.gather instead of list[index]), or make it a constant",
    ),
    Reason(
        _says(r"numpy\(\)", r"\.numpy", r"ndarray", r"np\.\w+", r"__array__", r"tolist\(\)"),
        "values leave PyTorch",
        lambda f: f"{_expression(f)} turns a tensor that depends on the input into NumPy or Python values",
        "Use the torch function of that name",
    ),
    Reason(
        _says(r"argument of type: <class 'torch\._C\.Generator'>"),
        "a random generator",
        lambda f: f"{_expression(f)} draws from a torch.Generator, which no graph holds",
        "Keep its result in a buffer instead",
    ),
    Reason(
        _says("which is not a known type", "unsupported output", "generator"),
        "an output that is no tensor",
        _output_type,
        "Return tensors, or tuples, lists, dicts or dataclasses of them",
    ),
    Reason(
        _is("UnsupportedOperatorException", "UnsupportedFakeTensorException"),
        "an operator without a shape rule",
        lambda f: f"{first_line(f.error)} does not say what shape it gives",
        "Register that with torch.library.register_fake, or use PyTorch's own operators there",
    ),
    Reason(
        _is("DataDependentOutputException", "DynamicOutputShapeException"),
        "a data-dependent result",
        lambda f: f"what {_expression(f)} gives depends on the input's values",
        "Leave it out, or keep it a tensor of a fixed size",
    ),
    Reason(
        _says("Unexpected key _export_root", "fake tensor in the exported program", "without values was kept"),
        "operators out of sight",
        "some of forward runs where tracing does not see it, such as in threads of its own",
        "Call the modules one after the other, in forward itself",
    ),
    Reason(
        _says("Cannot access data pointer", "data_ptr", "does not have a storage", "custom kernel", "ctypes"),
        "an operator PyTorch cannot see into",
        lambda f: f"{_expression(f)} hands a tensor's memory to compiled code",
        "Use PyTorch's own operators there, or register it with torch.library.custom_op and register_fake",
    ),
    Reason(
        _says("ScriptModule", "ScriptFunction", "torch.jit", "TorchScript"),
        "compiled with torch.jit",
        lambda f: first_line(f.error),
        "Give the Python module it was made from",
    ),
    Reason(
        _says("Attempted to call function marked as skipped", "graph break", "Unsupported:", "dynamo"),
        "Python that no graph has",
        lambda f: first_line(f.error),
        "Rewrite that line with tensor operators only",
    ),
    Reason(
        lambda f: True,
        "PyTorch cannot trace it",
        lambda f: first_line(f.error),
        "Rewrite that line with tensor operators only, or trace the part of the network without it",
    ),
)

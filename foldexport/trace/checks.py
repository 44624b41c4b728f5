"""Conditions on values that only guard an error or a message: ``assert not x.isnan().any()``, ``if …: raise``, ``if …: print``.

A graph has one way only. Where the other way leads to no result, the way is clear; the check itself is not in the graph.
"""

from __future__ import annotations

import ast

from foldexport.trace.user_code import Place, enclosing

_TALKS = frozenset({"print", "warn", "warning", "info", "debug", "error", "exception", "log", "critical", "write"})


def answer(place: Place | None, notes: dict[str, None]) -> bool | None:
    """The truth of a tensor at ``place`` on the way that leads to a result; None where both ways do.

    What was left out is added to notes.
    """
    statement = enclosing(place, ast.Assert, ast.If) if place is not None else None
    if statement is None or not (isinstance(statement, ast.Assert) or _only_guards(statement)):
        return None
    if enclosing(place, ast.Try) is not None:  # what is raised may be caught, and go on
        return None
    wanted = _operand(statement.test, isinstance(statement, ast.Assert))
    if wanted is not None:
        notes[f"{place}: the check `{ast.unparse(statement.test)}` is not part of the graph"] = None
    return wanted


def _only_guards(statement: ast.If) -> bool:
    """Whether the body of an ``if`` raises, or does nothing but talk."""
    if isinstance(statement.body[-1], ast.Raise):
        return True
    return all(isinstance(line, ast.Pass) or isinstance(line, ast.Expr) and _talks(line.value) for line in statement.body)


def _talks(value: ast.expr) -> bool:
    if not isinstance(value, ast.Call):
        return isinstance(value, ast.Constant)
    name = getattr(value.func, "attr", getattr(value.func, "id", ""))
    return name in _TALKS


def _operand(test: ast.expr, wanted: bool) -> bool | None:
    """What the tensors in a test must be for it to be ``wanted``: None where they need not all be the same.

    not a: the opposite of a; a and b, a or b: the same of both.
    """
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _operand(test.operand, not wanted)
    if isinstance(test, ast.BoolOp):
        parts = {_operand(value, wanted) for value in test.values}
        return parts.pop() if len(parts) == 1 else None
    return wanted

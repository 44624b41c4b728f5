"""Numbers and operators in the words of every report. Imports nothing of ours."""

from __future__ import annotations

OPERATORS = {"conv": "convolution", "conv_transpose": "transposed convolution", "linear": "linear", "relu": "ReLU",
             "relu6": "ReLU6", "add": "addition", "mul": "multiplication", "cat": "concatenation"}  # fmt: skip


def size(count: float) -> str:
    """``10_900_000`` → ``"10.9 M"``: three digits, powers of a thousand; a unit may be put right behind it."""
    units = ["", "k", "M", "G", "T"]
    while abs(count) >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    digits = 0 if units[0] == "" or abs(count) >= 99.95 else 1 if abs(count) >= 9.995 else 2
    return f"{count:.{digits}f} {units[0]}"


def milliseconds(value: float | None) -> str:
    """Three digits, "0.527", "12.4", "1240"; a dash for what is not known."""
    if value is None:
        return "–"
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:.{digits}f}"

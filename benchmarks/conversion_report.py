"""The results of `conversion.py` as a table, a page and a document. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import machine

PROOF = ("certify", "reference", "verify onnx")  # the manifest's stages that count as proof


@dataclass(frozen=True)
class Limit:
    """One row of the table. wanted: the median must not be above it. digits: to print."""

    key: str
    text: str
    wanted: float
    unit: str = "×"
    digits: int = 2


@dataclass
class Row:
    """Values of one measure, one per round; detail: what they are made of. failed: why there are none."""

    values: list[float] = field(default_factory=list)
    detail: str = ""
    failed: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def passes(self, limit: Limit) -> bool:
        return bool(self.values) and self.median <= limit.wanted


def table(limits: Sequence[Limit], rows: dict[str, Row]) -> str:
    """Markdown: every limit with what was measured against it."""
    lines = ["| measure | median | lowest … highest | limit | | medians |", "|---|---:|---:|---:|---|---|"]
    for limit in limits:
        if limit.key not in rows:
            continue
        row = rows[limit.key]
        verdict = "PASS" if row.passes(limit) else "FAIL"
        if row.failed:
            lines.append(f"| {limit.text} | – | – | {limit.wanted:g}{limit.unit} | {verdict} | {row.failed} |")
            continue
        low, middle, high = (f"{value:.{limit.digits}f}" for value in (min(row.values), row.median, max(row.values)))
        measured = f"{middle}{limit.unit} | {low} … {high} | {limit.wanted:g}{limit.unit}"
        lines.append(f"| {limit.text} | {measured} | {verdict} | {row.detail} |")
    return "\n".join(lines)


def document(limits: Sequence[Limit], rows: dict[str, Row], settings: Mapping[str, Any], date: str) -> dict[str, Any]:
    """Everything that was asked for and measured, for the JSON file."""
    return {
        "date": date,
        "machine": machine.describe(),
        "load_after": machine.load(),
        **settings,
        "rows": {
            limit.key: {**asdict(limit), **asdict(rows[limit.key]), "passes": rows[limit.key].passes(limit)}
            for limit in limits
            if limit.key in rows
        },
    }


def page(limits: Sequence[Limit], rows: dict[str, Row], found: Mapping[str, Any]) -> str:
    """The results as Markdown; found: what :func:`document` gives."""
    kind = "\n".join(f"- {name}: {value}" for name, value in found["machine"].items())
    few, many = found["layers"]
    return f"""# What a conversion costs

`benchmarks/conversion.py`, {found["date"]}: {found["network"]} at {found["input_shape"]}, {found["rounds"]} rounds,
{found["threads"]} threads; few layers are {few}, many {many}. Everything that is compared alternates. Proof is the
stages {", ".join(found["proof_stages"])} of the manifest; everything else of the command is conversion.

{table(limits, rows)}

{kind}
- load after the run, itself included: {found["load_after"]}
"""

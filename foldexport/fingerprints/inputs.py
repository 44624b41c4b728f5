"""How a network's images are to be prepared: as its published weights say, where they agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from foldexport.fingerprints.evidence import Claim
from foldexport.fingerprints.table import CHANNELS, Function, Published, Table

FIELDS = ("input_size", "interpolation", "mean", "std", "crop_pct")
PER_CHANNEL = ("mean", "std")


def published(function: Function, claim: Claim | None, table: Table) -> list[Published]:
    """The published weights that the file may be of, or tuned from: those of the claimed name and tag, if there are such.

    Of several, those with the file's number of classes, if there are such; defaults first.
    """
    rows = [
        (candidate, row)
        for candidate in function.candidates
        for row in table.published.get(candidate.package, {}).get(candidate.name, ())
        if row.arguments.items() <= candidate.arguments.items()
    ]
    narrowed = []
    if claim is not None:
        narrowed = [
            lambda candidate, row: candidate.name == claim.name,
            lambda candidate, row: not claim.package or candidate.package == claim.package,
            lambda candidate, row: not claim.tag or row.tag == claim.tag,
        ]
    for holds in (*narrowed, lambda candidate, row: row.num_classes == function.num_classes):
        rows = [each for each in rows if holds(*each)] or rows
    return [row for _, row in rows]


def agreed(rows: Iterable[Published]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Fields in which all agree, and the values of the others, in the order in which they come."""
    values = {name: list(dict.fromkeys(row.inputs.fields()[name] for row in rows)) for name in FIELDS}
    same = {name: each[0] for name, each in values.items() if len(each) == 1}
    return same, {name: each for name, each in values.items() if len(each) > 1}


def taken(rows: Iterable[Published], usual: Mapping[str, Any], in_chans: int | None) -> tuple[dict[str, Any], list[str]]:
    """timm's fields for images, and a note of those that had to be assumed: ``usual``, or else those of the first row."""
    rows = list(rows)
    same, differing = agreed(rows)
    assumed = {name: usual.get(name, values[0]) for name, values in differing.items()}
    fields = {**usual, **same, **assumed}
    notes = []
    if assumed:
        chosen = ", ".join(f"{name} {_written(value)}" for name, value in assumed.items())
        notes.append(f"weights published for this network differ in how images are prepared; assumed {chosen}")
    if in_chans is not None and in_chans != CHANNELS:
        notes.append(f"in_chans is {in_chans}: published weights give mean and std of {CHANNELS} channels only")
        fields = {name: value for name, value in fields.items() if name not in PER_CHANNEL}
        if "input_size" in fields:
            fields["input_size"] = (in_chans, *fields["input_size"][1:])
    return fields, notes


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return ("x" if isinstance(value[0], int) else " ").join(f"{each:g}" for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)

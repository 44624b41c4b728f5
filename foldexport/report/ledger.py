"""The ledger in words: what folded grouped by kind, what was kept each with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foldexport.fold.ledger import Entry

#: rule → (one, several)
WORDS = {
    "batch_norm": ("batch norm", "batch norms"),
    "mul": ("constant factor", "constant factors"),
    "div": ("constant factor", "constant factors"),
    "neg": ("constant factor", "constant factors"),
    "add": ("constant term", "constant terms"),
    "sub": ("constant term", "constant terms"),
    "rsub": ("constant term", "constant terms"),
    "repeated activation": ("repeated activation", "repeated activations"),
    "skip connection": ("skip connection", "skip connections"),
    "merge by sum": ("branch merged by sum", "branches merged by sum"),
    "merge by composition": ("convolution merged into the next", "convolutions merged into the next"),
    "merge by concatenation": ("branch merged by concatenation", "branches merged by concatenation"),
    "flat sum": ("nested sum written flat", "nested sums written flat"),
    "exchange with average pooling": ("convolution moved behind its pool", "convolutions moved behind their pools"),
    "exchange with upsampling": ("convolution moved before upsampling", "convolutions moved before upsampling"),
}
MOVED = ("merge", "exchange")


def name(rule: str, count: int = 1) -> str:
    """``("batch_norm", 3)`` → ``"batch norms"``; a rule without a name of its own reads as it is."""
    plain = rule.replace("_", " ")
    return WORDS.get(rule, (plain, plain))[count != 1]


def folded(entries: Iterable[Entry], evaluated: Mapping[str, int]) -> list[str]:
    """One line per kind: ``"24 batch norms folded into 24 layers"``."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if entry.status == "folded":
            groups.setdefault(WORDS.get(entry.rule, (entry.rule, entry.rule)), []).append(entry)
    lines = [_line(found) for found in groups.values()]
    for kind, count in evaluated.items():
        lines.append(f"{count} {kind} weight{'s' if count > 1 else ''} evaluated once and for all")
    return lines


def _line(found: list[Entry]) -> str:
    rule, count = found[0].rule, len(found)
    what = f"{count} {name(rule, count)}"
    targets = {target for entry in found for target in entry.into.split(", ") if target}
    if rule.startswith(MOVED) or not targets:
        return what if rule.startswith(MOVED) else f"{what} folded"
    return f"{what} folded into {len(targets)} layer{'s' if len(targets) > 1 else ''}"


def kept(entries: Iterable[Entry]) -> list[tuple[str, str]]:
    """``(module and kind, reason)`` of everything that stays as it was."""
    return [(f"{entry.module} ({name(entry.rule)})", entry.reason) for entry in entries if entry.status == "kept"]

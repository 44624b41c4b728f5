"""The picture of both networks as what the template writes: rows, ribbons, skip connections and what a row says when asked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from foldexport.report import ledger as phrases
from foldexport.report.html import drawing, kinds
from foldexport.report.html.blocks import Block, blocks, groups

OPEN_ROWS = 240  # of operators; further blocks are closed until they are asked for
MOST_NAMED = 6  # modules of a repeated block, of which a row tells each fate

Operator = dict[str, Any]


def picture(graph: dict[str, Any], ledger: Sequence[dict[str, str]] | None) -> dict[str, Any]:
    """The context of ``network.html``.

    graph: of :func:`foldexport.report.html.networks.networks`. ledger: its entries as dictionaries; None where nothing was folded.
    """
    before, after = graph["before"], graph["after"] or []
    known = _Known(before, after, ledger or [])
    drawn = [_Group(found, known).context() for found in groups(blocks(before, after), before, after)]
    rows = 0
    for each in drawn:
        each["open"] = rows < OPEN_ROWS
        rows += each["rows"]
    return {
        "strip": _strip(before, after), "groups": drawn, "legend": _legend(before, after), "folded": graph["after"] is not None,
        "counts": (len(before), len(after)),
    }  # fmt: skip


def _strip(before: Sequence[Operator], after: Sequence[Operator]) -> drawing.Strip:
    reads = []
    for operators in (before, after):
        places = drawing.place_of(operators)
        reads.append([[places[name] for name in each["reads"] if name in places] for each in operators])
    return drawing.strip(
        [(_family(each), each["how"], each["became"]) for each in before], [_family(each) for each in after], (reads[0], reads[1])
    )


def _legend(before: Sequence[Operator], after: Sequence[Operator]) -> list[dict[str, Any]]:
    counts = {name: [sum(_family(each) == name for each in operators) for operators in (before, after)] for name in kinds.FAMILIES}
    return [
        {"family": name, "text": text, "before": counts[name][0], "after": counts[name][1]}
        for name, text in kinds.FAMILIES.items()
        if any(counts[name])
    ]


def _family(each: Operator) -> str:
    return kinds.family(each["kind"], len(each["reads"]))


class _Known:
    """Both networks and the ledger, with what is looked up in them.

    takes: place in the folded network → operators that went there. readers: operator → places that read it.
    """

    def __init__(self, before: list[Operator], after: list[Operator], ledger: Sequence[dict[str, str]]) -> None:
        self.before, self.after, self.ledger = before, after, ledger
        self.takes: dict[int, list[Operator]] = {}
        for each in before:
            for place in each["became"]:
                self.takes.setdefault(place, []).append(each)

    @cached_property
    def readers(self) -> dict[int, dict[str, list[int]]]:
        """Of each network, by its identity."""
        found: dict[int, dict[str, list[int]]] = {}
        for operators in (self.before, self.after):
            of = found.setdefault(id(operators), {})
            for place, each in enumerate(operators):
                for name in each["reads"]:
                    of.setdefault(name, []).append(place)
        return found


class _Group:
    """Blocks of one structure, drawn once."""

    def __init__(self, found: list[Block], known: _Known) -> None:
        self._found, self._first, self._known = found, found[0], known
        self._before, self._after = known.before, known.after

    def context(self) -> dict[str, Any]:
        left, right = self._first.before, self._first.after
        links = self._links()
        labels = [block.label for block in self._found]
        count = max(len(left), len(right))
        return {
            "label": labels[0], "last": labels[-1] if len(labels) > 1 else "", "labels": labels, "times": len(labels),
            "type": self._first.type, "counts": (len(left), len(right)), "rows": count, "height": count * drawing.ROW,
            "before": [self._left(row, links) for row in range(len(left))],
            "after": [self._right(row, links) for row in range(len(right))],
            "ribbons": drawing.ribbons(links, (len(left), len(right))),
            "skips": (self._skips(self._before, left), self._skips(self._after, right)),
            "offsets": ((count - len(left)) * drawing.ROW // 2, (count - len(right)) * drawing.ROW // 2),
        }  # fmt: skip

    def _links(self) -> list[tuple[int, int, str, str]]:
        places = {place: row for row, place in enumerate(self._first.after)}
        last = self._first.after[-1] if self._first.after else -1
        links = []
        for row, at in enumerate(self._first.before):
            each = self._before[at]
            elsewhere = [drawing.BELOW if place > last >= 0 else drawing.ABOVE for place in each["became"]]
            ends = dict.fromkeys(places.get(place, other) for place, other in zip(each["became"], elsewhere, strict=True))
            links += [(row, end, _family(each), each["how"]) for end in ends]
        return links

    def _left(self, row: int, links: Sequence[tuple[int, int, str, str]]) -> dict[str, Any]:
        every = [self._before[block.before[row]] for block in self._found]
        return {
            **self._common(self._before, [block.before for block in self._found], row), "how": every[0]["how"],
            "to": [f"r{right}" for left, right, _, _ in links if left == row and right >= 0],
            "fates": [fate for each in every[:MOST_NAMED] for fate in self._fates(each)], "more": max(0, len(every) - MOST_NAMED),
        }  # fmt: skip

    def _right(self, row: int, links: Sequence[tuple[int, int, str, str]]) -> dict[str, Any]:
        places = [block.after[row] for block in self._found]
        takes = self._known.takes.get(places[0], [])
        made = [f"{_name(each)} ({kinds.words(each['kind'])})" for each in takes]
        return {
            **self._common(self._after, [block.after for block in self._found], row), "how": "stays",
            "to": [f"l{left}" for left, right, _, _ in links if right == row], "takes": made[:12], "more": max(0, len(made) - 12),
        }  # fmt: skip

    def _common(self, operators: Sequence[Operator], blocks_of: Sequence[Sequence[int]], row: int) -> dict[str, Any]:
        every = [operators[places[row]] for places in blocks_of]
        each, previous = every[0], operators[blocks_of[0][row - 1]]["name"] if row else None
        inside = {operators[place]["name"] for place in blocks_of[0]}
        return {
            "family": _family(each), "chip": kinds.chip(each["kind"], len(each["reads"])), "words": kinds.words(each["kind"]),
            "detail": each["detail"], "name": _name(each), "local": self._local(each["module"]), "shape": _shape(every),
            "flow": previous in each["reads"] if row else any(name not in inside for name in each["reads"]),
        }  # fmt: skip

    def _local(self, module: str) -> str:
        label = self._first.label
        return module.removeprefix(f"{label}.") if module != label else ""

    def _fates(self, each: Operator) -> list[dict[str, str]]:
        """What the ledger says of an operator."""
        return [{**entry, "what": phrases.name(entry["rule"])} for entry in (self._known.ledger[at] for at in each["entries"])]

    def _skips(self, operators: Sequence[Operator], places: Sequence[int]) -> list[drawing.Skip]:
        """Connections that do not go from a row to the next."""
        rows = {operators[place]["name"]: row for row, place in enumerate(places)}
        edges = set()
        for row, place in enumerate(places):
            for name in operators[place]["reads"]:
                start = rows.get(name, drawing.ABOVE)
                if row - start > 1:
                    edges.add((start, row, False))
        return drawing.skips(edges | self._leaving(operators, places, rows), len(places))

    def _leaving(self, operators: Sequence[Operator], places: Sequence[int], rows: dict[str, int]) -> set[tuple[int, int, bool]]:
        """Values made before the last row that another block reads."""
        inside, last, readers = set(places), len(places) - 1, self._known.readers[id(operators)]
        left = {row for name, row in rows.items() if row < last and not inside.issuperset(readers.get(name, ()))}
        return {(row, drawing.BELOW, False) for row in left}


def _name(each: Operator) -> str:
    return each["module"] or each["name"]


def _shape(every: Sequence[Operator]) -> str:
    """``"64×56×56"``; over repeated blocks from the smallest to the largest, ``"64…224×56×56"``."""
    shapes = [each["shape"] for each in every if each["shape"] is not None]
    if not shapes or len({len(shape) for shape in shapes}) > 1:
        return ""
    ends = [(min(sizes), max(sizes)) for sizes in zip(*shapes, strict=True)]
    return "×".join(str(low) if low == high else f"{low}…{high}" for low, high in ends)

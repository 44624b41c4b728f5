"""Coordinates of the picture: blocks that collapse, their skip connections, and the whole network on one strip.

All of it is pixels of known rows or shares of a box, so that the page needs no script to be laid out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

ROW = 30  # pixels, of an operator and the gap behind it; .op in the style sheet
WIDE = 100  # of the box that ribbons cross; stretched to its column
GUTTER = 30  # of the box beside a column that skip connections run in
LANES = 4
BETWEEN = 4  # pixels from a row to the next
TALL = ROW - BETWEEN

ABOVE, BELOW = -1, -2  # ends of a connection that are in another block


@dataclass(frozen=True)
class Ribbon:
    """From an operator to what it became. left, right: rows; right is `ABOVE` or `BELOW` where that is in another block."""

    path: str
    family: str
    how: str
    left: int
    right: int


@dataclass(frozen=True)
class Skip:
    """A connection that passes operators by. far: its source is further back than the block before."""

    path: str
    head: str
    start: int
    end: int
    far: bool


def ribbons(links: Sequence[tuple[int, int, str, str]], rows: tuple[int, int]) -> list[Ribbon]:
    """links: (row on the left, row on the right, family, how), several of either. rows: of the two columns.

    What leaves or arrives at one row shares its height.
    """
    height = max(rows) * ROW
    tops = [(height - count * ROW) / 2 for count in rows]
    leaving, arriving = (_places(link[side] for link in links) for side in (0, 1))
    made = []
    for at, (left, right, family, how) in enumerate(links):
        start, wide = _share(tops[0], left, leaving[left], at)
        if right in (ABOVE, BELOW):
            path = _leaving(start, start + wide, height, right)
        else:
            end, narrow = _share(tops[1], right, arriving[right], at)
            path = _crossing(start, start + wide, end, end + narrow)
        made.append(Ribbon(path, family, how, left, right))
    return made


def _places(rows: Iterable[int]) -> dict[int, list[int]]:
    """Row → which links have it."""
    found: dict[int, list[int]] = {}
    for at, row in enumerate(rows):
        found.setdefault(row, []).append(at)
    return found


def _share(top: float, row: int, links: Sequence[int], at: int) -> tuple[float, float]:
    """(top, height) of a link's share of a row."""
    height = TALL / len(links)
    return top + row * ROW + height * links.index(at), height


def _crossing(top: float, bottom: float, end_top: float, end_bottom: float) -> str:
    half = WIDE / 2
    return (
        f"M0 {_n(top)}C{_n(half)} {_n(top)} {_n(half)} {_n(end_top)} {WIDE} {_n(end_top)}"
        f"V{_n(end_bottom)}C{_n(half)} {_n(end_bottom)} {_n(half)} {_n(bottom)} 0 {_n(bottom)}Z"
    )


def _leaving(top: float, bottom: float, height: float, where: int) -> str:
    """A wedge that bends up or down to an arrow at the edge of the block."""
    x = WIDE * 0.5
    near = (top, bottom) if where == ABOVE else (bottom, top)
    far, tip = (-2, -11) if where == ABOVE else (height + 2, height + 11)
    return (
        f"M0 {_n(near[0])}C{_n(x * 0.6)} {_n(near[0])} {_n(x - 5)} {_n(near[0])} {_n(x - 5)} {_n(far)}"
        f"H{_n(x - 12)}L{_n(x)} {_n(tip)}L{_n(x + 12)} {_n(far)}H{_n(x + 5)}"
        f"C{_n(x + 5)} {_n(near[1])} {_n(x * 0.6)} {_n(near[1])} 0 {_n(near[1])}Z"
    )


def skips(edges: Iterable[tuple[int, int, bool]], count: int) -> list[Skip]:
    """edges: (row or `ABOVE`, row or `BELOW`, far) of a column of ``count`` rows; neighbours are left out by the caller.

    Connections that lie beside one another run in lanes of their own, the shortest nearest.
    """
    wanted = sorted(set(edges), key=lambda edge: (_end(edge[1], count) - edge[0], edge[0]))
    lanes: list[list[tuple[int, int]]] = []
    made = []
    for start, end, far in wanted:
        span = (start, _end(end, count))
        lane = next((at for at, taken in enumerate(lanes) if all(span[1] <= a or b <= span[0] for a, b in taken)), len(lanes))
        if lane == len(lanes):
            lanes.append([])
        lanes[lane].append(span)
        made.append(_skip(start, end, min(lane, LANES - 1), far, count))
    return made


def _skip(start: int, end: int, lane: int, far: bool, count: int) -> Skip:
    x, top = GUTTER - 9 - 6 * lane, 0.0 if start == ABOVE else start * ROW + TALL / 2 + 3
    bottom = count * ROW if end == BELOW else end * ROW + TALL / 2 - 3
    r = 6
    path = f"M{x} {_n(top)}" if start == ABOVE else f"M{GUTTER} {_n(top)}H{x + r}Q{x} {_n(top)} {x} {_n(top + r)}"
    path += f"V{_n(bottom)}" if end == BELOW else f"V{_n(bottom - r)}Q{x} {_n(bottom)} {x + r} {_n(bottom)}H{GUTTER - 3}"
    head = "" if end == BELOW else f"M{GUTTER - 6} {_n(bottom - 4)}L{GUTTER} {_n(bottom)}L{GUTTER - 6} {_n(bottom + 4)}Z"
    return Skip(path, head, start, end, far)


def _end(row: int, count: int) -> int:
    return count if row == BELOW else row


@dataclass(frozen=True)
class Strip:
    """The whole network: one bar per operator, the training graph above and the folded network below.

    width, top, height: of what is drawn; there is no room for arcs where there are none.
    bars, ribbons: (path, family, how) with everything of one family and fate in one path. arcs: the skip connections, a path for
    each network.
    """

    width: int
    top: str
    height: str
    bars: list[tuple[str, str, str]]
    ribbons: list[tuple[str, str, str]]
    arcs: list[str]


ARC, BAR, GAP = 46, 34, 76  # pixels: of the room for arcs, of a bar, between the networks
MANY = 150  # operators, whose bars have no room for gaps between them
MOST_ARCS = 3  # that end at one operator: a concatenation may read all that was before


def strip(
    before: Sequence[tuple[str, str, Sequence[int]]], after: Sequence[str], reads: Sequence[Sequence[Sequence[int]]]
) -> Strip:
    """before: (family, how, places of what it became); after: families; reads: of both, places of what each operator reads."""
    width = max(len(before), len(after), 1)
    offsets = [(width - len(before)) / 2, (width - len(after)) / 2]
    tops, apart = (ARC, ARC + BAR + GAP), 0.06 if width <= MANY else 0.0
    bars: dict[tuple[str, str], list[str]] = {}
    bands: dict[tuple[str, str], list[str]] = {}
    for place, (family, how, became) in enumerate(before):
        bars.setdefault((family, how), []).append(_bar(offsets[0] + place, tops[0], apart))
        for target in became[:4]:
            bands.setdefault((family, how), []).append(_band(offsets[0] + place, offsets[1] + target, how == "folded"))
    for place, family in enumerate(after):
        bars.setdefault((family, "stays"), []).append(_bar(offsets[1] + place, tops[1], apart))
    arcs = [
        "".join(
            _arc(offset + source + 0.5, offset + place + 0.5, up)
            for place, found in enumerate(sources)
            for source in _ends([source for source in found if place - source > 1])
        )
        for offset, sources, up in zip(offsets, reads, (True, False), strict=True)
    ]
    top, bottom = (ARC - (0.8 * ARC if path else 2) for path in arcs)
    height = (ARC + 2 * BAR + GAP + ARC - bottom if after else ARC + BAR + 2) - top
    collected = [[("".join(paths), *key) for key, paths in found.items()] for found in (bars, bands)]
    return Strip(width, _n(top), _n(height), *collected, [path for path in arcs if path])


def _ends(sources: Sequence[int]) -> Sequence[int]:
    """The furthest and the nearest of many."""
    found = sorted(sources)
    return found if len(found) <= MOST_ARCS else [found[0], *found[1 - MOST_ARCS :]]


def _bar(x: float, y: float, apart: float) -> str:
    return f"M{_n(x + apart)} {_n(y)}h{_n(1 - 2 * apart)}v{BAR}h{_n(2 * apart - 1)}z"


def _band(x: float, end: float, narrows: bool) -> str:
    top, bottom = ARC + BAR, ARC + BAR + GAP
    middle, left, right = (top + bottom) / 2, end + (0.36 if narrows else 0.06), end + (0.64 if narrows else 0.94)
    return (
        f"M{_n(x + 0.06)} {top}C{_n(x + 0.06)} {_n(middle)} {_n(left)} {_n(middle)} {_n(left)} {bottom}"
        f"H{_n(right)}C{_n(right)} {_n(middle)} {_n(x + 0.94)} {_n(middle)} {_n(x + 0.94)} {top}Z"
    )


def _arc(start: float, end: float, up: bool) -> str:
    """Half an ellipse; the longer the higher, within its room."""
    reach = min(ARC - 4.0, 9.0 + 3.2 * (end - start))
    y = ARC - 1 if up else ARC + 2 * BAR + GAP + 1
    tip = y - reach if up else y + reach
    return f"M{_n(start)} {y}C{_n(start)} {_n(tip)} {_n(end)} {_n(tip)} {_n(end)} {y}"


def _n(value: float) -> str:
    """At most two decimals, none that say nothing."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def place_of(names: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Operator → its place."""
    return {each["name"]: place for place, each in enumerate(names)}

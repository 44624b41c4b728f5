"""Charts as shares of a box: lines and dots over points on a logarithmic axis, bars on one, with a limit.

Coordinates are stretched with the box that they are drawn in; texts are the page's, at percentages of it, so that they stay
legible on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDE, HIGH = 1000.0, 100.0  # of a chart's box
FEWEST_DECADES = 1.0  # what is flat shall look flat
MOST_TICKS = 5
MOST_LABELS = 5
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Line:
    """One value per point, None where there is none."""

    label: str
    values: Sequence[float | None]
    style: str


def chart(
    title: str, names: Sequence[str], lines: Sequence[Line], *, joined: bool = True, narrow: bool = False
) -> dict[str, Any] | None:
    """The context of the template's ``chart``; None where nothing can be drawn on a logarithmic axis.

    names: of the points. joined: whether a line goes through a line's dots. narrow: whether two stand beside one another.
    """
    shown = [value for line in lines for value in line.values if _positive(value)]
    if not shown:
        return None
    low, high = _range(min(shown), max(shown))
    drawn = []
    for line in lines:
        spots = [(_x(at, len(names)), _y(value, low, high)) if _positive(value) else None for at, value in enumerate(line.values)]
        drawn.append({
            "label": line.label, "style": line.style, "path": _path(spots) if joined else "",
            "dots": "".join(f"M{_n(spot[0])} {_n(spot[1])}h0" for spot in spots if spot),
            "texts": [number(value) for value in line.values],
        })  # fmt: skip
    ticks = [{"at": _n(_y(value, low, high)), "text": _tick(value)} for value in _ticks(low, high)]
    return {"title": title, "lines": drawn, "ticks": ticks, "labels": _labels(names), "names": list(names), "narrow": narrow}


def bars(rows: Sequence[dict[str, Any]], low: float, high: float, marks: Sequence[tuple[float, str]]) -> dict[str, Any]:
    """Rows with ``label``, ``value`` and ``text`` get ``share``, the length of their bar in percent of the axis from low to high.

    marks: (value, text) of lines across the bars: limits.
    """

    def share(value: float) -> float:
        return 100 * min(1.0, max(0.0, math.log(value / low) / math.log(high / low))) if value > 0 else 0.0

    ticks = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    ticks = ticks[:: math.ceil(len(ticks) / MOST_TICKS)]
    return {
        "rows": [{**row, "share": None if row["value"] is None else _n(share(row["value"]))} for row in rows],
        "marks": [{"at": _n(share(value)), "text": text} for value, text in marks],
        "ticks": [{"at": _n(share(value)), "text": _tick(value)} for value in ticks],
    }


def number(value: float | None) -> str:
    """``"0.25"``, ``"30"``, ``"4.1e-05"``; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def _tick(value: float) -> str:
    """``"0.01"``, ``"10⁻⁹"``, ``"5·10⁻⁵"``."""
    if 1e-3 <= value < 1e5:
        return f"{value:.6g}"
    power = math.floor(math.log10(value) + 1e-9)
    digit = round(value / 10.0**power)
    return ("" if digit == 1 else f"{digit}·") + "10" + str(power).translate(SUPERSCRIPTS)


def _positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _range(low: float, high: float) -> tuple[float, float]:
    """Powers of ten, with some air."""
    bottom, top = math.log10(low), math.log10(high)
    missing = max(0.0, FEWEST_DECADES - (top - bottom))
    air = 0.07 * max(top - bottom, FEWEST_DECADES)
    return bottom - missing / 2 - air, top + missing / 2 + air


def _ticks(low: float, high: float) -> list[float]:
    powers = range(math.ceil(low), math.floor(high) + 1)
    if high - low > 2:
        return [10.0**power for power in powers][:: math.ceil(len(powers) / MOST_TICKS)]
    steps = [digit * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for digit in (1, 2, 5)]
    return [value for value in steps if low <= math.log10(value) <= high]


def _x(place: int, count: int) -> float:
    return WIDE * (place + 0.5) / max(1, count)


def _y(value: float, low: float, high: float) -> float:
    return HIGH * (1 - (math.log10(value) - low) / (high - low))


def _path(spots: Sequence[tuple[float, float] | None]) -> str:
    """Through all spots, with gaps where there are none."""
    parts, pen = [], "M"
    for spot in spots:
        parts += [f"{pen}{_n(spot[0])} {_n(spot[1])}"] if spot else []
        pen = "L" if spot else "M"
    return "".join(parts)


def _labels(names: Sequence[str]) -> list[dict[str, str]]:
    """A few names along the axis: the first, the last, and some between."""
    count = len(names)
    places = sorted({round(at * (count - 1) / max(1, MOST_LABELS - 1)) for at in range(MOST_LABELS)}) if count else []
    return [{"at": _n(100 * _x(place, count) / WIDE), "text": names[place]} for place in places]


def _n(value: float) -> str:
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text

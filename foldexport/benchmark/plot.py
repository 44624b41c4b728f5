"""A benchmark as a picture for a slide: median latencies on the left, ratios with their intervals on the right.

The only file of the benchmark that imports matplotlib, and only when something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldexport import destination
from foldexport.artifact import staged
from foldexport.benchmark.timing import NOISY, SAME, Measurement, Timing
from foldexport.report.plot import FONT, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 200
WIDTH_INCHES, BAR_INCHES, GAP_INCHES, AROUND_INCHES = 10.5, 0.3, 0.22, 1.75
TITLE_COLUMNS = 84
LONGEST_NAME = 34  # characters of a row's name
CHARACTER_SHARE = 0.0185  # of the axis of ratios, that a letter beside an interval takes
LEAST_REACH = 1.05  # of the axis of ratios, on both sides of 1
DECADE = 12.0  # the slowest over the fastest from which latencies are drawn on a logarithmic axis
BASELINE, OTHERS = "#B4B4B4", ("#004488", "#D55E00", "#009E73", "#8A5FBF")  # after Okabe and Ito (2008), and grey
DARK, PALE = "#222222", "#E2E2E2"


def save(found: Timing, path: Path, *, overwrite: bool = False) -> None:
    """Draw a benchmark as a PNG at ``path``. Raises MissingDependencyError, UsageError where no file can be put there."""
    made = figure(found)
    with destination.made(path.parent), staged([path], overwrite=overwrite) as (place,):
        made.savefig(place, format="png", dpi=DPI, metadata={"Software": None})


def figure(found: Timing) -> Figure:
    """The picture of :func:`save`, of matplotlib's own kind; no window and no global state."""
    require()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, names = found.measurements, row_names(found)
    bars = sum(len(each.entries) for each in rows)
    height = AROUND_INCHES + BAR_INCHES * bars + GAP_INCHES * len(rows)
    with rc_context(FONT | {"font.size": 11, "xtick.labelsize": 10, "ytick.labelsize": 11, "axes.labelsize": 11}):
        made = Figure(figsize=(WIDTH_INCHES, height), facecolor="white")
        FigureCanvasAgg(made)
        left, right = made.subplots(1, 2, sharey=True, width_ratios=(1.15, 1.0))
        made.subplots_adjust(
            left=0.035 + 0.0082 * max(len(line) for name in names for line in name.splitlines()), right=0.975, wspace=0.06,
            top=1 - 0.95 / height, bottom=0.66 / height,
        )  # fmt: skip
        made.text(0.016, 1 - 0.14 / height, title(found), fontsize=13, fontweight="bold", color=DARK, va="top")
        made.text(0.016, 1 - 0.46 / height, subtitle(found), fontsize=10, color="#555555", va="top")
        places = _places(rows)
        _draw_latencies(left, rows, places)
        _draw_ratios(right, rows, places)
        _label_rows(left, places, names)
        _legend(made, left, rows, height)
    return made


def title(found: Timing) -> str:
    """The network, without the last parts of its description where they do not fit on a line."""
    folded = any(entry.name == "folded" for entry in found.measurements[0].entries)
    more = ": folded against unfolded" if folded else ""
    text = found.subject
    while len(text) + len(more) > TITLE_COLUMNS and ", " in text:
        text = text.rpartition(", ")[0]
    room = TITLE_COLUMNS - len(more)
    return (text if len(text) <= room else f"{text[: room - 1]}…") + more


def subtitle(found: Timing) -> str:
    """Machine, threads, sizes where all are alike, and what the intervals are."""
    first, sizes = found.measurements[0], {each.sizes for each in found.measurements}
    place = (found.environment.get("gpu") or {}).get("name") or found.environment["processor"]
    parts = [place, "1 thread" if first.threads == 1 else f"{first.threads} threads"] if first.device == "cpu" else [place]
    parts += [f"input {first.sizes}"] if len(sizes) == 1 else []
    return ", ".join([*parts, f"medians, {round(100 * first.level, 2):g} % intervals over {first.processes} processes"])


def row_names(found: Timing) -> list[str]:
    """A measurement each: the runtime, and the size where there are several."""
    rows = found.measurements
    several, one_shape = len({each.sizes for each in rows}) > 1, len({str(each.input_shapes[0][1:]) for each in rows}) == 1
    made = []
    for each in rows:
        where = (f"batch {each.batch}" if one_shape else each.sizes) if several else ""
        name = "\n".join(part for part in (each.runtime, where) if part)
        made.append(name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…")
    return made


def _places(rows: Sequence[Measurement]) -> list[list[float]]:
    """The height of every bar, in bars, from the top."""
    found, at = [], 0.0
    for each in rows:
        found.append([-(at + place) for place in range(len(each.entries))])
        at += len(each.entries) + GAP_INCHES / BAR_INCHES
    return found


def _draw_latencies(axes: Any, rows: Sequence[Measurement], places: list[list[float]]) -> None:
    medians = [entry.latency.median_ms for each in rows for entry in each.entries]
    logarithmic = max(medians) > DECADE * min(medians)
    _clean(axes, f"latency, ms ({'logarithmic, ' if logarithmic else ''}less is better)")
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(min(medians) / 2, max(medians) * 3)
    else:
        axes.set_xlim(0, max(medians) * 1.2)
    for each, heights in zip(rows, places, strict=True):
        for colour, entry, height in zip(_colours(each), each.entries, heights, strict=True):
            median = entry.latency.median_ms
            if logarithmic:  # a bar's length means nothing without a zero
                axes.plot(median, height, "o", color=colour, markersize=10, zorder=2)
            else:
                axes.barh(height, median, height=0.86, color=colour, zorder=2)
            away = 8 if logarithmic else 4
            axes.annotate(_number(median), (median, height), xytext=(away, 0), textcoords="offset points", va="center", fontsize=10)
    if logarithmic:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_ratios(axes: Any, rows: Sequence[Measurement], places: list[list[float]]) -> None:
    baseline = rows[0].entries[rows[0].baseline].name
    alike = all(each.entries[each.baseline].name == baseline for each in rows)
    _clean(axes, f"times as fast as {baseline if alike and len(baseline) < 30 else 'the baseline'} (more is better)")
    axes.axvline(1.0, color=DARK, linewidth=1.2, zorder=1)
    ends = [1 / LEAST_REACH, LEAST_REACH]
    drawn, noisy = [], []
    for each, heights in zip(rows, places, strict=True):
        for colour, entry, height in zip(_colours(each), each.entries, heights, strict=True):
            if entry.ratio is None:
                continue
            speed, low, high = 1 / entry.ratio.value, 1 / entry.ratio.high, 1 / entry.ratio.low
            if entry.ratio.noisy:
                noisy.append(height)
                continue
            ends += [low, high]
            drawn.append((height, speed, low, high, colour, entry.ratio.measurable))
    texts = [
        f"{speed:.2f}×  ({low:.2f} to {high:.2f})" if measurable else f"{SAME}  ({low:.2f} to {high:.2f})"
        for _, speed, low, high, _, measurable in drawn
    ]
    start = min(ends) - 0.06 * (max(ends) - min(ends))
    shares = [min(0.75, CHARACTER_SHARE * (len(text) + 2)) for text in texts]
    share = CHARACTER_SHARE * (len(NOISY) + 2)
    stops = [(max(row[3], 1.0) - share * start) / (1 - share) for row, share in zip(drawn, shares, strict=True)]
    stops += [(1.0 - share * start) / (1 - share)] * bool(noisy)
    axes.set_xlim(start, max([*stops, max(ends)]))
    for height in noisy:  # an interval that says nothing would leave no room for the others
        axes.annotate(NOISY, (1.0, height), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9.5, color=DARK)
    for text, (height, speed, low, high, colour, measurable) in zip(texts, drawn, strict=True):
        axes.plot([low, high], [height, height], color=colour, linewidth=3, solid_capstyle="butt", zorder=3)
        for end in (low, high):
            axes.plot([end, end], [height - 0.24, height + 0.24], color=colour, linewidth=1.6, zorder=3)
        axes.plot(speed, height, "o", color=colour, markersize=7, zorder=4, markerfacecolor=colour if measurable else "white")
        axes.annotate(text, (max(high, 1.0), height), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9.5,
                      fontweight="bold" if measurable else "normal", color=DARK)  # fmt: skip


def _label_rows(axes: Any, places: list[list[float]], names: Sequence[str]) -> None:
    axes.set_yticks([sum(heights) / len(heights) for heights in places], names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(places[-1][-1] - 0.75, 0.75)


def _legend(made: Any, axes: Any, rows: Sequence[Measurement], height: float) -> None:
    """What the colours are; above the bars on the right."""
    from matplotlib.patches import Patch

    first = rows[0]
    handles = [Patch(color=colour, label=_cut(entry.name)) for colour, entry in zip(_colours(first), first.entries, strict=True)]
    made.legend(
        handles=handles, loc="upper right", bbox_to_anchor=(0.98, 1 - 0.62 / height), ncols=len(handles), frameon=False,
        borderaxespad=0, handlelength=1.1, handleheight=1.0, columnspacing=1.4, fontsize=10.5,
    )  # fmt: skip


def _colours(found: Measurement) -> list[str]:
    """Grey for the baseline, a colour for each of the others."""
    others = iter(range(len(found.entries)))
    return [
        BASELINE if place == found.baseline else OTHERS[next(others) % len(OTHERS)] for place in range(len(found.entries))
    ]


def _clean(axes: Any, label: str) -> None:
    axes.set_facecolor("white")
    axes.grid(True, axis="x", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(label, color=DARK)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _number(value: float) -> str:
    """Three digits."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f}"


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"

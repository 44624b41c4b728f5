"""What people and programs see of a benchmark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from foldexport.benchmark.statistics import FEWEST_FOR_P99
from foldexport.benchmark.timing import SAME
from foldexport.report.console import INDENT, heading
from foldexport.report.words import milliseconds, size

if TYPE_CHECKING:
    from foldexport.benchmark.timing import Entry, Measurement, Timing

FINDINGS_SHOWN = 3  # of a measurement; those about the machine come first
INTERVAL_AT = 32  # columns for which others are left out: "1.32 times faster (1.28 to 1.36)"
INTERVAL_LEAST = 17  # "1.32 times faster"; the rest below it
GAP = 2  # columns
NAME = " " * INDENT  # the title of the names
#: What a narrow terminal does without, in this order.
DROPPED = ("load s", "nodes", "memory", "GPU memory", "file", "samples/s", "p90", "p99")


def console(screen: Console, found: Timing, picture: Path | None = None, page: Path | None = None) -> None:
    """A table for every runtime and size, what is wrong with it, and the machine."""
    screen.print(Text.assemble((found.subject, "bold cyan"), f"  {_machine(found)}"), soft_wrap=True)
    dropped = dict.fromkeys(title for each in found.measurements for title in _measurement(screen, each))
    if found.unavailable:
        heading(screen, "not timed")
        for name, reason in found.unavailable.items():
            _line(screen, f"{name}: {reason}", "yellow")
    screen.print()
    if dropped:
        _line(screen, f"left out in {screen.width} columns: {', '.join(dropped)}; --json has them", "dim")
    for note in [*found.notes, *_conditions(found)]:
        _line(screen, note, "dim")
    if picture is not None:
        _line(screen, f"drawn: {picture}", "")
    if page is not None:
        _line(screen, f"report: {page}", "")


def document(found: Timing, picture: Path | None = None) -> dict[str, Any]:
    """The JSON document."""
    from foldexport.manifest import plain

    return plain({"ok": True, **found.to_dict(), "plot": str(picture) if picture else None})


def save(record: dict[str, Any], path: Path, *, command: Sequence[str] = (), overwrite: bool = False) -> None:
    """The JSON document as a page at ``path``. Raises UsageError where no file can be put there."""
    from foldexport import destination
    from foldexport.artifact import staged
    from foldexport.report.html import document, page

    with destination.made(path.parent), staged([path], overwrite=overwrite) as (place,):
        place.write_text(page.page(document.of_timing(record, command=command)), encoding="utf-8")


def interval(entry: Entry) -> str:
    """ "1.32 times faster (1.28 to 1.36)"; no numbers where they say nothing."""
    if entry.ratio is None or entry.ratio.noisy:
        return entry.verdict
    low, high = _ends(entry)
    if not entry.ratio.measurable:
        return f"{SAME} ({_factor(low)} to {_factor(high)} times {'as fast' if entry.ratio.value < 1 else 'as slow'})"
    return f"{entry.verdict} ({_factor(low)} to {_factor(high)})"


def noise(found: Measurement) -> list[str]:
    """What is to be done about intervals that say nothing."""
    made = []
    for entry in found.entries:
        if entry.ratio is not None and entry.ratio.noisy:
            low, high = map(_factor, _ends(entry))
            made.append(
                f"{entry.name}: anything from {low} to {high} times as {'fast' if entry.ratio.value < 1 else 'slow'} fits: "
                f"pass more than --processes {found.processes}, or time it on an idle machine"
            )
    return made


def _ends(entry: Entry) -> tuple[float, float]:
    """Of the interval: times as fast where the variant is faster, else times as slow."""
    assert entry.ratio is not None
    low, high = entry.ratio.low, entry.ratio.high
    return (1 / high, 1 / low) if entry.ratio.value < 1 else (low, high)


def threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _measurement(screen: Console, found: Measurement) -> list[str]:
    """Prints one; returns the columns that it had no room for."""
    where = f"{found.sizes}, {threads(found.threads)}" if found.device == "cpu" else f"{found.sizes}, {found.device}"
    screen.print()
    screen.print(Text.assemble((found.runtime, "bold"), (f"  {found.version}, {where}", "")), soft_wrap=True)
    rows = [_cells(each, found) for each in found.entries]
    titles, dropped = _fitting(rows, screen.width)
    if _width(rows, titles, INTERVAL_LEAST) > screen.width:
        for place, row in enumerate(rows, 1):
            _line(screen, f"{place}  {row[NAME].strip()}", "")
            row[NAME] = f"{' ' * INDENT}{place}"
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    for title in titles:
        wraps = "interval" in title
        table.add_column(
            title, justify="left" if wraps or not title.strip() else "right", no_wrap=not wraps, overflow="fold",
            min_width=max(INTERVAL_LEAST, len(title)) if wraps else None,
        )  # fmt: skip
    room = screen.width - _width(rows, [title for title in titles if "interval" not in title], 0) - GAP
    for entry, cells in zip(found.entries, rows, strict=True):
        broken = {title: text.replace(" (", "\n(") for title, text in cells.items() if "interval" in title and len(text) > room}
        table.add_row(*((cells | broken)[title] for title in titles), style=_style(entry))
    screen.print(table)
    for line in noise(found):
        _line(screen, line, "yellow")
    for line in found.findings[:FINDINGS_SHOWN]:
        _line(screen, line, "yellow")
    if len(found.findings) > FINDINGS_SHOWN:
        _line(screen, f"and {len(found.findings) - FINDINGS_SHOWN} more findings: --json", "yellow")
    return dropped


def _cells(entry: Entry, found: Measurement) -> dict[str, str]:
    """Title → cell, in the order of the columns."""
    latency, first = entry.latency, found.entries[0]
    cells = {NAME: " " * INDENT + entry.name, "median ms": milliseconds(latency.median_ms)}
    cells |= {"p90": milliseconds(latency.p90_ms), "p99": milliseconds(latency.p99_ms)}
    cells |= {f"{_percent(found.level)} interval": interval(entry), "samples/s": _rate(entry.throughput_per_s)}
    cells["load s"] = f"{entry.load_s:.2g}" if entry.load_s < 9.5 else f"{entry.load_s:.0f}"
    if any(each.operators is not None for each in found.entries):
        cells["nodes"] = str(entry.operators or "–")
    cells["file"] = f"{size(entry.file_bytes)}B"
    if first.peak_memory_bytes is not None:
        cells["memory"] = f"{size(entry.peak_memory_bytes or 0)}B"
    if any(each.device_memory_bytes is not None for each in found.entries):
        cells["GPU memory"] = f"{size(entry.device_memory_bytes or 0)}B"
    return cells


def _fitting(rows: Sequence[dict[str, str]], width: int) -> tuple[list[str], list[str]]:
    """(titles that fit beside each other, those left out): whole columns go, in the order of `DROPPED`, before a name breaks."""
    titles, dropped = list(rows[0]), []
    for title in DROPPED:
        if _width(rows, titles, INTERVAL_AT) <= width:
            break
        if title in titles:
            titles.remove(title)
            dropped.append(title)
    return titles, dropped


def _width(rows: Sequence[dict[str, str]], titles: Sequence[str], at_most: int) -> int:
    """Columns that a table of these titles takes, its interval in ``at_most`` where that can be broken."""
    return sum(
        max(len(title), *(min(len(row[title]), at_most) if "interval" in title else len(row[title]) for row in rows)) + GAP
        for title in titles
    ) - GAP


def _style(entry: Entry) -> str:
    if entry.ratio is None or not entry.ratio.measurable:
        return ""
    return "green" if entry.ratio.value < 1 else "red"


def _machine(found: Timing) -> str:
    place = found.environment.get("gpu") or {}
    return f"on {place.get('name') or found.environment['processor']}, {found.environment['cores']} cores"


def _conditions(found: Timing) -> list[str]:
    """How it was measured, in a few lines."""
    here, how = found.environment, found.settings
    measured = found.measurements[0]
    clocks = [value for each in found.measurements for reading in each.clocks_mhz for value in reading]
    speed = f"{min(clocks):.0f} to {max(clocks):.0f} MHz" if clocks else "unknown"
    against = "the training graph" if "folded" in _names(measured) else measured.entries[measured.baseline].name
    virtual = ", virtual machine" if here["virtual_machine"] else ""
    runs = min(entry.latency.runs for each in found.measurements for entry in each.entries)
    lines = [
        f"every variant was checked against {against} before it was timed; in turn, in {measured.processes} processes, "
        f"{sum(each.rounds for each in found.measurements)} rounds",
        f"clocks {speed}, governor {here['governor']}, turbo {here['turbo']}{virtual}; load average {here['load_average']}; "
        f"TF32 {here['tf32']}; OMP_WAIT_POLICY {here['omp_wait_policy']}",
    ]
    if found.comparisons > 1:
        each_at, all_at = _percent(measured.level), _percent(how.get("level", measured.level))
        lines.append(f"{found.comparisons} intervals at {each_at} each, so that all hold together with {all_at}")
    if runs < FEWEST_FOR_P99:
        lines.append(f"p99 (–) is told of {FEWEST_FOR_P99} runs or more; there were {runs}, and --seconds makes more")
    if how.get("device") == "cuda":
        there = [reading["sm_mhz"] for each in found.measurements for reading in each.gpu]
        lines.append(f"GPU clock {min(there)} to {max(there)} MHz" if there else "GPU clock unknown")
        lines.append(f"transfers: {'; '.join(dict.fromkeys(f'{each.runtime}: {each.transfers}' for each in found.measurements))}")
    return lines


def _names(found: Measurement) -> list[str]:
    return [each.name for each in found.entries]


def _line(screen: Console, text: str, style: str) -> None:
    screen.print(Text(" " * INDENT + text, style), soft_wrap=True)


def _factor(value: float) -> str:
    if value >= 1000 or value < 0.001:
        return "over 1000" if value >= 1000 else "under 0.001"
    return f"{value:.3f}" if 0.98 < value < 1.02 else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _percent(level: float) -> str:
    """ "99 %", "99.75 %": so many digits that what is left to 100 has two."""
    digits = max(0, 1 - math.floor(math.log10(max(100 * (1 - level), 1e-9))))
    return f"{round(100 * level, digits):g} %"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"

"""What people and programs see of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from foldexport.benchmark.timing import SAME
from foldexport.report.console import INDENT, heading
from foldexport.report.words import milliseconds, size

if TYPE_CHECKING:
    from foldexport.benchmark.timing import Entry, Measurement, Timing

FINDINGS_SHOWN = 3  # of a measurement; those about the machine come first


def console(screen: Console, found: Timing, picture: Path | None = None, page: Path | None = None) -> None:
    """A table for every runtime and size, what is wrong with it, and the machine."""
    screen.print(Text.assemble((found.subject, "bold cyan"), f"  {_machine(found)}"), soft_wrap=True)
    for each in found.measurements:
        _measurement(screen, each)
    if found.unavailable:
        heading(screen, "not timed")
        for name, reason in found.unavailable.items():
            _line(screen, f"{name}: {reason}", "yellow")
    screen.print()
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
    """ "1.32 times faster (1.28 to 1.36)"."""
    if entry.ratio is None:
        return entry.verdict
    low, high = entry.ratio.low, entry.ratio.high
    if entry.ratio.value < 1:
        low, high = 1 / high, 1 / low
    if not entry.ratio.measurable:
        return f"{SAME} ({_factor(low)} to {_factor(high)} times {'as fast' if entry.ratio.value < 1 else 'as slow'})"
    return f"{entry.verdict} ({_factor(low)} to {_factor(high)})"


def threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _measurement(screen: Console, found: Measurement) -> None:
    where = f"{found.sizes}, {threads(found.threads)}" if found.device == "cpu" else f"{found.sizes}, {found.device}"
    screen.print()
    screen.print(Text.assemble((found.runtime, "bold"), (f"  {found.version}, {where}", "")), soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(" " * INDENT, overflow="fold")
    operators = any(each.operators is not None for each in found.entries)
    memory = found.entries[0].peak_memory_bytes is not None
    device = any(each.device_memory_bytes is not None for each in found.entries)
    titles = ["median ms", "p90", "p99", f"{round(100 * found.level, 2):g} % interval", "samples/s", "load s"]
    titles += ["nodes"] * operators + ["file"] + ["memory"] * memory + ["GPU memory"] * device
    for title in titles:
        table.add_column(title, justify="left" if "interval" in title else "right")
    for entry in found.entries:
        table.add_row(" " * INDENT + entry.name, *_cells(entry, operators, memory, device), style=_style(entry))
    screen.print(table)
    for line in found.findings[:FINDINGS_SHOWN]:
        _line(screen, line, "yellow")
    if len(found.findings) > FINDINGS_SHOWN:
        _line(screen, f"and {len(found.findings) - FINDINGS_SHOWN} more findings: --json", "yellow")


def _cells(entry: Entry, operators: bool, memory: bool, device: bool) -> Sequence[str]:
    latency = entry.latency
    cells = [milliseconds(latency.median_ms), milliseconds(latency.p90_ms), milliseconds(latency.p99_ms), interval(entry)]
    cells += [_rate(entry.throughput_per_s), f"{entry.load_s:.2g}" if entry.load_s < 9.5 else f"{entry.load_s:.0f}"]
    cells += [str(entry.operators or "–")] * operators + [f"{size(entry.file_bytes)}B"]
    cells += [f"{size(entry.peak_memory_bytes or 0)}B"] * memory
    return cells + [f"{size(entry.device_memory_bytes or 0)}B"] * device


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
    lines = [
        f"every variant was checked against {against} before it was timed; in turn, in {measured.processes} processes, "
        f"{sum(each.rounds for each in found.measurements)} rounds",
        f"clocks {speed}, governor {here['governor']}, turbo {here['turbo']}{virtual}; load average {here['load_average']}; "
        f"TF32 {here['tf32']}; OMP_WAIT_POLICY {here['omp_wait_policy']}",
    ]
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
    return f"{value:.3f}" if 0.98 < value < 1.02 else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"

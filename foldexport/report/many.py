"""Several checkpoints: a line each while they are worked on, one table at the end, one JSON document."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from foldexport.many.result import ENDED, INTERRUPTED, Result
from foldexport.report.words import size

if TYPE_CHECKING:
    from rich.console import Console

    from foldexport.many.pool import Share

#: What an exit code says of one checkpoint, in the table.
FAILED = {
    1: "a bug of ours",
    2: "refused",
    3: "not read",
    4: "not equal",
    5: "cannot be written here",
    6: "not in that precision",
    INTERRUPTED: "interrupted",
}
NAME_COLUMNS = 40  # of a line of progress at most


class Lines:
    """Tells on stderr how each checkpoint is doing: on a terminal while it works, elsewhere only how it ended.

    quiet: those that fail alone.     debug: with all that their processes printed.
    """

    def __init__(self, paths: Sequence[Path], *, quiet: bool = False, debug: bool = False) -> None:
        self._names = names(paths)
        self._width = min(NAME_COLUMNS, max(map(len, self._names.values()), default=0))
        self._quiet, self._debug, self._count = quiet, debug, len(paths)
        self._done: dict[Path, Result] = {}
        self._stages: dict[Path, tuple[str, float]] = {}
        self._live: Any = None

    def __enter__(self) -> Lines:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            screen = Console(stderr=True, markup=False, highlight=False, emoji=False)
            self._live = Live(get_renderable=self._running, console=screen, transient=True, refresh_per_second=8)
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._stages.clear()
        if self._live is not None:
            self._live.__exit__(kind, error, where)
            self._live = None

    def began(self, path: Path) -> None:
        self._stages[path] = ("starting", time.monotonic())

    def stage(self, path: Path, text: str) -> None:
        self._stages[path] = (text, self._stages[path][1])

    def ended(self, found: Result) -> None:
        self._done[found.path] = found
        self._stages.pop(found.path, None)
        if self._debug and not found.ok and found.printed:
            self._say(found.printed.rstrip(), None)
        if found.ok and not self._quiet:
            said = f"{_network(found)}  {found.elapsed_s:.1f} s"
            self._say(f"✓ {self._name(found.path)}  {said}", "green")
        elif not found.ok:
            self._say(f"✗ {self._name(found.path)}  {found.reason}  {found.elapsed_s:.1f} s", "red")

    def interrupt(self, paths: Iterable[Path]) -> None:
        """What had not ended has not been done."""
        for path in paths:
            if path not in self._done:
                self._done[path] = Result(path, INTERRUPTED, message="interrupted", kind="Interrupted")

    def results(self, order: Iterable[Path]) -> list[Result]:
        return [self._done[path] for path in order if path in self._done]

    def _name(self, path: Path) -> str:
        return f"{self._names.get(path, str(path)):{self._width}}"

    def _say(self, text: str, colour: str | None) -> None:
        if self._live is None:
            click.echo(text, err=True)
        else:
            from rich.text import Text

            mark, rest = (text[:1], text[1:]) if colour else ("", text)
            self._live.console.print(Text.assemble((mark, colour or ""), rest), soft_wrap=True)

    def _running(self) -> Any:
        """The lines of those at work, and how many have ended."""
        from rich.text import Text

        now = time.monotonic()
        working = list(self._stages.items())
        lines = [f"… {self._name(path)}  {stage}  {now - began:.0f} s" for path, (stage, began) in working]
        lines.append(f"  {len(self._done)} of {self._count} done")
        return Text("\n".join(lines), "dim", no_wrap=True, overflow="ellipsis")


def names(paths: Iterable[Path]) -> dict[Path, str]:
    """What each is called in a list: its path from the folder that they have in common."""
    paths = list(paths)
    folder = os.path.commonpath([os.path.abspath(path.parent) for path in paths]) if paths else ""
    return {path: os.path.relpath(os.path.abspath(path), folder) for path in paths}


def document(results: Sequence[Result], code: int, share: Share) -> dict[str, Any]:
    """One entry per checkpoint, in the order given: what it alone would give, or its error."""
    return {
        "ok": code == 0, "exit_code": code, "jobs": share.jobs, "threads": share.threads or None,
        "checkpoints": [each.to_dict() for each in results],
    }  # fmt: skip


def console(screen: Console, results: Sequence[Result], share: Share) -> None:
    """The table, then why the failed ones failed, and how many there are of each."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("checkpoint", "architecture"):
        table.add_column(title, overflow="fold")
    for title in ("operators", "error / noise", "files", "seconds"):
        table.add_column(title, justify="right", no_wrap=True)
    called = names(each.path for each in results)
    for each in results:
        cells = _cells(each) if each.ok else [Text(f"✗ {_what(each)}", "red"), "", "", ""]
        table.add_row(called[each.path], *cells, f"{each.elapsed_s:.1f}")
    screen.print(table)
    for each in results:
        for said in _warnings(each):
            screen.print(Text.assemble(("! ", "yellow"), f"{called[each.path]}  {said}"), soft_wrap=True)
    failed = [each for each in results if not each.ok]
    if failed:
        screen.print()
    for each in failed:
        screen.print(Text.assemble((f"✗ {called[each.path]}", "red"), f"  {each.reason}"), soft_wrap=True)
    screen.print()
    screen.print(Text(_sum(results, share), "dim"), soft_wrap=True)


def _cells(found: Result) -> list[str]:
    files = [file for row in found.document["artifacts"] for file in row["files"]]
    total = size(sum(file["size_bytes"] for file in files))
    return [_network(found), _operators(found.document["costs"]), _error(found.document["artifacts"]), f"{len(files)}, {total}B"]


def _what(found: Result) -> str:
    """In a word or two, how it failed."""
    return found.signal or ("ended" if found.kind == ENDED else FAILED.get(found.code, "failed"))


def _network(found: Result) -> str:
    return str(found.document["architecture"]["description"])


def _operators(costs: dict[str, Any]) -> str:
    before, after = (sum(each["operators"].values()) if each else None for each in (costs["before"], costs["after"]))
    return f"{before} → {after}" if after is not None else f"{before}, as it is"


def _error(artifacts: Sequence[dict[str, Any]]) -> str:
    """The largest error of the files in multiples of the network's own noise in their number type."""
    found = [row["comparison"] for row in artifacts if row["comparison"]]
    known = [each for each in found if each["noise_multiple"] is not None]
    if not known:
        return "not run" if found else "–"
    worst = max(known, key=lambda each: each["noise_multiple"])
    if worst["unit"] == "int8":  # judged by accuracy
        return f"{worst['max_error']:.1e} of peak"
    unit = "" if worst["unit"] == "float32" else f" {worst['unit']}"
    return f"{worst['noise_multiple']:.1f}×{unit}"


def _warnings(found: Result) -> list[str]:
    """What was said of files that passed all the same, and of those that could not be run here."""
    said = []
    for row in found.document.get("artifacts", ()):
        comparison = row["comparison"] or {}
        said += [f"{row['format']}: {text}" for text in (comparison.get("not_run"), comparison.get("message")) if text]
    return said


def _sum(results: Sequence[Result], share: Share) -> str:
    done = sum(each.ok for each in results)
    parts = [f"{len(results)} checkpoint{'' if len(results) == 1 else 's'}: {done} exported"]
    parts += [f"{len(results) - done} failed"] if done < len(results) else []
    if share.jobs > 1:
        parts.append(f"{share.jobs} at a time with {share.threads} thread{'' if share.threads == 1 else 's'} each")
    return ", ".join(parts)

"""The two streams of a command: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

UNWRAPPED = 100_000  # columns of what is not a terminal: one line per sentence, for grep
STAGES = {
    "read": "reading the checkpoint",
    "trace": "tracing the network",
    "fold": "folding",
    "count": "counting",
    "reference": "running the training graph in float64",
}
NOISY = ("torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime")


class Terminal:
    """as_json: one JSON document on stdout, all else on stderr. quiet: nothing but errors and that document."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self._as_json, self._quiet = as_json, quiet

    @contextmanager
    def working(self) -> Iterator[Callable[[str], None]]:
        """While a command works: yields what tells the user of each stage, and keeps everybody else off the screen.

        What libraries and the user's own code print goes to stderr; warnings and log lines of libraries go nowhere.
        """
        with ExitStack() as stack:
            stack.enter_context(_stdout_to_stderr())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(_quiet_loggers())
            if self._quiet or not sys.stderr.isatty():
                yield lambda stage: None
                return
            from rich.console import Console

            status = stack.enter_context(Console(stderr=True).status("starting", spinner="dots"))
            yield lambda stage: status.update(words(stage))

    def show(self, render: Callable[[Console], None], document: Mapping[str, Any]) -> None:
        """The result: for people as ``render`` draws it, for programs as ``document``."""
        if not self._quiet:
            _render(render, sys.stderr if self._as_json else sys.stdout)
        if self._as_json:
            write_json(document)

    def complain(self, error: Exception) -> None:
        """An error that comes after a result was shown."""
        click.echo(f"{click.style('error:', fg='red', bold=True)} {error}", err=True)


def words(stage: str) -> str:
    """``"probe normal"`` → ``"proving in float64: normal"``."""
    first, _, rest = stage.partition(" ")
    more = {"probe": f"proving in float64: {rest}", "export": f"writing {rest}", "verify": f"running {rest}"}
    return STAGES.get(stage) or more.get(first) or stage


def _render(render: Callable[[Console], None], stream: Any) -> None:
    """On a terminal as it comes; elsewhere without the blanks that fill a table's lines."""
    console = screen(stream)
    if console.is_terminal:
        render(console)
        return
    with console.capture() as capture:
        render(console)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()), file=stream)


def screen(stream: Any) -> Console:
    """A console without markup or highlighting of its own; as wide as the terminal, unbounded where there is none."""
    from rich.console import Console

    width = None if stream.isatty() or "COLUMNS" in os.environ else UNWRAPPED
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def write_json(document: Mapping[str, Any]) -> None:
    """One document on stdout, in ASCII, whatever the terminal's encoding is."""
    click.echo(json.dumps(document, indent=1))


@contextmanager
def _quiet_loggers() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Prints of Python and of native libraries; a stream of a test runner has no descriptor to move."""
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        if sys.__stdout__ is not None and _descriptor(sys.__stdout__) == 1 and _descriptor(sys.stderr) == 2:
            sys.__stdout__.flush()
            kept = os.dup(1)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, 1)
            os.dup2(2, 1)
        yield


def _descriptor(stream: Any) -> int | None:
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None

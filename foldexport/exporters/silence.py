"""Libraries that talk: what they print, also from C++, is kept off the user's screen and at hand for an error."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

STANDARD = (1, 2)  # file descriptors of stdout and stderr
LAST_LINES = 3


class Said:
    """What was printed while it was silent; whole once the block has ended."""

    def __init__(self) -> None:
        self.text = ""

    def reason(self, error: BaseException | None = None) -> str:
        """The last lines that say something, those of an error first; for a message."""
        lines = [line.strip() for line in f"{self.text}\n{error or ''}".splitlines() if line.strip()]
        own = [line.strip() for line in str(error or "").splitlines() if line.strip()]
        told = own[:1] or lines[-LAST_LINES:]
        return (" ".join(told) or (type(error).__name__ if error else "no reason given"))[:300]


@contextmanager
def silenced() -> Iterator[Said]:
    """Send stdout and stderr to a file, for Python and for what it calls, and keep warnings and logs back.

    File descriptors belong to the process: another thread that prints meanwhile is silenced too.
    """
    said = Said()
    with tempfile.TemporaryFile() as sink, contextlib.ExitStack() as stack:
        python = stack.enter_context(open(os.dup(sink.fileno()), "w", encoding="utf-8", errors="replace"))
        for place, descriptor in enumerate(STANDARD):
            _flush((sys.stdout, sys.stderr)[place])
            _redirect(stack, descriptor, sink.fileno())
        stack.enter_context(contextlib.redirect_stdout(python))
        stack.enter_context(contextlib.redirect_stderr(python))
        stack.enter_context(_no_logs())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            yield said
        finally:
            _flush(python)
            sink.seek(0)
            said.text = sink.read().decode("utf-8", "replace")
            sink.seek(0, os.SEEK_END)


def _redirect(stack: contextlib.ExitStack, descriptor: int, target: int) -> None:
    """Point a descriptor elsewhere until the stack ends; one that is closed stays so."""
    try:
        saved = os.dup(descriptor)
    except OSError:
        return
    os.dup2(target, descriptor)

    def restore() -> None:
        os.dup2(saved, descriptor)
        os.close(saved)

    stack.callback(restore)


@contextmanager
def _no_logs() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)


def _flush(stream: TextIO | None) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none
        stream.flush()

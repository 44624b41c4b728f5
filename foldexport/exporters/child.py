"""A process at the other end of two pipes, which ends with the object that holds it."""

from __future__ import annotations

import contextlib
import io
import subprocess
import tempfile
import weakref
from collections.abc import Sequence

PATIENCE_S = 10  # for a process to end by itself


class Child:
    """``command`` at work in the folder for temporary files; what it says on stderr is kept for `last_words`."""

    def __init__(self, command: Sequence[str]) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, cwd=tempfile.gettempdir()
        )
        self.end = weakref.finalize(self, _end, self.process, self._said)

    def send(self, *parts: bytes | memoryview) -> None:
        """Write to its stdin; raises OSError where it has ended."""
        for part in parts:
            self.process.stdin.write(part)
        self.process.stdin.flush()

    def read(self, count: int) -> bytes:
        """``count`` bytes of its stdout, fewer where it has ended."""
        return self.process.stdout.read(count)

    def last_words(self, containing: str = "") -> str:
        """Its exit code, once it has ended, and its last line on stderr, of those with ``containing`` in them."""
        code = self.process.wait()
        self._said.seek(0)
        lines = [line for line in self._said.read().decode(errors="replace").strip().splitlines() if containing in line]
        return f"process ended with code {code}{': ' + lines[-1].strip()[:300] if lines else ''}"


def _end(process: subprocess.Popen, said: io.IOBase) -> None:
    """Closing its input ends the process."""
    with contextlib.suppress(OSError):  # it has ended already, with something unsent
        process.stdin.close()
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
    said.close()

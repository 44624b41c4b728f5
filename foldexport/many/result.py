"""What one checkpoint of several came to, and the exit code of them all."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Exit codes from the worst to none: what nobody understands, wrong values, what was asked and is not, then what can be mended.
WORST_FIRST = (1, 4, 6, 3, 5, 2, 0)
INTERRUPTED = 130
ENDED = "ProcessEnded"


@dataclass(frozen=True)
class Result:
    """One checkpoint's end.

    code: the exit code of the command for it alone.     document: what ``--json`` gives for it alone; {} where it failed.
    message: why it failed, in one or two lines.          kind: the error's class name.     signal: what killed its process.
    """

    path: Path
    code: int
    elapsed_s: float = 0.0
    document: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    kind: str = ""
    signal: str = ""
    printed: str = ""

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def reason(self) -> str:
        """Why it failed, in one line that does not begin with its name once more."""
        return " ".join(self.message.split()).removeprefix(f"{self.path}: ")

    def to_dict(self) -> dict[str, Any]:
        """Its entry of the JSON document: what the checkpoint alone would give, with its path and time."""
        head = {"ok": self.ok, "path": str(self.path), "elapsed_s": round(self.elapsed_s, 3)}
        if self.ok:
            return head | {key: value for key, value in self.document.items() if key != "ok"}
        error = {"type": self.kind, "message": self.message, "exit_code": self.code}
        return head | {"error": error | ({"signal": self.signal} if self.signal else {})}


def worst(codes: Iterable[int]) -> int:
    """The exit code of several: the first of ``WORST_FIRST`` that occurs; a code that is not in it counts as a bug of ours."""
    seen = set(codes)
    return min((code if code in WORST_FIRST else 1 for code in seen), key=WORST_FIRST.index, default=0)


def ended(path: Path, exit_code: int | None, stage: str, elapsed_s: float, printed: str = "") -> Result:
    """The result of a process that ended without one: killed, or left by the code of a checkpoint or a runtime.

    exit_code: as multiprocessing tells it, the negative signal where it was killed.
    """
    number = -exit_code if exit_code is not None and exit_code < 0 else 0
    number = signal.SIGTERM if exit_code == 128 + signal.SIGTERM else number
    if number:
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        how = f"was killed by {name}"
        hint = "; where memory runs out the system does that: try fewer --jobs" if name == "SIGKILL" else ""
    else:
        name, how, hint = "", f"ended with code {exit_code} and no result", ""
    last = next((line.strip() for line in reversed(printed.splitlines()) if line.strip()), "")
    said = f" ({last[:200]})" if last else ""
    message = f"{path}: its process {how} while {stage}{hint}{said}."
    return Result(path, 1, elapsed_s, message=message, kind=ENDED, signal=name, printed=printed)

"""Where an artifact's runtime runs: on the device that was asked for, or, told in its label, on another.

An exporter says what its runtime can use: ``devices``, kinds of devices, ``("cpu",)`` where it has no such attribute. One that
names several takes ``load(path, device=…)``, and may have ``lacks(device) -> str``: what is missing on this machine, empty
where nothing is. What ``load`` returns may have a ``remark`` for the proof line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foldexport import device as devices


@dataclass(frozen=True)
class Placed:
    """A loaded artifact. device: where it runs. label: its runtime, and where that is, for the proof line."""

    run: Callable[..., list[Any]]
    device: str
    label: str


def place(exporter: Any, path: Path, device: str = "cpu") -> Placed:
    """Load the artifact on ``device`` where its runtime can use it, else on the first that it can use.

    On the CPU, the default, the label is the runtime's name and version alone; elsewhere it says where the artifact runs, and
    why not where it was asked for. Raises what the exporter's ``load`` raises.
    """
    can = tuple(getattr(exporter, "devices", ("cpu",)))
    if devices.kind(device) == "cpu" and devices.kind(device) not in can:  # it has a device of its own, which is no news
        return Placed(exporter.load(path), can[0], exporter.runtime())
    reason = why_not(exporter, device)
    there = device if not reason else can[0]
    run = exporter.load(path, device=there) if len(can) > 1 else exporter.load(path)
    label = exporter.runtime()
    if device != "cpu":
        because = "; ".join(filter(None, (reason, getattr(run, "remark", ""))))
        label = f"{label} on {devices.described(there)}{f': {because}' if because else ''}"
    return Placed(run, there, label)


def why_not(exporter: Any, device: str) -> str:
    """Why the exporter's runtime cannot use ``device`` here; empty where it can."""
    can = tuple(getattr(exporter, "devices", ("cpu",)))
    if devices.kind(device) not in can:
        return f"it does not use {devices.kind(device)}"
    return exporter.lacks(device) if hasattr(exporter, "lacks") else ""

"""What a measurement was made on: kind of machine and versions, never its name or a path of it. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("torch", "numpy", "onnx", "onnxscript", "onnxruntime", "onnxsim")
GIB = 2**30


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, str]:
    """Processor, cores, memory, system and versions of the packages that took part."""
    found = {
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": str(cores()),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def load() -> float | None:
    """Processes that wanted a core over the last minute, this run's own among them; None where unknown."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def _field(path: str, name: str) -> str:
    """The value of the first ``name : value`` line of a file of /proc; empty where there is none."""
    if not Path(path).is_file():
        return ""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _memory() -> str:
    kilobytes = _field("/proc/meminfo", "MemTotal").split()
    return f"{int(kilobytes[0]) * 1024 / GIB:.0f} GiB" if kilobytes else "unknown"

"""What a measurement was made on: processor, clocks, load, devices and versions; never the machine's name. Imports no torch."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

GIB = 2**30
CPU_FOLDER = Path("/sys/devices/system/cpu")
#: Where boost can be read, and what is found there while it is on.
TURBO = ((CPU_FOLDER / "cpufreq/boost", "1"), (CPU_FOLDER / "intel_pstate/no_turbo", "0"))
PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "triton")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Processor, cores, memory, system, clocks and versions of what is installed."""
    kilobytes = (_field("/proc/meminfo", "MemTotal") or "0").split()[0]
    found: dict[str, Any] = {
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "memory_bytes": int(kilobytes) * 1024 or None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "governor": _read(CPU_FOLDER / "cpu0/cpufreq/scaling_governor") or "unknown",
        "turbo": turbo(),
        "virtual_machine": "hypervisor" in (_field("/proc/cpuinfo", "flags") or "").split(),
        "versions": {},
    }
    for package in PACKAGES:
        try:
            found["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def clocks_mhz() -> list[float]:
    """The clock of every core now, as the system tells it; empty where it does not."""
    files = sorted(CPU_FOLDER.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    if files:
        return [float(value) / 1000 for file in files if (value := _read(file))]
    lines = (_read(Path("/proc/cpuinfo")) or "").splitlines()
    return [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]


def turbo() -> str:
    """ "on", "off" or "unknown"."""
    for path, on in TURBO:
        if value := _read(path):
            return "on" if value == on else "off"
    return "unknown"


def load_average() -> float | None:
    """Processes that wanted a core over the last minute, this run's own among them; None where unknown."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far.

    From VmHWM where there is one: what ``getrusage`` gives begins with the size of the process that started this one.
    """
    kilobytes = _field("/proc/self/status", "VmHWM").split()
    if kilobytes:
        return int(kilobytes[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def interruptions() -> int:
    """How often this process was taken off its core against its will."""
    try:
        import resource
    except ImportError:  # Windows has none
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def no_gpu() -> str:
    """Why the NVIDIA driver cannot be used, in its own words; empty where it can."""
    name = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError as error:
        return f"the NVIDIA driver is not installed ({error})"
    code = driver.cuInit(0)
    if code == 0:
        return ""
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    return f"the NVIDIA driver says: {(text.value or b'unknown error').decode()} (cuInit returned {code})"


def _field(path: str, name: str) -> str:
    """The value of the first ``name : value`` line of a file of /proc; empty where there is none."""
    for line in (_read(Path(path)) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None

"""The clock of the GPU that networks are timed on, and what holds it down; by NVIDIA's management library. Imports no torch."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

BUS_ID_BYTES = 32
#: Names in NVML's ``nvmlClocksEventReasons``; that the GPU idles, or runs at the clock that was asked for, slows nothing down.
HOLDS = {
    "SwPowerCap": "its power limit", "SwThermalSlowdown": "heat", "HwThermalSlowdown": "heat", "HwSlowdown": "heat or power",
    "HwPowerBrakeSlowdown": "its power supply", "SyncBoost": "another GPU",
}  # fmt: skip


def reading() -> dict[str, Any] | None:
    """``sm_mhz``, the clock of its multiprocessors now, and ``held_by``, why that is not higher.

    None without a GPU, or without the package nvidia-ml-py.
    """
    try:
        import pynvml
    except ImportError:
        return None
    bus = _bus_id()
    if not bus:
        return None
    try:
        pynvml.nvmlInit()
        try:
            device = pynvml.nvmlDeviceGetHandleByPciBusId(bus)
            reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(device)
            return {"sm_mhz": pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM), "held_by": held_by(reasons)}
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # a driver that does not tell
        return None


def held_by(reasons: int) -> list[str]:
    """The words for NVML's bits, each once."""
    import pynvml

    found = [words for name, words in HOLDS.items() if reasons & getattr(pynvml, f"nvmlClocksEventReason{name}")]
    return list(dict.fromkeys(found))


def _bus_id() -> bytes:
    """Of the GPU that CUDA calls the first, which NVML may count otherwise; empty where there is none."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    except OSError:
        return b""
    device, text = ctypes.c_int(), ctypes.create_string_buffer(BUS_ID_BYTES)
    steps = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
        lambda: driver.cuDeviceGetPCIBusId(text, BUS_ID_BYTES, device),
    )
    return text.value if all(step() == 0 for step in steps) else b""

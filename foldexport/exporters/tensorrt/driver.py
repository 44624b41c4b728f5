"""The GPU, asked through NVIDIA's driver itself: no package is needed to find that there is none.

Source: CUDA Driver API, ``cuInit``, ``cuDeviceGetAttribute`` and ``cuGetErrorString``.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Gpu:
    """The first GPU: its name, compute capability ("8.6") and the CUDA version of the driver ("13.0")."""

    name: str
    compute_capability: str
    driver: str


class NoGpu(Exception):
    """Why there is no GPU, in the driver's own words."""


def gpu() -> Gpu:
    """The first GPU of this machine. Raises :class:`NoGpu`."""
    try:
        cuda = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise NoGpu(f"cuInit: {LIBRARY} is not there, no NVIDIA driver") from error
    _call(cuda, "cuInit", 0)
    count, device, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    _call(cuda, "cuDeviceGetCount", ctypes.byref(count))
    if not count.value:
        raise NoGpu("cuDeviceGetCount: 0 devices")
    _call(cuda, "cuDeviceGet", ctypes.byref(device), 0)
    _call(cuda, "cuDriverGetVersion", ctypes.byref(version))
    name = ctypes.create_string_buffer(256)
    _call(cuda, "cuDeviceGetName", name, len(name), device)
    parts = []
    for attribute in (MAJOR, MINOR):
        value = ctypes.c_int()
        _call(cuda, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        parts.append(str(value.value))
    return Gpu(name.value.decode(), ".".join(parts), f"{version.value // 1000}.{version.value % 1000 // 10}")


def why_none() -> str:
    """The driver's reason why there is no GPU; empty where there is one."""
    try:
        gpu()
    except NoGpu as error:
        return str(error)
    return ""


def _call(cuda: ctypes.CDLL, function: str, *arguments: object) -> None:
    code = getattr(cuda, function)(*arguments)
    if code == 0:
        return
    words = ctypes.c_char_p()
    cuda.cuGetErrorString(code, ctypes.byref(words))
    raise NoGpu(f"{function}: {words.value.decode() if words.value else f'error {code}'}")

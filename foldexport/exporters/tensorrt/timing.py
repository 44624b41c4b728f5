"""The timing cache of full TensorRT: what it measured on this GPU, kept for the next build.

One file per library version and GPU in the user's cache folder. A file that cannot be read, or does not fit, is as good
as none; one that cannot be written costs the next build its time and nothing else. TensorRT-RTX measures nothing when it
builds, and calls these operations no-ops.
"""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from foldexport.exporters.tensorrt.driver import Gpu


def folder() -> Path:
    """``$XDG_CACHE_HOME/foldexport/tensorrt``, by default below ``~/.cache``; below ``%LOCALAPPDATA%`` on Windows."""
    fallback = os.environ.get("LOCALAPPDATA") if os.name == "nt" else None
    base = os.environ.get("XDG_CACHE_HOME") or fallback or Path.home() / ".cache"
    return Path(base) / "foldexport" / "tensorrt"


def file(version: str, gpu: Gpu) -> Path:
    """``11.4.0.106-NVIDIA_H200-9.0-driver13.0.cache``"""
    words = (version, gpu.name, gpu.compute_capability, f"driver{gpu.driver}")
    return folder() / ("-".join(re.sub(r"[^\w.]+", "_", word) for word in words) + ".cache")


def install(config: Any, path: Path) -> str:
    """Give the builder what is in the file; returns what was found, for the manifest."""
    content = b""
    with suppress(OSError):
        content = path.read_bytes()
    for each in dict.fromkeys((content, b"")):
        try:
            cache = config.create_timing_cache(each)
            taken = cache is not None and config.set_timing_cache(cache, False)
        except (TypeError, RuntimeError, ValueError):  # what pybind11 makes of a null pointer, by version
            taken = False
        if taken:
            return f"{len(each)} bytes used" if each else "empty" if not content else "did not fit, begun again"
    return "not taken"


def save(config: Any, path: Path) -> None:
    """Write what the builder measured, whole or not at all."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".timing-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(memoryview(cache.serialize()))
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

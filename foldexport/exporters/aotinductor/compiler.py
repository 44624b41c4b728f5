"""The C++ compiler that TorchInductor calls; imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
import os
import shutil

from foldexport.errors import MissingDependencyError

COMPILERS = ("g++", "clang++", "c++", "cl")
WANTED = "needs a C++ compiler (g++ or clang++, or CXX): install one, on Debian with: apt install g++"


def compiler() -> str:
    """The program; empty where there is none."""
    asked = os.environ.get("CXX", "").split()
    return next((found for name in (*asked[:1], *COMPILERS) if (found := shutil.which(name))), "")


def require() -> None:
    """Raise :class:`MissingDependencyError` without a compiler. Running a package needs none."""
    if not compiler():
        raise MissingDependencyError(f"aotinductor {WANTED}.")


def status() -> tuple[str, str, str]:
    """(runtime, version, remark) for ``foldexport formats``; no runtime where nothing can be compiled."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "", "", ""
    return ("torch", version, "") if compiler() else ("", "", f"aotinductor {WANTED}.")

"""What TorchInductor needs to compile ahead of time: a C++ compiler, and settings of PyTorch's; imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
import os
import shutil

from foldexport.errors import MissingDependencyError

COMPILERS = ("g++", "clang++", "c++", "cl")
NEEDS_TORCH = (2, 13)  # the first version with `cpp.march`: earlier ones compile for the exporting processor only
WANTED = "needs a C++ compiler (g++ or clang++, or CXX): install one, on Debian with: apt install g++"


def compiler() -> str:
    """The program; empty where there is none."""
    asked = os.environ.get("CXX", "").split()
    return next((found for name in (*asked[:1], *COMPILERS) if (found := shutil.which(name))), "")


def lacks() -> str:
    """What is missing for compiling, in words; empty where nothing is."""
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < NEEDS_TORCH:
        wanted = ".".join(map(str, NEEDS_TORCH))
        return f"needs PyTorch {wanted} or newer, this is {version}: older ones compile for the exporting processor only"
    return "" if compiler() else WANTED


def require() -> None:
    """Raise :class:`MissingDependencyError` where nothing can be compiled. Running a package needs no compiler."""
    if reason := lacks():
        raise MissingDependencyError(f"aotinductor {reason}.")


def status() -> tuple[str, str, str]:
    """(runtime, version, remark) for ``foldexport formats``; no runtime where nothing can be compiled."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "", "", ""
    reason = lacks()
    return ("", "", f"aotinductor {reason}.") if reason else ("torch", version, "")

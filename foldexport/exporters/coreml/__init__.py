"""Core ML packages, written anywhere and run on macOS only.

`package`: the folder, its stable bytes, its constants. `evaluate`: the program computed here by the definitions of its operators.
`exporter`: the format.
"""

from __future__ import annotations

import importlib.metadata
import sys


def status() -> tuple[str, str, str]:
    """(runtime, version, remark): what writes packages, and whether they run here. Imports nothing of it."""
    remark = "" if sys.platform == "darwin" else "packages are written here and not run: Core ML runs on macOS only"
    return "coremltools", importlib.metadata.version("coremltools"), remark

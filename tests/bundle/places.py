"""Python environments that hold a few packages and nothing else, made in a moment: a venv without pip that links to ours."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

NEEDS = {"numpy": ("numpy", "numpy.libs"), "onnxruntime": ("onnxruntime",), "openvino": ("openvino",)}


def environment(folder: Path, *packages: str) -> Path:
    """The Python of a new environment in which these packages, and neither foldexport nor torch, can be imported."""
    place = folder / "-".join(["only", *packages])
    venv.create(place, with_pip=False, symlinks=True)
    site = next(place.glob("lib/python*/site-packages"))
    for package in packages:
        origin = Path(importlib.util.find_spec(package).submodule_search_locations[0]).parent
        for name in NEEDS[package]:
            if (origin / name).exists():
                (site / name).symlink_to(origin / name, target_is_directory=True)
    python = place / "bin" / "python"
    hidden = "import importlib.util as u; print([n for n in ('foldexport', 'torch', 'onnx') if u.find_spec(n)])"
    found = subprocess.run([python, "-c", hidden], cwd=folder, env=_plain(), capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n", found.stdout
    return python


def verify(python: Path | str, bundle: Path) -> tuple[int, str]:
    """``python verify.py`` in the bundle: its exit code, and what it said."""
    done = subprocess.run([python, "verify.py"], cwd=bundle, env=_plain(), capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def _plain() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def here(bundle: Path) -> tuple[int, str]:
    """With everything that is installed for the tests."""
    return verify(sys.executable, bundle)

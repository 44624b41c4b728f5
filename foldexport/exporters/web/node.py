"""Node.js and the npm package onnxruntime-web: where they are, which versions, and what installs them. Imports nothing heavy."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from foldexport.errors import MissingDependencyError

PACKAGE = "onnxruntime-web"
VARIABLE = "FOLDEXPORT_NODE_MODULES"
OLDEST_NODE = 18  # has what the package's own loader calls (fetch, WebAssembly SIMD)
PATIENCE_S = 30


@dataclass(frozen=True)
class Web:
    """node: the program. package: the folder of onnxruntime-web. version: of it."""

    node: str
    package: Path
    version: str


def require() -> Web:
    """What runs the format. Raises :class:`MissingDependencyError` with the commands that install what is missing."""
    node = shutil.which("node")
    if node is None:
        raise MissingDependencyError(
            f"{PACKAGE} needs Node.js {OLDEST_NODE} or later, and there is no node on PATH: "
            f"install it (on Debian: apt install nodejs npm), then run: npm install {PACKAGE}"
        )
    version = _node_version(node)
    if version < OLDEST_NODE:
        raise MissingDependencyError(f"{PACKAGE} needs Node.js {OLDEST_NODE} or later; {node} is {version or 'no Node.js'}.")
    for folder in _folders():
        package = folder / PACKAGE
        try:
            found = json.loads((package / "package.json").read_text(encoding="utf-8"))["version"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return Web(node, package, str(found))
    raise MissingDependencyError(
        f"{PACKAGE} is an npm package, and it is neither in a node_modules folder here or above nor global: "
        f"npm install {PACKAGE} (or set {VARIABLE} to the node_modules folder that has it)"
    )


def status() -> tuple[str, str, str]:
    """(runtime, version, remark) for ``foldexport formats``; no runtime where something is missing."""
    try:
        return PACKAGE, require().version, ""
    except MissingDependencyError as error:
        return "", "", str(error)


def _folders() -> Iterator[Path]:
    """``node_modules`` folders: named by the variable, then in and above the working folder, then Node's own."""
    named = [each for name in (VARIABLE, "NODE_PATH") for each in os.environ.get(name, "").split(os.pathsep) if each]
    for each in map(Path, named):
        yield from (each, each / "node_modules")
    here = Path.cwd()
    for each in (here, *here.parents):
        yield each / "node_modules"
    npm = shutil.which("npm")
    if npm is not None and (folder := _said(npm, "root", "-g")):
        yield Path(folder)


def _node_version(node: str) -> int:
    """20 for "v20.20.2"; 0 for what is no Node.js."""
    major = _said(node, "--version").removeprefix("v").partition(".")[0]
    return int(major) if major.isdigit() else 0


@functools.lru_cache
def _said(program: str, *words: str) -> str:
    try:
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=PATIENCE_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

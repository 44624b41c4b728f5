"""Which checkpoints a command line means: files as they are named, folders by the suffixes of what lies in them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from foldexport.destination import MANIFEST_SUFFIX
from foldexport.exporters import FORMATS

#: A folder may hold anything, so pickles under a name of their own (.pkl, .t7, .model) are taken only where they are named.
SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors", ".bin", ".pt2", ".pth.tar", ".pt.tar", ".ckpt.tar")


@dataclass
class Found:
    """Checkpoints in the order named, each once, and (path, reason) of what could not be looked into."""

    checkpoints: list[Path] = field(default_factory=list)
    problems: list[tuple[Path, str]] = field(default_factory=list)


def find(paths: Sequence[Path], *, recursive: bool = False) -> Found:
    """The checkpoints that ``paths`` name; a file that does not exist is one too, whose reading will fail.

    A folder stands for the checkpoint files in it, in the order of their names, and with ``recursive`` for those in its
    folders. Links to folders are followed, each folder is looked into once, hidden names are passed over, and so is what
    foldexport wrote.
    """
    found, seen = Found(), set()
    for path in paths:
        if not path.is_dir():
            _take(found, seen, path)
            continue
        before = len(found.checkpoints), len(found.problems)
        for each in _in_folder(path, recursive, set(), found):
            _take(found, seen, each)
        if before == (len(found.checkpoints), len(found.problems)) and not _holds(path, seen):
            found.problems.append((path, _empty(path, recursive)))
    return found


def _take(found: Found, seen: set[str], path: Path) -> None:
    """A file that is named twice, or named and found, is taken once; a link beside its file has a name of its own."""
    place = os.path.join(os.path.realpath(path.parent), path.name)
    if place not in seen:
        seen.add(place)
        found.checkpoints.append(path)


def _holds(folder: Path, seen: set[str]) -> bool:
    """Whether checkpoints in the folder were taken already, under another name of it."""
    place = os.path.realpath(folder) + os.sep
    return any(each.startswith(place) for each in seen)


def _in_folder(folder: Path, recursive: bool, visited: set[tuple[int, int]], found: Found) -> Iterator[Path]:
    try:
        status = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        found.problems.append((folder, f"{folder}: cannot be looked into: {error.strerror or error}."))
        return
    if (status.st_dev, status.st_ino) in visited:  # a link that leads back
        return
    visited.add((status.st_dev, status.st_ino))
    entries = [entry for entry in entries if not entry.name.startswith(".")]
    ours = _written(folder, {entry.name for entry in entries})
    folders = [entry for entry in entries if _is_dir(entry)]
    for entry in entries:
        if entry not in folders and _is_checkpoint(entry, ours):
            yield folder / entry.name
    for entry in folders if recursive else ():
        if not _is_ours(entry.name):  # a package is a folder
            yield from _in_folder(folder / entry.name, recursive, visited, found)


def _is_dir(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_checkpoint(entry: os.DirEntry, ours: set[str]) -> bool:
    """By its name; a link that leads nowhere is one, so that it is reported, and a pipe, which would block, is none."""
    if not entry.name.lower().endswith(SUFFIXES) or _is_ours(entry.name) or entry.name in ours:
        return False
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def _is_ours(name: str) -> bool:
    """Whether a name ends as one of a format's own files does."""
    return any(name.endswith(row.suffix) for row in FORMATS.values() if row.suffix not in SUFFIXES)


def _written(folder: Path, names: set[str]) -> set[str]:
    """Names in a folder that foldexport wrote under a checkpoint's suffix: companions, and what a manifest there lists."""
    ours = {
        each.name
        for row in FORMATS.values()
        for name in names
        if row.companions and name.endswith(row.suffix) and name != row.suffix
        for each in row.beside(name)
    }
    for row in FORMATS.values():  # net.py.safetensors
        ours |= {name for name in names for suffix in SUFFIXES if name.endswith(f"{row.suffix}{suffix}")}
    for name in names:
        if name.endswith(MANIFEST_SUFFIX):
            ours |= {each for each, size in _listed(folder / name) if _size(folder / each) == size}
    return ours


def _listed(manifest: Path) -> list[tuple[str, int]]:
    """(name, bytes) of the files of a manifest; none where it is not one of ours."""
    try:
        document = json.loads(manifest.read_text(encoding="utf-8"))
        return [(each["name"], each["size_bytes"]) for row in document["artifacts"] for each in row["files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _empty(folder: Path, recursive: bool) -> str:
    deeper = "" if recursive else " Pass --recursive to look into its folders too."
    return f"{folder}: no checkpoint file in this folder (looked for {', '.join(SUFFIXES[:6])}).{deeper}"

"""A bundle that ``foldexport verify`` is given: a folder, a zip, or the manifest in it."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from foldexport.bundle import MARK, SUMS, VERIFY, standalone
from foldexport.destination import MANIFEST_SUFFIX
from foldexport.errors import CheckpointError, EquivalenceError, UsageError


@contextmanager
def manifest_of(path: Path) -> Iterator[Path]:
    """The manifest of a bundle; any other path as it is.

    Raises UsageError for a folder or zip without exactly one manifest, CheckpointError for a zip that cannot be read, and
    EquivalenceError where the manifest of a bundle was changed.
    """
    if path.is_dir():
        yield _only(path, path)
    elif path.is_file() and zipfile.is_zipfile(path):
        with tempfile.TemporaryDirectory(prefix="foldexport-") as folder:
            yield _only(_extracted(path, Path(folder)), path)
    else:
        yield path


def is_bundle(manifest: Path) -> bool:
    """Whether the manifest lies in a bundle."""
    verify, sums = manifest.with_name(VERIFY), manifest.with_name(SUMS)
    return sums.is_file() and verify.is_file() and MARK in verify.read_text(encoding="utf-8", errors="replace")


def changed(manifest: Path) -> dict[str, str]:
    """The bundle's files that are not as they were, each with what is wrong. Raises EquivalenceError for the manifest itself."""
    found = standalone.changed(manifest.parent)
    if manifest.name in found:
        raise EquivalenceError(f"{manifest.name} {found[manifest.name]}; copy the bundle again, or export again.")
    return found


def _only(folder: Path, given: Path) -> Path:
    found = sorted(folder.glob(f"*{MANIFEST_SUFFIX}"))
    if len(found) != 1:
        how = ", ".join(each.name for each in found) or "none"
        raise UsageError(f"{given}: is no bundle: wanted one NAME{MANIFEST_SUFFIX} in it, found {how}.")
    return found[0]


def _extracted(path: Path, folder: Path) -> Path:
    """The bundle's folder. Raises CheckpointError for a zip that cannot be read, or has names that lead out of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name:
                    raise CheckpointError(f"{path}: holds {name!r}, which leads out of it; it was not made by foldexport.")
            archive.extractall(folder)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise EquivalenceError(f"{path}: cannot be unpacked ({error}); copy it again, or export again.") from error
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder

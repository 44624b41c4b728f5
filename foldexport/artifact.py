"""Files put in place whole or not at all.

An artifact is written into a temporary folder beside its destination, proven there, and then moved with ``os.replace``,
which is atomic within one file system. Whatever ends the work before that, the destination is as it was.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldexport.errors import UsageError
from foldexport.exporters.pytorch import MARK

if TYPE_CHECKING:
    from foldexport.verify import Comparison

CHUNK_BYTES = 1 << 20
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


@dataclass(eq=False)
class Artifact:
    """A file in place, with its proof.

    path: the file to give to the runtime.            files: it and what lies beside it (external data).
    sha256, size_bytes: of each file, by name.        notes: what the exporter recorded for the manifest.
    """

    path: Path
    format: str
    comparison: Comparison | None = None
    files: tuple[Path, ...] = ()
    sha256: dict[str, str] = field(default_factory=dict)
    size_bytes: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def write(
    exporter: Any,
    module: Any,
    example: tuple,
    destination: str | os.PathLike,
    options: Any,
    *,
    prove: Callable[[Path], Comparison],
    overwrite: bool = False,
) -> Artifact:
    """Export ``module``, prove the file, and only then put it in place.

    prove: called with the temporary path; returns the comparison, or raises :class:`EquivalenceError`, and then nothing
    is left behind.

    Raises :class:`UsageError` before any work when the destination cannot be written or exists already.
    """
    target = Path(destination)
    with staged([target], overwrite=overwrite) as (path,):
        notes = exporter.export(module, example, path, options)
        comparison = prove(path)
        files = tuple(target.with_name(each.name) for each in _beside(path))
    return describe(target, exporter.name, files, comparison=comparison, notes=notes)


def describe(path: Path, format_name: str, files: Sequence[Path], **record: Any) -> Artifact:
    """The :class:`Artifact` of files that are in place, with their digests and sizes."""
    digests = {each.name: sha256(each) for each in files}
    sizes = {each.name: each.stat().st_size for each in files}
    return Artifact(path, format_name, files=tuple(files), sha256=digests, size_bytes=sizes, **record)


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_destination(path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Raise :class:`UsageError` unless a file can be put at ``path``.

    The folder is tried, since permissions alone do not tell (a read-only mount, the superuser).
    """
    target = Path(path)
    if target.is_dir():
        raise UsageError(
            f"{target} is a folder: name the file to write, for example {target / 'network'}{target.suffix or '.onnx'}."
        )
    if os.path.lexists(target) and not overwrite:
        raise UsageError(f"{target} exists already: pass --overwrite to replace it, or -o to write elsewhere.")
    if target.suffix == ".py" and target.is_file() and MARK not in target.read_text(encoding="utf-8", errors="replace"):
        raise UsageError(f"{target} is Python source that foldexport did not write, and is never replaced: pass another -o.")
    if not target.parent.is_dir():
        raise UsageError(
            f"cannot write {target}: the folder {target.parent} does not exist. Create it, or choose another with -o."
        )
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".foldexport-", dir=target.parent))
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror or error}. Choose another folder with -o.") from error


@contextmanager
def staged(destinations: Sequence[str | os.PathLike], *, overwrite: bool = False) -> Iterator[list[Path]]:
    """Temporary paths to write to, of the same names as ``destinations``; all moved in place when the block ends well.

    What the block writes beside a path (``net.onnx.data`` beside ``net.onnx``) goes with it. When the block raises, or
    one of the moves fails, no destination has changed and no temporary folder is left.

    Raises :class:`UsageError` on entry as :func:`check_destination` does, and on a name that occurs twice.
    """
    targets = [Path(each) for each in destinations]
    for target in targets:
        if targets.count(target) > 1:
            raise UsageError(f"{target} would be written twice: give each format its own path.")
        check_destination(target, overwrite=overwrite)
    folders: list[Path] = []
    try:
        for target in targets:
            folders.append(Path(tempfile.mkdtemp(prefix=".foldexport-", dir=target.parent)))
        yield [folder / target.name for folder, target in zip(folders, targets, strict=True)]
        moves = [
            (each, target.with_name(each.name))
            for folder, target in zip(folders, targets, strict=True)
            for each in _beside(folder / target.name)
        ]
        _place(moves, overwrite)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UsageError(f"cannot write {targets[0]}: {error.strerror}. Choose another folder with -o.") from error
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _beside(path: Path) -> list[Path]:
    """The file and its companions: what shares its folder and starts with its name, the companions first.

    Companions are placed first, so that a file never stands without the data it refers to.
    """
    return sorted(
        (each for each in path.parent.iterdir() if each.name.startswith(path.name)),
        key=lambda each: (each == path, each.name),
    )


def _place(moves: Sequence[tuple[Path, Path]], overwrite: bool) -> None:
    """Move all or none: what a move replaces is kept aside until the last has succeeded."""
    for _, target in moves:
        if not overwrite and os.path.lexists(target):
            raise UsageError(f"{target} exists already: pass --overwrite to replace it, or -o to write elsewhere.")
    done: list[tuple[Path, Path | None]] = []
    try:
        for source, target in moves:
            done.append((target, _keep(target, source.with_name(f"{source.name}.replaced"))))
            os.replace(source, target)
    except BaseException:
        _undo(done)
        raise


def _keep(target: Path, aside: Path) -> Path | None:
    """A second name for the file that is about to be replaced; None where there is none.

    A hard link leaves no moment without a file at ``target``; file systems without links get a copy.
    """
    if not os.path.lexists(target):
        return None
    try:
        os.link(target, aside, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(target, aside, follow_symlinks=False)
    return aside


def _undo(done: Sequence[tuple[Path, Path | None]]) -> None:
    for target, aside in reversed(done):
        if aside is not None:
            os.replace(aside, target)
        else:
            target.unlink(missing_ok=True)

"""Files put in place whole or not at all.

An artifact is written into a temporary folder beside its destination, proven there, and then moved with ``os.replace``,
which is atomic within one file system. Whatever ends the work before that, the destination is as it was. An artifact that is a
folder (``NAME.mlpackage``) moves as a whole; the one that it replaces is renamed away first, since no file system exchanges them.
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

from foldexport import exporters
from foldexport.errors import UsageError
from foldexport.exporters import named
from foldexport.exporters.pytorch import MARK

if TYPE_CHECKING:
    from foldexport.verify import Comparison

CHUNK_BYTES = 1 << 20
PACKAGE_MARK = "Manifest.json"  # at the top of every package of Core ML
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
#: Of temporary folders beside a destination. A process adds its own mark, for the one that started it to clean up after a kill.
staging_prefix = ".foldexport-"


@dataclass(eq=False)
class Artifact:
    """A file, or a folder that is one to its users, in place, with its proof.

    path: what to give to the runtime.                files: it and what lies beside it (companions, external data).
    sha256, size_bytes: of each file, by name; of a folder, of every file in it, by ``NAME.mlpackage/path``.
    notes: what the exporter recorded for the manifest. on_device: comparisons of the training graph and of the folded module on
    the device that was asked for, empty on the CPU.
    """

    path: Path
    format: str
    comparison: Comparison | None = None
    files: tuple[Path, ...] = ()
    sha256: dict[str, str] = field(default_factory=dict)
    size_bytes: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    on_device: tuple[Comparison, ...] = ()


def write(
    exporter: Any,
    module: Any,
    example: tuple,
    destination: str | os.PathLike,
    options: Any,
    *,
    prove: Callable[[Path], Comparison],
    overwrite: bool = False,
    companions: Sequence[Path] = (),
) -> Artifact:
    """Export ``module``, prove the file, and only then put it in place.

    companions: the further files of its format, as :meth:`foldexport.exporters.Format.beside` gives them.

    prove: called with the temporary path; returns the comparison, or raises :class:`EquivalenceError`, and then nothing
    is left behind.

    Raises :class:`UsageError` before any work when the destination cannot be written or exists already.
    """
    target = Path(destination)
    with staged([target], overwrite=overwrite, companions=[companions]) as (path,):
        notes = exporter.export(exporters.suited(exporter, module), example, path, options)
        comparison = prove(path)
        files = tuple(target.with_name(each.name) for each in written(path, companions))
    return describe(target, exporter.name, files, comparison=comparison, notes=notes)


def describe(path: Path, format_name: str, files: Sequence[Path], **record: Any) -> Artifact:
    """The :class:`Artifact` of files that are in place, with their digests and sizes."""
    inside = [(name, each) for file in files for name, each in contents(file)]
    digests = {name: sha256(each) for name, each in inside}
    sizes = {name: each.stat().st_size for name, each in inside}
    return Artifact(path, format_name, files=tuple(files), sha256=digests, size_bytes=sizes, **record)


def contents(path: Path) -> list[tuple[str, Path]]:
    """(name, file) of every file of an artifact: itself, or all that a folder holds, by names that begin with the folder's."""
    if not path.is_dir():
        return [(path.name, path)]
    found = [each for each in path.rglob("*") if not each.is_dir()]
    return sorted((each.relative_to(path.parent).as_posix(), each) for each in found)


def size_bytes(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    return sum(each.stat().st_size for _, each in contents(path))


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_destination(path: str | os.PathLike, *, overwrite: bool = False, companions: Sequence[Path] = ()) -> None:
    """Raise :class:`UsageError` unless a file can be put at ``path``, and its companions beside it.

    The folder is tried, since permissions alone do not tell (a read-only mount, the superuser). A companion has a common
    name (``net.bin`` may be a checkpoint), so it is replaced only where the file that it belongs to is there too.
    """
    target = Path(path)
    for each in companions:
        if overwrite and os.path.lexists(each) and not os.path.lexists(target):
            raise UsageError(
                f"{each} exists, but not the {target.name} that it would belong to, so it is never replaced: "
                "move it away, or choose another name or folder with -o."
            )
        check_destination(each, overwrite=overwrite)
    if target.is_dir() and _is_package(target):
        if overwrite and any(target.iterdir()) and not (target / PACKAGE_MARK).is_file():
            raise UsageError(f"{target} is a folder without {PACKAGE_MARK}, so no package, and is never replaced: pass another -o.")
    elif target.is_dir():
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
        os.rmdir(tempfile.mkdtemp(prefix=staging_prefix, dir=target.parent))
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror or error}. Choose another folder with -o.") from error


@contextmanager
def staged(
    destinations: Sequence[str | os.PathLike], *, overwrite: bool = False, companions: Sequence[Sequence[Path]] = ()
) -> Iterator[list[Path]]:
    """Temporary paths to write to, of the same names as ``destinations``; all moved in place when the block ends well.

    companions: per destination, the further files of its format; none where left out. They go with it, and so does what
    the block writes under a longer name (``net.onnx.data`` beside ``net.onnx``). When the block raises, or one of the
    moves fails, no destination has changed and no temporary folder is left.

    Raises :class:`UsageError` on entry as :func:`check_destination` does, and on a name that occurs twice.
    """
    targets = [Path(each) for each in destinations]
    belonging = [tuple(each) for each in companions] or [()] * len(targets)
    everything = [*targets, *(each for group in belonging for each in group)]
    for target, group in zip(targets, belonging, strict=True):
        for each in (target, *group):
            if everything.count(each) > 1:
                raise UsageError(f"{each} would be written twice: give each format its own path.")
        check_destination(target, overwrite=overwrite, companions=group)
    folders: list[Path] = []
    try:
        for target in targets:
            folders.append(Path(tempfile.mkdtemp(prefix=staging_prefix, dir=target.parent)))
        yield [folder / target.name for folder, target in zip(folders, targets, strict=True)]
        moves = [
            (each, target.with_name(each.name))
            for folder, target, group in zip(folders, targets, belonging, strict=True)
            for each in written(folder / target.name, group)
        ]
        _place(moves, overwrite)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UsageError(f"cannot write {targets[0]}: {error.strerror}. Choose another folder with -o.") from error
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def written(path: Path, companions: Sequence[Path] = ()) -> list[Path]:
    """The files of an artifact in the folder that it was written to, the first one last.

    They are what starts with its name, and ``companions``, by their names. Placed in this order, a file never stands
    without the data it refers to.
    """
    names = {each.name for each in companions}
    return sorted(
        (each for each in path.parent.iterdir() if each.name.startswith(path.name) or each.name in names),
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
            done.append((target, _keep(target, source.with_name(f"{source.name}.replaced"), source.is_dir())))
            os.replace(source, target)
    except BaseException:
        _undo(done)
        raise


def _keep(target: Path, aside: Path, by_folder: bool) -> Path | None:
    """A second name for the file that is about to be replaced; None where there is none.

    A hard link leaves no moment without a file at ``target``; file systems without links get a copy. A folder, and what one is
    about to take the place of, is renamed.
    """
    if not os.path.lexists(target):
        return None
    if by_folder:
        os.replace(target, aside)
        return aside
    try:
        os.link(target, aside, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(target, aside, follow_symlinks=False)
    return aside


def _undo(done: Sequence[tuple[Path, Path | None]]) -> None:
    for target, aside in reversed(done):
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        if aside is not None:
            os.replace(aside, target)
        else:
            target.unlink(missing_ok=True)


def _is_package(target: Path) -> bool:
    row = named(target)
    return row is not None and row.folder

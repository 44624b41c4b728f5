"""Where a bundle goes: built in a temporary folder beside its place, and moved there in one step."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from foldexport import destination
from foldexport.artifact import UNWRITABLE
from foldexport.bundle import MARK, SUMS, VERIFY
from foldexport.errors import UsageError

BYPRODUCTS = ("__pycache__", ".DS_Store")  # what running and looking at a bundle leaves in it
EARLIEST = (1980, 1, 1, 0, 0, 0)  # the date of every file in a zip, which has room for none


def is_zip(target: Path) -> bool:
    return target.suffix.lower() == ".zip"


def check(target: Path, *, overwrite: bool) -> None:
    """Raise UsageError unless a bundle can be put at ``target``: nothing is there, or with ``overwrite`` a bundle of ours."""
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise UsageError(f"--bundle {target}: exists already: pass --overwrite to replace it, or name another.")
    reason = not_ours(target)
    if reason:
        raise UsageError(f"--bundle {target}: {reason}, so it is never replaced; name another, or move it away.")


def not_ours(target: Path) -> str:
    """Why what is there is no bundle of ours, whole and with nothing added; empty where it is one. An empty folder may go too."""
    if target.is_symlink():
        return "is a link"
    if target.is_dir() != (not is_zip(target)):
        return "is a folder" if target.is_dir() else "is a file"
    if target.is_dir():
        names = [each.relative_to(target).as_posix() for each in sorted(target.rglob("*")) if not each.is_dir()]
        texts = {name: (target / name).read_text("utf-8", "replace") for name in (SUMS, VERIFY) if (target / name).is_file()}
    else:
        try:
            with zipfile.ZipFile(target) as archive:
                names = [PurePosixPath(name).relative_to(PurePosixPath(name).parts[0]).as_posix() for name in archive.namelist()]
                inner = dict(zip(names, archive.namelist()))
                texts = {name: archive.read(inner[name]).decode("utf-8", "replace") for name in (SUMS, VERIFY) if name in inner}
        except (zipfile.BadZipFile, OSError, IndexError):
            return "is no bundle of foldexport"
    if not names and target.is_dir():
        return ""
    if MARK not in texts.get(VERIFY, "") or SUMS not in texts:
        return "is no bundle of foldexport"
    known = {line.partition("  ")[2] for line in texts[SUMS].splitlines()} | {SUMS}
    added = [name for name in names if name not in known and not set(PurePosixPath(name).parts) & set(BYPRODUCTS)]
    return f"holds {added[0]}, which is not of the bundle" if added else ""


@contextmanager
def staged(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which becomes the bundle when the block ends well; else nothing has changed and nothing is left.

    Raises UsageError as :func:`check` does, and where the place cannot be written.
    """
    check(target, overwrite=overwrite)
    with destination.made(target.parent):
        try:
            room = Path(tempfile.mkdtemp(prefix=".foldexport-", dir=target.parent)).resolve()  # for tools that work elsewhere
        except OSError as error:
            raise UsageError(f"--bundle {target}: cannot be written ({error.strerror or error}); choose another place.") from error
        try:
            folder = room / "bundle"
            folder.mkdir()
            yield folder
            ready = pack(folder, room / "bundle.zip") if is_zip(target) else folder
            check(target, overwrite=overwrite)
            _swap(ready, target, room / "replaced")
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            raise UsageError(f"--bundle {target}: cannot be written ({error.strerror}); choose another place.") from error
        finally:
            shutil.rmtree(room, ignore_errors=True)


def _swap(ready: Path, target: Path, aside: Path) -> None:
    """``ready`` to ``target``; what was there comes back where that fails."""
    replaced = os.path.lexists(target)
    if replaced:
        os.rename(target, aside)
    try:
        os.rename(ready, target)
    except BaseException:
        if replaced:
            os.rename(aside, target)
        raise


def pack(folder: Path, path: Path) -> Path:
    """The folder as a zip, under the name of its manifest: sorted, stored, without dates or owners, so the same bytes again."""
    manifest = next(folder.glob(f"*{destination.MANIFEST_SUFFIX}"))
    top = manifest.name.removesuffix(destination.MANIFEST_SUFFIX)
    names = sorted(each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file())
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            entry = zipfile.ZipInfo(f"{top}/{name}", EARLIEST)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            entry.file_size = (folder / name).stat().st_size  # tells large files apart, which have another header
            with (folder / name).open("rb") as source, archive.open(entry, "w") as stored:
                shutil.copyfileobj(source, stored, 1 << 20)
    return path

"""Where the files of one command go: names from the checkpoint, places from ``-o``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from foldexport.artifact import check_destination
from foldexport.errors import UsageError
from foldexport.exporters import FORMATS, Format

MANIFEST_SUFFIX = ".manifest.json"


@dataclass(frozen=True)
class Destination:
    """One file per format, in the order asked for, and the manifest beside them."""

    artifacts: tuple[Path, ...]
    manifest: Path

    @property
    def folder(self) -> Path:
        return self.manifest.parent


def plan(checkpoint: Path, output: Path | str | None, formats: Sequence[Format]) -> Destination:
    """``NAME.onnx``, … and ``NAME.manifest.json``: beside the checkpoint, in the folder or at the file ``output``.

    ``output`` is a folder where it is one, ends with a separator or has no suffix; such a folder may be made. Raises
    UsageError for a file that is to hold several formats, or that is named as another format is.
    """
    name = checkpoint.stem.removesuffix(".pth")  # net.pth.tar, as PyTorch's ImageNet example saves
    if output is None:
        return _in_folder(checkpoint.parent, name, formats)
    if _is_folder(output):
        return _in_folder(Path(output), name, formats)
    path = Path(output)
    if len(formats) > 1:
        asked = ", ".join(row.name for row in formats)
        raise UsageError(
            f"-o {path} names one file, but {len(formats)} formats are asked for ({asked}): name a folder."
        )
    others = [row for row in FORMATS.values() if path.name.endswith(row.suffix) and row is not formats[0]]
    if others and not path.name.endswith(formats[0].suffix):
        raise UsageError(f"-o {path} is named as {others[0].name}, but --to asks for {formats[0].name}.")
    suffix = formats[0].suffix
    base = path.name.removesuffix(suffix) if path.name.endswith(suffix) else path.stem
    return Destination((path,), path.with_name(f"{base}{MANIFEST_SUFFIX}"))


def _is_folder(output: Path | str) -> bool:
    text = str(output)
    return text.endswith((os.sep, "/")) or Path(text).is_dir() or not Path(text).suffix


def _in_folder(folder: Path, name: str, formats: Sequence[Format]) -> Destination:
    return Destination(tuple(folder / f"{name}{row.suffix}" for row in formats), folder / f"{name}{MANIFEST_SUFFIX}")


def check(destination: Destination, checkpoint: Path, *, overwrite: bool) -> None:
    """Raise UsageError unless every file can be put in place, before any work; the checkpoint is never replaced."""
    for path in (*destination.artifacts, destination.manifest):
        if os.path.exists(path) and os.path.exists(checkpoint) and os.path.samefile(path, checkpoint):
            raise UsageError(f"{path} is the checkpoint itself: choose another name or folder with -o.")
        with made(destination.folder):
            check_destination(path, overwrite=overwrite)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder where there is none; folders made here go again unless something was put into them."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot make the folder {folder}: {reason}. Choose another with -o.") from error
    try:
        yield
    finally:
        for each in missing:
            with suppress(OSError):  # not empty: it holds what was asked for
                each.rmdir()

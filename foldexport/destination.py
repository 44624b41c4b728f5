"""Where the files of one command go: names from the checkpoint, places from ``-o``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from foldexport.artifact import check_destination
from foldexport.errors import UsageError
from foldexport.exporters import FORMATS, Format, named

MANIFEST_SUFFIX = ".manifest.json"
#: What users end the file of a format with, beside its own suffixes.
MEANT = {
    "torchscript": (".pt", ".pth", ".ts", ".jit", ".torchscript"),
    "tensorrt": (".plan", ".trt"),
    "openvino": (".ir", ".bin"),
    "ncnn": (".param", ".bin"),
    "coreml": (".mlmodel",),
}
STRICT = ("pytorch", "coreml")  # formats whose files are opened by the suffix of their name alone


@dataclass(frozen=True)
class Destination:
    """The first file of each format, in the order asked for, its companions, and the manifest beside them."""

    artifacts: tuple[Path, ...]
    manifest: Path
    companions: tuple[tuple[Path, ...], ...]

    @property
    def folder(self) -> Path:
        return self.manifest.parent


def plan(checkpoint: Path, output: Path | str | None, formats: Sequence[Format]) -> Destination:
    """``NAME.onnx``, … and ``NAME.manifest.json``: beside the checkpoint, in the folder or at the file ``output``.

    ``output`` is a folder unless it ends as the files of a format do; such a folder may be made. Raises UsageError for a file
    that is to hold several formats, or that is named as another format is.
    """
    name = checkpoint.stem.removesuffix(".pth")  # net.pth.tar, as PyTorch's ImageNet example saves
    if output is None:
        return _in_folder(checkpoint.parent, name, formats)
    if is_folder(output) and not (formats[0].folder and named(output) is formats[0]):
        return _in_folder(Path(output), name, formats)
    path = Path(output)
    if len(formats) > 1:
        asked = ", ".join(row.name for row in formats)
        raise UsageError(
            f"-o {path} names one file, but {len(formats)} formats are asked for ({asked}): name a folder."
        )
    owners = _owners(path)
    if not owners:
        right = f"NAME{formats[0].suffix}"
        raise UsageError(f"-o {path} is a file, and not named as {formats[0].name} is: name a folder, or a file {right}.")
    if formats[0].name not in owners:
        raise UsageError(f"-o {path} is named as {' or '.join(owners)}, but --to asks for {formats[0].name}.")
    require_suffix(path, formats[0])
    suffix = formats[0].suffix
    base = path.name.removesuffix(suffix) if path.name.endswith(suffix) else path.stem
    return Destination((path,), path.with_name(f"{base}{MANIFEST_SUFFIX}"), (formats[0].beside(path),))


def is_folder(output: Path | str) -> bool:
    """Whether ``output`` is a folder, or is named as one that may be made: as no format's files are, ``build.release``."""
    text, path = str(output), Path(output)
    return text.endswith((os.sep, "/")) or path.is_dir() or not (_owners(path) or path.is_file())


def _owners(path: Path) -> list[str]:
    """The formats whose files end as this name does: the one by its own suffix, else those that users mean by it."""
    row = named(path.name.lower())
    if row is not None:
        return [row.name]
    return [name for name in FORMATS if path.name.lower().endswith(MEANT.get(name, ()))]


def require_suffix(path: str | Path, row: Format) -> None:
    """Raise UsageError for a name by which the format's file cannot be opened again."""
    if row.name in STRICT and not Path(path).name.endswith(row.suffix):
        right = Path(path).with_suffix(row.suffix)
        raise UsageError(f"{path}: files of {row.name} end with {row.suffix}, for example {right}.")


def _in_folder(folder: Path, name: str, formats: Sequence[Format]) -> Destination:
    artifacts = tuple(folder / f"{name}{row.suffix}" for row in formats)
    companions = tuple(row.beside(path) for row, path in zip(formats, artifacts, strict=True))
    return Destination(artifacts, folder / f"{name}{MANIFEST_SUFFIX}", companions)


def check(destination: Destination, checkpoint: Path, *, overwrite: bool) -> None:
    """Raise UsageError unless every file can be put in place, before any work; the checkpoint is never replaced."""
    everything = [*zip(destination.artifacts, destination.companions, strict=True), (destination.manifest, ())]
    for path, companions in everything:
        for each in (path, *companions):
            if os.path.exists(each) and os.path.exists(checkpoint) and os.path.samefile(each, checkpoint):
                raise UsageError(f"{each} is the checkpoint itself: choose another name or folder with -o.")
        with made(destination.folder):
            check_destination(path, overwrite=overwrite, companions=companions)


def check_extra(path: Path, option: str, suffix: str, what: str, *, overwrite: bool = False) -> None:
    """Whether a picture or a page can be put at ``path``, before any work; ``what``: "the picture is a PNG".

    Raises UsageError, by the option's name: another suffix, a file that exists, a folder that cannot be written.
    """
    if path.suffix.lower() != suffix:
        raise UsageError(f"{option} {path}: {what}; wanted a name that ends with {suffix}.")
    if path.exists() and not overwrite:
        raise UsageError(f"{option} {path}: exists already; pass --overwrite to replace it, or name another file.")
    try:
        with made(path.parent):
            check_destination(path, overwrite=True)
    except UsageError as error:
        reason = getattr(error.__cause__, "strerror", None) or "it is a folder"
        raise UsageError(f"{option} {path}: no file can be put there ({reason}); name another.") from error


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

"""A folder of artifacts and their manifest made a bundle: golden arrays, card, verify.py and checksums are added."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from foldexport import destination, manifest
from foldexport.artifact import sha256
from foldexport.bundle import CARD, GOLDEN, OWN, SUMS, VERIFY, card, standalone
from foldexport.bundle.golden import Golden
from foldexport.errors import UsageError


def refuse_names(paths: Iterable[Path]) -> None:
    """Raise UsageError where an artifact is called as one of the bundle's own files is."""
    for path in paths:
        if path.name in OWN:
            raise UsageError(f"--bundle: has a {path.name} of its own, beside which this checkpoint's has no place: rename it.")


def fill(folder: Path, document: Mapping[str, Any], golden: Golden, checkpoint: Path) -> None:
    """Add to the artifacts and the manifest in ``folder`` what makes them a bundle.

    Seconds, which differ from run to run, are left out of its manifest: the same command gives the same bytes.
    """
    (path,) = folder.glob(f"*{destination.MANIFEST_SUFFIX}")
    path.write_text(manifest.dumps({**document, "seconds": {}}), encoding="utf-8")
    golden.write(folder / GOLDEN)
    shutil.copyfile(standalone.__file__, folder / VERIFY)
    name = path.name.removesuffix(destination.MANIFEST_SUFFIX)
    beside = checkpoint.with_name(f"{name}.md")
    own, pictures = card.taken_in(beside) if beside.is_file() else ("", {})
    for picture, source in pictures.items():
        if not (folder / picture).exists():
            shutil.copyfile(source, folder / picture)
    (folder / CARD).write_text(card.page(name, document, own), encoding="utf-8", newline="\n")
    (folder / SUMS).write_text(_sums(folder), encoding="utf-8", newline="\n")


def _sums(folder: Path) -> str:
    """Lines as ``sha256sum`` writes them, sorted by name."""
    names = sorted(each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file())
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in names if name != SUMS)

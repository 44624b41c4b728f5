"""``foldexport verify``: an exported set proved again, on the machine where it will work.

Every artifact beside the manifest must be the file that was exported, by its SHA-256, and must still compute the
training graph's outputs on the golden inputs, in the runtime that is installed here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from foldexport import exporters, manifest
from foldexport.artifact import sha256
from foldexport.errors import CheckpointError, EquivalenceError, MissingDependencyError, UsageError
from foldexport.exporters import Format
from foldexport.study import Clock, Progress
from foldexport.verify import Comparison, Tolerance
from foldexport.verify.golden import check_golden


@dataclass(eq=False)
class Checked:
    """One artifact of a manifest.

    changed: files whose SHA-256 differs from the manifest's; such an artifact is not run.
    comparison: None where it was not run.    reason: why it failed, empty where it holds.
    unrun: why it cannot be run on this machine, though it is the file that was exported; else empty.
    """

    format: str
    file: str
    changed: list[str] = field(default_factory=list)
    comparison: Comparison | None = None
    reason: str = ""
    unrun: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason and not self.unrun

    def to_dict(self) -> dict[str, Any]:
        record = {
            "format": self.format,
            "file": self.file,
            "ok": self.ok,
            "reason": self.reason or self.unrun,
            "changed": self.changed,
        }
        return record | {"comparison": self.comparison.to_dict() if self.comparison else None}


def recheck(path: Path, only: Iterable[Format] = (), progress: Progress | None = None) -> list[Checked]:
    """Check every artifact of the manifest at ``path``, or those of some formats.

    Raises UsageError (no manifest; a file that is not beside it) and MissingDependencyError (a runtime that is not
    installed). A mismatch is a finding, see :func:`require`.
    """
    clock, document = Clock(progress), manifest.read(path)
    entries = _chosen(path, document, [row.name for row in only])
    for entry in entries:
        exporters.require_installed(exporters.get(entry["format"]))
        for each in entry["files"]:
            if not (path.parent / each["name"]).is_file():
                name = each["name"]
                raise UsageError(f"{name} is not beside {path}: copy it there, or pass --format with the others.")
    return [_check(path.parent, entry, document, clock) for entry in entries]


def require(checked: list[Checked]) -> None:
    """Raise EquivalenceError, naming every file that is not what was exported or does not compute what was proved.

    Raises MissingDependencyError where all that could be run holds, and one could not be run on this machine.
    """
    failed = [each.file for each in checked if each.reason]
    if failed:
        raise EquivalenceError(f"{len(failed)} of {len(checked)} artifacts failed: {', '.join(failed)}.")
    unrun = [each for each in checked if each.unrun]
    if unrun:
        count = f"{len(unrun)} of {len(checked)} artifacts"
        raise MissingDependencyError(f"{count} could not be run here: {unrun[0].file}: {unrun[0].unrun}; verify on its machine.")


def _chosen(path: Path, document: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    entries = document["artifacts"]
    try:
        found = [entry for entry in entries if not names or entry["format"] in names]
        for entry in found:
            _require_whole(path, entry)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its list of artifacts was not written by foldexport, or was cut.") from error
    if not found:
        there = ", ".join(str(entry["format"]) for entry in entries) or "no artifacts"
        raise UsageError(f"{path}: has {there}, not {', '.join(names)}." if names else f"{path}: has {there}.")
    return found


def _require_whole(path: Path, entry: dict[str, Any]) -> None:
    """Raise CheckpointError unless the entry names files beside the manifest, and nothing else."""
    digests = {each["name"]: each["sha256"] for each in entry["files"]}
    outside = [name for name in digests if Path(name).name != name]
    if outside or entry["file"] not in digests:
        name = (outside or [entry["file"]])[0]
        raise CheckpointError(f"{path}: names {name}, which is not one of the files beside it.")


def _unit(document: dict[str, Any]) -> dict[str, Any]:
    """Whose noise the golden outputs are judged by, and what artifacts are fed."""
    precision = document.get("precision") or {}
    name = precision.get("precision", "fp32")
    dtype = torch.float16 if precision.get("half_io") else torch.float32
    return {"unit": "float32" if name == "fp32" else name, "dtype": dtype}


def _check(folder: Path, entry: dict[str, Any], document: dict[str, Any], clock: Clock) -> Checked:
    row = exporters.get(entry["format"])
    found = Checked(row.name, entry["file"])
    clock.tell(f"check {entry['file']}")
    found.changed = [each["name"] for each in entry["files"] if sha256(folder / each["name"]) != each["sha256"]]
    if found.changed:
        names = ", ".join(found.changed)
        found.reason = f"SHA-256 of {names} differs from the manifest's; copy it again, or export again"
        return found
    if document["golden"] is None:
        return found
    exporter = exporters.exporter(row)
    found.unrun = exporter.cannot_run(folder / entry["file"]) if hasattr(exporter, "cannot_run") else ""
    if found.unrun:
        return found
    given = document.get("tolerance")
    tolerance = Tolerance(**given) if given else None
    clock.tell(f"run {entry['file']} in {exporter.runtime()}")
    comparison = check_golden(
        document["golden"],
        exporter.load(folder / entry["file"]),
        format=row.name,
        label=exporter.runtime(),
        tolerance=tolerance,
        **_unit(document),
    )
    found.comparison = comparison
    found.reason = "" if comparison.ok else comparison.message
    return found

"""``foldexport verify``: an exported set proved again, on the machine where it will work.

Every artifact beside the manifest must be the file that was exported, by its SHA-256, and must still compute the
training graph's outputs on the golden inputs, in the runtime that is installed here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from foldexport import device as devices
from foldexport import exporters, manifest
from foldexport.artifact import contents, sha256
from foldexport.bundle import GOLDEN, opened
from foldexport.bundle import golden as golden_file
from foldexport.errors import EquivalenceError, MissingDependencyError, UsageError
from foldexport.exporters import Format, placing
from foldexport.study import Clock, Progress
from foldexport.verify import Comparison, record
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


def recheck(
    path: Path, only: Iterable[Format] = (), progress: Progress | None = None, *, device: str = "cpu"
) -> list[Checked]:
    """Check every artifact of the manifest at ``path``, or those of some formats.

    device: where files are run if their runtimes can; where one cannot, its proof line says so.

    Raises UsageError (no manifest, or one that says what none of foldexport's does) and MissingDependencyError (a device that is
    not there). A mismatch is a finding, and so are a file that is not there and a runtime that is not installed, see
    :func:`require`.
    """
    devices.require(device)
    broken = opened.changed(path) if opened.is_bundle(path) else None
    clock, document = Clock(progress), manifest.read(path)
    entries = _chosen(path, document, [row.name for row in only])
    record.tolerance_of(path, document)
    for entry in entries:
        record.units_of(path, entry, len(document.get("outputs") or ()))
    record.require_golden(path, document, opened.is_bundle(path) and (path.parent / GOLDEN).is_file())
    if broken is not None:
        return _of_bundle(path.parent, broken, entries, document, clock, device)
    return [_check(path.parent, entry, document, clock, device) for entry in entries]


def _of_bundle(
    folder: Path, broken: dict[str, str], entries: list[dict[str, Any]], document: dict[str, Any], clock: Clock, device: str
) -> list[Checked]:
    """Every file of the bundle that was changed, then its artifacts: one whose runtime is not installed here is not run."""
    of_artifacts = {each["name"] for entry in document["artifacts"] for each in entry["files"]}
    found = [Checked("bundle", name, [name], reason=f"{name} {why}") for name, why in broken.items() if name not in of_artifacts]
    for entry in entries:
        row, touched = exporters.get(entry["format"]), [each["name"] for each in entry["files"] if each["name"] in broken]
        if touched:
            found.append(Checked(row.name, entry["file"], touched, reason=f"{touched[0]} {broken[touched[0]]}"))
        else:
            found.append(_check(folder, entry, document, clock, device))
    return found


def require(checked: list[Checked], *, every: bool = True) -> None:
    """Raise EquivalenceError, naming every file that is not what was exported or does not compute what was proved.

    Raises MissingDependencyError where all that could be run holds, and one could not be run on this machine; of a bundle
    (``every`` False), which is made for several, only where none could.
    """
    failed = [each.file for each in checked if each.reason]
    if failed:
        raise EquivalenceError(f"{len(failed)} of {len(checked)} artifacts failed: {', '.join(failed)}.")
    unrun = [each for each in checked if each.unrun]
    if unrun and (every or len(unrun) == len(checked)):
        count = f"{len(unrun)} of {len(checked)} artifacts"
        raise MissingDependencyError(f"{count} could not be run here: {unrun[0].file}: {unrun[0].unrun}; verify on its machine.")


def _chosen(path: Path, document: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    entries = document["artifacts"]
    try:
        found = [entry for entry in entries if not names or entry["format"] in names]
        for entry in found:
            _require_whole(path, entry)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: its list of artifacts was not written by foldexport, or was cut.") from error
    if not found:
        there = ", ".join(str(entry["format"]) for entry in entries) or "no artifacts"
        raise UsageError(f"{path}: has {there}, not {', '.join(names)}." if names else f"{path}: has {there}.")
    return found


def _require_whole(path: Path, entry: dict[str, Any]) -> None:
    """Raise UsageError unless the entry names files beside the manifest, and nothing else."""
    digests = {each["name"]: each["sha256"] for each in entry["files"]}
    outside = [name for name in digests if not _is_of(entry["file"], name)]
    if outside or not any(name == entry["file"] or name.startswith(f"{entry['file']}/") for name in digests):
        name = (outside or [entry["file"]])[0]
        raise UsageError(f"{path}: names {name}, which is not one of the files beside it.")


def _is_of(file: str, name: str) -> bool:
    """Whether the name is one beside the manifest, or one inside of the artifact's own folder."""
    first, *more = PurePosixPath(name).parts or ("",)
    inside = first == file and ".." not in more and PurePosixPath(name).as_posix() == name
    plain = Path(file).name == file and file not in (".", "..")
    return plain and (Path(name).name == name or (bool(more) and inside and "\\" not in name))


def _unknown(folder: Path, entry: dict[str, Any]) -> list[str]:
    """Files in the artifact's folder, where it is one, that the manifest does not name."""
    known = {each["name"] for each in entry["files"]}
    artifact = folder / entry["file"]
    there = contents(artifact) if artifact.is_dir() else []
    return [name for name, each in there if name not in known and each.name != ".DS_Store"]  # which Finder leaves


def _unit(document: dict[str, Any]) -> dict[str, Any]:
    """Whose noise the golden outputs are judged by, and what artifacts are fed."""
    precision = document.get("precision") or {}
    name = precision.get("precision", "fp32")
    dtype = torch.float16 if precision.get("half_io") else torch.float32
    return {"unit": "float32" if name == "fp32" else name, "dtype": dtype}


def _noise_there(document: dict[str, Any], device: str) -> list[float] | None:
    """The float32 noise that the export found on this kind of device, where it was run there."""
    there = document.get("device") or {}
    same = devices.kind(there.get("name", "")) == devices.kind(device) and _unit(document)["unit"] == "float32"
    return there["float32_noise"] if same else None


def _check(folder: Path, entry: dict[str, Any], document: dict[str, Any], clock: Clock, device: str) -> Checked:
    row = exporters.get(entry["format"])
    found = Checked(row.name, entry["file"])
    clock.tell(f"check {entry['file']}")
    found.changed = [each["name"] for each in entry["files"] if not (folder / each["name"]).is_file()]
    if found.changed:
        found.reason = f"{', '.join(found.changed)} is not beside the manifest; copy it there, or export again"
        return found
    found.changed = [each["name"] for each in entry["files"] if sha256(folder / each["name"]) != each["sha256"]]
    if found.changed:
        names = ", ".join(found.changed)
        found.reason = f"SHA-256 of {names} differs from the manifest's; copy it again, or export again"
        return found
    found.changed = _unknown(folder, entry)
    if found.changed:
        found.reason = f"{', '.join(found.changed)} is in it, but not in the manifest; copy it again, or export again"
        return found
    arrays = folder / GOLDEN if opened.is_bundle(folder / GOLDEN) and (folder / GOLDEN).is_file() else None
    if document["golden"] is None and arrays is None:
        return found
    if row.missing():
        found.unrun = f"{', '.join(row.missing())} is not installed ({row.install})"
        return found
    exporter = exporters.exporter(row)
    found.unrun = exporter.cannot_run(folder / entry["file"]) if hasattr(exporter, "cannot_run") else ""
    if found.unrun:
        return found
    tolerance = record.tolerance_of(folder, document)
    clock.tell(f"run {entry['file']} in {exporter.runtime()}")
    placed = placing.place(exporter, folder / entry["file"], device)
    units = record.units_of(folder, entry, len(document.get("outputs") or ()))
    how = {"format": row.name, "label": placed.label, "tolerance": tolerance, "noise_there": units, **_unit(document)}
    noise = None if placed.device == "cpu" else _noise_there(document, placed.device)
    golden = document["golden"] | {"n32": noise} if document["golden"] is not None and noise else document["golden"]
    comparison = check_golden(golden, placed.run, **how) if golden is not None else golden_file.check(arrays, placed.run, **how)
    comparison.device = placed.device
    found.comparison = comparison
    found.reason = "" if comparison.ok else comparison.message
    if found.reason and placed.device != "cpu" and noise is None and _unit(document)["unit"] == "float32":
        found.reason += f"; in the cpu's noise, since {placed.device}'s is not in the manifest: --device cuda measures it at export"
    return found

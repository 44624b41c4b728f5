"""The stages composed once: a checkpoint is read, folded, proved, exported, run by each runtime, and put in place.

Nothing is put in place before the last proof held, and then everything is, the manifest last.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from foldexport import destination, device, exporters, manifest, propagation
from foldexport.artifact import Artifact, check_destination, describe, staged
from foldexport.errors import PrecisionError, UsageError
from foldexport.exporters import Format
from foldexport.exporters.options import ExportOptions
from foldexport.study import Clock, Progress, Question, Study, study
from foldexport.verify import Tolerance, require
from foldexport.verify.reference import Reference, reference

__all__ = ["Order", "Outcome", "Question", "Study", "check_plot", "convert", "inspect", "plot"]

PRECISIONS = ("fp32",)  # written today
KNOWN_PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Order:
    """What the user asks to be made; the fields are the options of the main command.

    dynamic: None for a free batch where the network allows one.     command: argv, for the manifest.
    """

    formats: tuple[Format, ...]
    output: Path | str | None = None
    input_names: tuple[str, ...] | None = None
    output_names: tuple[str, ...] | None = None
    dynamic: tuple[str, ...] | None = None
    precision: str = "fp32"
    opset: int | None = None
    device: str = "cpu"
    tolerance: Tolerance | None = None
    overwrite: bool = False
    command: tuple[str, ...] = ()


@dataclass(eq=False)
class Outcome:
    """What one command made: the study, the artifacts in the order asked for, and the manifest."""

    study: Study
    artifacts: list[Artifact]
    manifest_path: Path
    manifest: dict[str, Any] = field(repr=False)


def inspect(question: Question, progress: Progress | None = None) -> Study:
    """Everything up to the certificate; writes no file."""
    return study(question, Clock(progress))


def check_plot(path: Path, *, overwrite: bool = False) -> None:
    """Whether a picture can be drawn and put at ``path``, before any work.

    Raises UsageError (not a .png, a file that exists, a folder that cannot be written) and MissingDependencyError.
    """
    from foldexport.report import plot as drawing

    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot {path}: the picture is a PNG; wanted a name that ends with .png.")
    if path.exists() and not overwrite:
        raise UsageError(f"--plot {path}: exists already; pass --overwrite to replace it, or name another file.")
    drawing.require()
    try:
        with destination.made(path.parent):
            check_destination(path, overwrite=True)
    except UsageError as error:
        reason = getattr(error.__cause__, "strerror", None) or "it is a folder"
        raise UsageError(f"--plot {path}: no file can be put there ({reason}); name another.") from error


def plot(
    found: Study, path: Path, *, seed: int = 0, overwrite: bool = False, progress: Progress | None = None
) -> propagation.Propagation:
    """Measure how the signal propagates through both networks and draw it at ``path``."""
    from foldexport.report import plot as drawing

    clock = Clock(progress)
    with clock.stage("measuring the signal"):
        program = propagation.program_of(found.graph, found.after.operators) if found.after is not None else None
        measured = propagation.measure(found.graph, program, data=found.data, seed=seed)
    with destination.made(path.parent), staged([path], overwrite=overwrite) as (place,):
        drawing.propagation(measured, found.network.description, place)
    found.seconds |= clock.seconds
    return measured


def convert(question: Question, order: Order, progress: Progress | None = None) -> Outcome:
    """The main command.

    Raises a FoldexportError, with nothing left behind, when any stage refuses or any proof fails.
    """
    clock = Clock(progress)
    places = destination.plan(question.checkpoint, order.output, order.formats)
    _refuse_early(question, order, places)
    found = study(dataclasses.replace(question, free_axes=order.dynamic or ()), clock)
    options = _options(order, found)
    with clock.stage("reference"):
        expected = reference(
            found.graph, found.example, options, levels=found.levels, multiply_adds=found.before.multiply_adds,
            data=found.data, seed=question.seed, device=order.device,
            known=found.certificate.references if found.certificate else (),
        )  # fmt: skip
    targets = [*places.artifacts, places.manifest]
    with destination.made(places.folder), staged(targets, overwrite=order.overwrite) as paths:
        artifacts = [
            _export(row, path, found, options, expected, order.tolerance, clock)
            for row, path in zip(order.formats, paths[:-1], strict=True)
        ]
        record = manifest.build(
            question, found, artifacts, expected, options, tolerance=order.tolerance, command=order.command
        )
        paths[-1].write_text(manifest.dumps(record), encoding="utf-8")
    return Outcome(found, [_in(places.folder, each) for each in artifacts], places.manifest, record)


def _refuse_early(question: Question, order: Order, places: destination.Destination) -> None:
    """What can be refused before any work is."""
    if order.precision not in KNOWN_PRECISIONS:
        raise UsageError(f"--precision {order.precision}: wanted {', '.join(PRECISIONS)}.")
    if order.precision not in PRECISIONS:
        there = ", ".join(PRECISIONS)
        raise PrecisionError(f"--precision {order.precision}: no format is written in it; there is {there}.")
    if order.opset is not None and all(row.name != "onnx" for row in order.formats):
        raise UsageError(f"--opset {order.opset}: is for onnx, which --to does not name.")
    ExportOptions(order.input_names, order.output_names, order.opset, order.dynamic or ())
    for row in order.formats:
        exporters.require_installed(row)
    device.require(order.device)
    destination.check(places, question.checkpoint, overwrite=order.overwrite)


def _options(order: Order, found: Study) -> ExportOptions:
    """Raises UsageError for a free batch that the network does not have."""
    free = bool(found.graph.dynamic.get("batch"))
    dynamic = order.dynamic if order.dynamic is not None else (("batch",) if free else ())
    if "batch" in dynamic and not free:
        batch = found.graph.example[0].shape[0]
        raise UsageError(f"--dynamic batch: the network works at a batch of {batch} only; pass --dynamic none.")
    if order.dynamic is None and not free:
        batch = found.graph.example[0].shape[0]
        found.network.notes.append(f"the network fixes its batch at {batch}, so the files do too")
    return ExportOptions(order.input_names, order.output_names, order.opset, dynamic, order.precision)


def _export(
    row: Format,
    path: Path,
    found: Study,
    options: ExportOptions,
    expected: Reference,
    tolerance: Tolerance | None,
    clock: Clock,
) -> Artifact:
    """Write one format and run it in its own runtime. Raises EquivalenceError where it computes something else."""
    exporter = exporters.exporter(row)
    with clock.stage(f"export {row.name}"):
        notes = exporter.export(found.module, found.example, path, options)
    with clock.stage(f"verify {row.name}"):
        # An unfolded network's weights may lie in the file in any form: writers fold some of it themselves.
        weights: nn.Module | None = found.module if found.ledger is not None else None
        comparison = require(expected.compare(exporter, path, weights, tolerance))
        files = [each for each in path.parent.iterdir() if each.name.startswith(path.name)]
    return describe(path, row.name, sorted(files), comparison=comparison, notes=notes)


def _in(folder: Path, artifact: Artifact) -> Artifact:
    """The artifact as it is once its files have been moved to ``folder``."""
    files = tuple(folder / each.name for each in artifact.files)
    return dataclasses.replace(artifact, path=folder / artifact.path.name, files=files)

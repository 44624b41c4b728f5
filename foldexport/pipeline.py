"""The stages composed once: a checkpoint is read, folded, proved, exported, run by each runtime, and put in place.

Nothing is put in place before the last proof held, and then everything is, the manifest last.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from foldexport import destination, device, exporters, manifest, propagation
from foldexport.artifact import Artifact, describe, staged, written
from foldexport.bundle import contents, golden, place
from foldexport.errors import UsageError
from foldexport.exporters import Format
from foldexport.exporters.options import ExportOptions
from foldexport.precision import quantised
from foldexport.precision.prepare import Prepared, prepare
from foldexport.precision.quantised import Quantised
from foldexport.precision.types import HALF, PRECISIONS
from foldexport.study import Clock, Progress, Question, Study, study
from foldexport.trace.outputs import output_names
from foldexport.verify import Comparison, Tolerance, on_device, require
from foldexport.verify.reference import Reference, reference

if TYPE_CHECKING:
    from foldexport.bundle.golden import Golden
    from foldexport.exporters.tensorrt.options import TensorRTOptions
    from foldexport.exporters.tensorrt.profile import Profile

__all__ = ["Order", "Outcome", "Question", "Study", "check_plot", "check_report", "convert", "inspect", "plot", "report"]


@dataclass(frozen=True)
class Order:
    """What the user asks to be made; the fields are the options of the main command.

    dynamic: None for a free batch where the network allows one.     command: argv, for the manifest.
    tensorrt, profile: how an engine is built and the shapes it takes; the axes that vary there are free in every file.
    bundle: a folder or FILE.zip that takes everything, in place of ``output``.      report: a page about it, FILE.html.
    keep_fp32: modules that stay in float32 at fp16 and bf16.      device: where everything is run to be compared.
    """

    formats: tuple[Format, ...]
    output: Path | str | None = None
    input_names: tuple[str, ...] | None = None
    output_names: tuple[str, ...] | None = None
    dynamic: tuple[str, ...] | None = None
    precision: str = "fp32"
    half_io: bool = False
    max_drop: float | None = None
    keep_fp32: tuple[str, ...] = ()
    opset: int | None = None
    device: str = "cpu"
    tolerance: Tolerance | None = None
    overwrite: bool = False
    command: tuple[str, ...] = ()
    tensorrt: TensorRTOptions | None = None
    profile: Profile | None = None
    bundle: Path | None = None
    report: Path | None = None


@dataclass(eq=False)
class Outcome:
    """What one command made: the study, the artifacts in the order asked for, and the manifest.

    on_device: the training graph's and the folded module's comparisons on the device that was asked for; none on the CPU.
    golden: the inputs and outputs that artifacts are verified on. bundle: the folder or zip that holds everything, if asked for.
    """

    study: Study
    artifacts: list[Artifact]
    manifest_path: Path
    manifest: dict[str, Any] = field(repr=False)
    reduced: Prepared | Quantised | None = None
    on_device: list[Comparison] = field(default_factory=list)
    golden: Golden | None = field(default=None, repr=False)
    bundle: Path | None = None
    report: Path | None = None

    @property
    def files(self) -> list[Path]:
        """Everything that is in place now, the manifest last; of a bundle all of its files, or the zip."""
        if self.bundle is None:
            return [*(path for artifact in self.artifacts for path in artifact.files), self.manifest_path]
        return sorted(each for each in self.bundle.rglob("*") if each.is_file()) if self.bundle.is_dir() else [self.bundle]


def inspect(question: Question, progress: Progress | None = None) -> Study:
    """Everything up to the certificate; writes no file."""
    return study(question, Clock(progress))


def check_plot(path: Path, *, overwrite: bool = False) -> None:
    """Whether a picture can be drawn and put at ``path``, before any work.

    Raises UsageError (not a .png, a file that exists, a folder that cannot be written) and MissingDependencyError.
    """
    from foldexport.report import plot as drawing

    destination.check_extra(path, "--plot", ".png", "the picture is a PNG", overwrite=overwrite)
    drawing.require()


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


def check_report(path: Path, *inputs: Path, overwrite: bool = False) -> None:
    """Whether a page can be put at ``path``, before any work; ``inputs`` are never replaced. Raises UsageError."""
    from foldexport.report.html import document

    document.check(path, *inputs, overwrite=overwrite)


def report(
    found: Study, question: Question, path: Path, *, command: tuple[str, ...] = (), overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """The page of an inspection, at ``path``."""
    record = manifest.describe(question, found)
    with destination.made(path.parent), staged([path], overwrite=overwrite) as (place,):
        _write_report(place, found, record, question, command, Clock(progress))


def _write_report(
    path: Path, found: Study, record: dict[str, Any], question: Question, command: tuple[str, ...], clock: Clock,
    manifest_name: str = "",
) -> None:
    from foldexport.report.html import document, page

    with clock.stage("report"):
        facts = document.of_study(found, record, seed=question.seed, command=command, manifest_name=manifest_name)
        path.write_text(page.page(facts), encoding="utf-8")


def convert(question: Question, order: Order, progress: Progress | None = None) -> Outcome:
    """The main command.

    Raises a FoldexportError, with nothing left behind, when any stage refuses or any proof fails.
    """
    if order.report is not None:
        check_report(order.report, question.checkpoint, overwrite=order.overwrite)
    if order.bundle is not None:
        return _bundled(question, order, order.bundle, progress)
    clock = Clock(progress)
    order = _with_free_axes(order)
    places = destination.plan(question.checkpoint, order.output, order.formats)
    _refuse_early(question, order, places)
    found = study(dataclasses.replace(question, free_axes=order.dynamic or ()), clock)
    options = _options(order, found)
    reduced = _reduced(order, question, found, clock)
    with clock.stage("reference"):
        expected = reference(
            found.graph, found.example, options, levels=reduced.levels if reduced else found.levels,
            multiply_adds=found.before.multiply_adds, data=found.data, seed=question.seed, device=order.device,
            points=order.profile.points() if order.profile else (),
            known=found.certificate.references if found.certificate else (), **(reduced.unit if reduced else {}),
        )  # fmt: skip
    on_there = _on_device(order, found, reduced, expected, clock, question.seed)
    page = [order.report] if order.report is not None else []
    targets = [*places.artifacts, *page, places.manifest]
    companions = [*places.companions, *((),) * len(page), ()]
    with ExitStack() as stack:
        for folder in dict.fromkeys([places.folder, *(each.parent for each in page)]):
            stack.enter_context(destination.made(folder))
        paths = stack.enter_context(staged(targets, overwrite=order.overwrite, companions=companions))
        artifacts = [
            _export(row, path, found, _own_options(row, order, options), expected, order.tolerance, clock, reduced)
            for row, path in zip(order.formats, paths)
        ]
        record = manifest.build(
            question, found, artifacts, expected, options, tolerance=order.tolerance, command=order.command, reduced=reduced,
            on_device=on_there,
        )
        if page:
            _write_report(paths[-2], found, record, question, order.command, clock, places.manifest.name)
        paths[-1].write_text(manifest.dumps(record), encoding="utf-8")
    placed = [_in(places.folder, each) for each in artifacts]
    return Outcome(found, placed, places.manifest, record, reduced, on_there, golden.of(expected), report=order.report)


def _bundled(question: Question, order: Order, target: Path, progress: Progress | None) -> Outcome:
    """The main command into a bundle: everything is made in its temporary folder, which is then moved in place."""
    if order.output is not None:
        raise UsageError(f"-o {order.output}: --bundle holds all the files; leave one of the two out.")
    contents.refuse_names(destination.plan(question.checkpoint, "bundle/", order.formats).artifacts)
    with place.staged(target, overwrite=order.overwrite) as folder:
        inner = dataclasses.replace(order, output=f"{folder}/", bundle=None, overwrite=False, report=None)
        done = convert(question, inner, progress)
        assert done.golden is not None
        contents.fill(folder, done.manifest, done.golden, question.checkpoint)
        if order.report is not None:
            with destination.made(order.report.parent), staged([order.report], overwrite=order.overwrite) as (path,):
                name = target.name  # what `foldexport verify` takes
                _write_report(path, done.study, done.manifest, question, order.command, Clock(progress), name)
    done.artifacts = [_in(target, each) for each in done.artifacts]
    done.report = order.report
    done.bundle, done.manifest_path = target, target if place.is_zip(target) else target / done.manifest_path.name
    return done


def _on_device(
    order: Order, found: Study, reduced: Prepared | Quantised | None, expected: Reference, clock: Clock, seed: int
) -> list[Comparison]:
    """The training graph and the folded module on the device that was asked for. Raises EquivalenceError."""
    if order.device == "cpu":
        return []
    with clock.stage(f"run on {order.device}"):
        module = reduced.module if isinstance(reduced, Prepared) else found.module
        return on_device.prove(
            found.graph, module, expected, levels=found.levels, folded=found.ledger is not None, tolerance=order.tolerance,
            seed=seed,
        )  # fmt: skip


def _reduced(order: Order, question: Question, found: Study, clock: Clock) -> Prepared | Quantised | None:
    """The network in the asked type; None for fp32. Raises what `precision.prepare` raises, and UsageError for int8 samples."""
    if order.precision == "fp32":
        return None
    if order.precision == "int8":
        with clock.stage("read samples"):
            preprocessing = found.network.preprocessing
            return quantised.prepared(
                found.graph, found.refold, question.data, preprocessing, levels=found.levels, max_drop=order.max_drop
            )
    with clock.stage(order.precision):
        return prepare(
            found.graph, found.refold() if found.refold else None, HALF[order.precision], module=found.module,
            inputs=[inputs for inputs, _ in found.certificate.references] if found.certificate else (),
            data=found.data or (), seed=question.seed, half_io=order.half_io, keep=order.keep_fp32,
            known_range=bool(found.network.preprocessing.get("mean") and found.network.preprocessing.get("std")),
        )  # fmt: skip


def _refuse_early(question: Question, order: Order, places: destination.Destination) -> None:
    """What can be refused before any work is."""
    if order.precision not in PRECISIONS:
        raise UsageError(f"--precision {order.precision}: wanted {', '.join(PRECISIONS)}.")
    if order.precision == "int8" and [row.name for row in order.formats] != ["onnx"]:
        raise UsageError("--precision int8: is written as ONNX only; pass --to onnx.")
    if order.precision == "int8" and question.data is None:
        quantised.prepared(None, None, None, {})
    if order.max_drop is not None and order.precision != "int8":
        raise UsageError(f"--max-drop: is about int8, not {order.precision}; pass --precision int8.")
    if order.keep_fp32 and order.precision not in HALF:
        raise UsageError(f"--keep-fp32: is about {' and '.join(HALF)}, not {order.precision}; pass --precision fp16.")
    if order.keep_fp32 and not question.fold:
        raise UsageError("--keep-fp32: names layers of the folded network; leave out --no-fold.")
    if order.half_io and order.precision != "fp16":
        raise UsageError(f"--half-io: inputs and outputs can be in fp16 only, not {order.precision}; pass --precision fp16.")
    if order.opset is not None and not any(row.from_onnx for row in order.formats):
        takers = ", ".join(row.name for row in exporters.FORMATS.values() if row.from_onnx)
        raise UsageError(f"--opset {order.opset}: is for {takers}, none of which --to names.")
    ExportOptions(order.input_names, order.output_names, order.opset, order.dynamic or ())
    for row in order.formats:
        if order.precision != "int8":
            ExportOptions(precision=order.precision).require_precision(row.name, row.precisions)
        exporters.require_writable(row)
    if any(row.name == "tensorrt" for row in order.formats):
        _refuse_engine(order)
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
    if order.dynamic is None and all(row.fixed_by_default for row in order.formats):
        dynamic = ()
    if order.dynamic is None and any(row.fixed_by_default for row in order.formats):
        sizes = ", ".join("x".join(map(str, value.shape)) for value in found.example)
        found.network.notes.append(f"the engine takes {sizes} only; pass --min-shape, --opt-shape and --max-shape for other sizes")
    options = ExportOptions(order.input_names, order.output_names, order.opset, dynamic, order.precision, order.half_io)
    if order.profile is not None:
        shapes = [tuple(value.shape) for value in found.example]
        order.profile.check(options.names("input", len(shapes)), shapes, dynamic)
    return dataclasses.replace(options, tensorrt=order.tensorrt, profile=order.profile, own_outputs=output_names(found.graph))


def _own_options(row: Format, order: Order, options: ExportOptions) -> ExportOptions:
    """A format whose files have fixed sizes by default is asked for free ones only where the user did."""
    return dataclasses.replace(options, dynamic=()) if row.fixed_by_default and order.dynamic is None else options


def _with_free_axes(order: Order) -> Order:
    """The order with the axes free that its profile leaves free. Raises UsageError where --dynamic names fewer."""
    if order.profile is None:
        return order
    free = order.profile.free_axes()
    fixed = [axis for axis in free if order.dynamic is not None and axis not in order.dynamic]
    if fixed:
        raise UsageError(f"--max-shape: the {fixed[0]} varies there, but --dynamic does not name it: leave --dynamic out.")
    return order if order.dynamic is not None else dataclasses.replace(order, dynamic=free)


def _refuse_engine(order: Order) -> None:
    """What can be refused of an engine before any work. Raises UsageError, and MissingDependencyError for library and GPU."""
    from foldexport.exporters.tensorrt import flavour
    from foldexport.exporters.tensorrt.options import TensorRTOptions

    if order.dynamic and order.profile is None:
        raise UsageError(
            f"tensorrt: --dynamic {','.join(order.dynamic)} leaves sizes free, and an engine needs to know their range: pass "
            "--min-shape, --opt-shape and --max-shape, or --dynamic none."
        )
    flavour.require(order.tensorrt or TensorRTOptions())


def _export(
    row: Format,
    path: Path,
    found: Study,
    options: ExportOptions,
    expected: Reference,
    tolerance: Tolerance | None,
    clock: Clock,
    reduced: Prepared | Quantised | None = None,
) -> Artifact:
    """Write one format and run it in its own runtime.

    Raises EquivalenceError where it computes something else, PrecisionError where it is in another type than was asked for.
    """
    exporter = exporters.exporter(row)
    if isinstance(reduced, Quantised):
        with clock.stage("quantise"):
            notes = reduced.write(exporter, found.example, path, options)
            comparison = require(reduced.compare(expected, exporter, path))
        return describe(path, row.name, [path], comparison=comparison, notes=notes)
    module, example = (reduced.module, reduced.given(found.example)) if reduced else (found.module, found.example)
    # An unfolded network's weights may lie in the file in any form: writers fold some of it themselves.
    weights: nn.Module | None = module if found.ledger is not None else None
    expected.introduce(exporter, weights, tolerance)
    with clock.stage(f"export {row.name}"):
        notes = exporter.export(exporters.suited(exporter, module), example, path, options)
        if reduced:
            notes["precision"] = reduced.require_delivered(exporter, path).to_dict()
    with clock.stage(f"verify {row.name}"):
        comparison = require(expected.compare(exporter, path, weights, tolerance))
        files = written(path, row.beside(path))
    return describe(path, row.name, sorted(files, key=lambda each: (each != path, each.name)), comparison=comparison, notes=notes)


def _in(folder: Path, artifact: Artifact) -> Artifact:
    """The artifact as it is once its files have been moved to ``folder``."""
    files = tuple(folder / each.name for each in artifact.files)
    return dataclasses.replace(artifact, path=folder / artifact.path.name, files=files)

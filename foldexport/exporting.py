"""The library's export: a folded network to one file, run in its own runtime, in place only where it computes the same."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from foldexport.errors import UsageError
from foldexport.fold.rebuild import Program, in_dtype

if TYPE_CHECKING:
    from foldexport.api import Folded
    from foldexport.artifact import Artifact
    from foldexport.exporters.options import ExportOptions
    from foldexport.exporters.tensorrt.options import TensorRTOptions
    from foldexport.exporters.tensorrt.profile import Profile
    from foldexport.precision.prepare import Prepared
    from foldexport.precision.quantised import Quantised
    from foldexport.verify import Comparison
    from foldexport.verify.reference import Reference

Data = str | Path | np.ndarray | Tensor | Sequence[np.ndarray | Tensor]
FORMAT_OF_INT8 = "onnx"


def export(
    folded: Folded,
    format: str,
    path: str | Path,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
    dynamic: Sequence[str] | None = None,
    overwrite: bool = False,
    seed: int = 0,
    precision: str = "fp32",
    half_io: bool = False,
    keep_fp32: Sequence[str] = (),
    data: Data | None = None,
    labels: Sequence[int] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    max_drop: float | None = None,
    device: str = "cpu",
    tensorrt: TensorRTOptions | None = None,
    profile: Profile | None = None,
) -> Artifact:
    """Write a folded network to ``path``, run the file in its own runtime, and put it in place if it computes the same.

    format: "onnx", "torchscript" or an alias. opset: of ONNX. dynamic: axes left free, any of "batch", "height" and
    "width"; by default the batch where the network allows it. The artifact is in ``precision`` whatever the module is in:
    "fp32", "fp16", "bf16", or "int8" as ONNX, read back from the file. half_io: inputs and outputs are in fp16 too. keep_fp32:
    names of modules that stay in float32 at fp16 and bf16, with all below them.

    data: inputs like those that the network will see, one array per input, batch first, or an .npz of them, or a folder of
    images with ``preprocessing`` in timm's field names (input_size, mean, std, …). The file is compared on them too; int8, which
    is calibrated on them, needs them. labels: their class numbers, by which int8 is judged; an .npz may have them as "labels",
    a folder in the names of its own folders. max_drop: points of accuracy that int8 may lose, 1 unless given.

    device: "cuda" runs the training graph, the folded module and, where its runtime can, the file on the GPU as well.
    tensorrt, profile: how an engine is built and the shapes that it takes (foldexport.exporters.tensorrt), by default the
    example's only.

    Returns the artifact with its ``path``, ``comparison`` and ``on_device``. Raises UsageError (an unknown format, an existing
    path, what the format cannot write), MissingDependencyError, PrecisionError (the file is not in the asked precision), and
    EquivalenceError, with nothing written, where the proof fails.
    """
    from foldexport import artifact, destination, exporters, samples
    from foldexport import device as devices
    from foldexport.exporters.options import ExportOptions
    from foldexport.precision import quantised
    from foldexport.trace.outputs import output_names as own_names
    from foldexport.verify import on_device, require

    row = exporters.get(format)
    destination.require_suffix(path, row)
    exporters.require_writable(row)
    devices.require(device)
    exporter = exporters.exporter(row)
    companions = row.beside(path)
    artifact.check_destination(path, overwrite=overwrite, companions=companions)
    free = ("batch",) if folded.graph.dynamic.get("batch") and not row.fixed_by_default else ()
    free = profile.free_axes() if profile is not None else free
    names = [None if given is None else tuple(given) for given in (input_names, output_names)]
    options = ExportOptions(
        *names, opset=opset, dynamic=free if dynamic is None else tuple(dynamic), precision=precision, half_io=half_io,
        tensorrt=tensorrt, profile=profile, own_outputs=own_names(folded.graph),
    )  # fmt: skip
    example = tuple(value.float() if value.is_floating_point() else value for value in folded.example)
    for name, given in (("labels", labels), ("max_drop", max_drop)):
        if given is not None and precision != "int8":
            raise UsageError(f"{name}: is about int8, not {precision}")
    reduced: Prepared | Quantised | None
    if precision == "int8":
        _require_plain(row.name, half_io=half_io, keep_fp32=keep_fp32)
        reduced = _quantised(folded, data, labels, preprocessing or {}, max_drop)
        module, data = in_dtype(folded.module, torch.float32), [each[: samples.SAMPLES] for each in reduced.samples.judged]
        writer: Any = quantised.Writer(reduced, exporter)
    else:
        data = _arrays(data, preprocessing or {})
        reduced = in_precision(folded, precision, seed=seed, half_io=half_io, keep_fp32=keep_fp32, data=data or ())
        module, writer = reduced.module if reduced else in_dtype(folded.module, torch.float32), exporter
    expected = _reference(folded, example, options, reduced, data, seed, device)
    there = ()
    if device != "cpu":
        there = tuple(on_device.prove(folded.graph, module, expected, levels=_levels(folded), seed=seed))

    def proved(file: Path) -> Comparison:
        if isinstance(reduced, quantised.Quantised):
            return require(reduced.compare(expected, exporter, file))
        if reduced is not None:
            reduced.require_delivered(exporter, file)
        return require(expected.compare(exporter, file, module))

    given = reduced.given(example) if reduced is not None and hasattr(reduced, "given") else example
    expected.introduce(exporter, module)
    made = artifact.write(writer, module, given, path, options, prove=proved, overwrite=overwrite, companions=companions)
    return dataclasses.replace(made, on_device=there)


def in_precision(
    folded: Folded, precision: str, *, seed: int = 0, half_io: bool = False, keep_fp32: Sequence[str] = (), data: Sequence = ()
) -> Prepared | None:
    """The folded network in "fp16" or "bf16", as it would be exported; None for "fp32".

    Raises UsageError for another precision, and what :func:`foldexport.precision.prepare.prepare` raises.
    """
    from foldexport.precision.prepare import prepare
    from foldexport.precision.types import HALF, PRECISIONS

    if half_io and precision != "fp16":
        raise UsageError(f"half_io: inputs and outputs can be in fp16 only, not {precision}")
    if isinstance(keep_fp32, str):
        raise UsageError(f"keep_fp32={keep_fp32!r}: wanted a list of module names, [{keep_fp32!r}]")
    if keep_fp32 and precision not in HALF:
        raise UsageError(f"keep_fp32: is about {' and '.join(HALF)}, not {precision}")
    if precision == "fp32":
        return None
    if precision not in HALF:
        raise UsageError(f"precision {precision!r}: wanted {', '.join(map(repr, PRECISIONS))}")
    program = _program(folded, precision)
    inputs = [inputs for inputs, _ in folded.certificate.references] if folded.certificate else ()
    return prepare(
        folded.graph, program, HALF[precision], module=folded.module, inputs=inputs, data=data, seed=seed, half_io=half_io,
        keep=keep_fp32,
    )  # fmt: skip


def _program(folded: Folded, precision: str) -> Program | None:
    """The folded network in float64. Raises UsageError where the module is no longer what that rounds to."""
    program = folded.refold() if folded.refold is not None else None
    if program is not None and not _rounds_to(program.module, folded.module):
        raise UsageError(f"the folded module's weights have changed since the fold: fold again to export it in {precision}")
    return program


def _rounds_to(exact: nn.Module, module: nn.Module) -> bool:
    """Whether every weight of ``module`` is one of ``exact`` rounded to its type, whatever their names."""
    dtypes = {each.dtype for each in module.parameters()}
    known = {(dtype, _digest(each.detach().to(dtype))) for each in exact.parameters() for dtype in dtypes}
    return all((each.dtype, _digest(each.detach())) in known for each in module.parameters())


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bits."""
    return hashlib.sha256(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def _require_plain(format_name: str, *, half_io: bool, keep_fp32: Sequence[str]) -> None:
    """Raise UsageError for what int8 does not go with."""
    if format_name != FORMAT_OF_INT8:
        raise UsageError(f"precision 'int8': is written as {FORMAT_OF_INT8} only, not {format_name}")
    if half_io or keep_fp32:
        raise UsageError(f"{'half_io' if half_io else 'keep_fp32'}: is about half types, not int8")


def _quantised(
    folded: Folded, data: Data | None, labels: Sequence[int] | None, preprocessing: Mapping[str, Any], max_drop: float | None
) -> Quantised:
    from foldexport.precision import quantised

    program = _program(folded, "int8")
    levels = _levels(folded)
    if data is None or isinstance(data, str | Path):
        if labels is not None:
            raise UsageError("labels: go with arrays; an .npz has them in its array 'labels', a folder in the names of its folders")
        path = None if data is None else Path(data)
        return quantised.prepared(folded.graph, _given(program), path, dict(preprocessing), levels=levels, max_drop=max_drop)
    return quantised.of_arrays(
        folded.graph, _given(program), _as_arrays(data), None if labels is None else np.asarray(labels), levels=levels,
        max_drop=max_drop,
    )  # fmt: skip


def _given(program: Program | None) -> Any:
    return None if program is None else lambda: program


def _arrays(data: Data | None, preprocessing: Mapping[str, Any]) -> list[np.ndarray] | None:
    """One array per input. Raises UsageError for a file that holds none."""
    from foldexport import samples

    if data is None:
        return None
    return samples.load(Path(data), preprocessing) if isinstance(data, str | Path) else _as_arrays(data)


def _as_arrays(data: Any) -> list[np.ndarray]:
    from foldexport import samples

    several = data if isinstance(data, list | tuple) else [data]
    found = [each.numpy(force=True) if isinstance(each, Tensor) else np.asarray(each) for each in several]
    for each in found:
        if each.dtype.kind not in "biuf" or each.ndim == 0 or not len(each):
            found = f"a {each.dtype} array of shape {list(each.shape)}"
            raise UsageError(f"data: holds {found}; wanted an array of numbers per input, batch first")
    for place, each in enumerate(found):
        samples.require_finite(f"data: array {place}", each)
    return [each.astype(np.float32) if each.dtype.kind == "f" else each for each in found]


def _levels(folded: Folded) -> list[float] | None:
    rounding = None if folded.certificate is None else folded.certificate.rounding
    return None if rounding is None else rounding.levels


def _reference(
    folded: Folded, example: tuple, options: ExportOptions, reduced: Prepared | Quantised | None, data: Sequence | None, seed: int,
    device: str,
) -> Reference:  # fmt: skip
    from foldexport.verify.reference import reference

    points = ()
    if options.profile is not None:
        shapes = [tuple(value.shape) for value in example if isinstance(value, Tensor)]
        options.profile.check(options.names("input", len(shapes)), shapes, options.dynamic)
        points = options.profile.points()
    return reference(
        folded.graph, example, options, levels=reduced.levels if reduced is not None else _levels(folded), data=data, seed=seed,
        known=folded.certificate.references if folded.certificate else (), points=points, device=device,
        **(reduced.unit if reduced is not None else {}),
    )  # fmt: skip

"""ONNX: ``torch.onnx`` writes the graph; names, metadata, opset and bytes are made stable here.

The file is one protobuf up to its 2 GB limit; above it the weights lie beside it in ``NAME.onnx.data``. The format is
described in ONNX's own IR, ExternalData and VersionConverter documents.
"""

from __future__ import annotations

import ast
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from google.protobuf.message import DecodeError
from torch import Tensor, nn

from foldexport.errors import EquivalenceError, UsageError
from foldexport.exporters import sizes
from foldexport.exporters.inner import Inner
from foldexport.exporters.onnx import constants as onnx_constants
from foldexport.exporters.onnx import devices as onnx_devices
from foldexport.exporters.onnx import inner as onnx_inner
from foldexport.exporters.onnx import model as onnx_model
from foldexport.exporters.onnx import rectifiers
from foldexport.exporters.onnx import types as onnx_types
from foldexport.exporters.options import FLOATS, ExportOptions
from foldexport.exporters.weights import expected_weights, match_weights
from foldexport.threads import share

EXTERNAL_DATA_ABOVE_BYTES = 2**31 - 2**25  # protobuf's limit, less room for the graph
SMALL_TENSOR_BYTES = 1024  # stays in the graph file when the others lie outside
OLDEST_WRITTEN = 18  # torch.onnx writes this opset and later ones; older ones are converted
NOISY_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")


class OnnxExporter:
    """Plain eval-mode modules to ONNX files."""

    name = "onnx"
    suffix = ".onnx"
    devices = ("cpu", "cuda")

    def export(
        self,
        module: nn.Module,
        example: tuple,
        path: str | Path,
        options: ExportOptions | None = None,
        *,
        accept: Callable[[Path], bool] | None = None,
    ) -> dict[str, Any]:
        """Write ``module`` to ``path``; equal modules give equal bytes, whatever the process or the folder.

        example: the inputs of ``forward``, in order.
        accept:  judges the file simplified by onnxsim, which is kept only if it has fewer nodes and is accepted;
                 default: same weights as the module and same outputs as the plain file on the example.

        Returns notes for the manifest. Raises :class:`UsageError` when the network cannot be written as asked (opset,
        free axes, operators), :class:`PrecisionError` for another precision than fp32, fp16 and bf16.
        """
        options = options or ExportOptions()
        options.require_precision(self.name, FLOATS)
        options = _with_opset(options)
        onnx_model.require_known_opset(options.opset)
        sizes.require_free_axes(module, example, options)
        path = Path(path)
        example = sizes.traceable(example, options)
        model = _graph(module, example, options)
        _rename(model, options)
        notes: dict[str, Any] = {
            "inputs": [v.name for v in model.graph.inputs],
            "outputs": [v.name for v in model.graph.outputs],
        }
        if _weight_bytes(model) > EXTERNAL_DATA_ABOVE_BYTES:
            proto = _write_external(model, path, options)
            notes["onnxsim"] = "not run: the weights lie in a file of their own"
        else:
            proto = _write_single(model, path, options)
        if options.precision == "bf16":
            notes["onnxsim"] = "not run: it folds constants with onnxruntime, which has no bfloat16"
        elif "onnxsim" not in notes:
            judge = accept or (lambda simplified: _same_as_plain(simplified, proto, module, example))
            proto, notes["onnxsim"] = _simplify(proto, path, judge)
        _require_free(proto, example, options)
        if options.precision == "bf16":
            notes["run"] = "onnxruntime's CPU has no bfloat16 convolution: operators in float32, each result rounded to bfloat16"
        return notes | {
            "opset": onnx_model.opset(proto),
            "ir_version": proto.ir_version,
            "nodes": len(proto.graph.node),
        }

    def load(
        self, path: str | Path, *, optimise: bool = True, threads: int = 0, device: str = "cpu"
    ) -> Callable[..., list[np.ndarray]]:
        """A callable that runs the file in onnxruntime, ``*arrays -> [arrays]``.

        optimise: onnxruntime's own graph optimisations, as its users get them.
        threads:  within one operator, 0 for onnxruntime's default.
        device:   "cuda" for its CUDA provider, with TF32 off; what runs on the CPU all the same is its ``remark``.
        Raises :class:`EquivalenceError` when onnxruntime refuses the file, and :class:`MissingDependencyError` when it
        cannot use the device.
        """
        return _session_call(_session(str(path), optimise, threads, device))

    def lacks(self, device: str) -> str:
        """What onnxruntime lacks to run on ``device`` here; empty where nothing."""
        return onnx_devices.lacks(device)

    def suited(self, module: nn.Module) -> nn.Module:
        """The module with its per-channel clamps as onnxruntime runs them fastest; float32 only, where that was measured."""
        return rectifiers.signed(module)

    def weights(self, path: str | Path) -> dict[str, np.ndarray]:
        """Every initializer of the file, by name, in the file's own bits."""
        model = onnx_ir.load(str(path))
        graphs = [model.graph, *model.graph.subgraphs()]
        return {
            name: value.const_value.numpy()
            for graph in graphs
            for name, value in graph.initializers.items()
            if value.const_value is not None
        }

    def inner(self, path: str | Path) -> Inner:
        """The operators inside the file, and their values, as its nodes stand."""
        return onnx_inner.inner(path, lambda source: _session(source, False, 0))

    def precision_of(self, path: str | Path) -> dict[str, int]:
        """Convolutions and matrix products of the file by the type that they compute in."""
        return onnx_types.layers_by_type(path)

    def runtime(self) -> str:
        """The runtime and its version, "onnxruntime 1.31.1"."""
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress lines and deprecation warnings off the user's screen; errors still raise."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _with_opset(options: ExportOptions) -> ExportOptions:
    """bfloat16 needs the opset whose operators take it. Raises UsageError where an older one was asked for."""
    if options.precision != "bf16":
        return options
    if options.opset is not None and options.opset < onnx_types.OLDEST_BFLOAT16:
        raise UsageError(f"--opset {options.opset}: ONNX has bf16 convolutions from opset {onnx_types.OLDEST_BFLOAT16} on.")
    return replace(options, opset=options.opset or onnx_types.OLDEST_BFLOAT16)


#: What torch.export says of a symbolic axis that a network makes a number of.
FIXED = ("user-specified ranges", "Constraints violated", "inconsistencies were found")


def _graph(module: nn.Module, example: tuple, options: ExportOptions) -> onnx_ir.Model:
    """The graph as torch.onnx writes it, at the asked opset or at the oldest that it writes."""
    axes = tuple(options.dynamic_axes(value.shape) if isinstance(value, Tensor) else None for value in example)
    opset = None if options.opset is None else max(options.opset, OLDEST_WRITTEN)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                onnx_constants.kept(module, example),
                example,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=axes if any(axes) else None,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = _root_cause(error)
        if any(words in cause for words in FIXED):
            axes = " or ".join(options.dynamic)
            raise UsageError(
                f"onnx: the network fixes its {axes} at the example's size: leave it out of --dynamic."
            ) from error
        raise UsageError(f"onnx: torch.onnx cannot write this network: {cause}") from error
    return program.model


def scopes(module: nn.Module, example: tuple, options: ExportOptions) -> dict[str, tuple[str, str, str]]:
    """Where each node comes from, as torch.onnx notes it: node name → (module path, value, ATen operator), for messages."""
    found = {}
    for node in _graph(module, sizes.traceable(example, options), options).graph:
        notes = [node.metadata_props.get(f"pkg.torch.onnx.{key}", "[]") for key in ("name_scopes", "class_hierarchy")]
        names, kinds = (ast.literal_eval(note) for note in notes)
        if len(names) >= 2 and kinds:
            found[node.name] = (names[-2], names[-1], kinds[-1])
    return found


def _root_cause(error: BaseException) -> str:
    """First line of the innermost error: the outer ones describe torch.onnx's own steps."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _rename(model: onnx_ir.Model, options: ExportOptions) -> None:
    """Give inputs and outputs the asked names; an inner value that has one of them gets a trailing underscore."""
    inputs, outputs = list(model.graph.inputs), list(model.graph.outputs)
    names = options.names("input", len(inputs)) + options.names("output", len(outputs))
    taken = set(names)
    ends = {id(value) for value in (*inputs, *outputs)}
    inner = [value for node in model.graph for value in node.outputs] + list(model.graph.initializers.values())
    used = {value.name for value in inner} | taken
    for value in inner:
        if id(value) not in ends and value.name in taken:
            fresh = f"{value.name}_"
            while fresh in used:
                fresh += "_"
            used.add(fresh)
            value.name = fresh
    for place, value in enumerate((*inputs, *outputs)):
        value.name = f"{place} of foldexport"  # two steps, since names may be exchanged among them
    for value, name in zip((*inputs, *outputs), names, strict=True):
        value.name = name


def _weight_bytes(model: onnx_ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def _write_single(model: onnx_ir.Model, path: Path, options: ExportOptions) -> onnx.ModelProto:
    """One file; returns what was written."""
    proto = onnx_model.lower(onnx_ir.to_proto(model), options.opset)
    onnx_model.write(proto, path)
    return proto


def _write_external(model: onnx_ir.Model, path: Path, options: ExportOptions) -> onnx.ModelProto:
    """The graph in ``path``, the weights in one file beside it; returns the graph without weights."""
    if options.opset is not None and options.opset < OLDEST_WRITTEN:
        raise UsageError(
            f"onnx: weights above 2 GB are written at opset {OLDEST_WRITTEN} or later, not {options.opset}."
        )
    onnx_ir.save(
        model, path, format="protobuf", external_data=f"{path.name}.data", size_threshold_bytes=SMALL_TENSOR_BYTES
    )
    proto = onnx.load(str(path), load_external_data=False)
    onnx_model.write(proto, path)
    return proto


def _simplify(proto: onnx.ModelProto, path: Path, judge: Callable[[Path], bool]) -> tuple[onnx.ModelProto, str]:
    """Replace the file by what onnxsim makes of it where that has fewer nodes and is accepted.

    Returns the model that is in the file and what was done.
    """
    simpler = onnx_model.simplified(proto)
    removed = len(proto.graph.node) - len(simpler.graph.node) if simpler is not None else 0
    if removed <= 0:
        return proto, "nothing to remove"
    count = f"{removed} node{'s' if removed > 1 else ''}"
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        trial = Path(folder) / path.name
        onnx_model.write(simpler, trial)
        if not judge(trial):
            return proto, f"refused: without {count} the proof does not hold"
        trial.replace(path)
    return simpler, f"removed {count}"


def _same_as_plain(simplified: Path, proto: onnx.ModelProto, module: nn.Module, example: tuple) -> bool:
    """Whether onnxsim kept every weight's bits and the outputs, to rounding, on the example."""
    arrays = [value.numpy(force=True) for value in example if isinstance(value, Tensor)]
    wanted = _session_call(_session(proto.SerializeToString(), True, 0))(*arrays)
    found = OnnxExporter().load(simplified)(*arrays)
    close = all(
        np.abs(a - b).max(initial=0) <= 1e-5 * np.abs(b).max(initial=0) for a, b in zip(found, wanted, strict=True)
    )
    return close and match_weights(expected_weights(module), OnnxExporter().weights(simplified)).ok


def _require_free(proto: onnx.ModelProto, example: tuple, options: ExportOptions) -> None:
    """Raise :class:`UsageError` where the graph fixed an axis that was to be free."""
    tensors = [value for value in example if isinstance(value, Tensor)]
    for value, tensor in zip(proto.graph.input, tensors, strict=True):
        dims = value.type.tensor_type.shape.dim
        for axis, name in options.dynamic_axes(tensor.shape).items():
            if not dims[axis].dim_param:
                fixed = f"the {name} of {value.name!r} at {dims[axis].dim_value}"
                raise UsageError(f"onnx: the network fixes {fixed}: leave it out of --dynamic.")


def _session(source: str | bytes, optimise: bool, threads: int, device: str = "cpu") -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    onnx_devices.record_places(settings, device)
    settings.intra_op_num_threads = threads or share()
    settings.log_severity_level = 3
    source = _runnable(source)
    levels = onnxruntime.GraphOptimizationLevel
    settings.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(source, settings, providers=onnx_devices.providers(device))
    except Exception as error:  # onnxruntime's exceptions share no other base class
        reason = str(error).strip().splitlines()[0]
        raise EquivalenceError(f"onnx: onnxruntime {onnxruntime.__version__} refuses the file: {reason}") from error
    onnx_devices.require(session, device)
    return session


def _runnable(source: str | bytes) -> str | bytes:
    """The file itself, or what stands for it in memory where it is in bfloat16, which onnxruntime's CPU lacks."""
    held = isinstance(source, bytes)
    try:
        model = onnx.load_from_string(source) if held else onnx.load(source, load_external_data=False)
    except DecodeError:
        return source  # onnxruntime says what is wrong with it
    if not onnx_types.has_bfloat16(model):
        return source
    whole = model if held else onnx.load(source)
    return onnx_types.runnable(whole).SerializeToString()


def _session_call(session: Any) -> Callable[..., list[np.ndarray]]:
    names = [value.name for value in session.get_inputs()]

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        return session.run(None, dict(zip(names, arrays, strict=True)))

    run.remark = onnx_devices.remark(session)
    return run

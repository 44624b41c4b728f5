"""The formats that foldexport writes: one table, looked up by name, importing nothing until a format is used.

Add a format: one line in the table and one file beside this one whose class has ``name``, ``suffix``,
``export(module, example, path, options) -> notes``, ``load(path) -> callable``, ``weights(path)`` and ``runtime()``.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foldexport.errors import MissingDependencyError, UsageError


@dataclass(frozen=True)
class Format:
    """One row of the table.

    name, aliases: what ``--to`` accepts.
    target: ``"module:Class"`` of the exporter, imported on first use.
    suffix: appended to the artifact's base name.
    companions: suffixes of the further files that a format always writes beside the first: ``.bin`` of OpenVINO's ``.xml``.
    extra: of ``pip install 'foldexport[extra]'``; empty for core formats.
    packages: import names that writing and running the format need.
    runtime: distribution whose version the comparison reports.
    probe: ``"module:function"`` that says (runtime, version, remark) where packages alone do not tell.
    folder: the artifact is a folder that its users handle as one file.
    needs: ``"module:function"`` that raises MissingDependencyError for what no package brings and writing needs: a compiler.
    fixed_by_default: its files take the example's sizes only, unless the user says which others.
    from_onnx: it is made from the ONNX file of the same network, so ``--opset`` says something about it.
    precisions: that its files can be in, of those that are rounded to; int8 has rules of its own.
    """

    name: str
    target: str
    suffix: str
    aliases: tuple[str, ...] = ()
    extra: str = ""
    packages: tuple[str, ...] = ()
    runtime: str = ""
    description: str = ""
    probe: str = ""
    fixed_by_default: bool = False
    companions: tuple[str, ...] = ()
    needs: str = ""
    from_onnx: bool = False
    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16")
    folder: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def file_names(self) -> str:
        """How its files are called, "NAME.xml + NAME.bin"."""
        return " + ".join(f"NAME{suffix}" for suffix in (self.suffix, *self.companions))

    def beside(self, path: str | Path) -> tuple[Path, ...]:
        """Where the companions of the artifact at ``path`` are: ``net.bin`` of ``net.xml``.

        Raises :class:`UsageError` where the name does not end as the format's do: its runtime finds them by that name.
        """
        path = Path(path)
        if not self.companions:
            return ()
        base = path.name.removesuffix(self.suffix)
        if base in ("", path.name):
            mistaken = [path.name.removesuffix(suffix) for suffix in self.companions if path.name.endswith(suffix)]
            stem = next(iter(mistaken), path.stem) or "net"
            raise UsageError(
                f"{path}: {self.name} is {self.file_names.replace(' + ', ' and ')}, found by these names: "
                f"wanted {path.with_name(stem + self.suffix)}."
            )
        return tuple(path.with_name(base + suffix) for suffix in self.companions)

    @property
    def install(self) -> str:
        """The command that installs what this format needs."""
        return f"pip install 'foldexport[{self.extra}]'" if self.extra else "pip install foldexport"

    def missing(self) -> list[str]:
        """Import names of the packages that are not installed; imports none of them."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


@dataclass(frozen=True)
class Status:
    """Whether a format works on this machine: ``reason`` is why not and what to do, or what does not work here.

    runtime: its name, where it is not the distribution of the format.
    """

    format: Format
    works: bool
    version: str
    reason: str
    runtime: str = ""


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            name="onnx",
            target="foldexport.exporters.onnx.exporter:OnnxExporter",
            suffix=".onnx",
            aliases=("onnxruntime",),
            packages=("torch", "onnx", "onnxscript", "onnxruntime", "onnxsim"),
            runtime="onnxruntime",
            description="ONNX, run by onnxruntime",
            from_onnx=True,
        ),
        Format(
            name="torchscript",
            target="foldexport.exporters.torchscript.exporter:TorchScriptExporter",
            suffix=".torchscript.pt",
            aliases=("ts", "jit"),
            packages=("torch",),
            runtime="torch",
            description="TorchScript archive, run by torch.jit or libtorch",
        ),
        Format(
            name="pytorch",
            target="foldexport.exporters.pytorch.exporter:PyTorchExporter",
            suffix=".py",
            aliases=("py", "source"),
            packages=("torch", "safetensors"),
            runtime="torch",
            description="readable PyTorch source with its weights in safetensors",
        ),
        Format(
            name="tensorrt",
            target="foldexport.exporters.tensorrt.exporter:TensorRTExporter",
            suffix=".engine",
            aliases=("trt", "engine"),
            extra="tensorrt-rtx",
            packages=("torch", "onnx", "onnxscript", "onnxruntime", "onnxsim"),
            description="TensorRT or TensorRT-RTX engine, for NVIDIA GPUs",
            probe="foldexport.exporters.tensorrt.flavour:status",
            fixed_by_default=True,
        ),
        Format(
            name="openvino",
            target="foldexport.exporters.openvino.exporter:OpenVinoExporter",
            suffix=".xml",
            companions=(".bin",),
            aliases=("ov", "ir"),
            extra="openvino",
            packages=("torch", "onnx", "onnxscript", "onnxruntime", "onnxsim", "openvino"),
            runtime="openvino",
            description="OpenVINO IR, for Intel processors, GPUs and NPUs",
        ),
        Format(
            name="pt2",
            target="foldexport.exporters.pt2:ProgramExporter",
            suffix=".pt2",
            aliases=("torch.export", "exported"),
            packages=("torch",),
            runtime="torch",
            description="program of torch.export, run by PyTorch without the network's code",
        ),
        Format(
            name="aotinductor",
            target="foldexport.exporters.aotinductor.exporter:AOTInductorExporter",
            suffix=".aoti.pt2",
            aliases=("aoti",),
            packages=("torch",),
            runtime="torch",
            description="network compiled ahead of time by TorchInductor, run by libtorch",
            probe="foldexport.exporters.aotinductor.compiler:status",
            needs="foldexport.exporters.aotinductor.compiler:require",
        ),
        Format(
            name="ort",
            target="foldexport.exporters.ort.exporter:OrtExporter",
            suffix=".ort",
            aliases=("onnxruntime-mobile",),
            packages=("torch", "onnx", "onnxscript", "onnxruntime", "onnxsim"),
            runtime="onnxruntime",
            description="onnxruntime's own format, also for its mobile and minimal builds",
            from_onnx=True,
            precisions=("fp32",),
        ),
        Format(
            name="onnxruntime-web",
            target="foldexport.exporters.web.exporter:WebExporter",
            suffix=".web.onnx",
            aliases=("web", "ort-web"),
            packages=("torch", "onnx", "onnxscript", "onnxruntime", "onnxsim"),
            description="ONNX for browsers, run by onnxruntime-web under Node",
            probe="foldexport.exporters.web.node:status",
            needs="foldexport.exporters.web.node:require",
            from_onnx=True,
            precisions=("fp32", "fp16"),
        ),
        Format(
            name="executorch",
            target="foldexport.exporters.executorch.exporter:ExecuTorchExporter",
            suffix=".pte",
            aliases=("pte", "et"),
            extra="executorch",
            packages=("torch", "executorch"),
            runtime="executorch",
            description="ExecuTorch program for CPUs of phones and boards, by XNNPACK",
        ),
        Format(
            name="litert",
            target="foldexport.exporters.litert.exporter:LiteRTExporter",
            suffix=".tflite",
            aliases=("tflite", "tensorflow-lite"),
            extra="litert",
            packages=("torch", "litert_torch", "ai_edge_litert"),
            runtime="ai-edge-litert",
            description="LiteRT (TensorFlow Lite) for phones and boards",
        ),
        Format(
            name="ncnn",
            target="foldexport.exporters.ncnn.exporter:NcnnExporter",
            suffix=".ncnn.param",
            companions=(".ncnn.bin",),
            extra="ncnn",
            packages=("torch", "ncnn", "pnnx"),
            runtime="ncnn",
            description="ncnn for phones and boards, one sample at a time",
        ),
        Format(
            name="coreml",
            target="foldexport.exporters.coreml.exporter:CoreMLExporter",
            suffix=".mlpackage",
            folder=True,
            aliases=("core-ml", "mlpackage"),
            extra="coreml",
            packages=("torch", "coremltools"),
            description="Core ML package for Apple's devices; written anywhere, run on macOS",
            probe="foldexport.exporters.coreml:status",
            fixed_by_default=True,
        ),
    )
}


def get(name: str) -> Format:
    """The format called ``name`` (a name or an alias, in any case).

    Raises :class:`UsageError` naming the nearest formats when there is none.
    """
    wanted = name.strip().lower()
    for row in FORMATS.values():
        if wanted in row.names:
            return row
    known = [each for row in FORMATS.values() for each in row.names]
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"formats are {', '.join(FORMATS)}."
    raise UsageError(f"unknown format {name.strip()!r}: {hint} `foldexport formats` lists them all.")


def named(path: str | Path) -> Format | None:
    """The format whose suffix the name has, the longest where one ends with another; None where it has none."""
    name = Path(path).name
    fitting = [row for row in FORMATS.values() if name.endswith(row.suffix)]
    return max(fitting, key=lambda row: len(row.suffix), default=None)


def resolve(names: str) -> list[Format]:
    """The formats of a comma-separated list, in order, each once.

    Raises :class:`UsageError` for an unknown format and for an empty list.
    """
    rows = [get(name) for name in names.split(",") if name.strip()]
    if not rows:
        raise UsageError(f"no format in {names!r}: give one or more of {', '.join(FORMATS)}, separated by commas.")
    return list(dict.fromkeys(rows))


def require_installed(row: Format) -> None:
    """Raise :class:`MissingDependencyError`, with the command that installs it, where a package is missing."""
    missing = row.missing()
    if missing:
        raise MissingDependencyError(_missing_message(row, missing))


def require_writable(row: Format) -> None:
    """Raise :class:`MissingDependencyError` where anything that writing the format needs is missing."""
    require_installed(row)
    if row.needs:
        module, _, name = row.needs.partition(":")
        getattr(importlib.import_module(module), name)()


def exporter(row: Format) -> Any:
    """An instance of the format's exporter.

    Raises :class:`MissingDependencyError` with the command that installs what is missing.
    """
    require_installed(row)
    module, _, name = row.target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)()
    except ImportError as error:
        raise MissingDependencyError(
            f"{row.name}: a package is installed but does not import ({error}): {row.install}"
        ) from error


def suited(exporter: Any, module: Any) -> Any:
    """The module in the form that the exporter's runtime runs fastest: the same values, exactly, by other operators."""
    return exporter.suited(module) if hasattr(exporter, "suited") else module


def status() -> list[Status]:
    """Every format with whether it works here, told from what is installed; imports nothing heavy."""
    return [_status(row) for row in FORMATS.values()]


def _status(row: Format) -> Status:
    missing = row.missing()
    if missing:
        return Status(row, False, "", _missing_message(row, missing))
    if not row.probe:
        return Status(row, True, _version(row.runtime), "")
    module, _, name = row.probe.partition(":")
    runtime, version, remark = getattr(importlib.import_module(module), name)()
    return Status(row, bool(runtime), version, remark, runtime)


def _missing_message(row: Format, missing: list[str]) -> str:
    verb = "is" if len(missing) == 1 else "are"
    return f"{row.name} needs {', '.join(missing)}, which {verb} not installed: {row.install}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""

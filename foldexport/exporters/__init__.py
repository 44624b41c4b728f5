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
from typing import Any

from foldexport.errors import MissingDependencyError, UsageError


@dataclass(frozen=True)
class Format:
    """One row of the table.

    name, aliases: what ``--to`` accepts.
    target: ``"module:Class"`` of the exporter, imported on first use.
    suffix: appended to the artifact's base name.
    extra: of ``pip install 'foldexport[extra]'``; empty for core formats.
    packages: import names that writing and running the format need.
    runtime: distribution whose version the comparison reports.
    probe: ``"module:function"`` that says (runtime, version, remark) where packages alone do not tell.
    fixed_by_default: its files take the example's sizes only, unless the user says which others.
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

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

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
            target="foldexport.exporters.onnx:OnnxExporter",
            suffix=".onnx",
            aliases=("onnxruntime",),
            packages=("torch", "onnx", "onnxscript", "onnxruntime", "onnxsim"),
            runtime="onnxruntime",
            description="ONNX, run by onnxruntime",
        ),
        Format(
            name="torchscript",
            target="foldexport.exporters.torchscript:TorchScriptExporter",
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

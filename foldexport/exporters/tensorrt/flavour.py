"""Full TensorRT and TensorRT-RTX: one Python API, two libraries. Which is installed, which is used, what each cannot do.

| | full TensorRT 10, 11 | TensorRT-RTX |
|---|---|---|
| builds | on the GPU that it builds for | ahead of time, with or without a GPU |
| for    | that GPU, or more with --hardware-compatibility | --compute-capability, or its default |
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from types import ModuleType

from foldexport.errors import MissingDependencyError, UsageError
from foldexport.exporters.tensorrt import driver
from foldexport.exporters.tensorrt.options import TensorRTOptions


@dataclass(frozen=True)
class Flavour:
    """One of the two libraries.

    modules: import names, the first that is there is used. distributions: whose version is reported.
    """

    name: str
    title: str
    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    extra: str

    @property
    def install(self) -> str:
        return f"pip install 'foldexport[{self.extra}]'"

    def module(self) -> str:
        """The import name that is installed here, empty where none is; imports nothing."""
        return next((name for name in self.modules if importlib.util.find_spec(name) is not None), "")

    def version(self) -> str:
        for name in self.distributions:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return ""

    def load(self) -> ModuleType:
        """The library. Raises MissingDependencyError where it is not installed, or does not import."""
        if not self.module():
            raise MissingDependencyError(f"{self.title} is not installed: {self.install}")
        try:
            return importlib.import_module(self.module())
        except (ImportError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise MissingDependencyError(f"{self.title} is installed but does not import ({reason}): {self.install}") from error


FULL = Flavour(
    "full", "TensorRT", ("tensorrt", "tensorrt_bindings"),
    ("tensorrt", "tensorrt_cu13_bindings", "tensorrt_cu13", "tensorrt_cu12_bindings", "tensorrt_cu12"), "tensorrt",
)  # fmt: skip
RTX = Flavour(
    "rtx", "TensorRT-RTX", ("tensorrt_rtx", "tensorrt_rtx_bindings"),
    ("tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu12_bindings", "tensorrt_rtx"), "tensorrt-rtx",
)  # fmt: skip
FLAVOURS = {each.name: each for each in (FULL, RTX)}

#: Why neither can be used, as the registry says it.
NEITHER = f"TensorRT is not installed: {RTX.install} (builds without a GPU) or {FULL.install} (for this machine's GPU)"


def choose(options: TensorRTOptions) -> Flavour:
    """The flavour that the options ask for; "auto" is the installed one, and of two the full one where it can build.

    Raises MissingDependencyError with the command that installs what is missing.
    """
    if options.flavour != "auto":
        flavour = FLAVOURS[options.flavour]
        if not flavour.module():
            raise MissingDependencyError(f"--flavour {flavour.name}: {flavour.title} is not installed: {flavour.install}")
        return flavour
    there = [each for each in (FULL, RTX) if each.module()]
    if not there:
        raise MissingDependencyError(NEITHER)
    if len(there) == 2 and (options.compute_capabilities or driver.why_none()):
        return RTX
    return there[0]


def require(options: TensorRTOptions) -> Flavour:
    """The chosen flavour, once it is known to be able to do what is asked; before any work.

    Raises UsageError for what it cannot build, MissingDependencyError for a library or a GPU that is not there.
    """
    flavour = choose(options)
    if flavour is FULL:
        _require_full(options)
    else:
        _require_rtx(options, flavour.load())
    return flavour


def targets(trt: ModuleType) -> tuple[str, ...]:
    """Compute capabilities that this TensorRT-RTX can be asked for: ``("7.5", "8.0", "8.6", …)``."""
    names = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    return tuple(f"{name[2:-1]}.{name[-1]}" for name in names)


def status() -> tuple[str, str, str]:
    """(title, version, remark) for the list of formats; the reason is in the remark where it does not work."""
    try:
        flavour = choose(TensorRTOptions())
    except MissingDependencyError as error:
        return "", "", str(error)
    reason = driver.why_none()
    if reason and flavour is FULL:
        return "", "", f"TensorRT builds on a GPU and there is none here ({reason}): {RTX.install} builds without one."
    return flavour.title, flavour.version(), f"builds; engines cannot be run here, no GPU ({reason})" if reason else ""


def _require_full(options: TensorRTOptions) -> None:
    if options.compute_capabilities:
        raise UsageError(
            "--compute-capability: full TensorRT builds for the GPU it runs on; use --flavour rtx, or --hardware-compatibility."
        )
    reason = driver.why_none()
    if reason:
        raise MissingDependencyError(
            f"full TensorRT builds on the GPU that it builds for, and there is none here ({reason}): "
            f"run on that machine, or build without a GPU by --flavour rtx ({RTX.install})."
        )


def _require_rtx(options: TensorRTOptions, trt: ModuleType) -> None:
    if options.hardware_compatibility != "none":
        raise UsageError(
            "--hardware-compatibility: TensorRT-RTX has no such levels; name the GPUs with --compute-capability 8.6,8.9,12.0."
        )
    if options.version_compatible:
        raise UsageError("--version-compatible: TensorRT-RTX engines work in the version that built them; only full TensorRT can.")
    known = targets(trt)
    unknown = [each for each in options.compute_capabilities if each not in known]
    if unknown:
        raise UsageError(
            f"--compute-capability {unknown[0]}: TensorRT-RTX {RTX.version()} builds for {', '.join(known)}; for other GPUs "
            f"use full TensorRT on that machine ({FULL.install})."
        )

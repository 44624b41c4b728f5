"""The runtimes that are timed: one table, importing nothing until one is used.

Add one: a row here and a function ``load(path, arrays, threads, device) -> Ready`` in a file of its family.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foldexport.benchmark import environment
from foldexport.errors import MissingDependencyError, UsageError
from foldexport.exporters.aotinductor.compiler import WANTED, compiler
from foldexport.exporters.web import node


@dataclass(frozen=True)
class Ready:
    """A loaded network with its inputs in place.

    run: runs it once and returns when it has finished.   outputs: of what ``run`` returned, as arrays of the host.
    """

    run: Callable[[], Any]
    outputs: Callable[[Any], list[np.ndarray]]


@dataclass(frozen=True)
class Runtime:
    """One row of the table.

    name, aliases: what ``--runtimes`` accepts.   target: ``"module:function"``, see the module.
    reads: "module" (a network in PyTorch) or the name of a format that the network is exported to.
    packages: import names.   distribution: whose version is told.   install: the command that installs what is missing; of
    tensorrt, which comes in two flavours, the exporter knows these.
    devices: that it can run on.   also: further files that it reads, by suffix.
    compiler: it needs a C++ compiler on the CPU.   transfers: what a GPU's time includes.
    by_default: timed where nobody says which; the others take long to build, or show what another one shows already.
    """

    name: str
    target: str
    reads: str
    packages: tuple[str, ...]
    distribution: str
    install: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    aliases: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    compiler: bool = False
    transfers: str = "none: inputs and outputs stay on the GPU"
    by_default: bool = True
    description: str = ""

    @property
    def load(self) -> Callable[[Path, Sequence[np.ndarray], int, str], Ready]:
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(f"foldexport.benchmark.runtimes.{module}"), name)


_TORCH = {"packages": ("torch",), "distribution": "torch", "install": "pip install foldexport"}
_ORT = {"packages": ("onnxruntime",), "distribution": "onnxruntime", "install": "pip install foldexport"}

RUNTIMES: dict[str, Runtime] = {
    row.name: row
    for row in (
        Runtime("eager", "pytorch:eager", "module", **_TORCH, aliases=("torch", "pytorch"), description="PyTorch as it is"),
        Runtime("compile", "pytorch:compiled", "module", **_TORCH, aliases=("torch.compile", "inductor"), compiler=True,
                description="torch.compile"),
        Runtime("torchscript", "pytorch:torchscript", "torchscript", **_TORCH, aliases=("ts", "jit"),
                description="torch.jit, frozen"),
        Runtime("source", "pytorch:source", "pytorch", ("torch", "safetensors"), "torch", "pip install foldexport", aliases=("py",),
                by_default=False, description="readable PyTorch source"),
        Runtime("pt2", "pytorch:exported", "pt2", **_TORCH, aliases=("torch.export", "exported"), by_default=False,
                description="the program of torch.export"),
        Runtime("aotinductor", "pytorch:ahead_of_time", "aotinductor", **_TORCH, devices=("cpu",), aliases=("aoti",),
                by_default=False, description="TorchInductor, compiled ahead of time"),
        Runtime("onnxruntime", "onnx_runtime:optimised", "onnx", **_ORT, aliases=("ort", "onnx"), also=(".ort",),
                description="onnxruntime with its own graph optimisations"),
        Runtime("onnxruntime-plain", "onnx_runtime:plain", "onnx", **_ORT, aliases=("ort-plain",),
                description="onnxruntime without them"),
        Runtime("openvino", "open_vino:load", "onnx", packages=("openvino",), distribution="openvino",
                install="pip install 'foldexport[openvino]'", devices=("cpu",), aliases=("ov",), also=(".xml",),
                description="OpenVINO, in float32, for latency"),
        Runtime("onnxruntime-web", "onnx_web:load", "onnxruntime-web", packages=(), distribution="", install="", devices=("cpu",),
                aliases=("web", "ort-web"), by_default=False, description="onnxruntime-web: WebAssembly, under Node"),
        Runtime("executorch", "mobile:executorch", "executorch", packages=("executorch",), distribution="executorch",
                install="pip install 'foldexport[executorch]'", devices=("cpu",), aliases=("et", "pte"), by_default=False,
                description="ExecuTorch with XNNPACK"),
        Runtime("litert", "mobile:litert", "litert", packages=("litert_torch", "ai_edge_litert"), distribution="ai-edge-litert",
                install="pip install 'foldexport[litert]'", devices=("cpu",), aliases=("tflite", "tensorflow-lite"),
                by_default=False, description="LiteRT with XNNPACK"),
        Runtime("ncnn", "mobile:ncnn", "ncnn", packages=("ncnn", "pnnx"), distribution="ncnn",
                install="pip install 'foldexport[ncnn]'", devices=("cpu",), by_default=False, description="ncnn, sample by sample"),
        Runtime("tensorrt", "tensor_rt:load", "tensorrt", packages=(), distribution="", install="",
                devices=("cuda",), aliases=("trt",), transfers="included: inputs and outputs are copied", description="TensorRT"),
        Runtime("cudagraphs", "pytorch:cuda_graph", "module", **_TORCH, devices=("cuda",),
                aliases=("cudagraph", "cuda-graphs"), description="PyTorch, replayed as a CUDA graph"),
    )
}  # fmt: skip


def get(name: str) -> Runtime:
    """The runtime called ``name`` (a name or an alias, in any case). Raises UsageError with the nearest names."""
    wanted = name.strip().lower()
    for row in RUNTIMES.values():
        if wanted in (row.name, *row.aliases):
            return row
    near = difflib.get_close_matches(wanted, [each for row in RUNTIMES.values() for each in (row.name, *row.aliases)], n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"runtimes are {', '.join(RUNTIMES)}."
    raise UsageError(f"unknown runtime {name.strip()!r}: {hint}")


def resolve(names: str) -> tuple[Runtime, ...]:
    """The runtimes of a comma-separated list, in order, each once. Raises UsageError."""
    rows = [get(name) for name in names.split(",") if name.strip()]
    if not rows:
        raise UsageError(f"no runtime in {names!r}: give one or more of {', '.join(RUNTIMES)}, separated by commas.")
    return tuple(dict.fromkeys(rows))


def missing(row: Runtime, device: str) -> str:
    """What this runtime lacks on this machine, and what installs it; empty where nothing is. Imports it only for a GPU."""
    absent = [name for name in row.packages if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed: {row.install}"
    if row.reads in OTHERS:
        try:
            OTHERS[row.reads]()
        except MissingDependencyError as error:
            return str(error)
    if device == "cuda" or "cpu" not in row.devices:
        without = "" if not row.compiler or importlib.util.find_spec("triton") else "triton is not installed: pip install triton"
        return _no_gpu(row) or without
    if row.compiler and not compiler():
        return f"it {WANTED}"
    return ""


def unsuited(row: Runtime, device: str) -> str:
    """Why it does not run on a device at all; empty where it does."""
    if device in row.devices:
        return ""
    return f"runs on {' and '.join(row.devices)} only: pass --device {row.devices[0]}"


def version(row: Runtime) -> str:
    """ "onnxruntime 1.31.1": what runs it."""
    if row.reads == "tensorrt":
        flavour = _tensorrt()
        return f"{flavour.title} {flavour.version()}"
    if row.reads == node.PACKAGE:
        return f"{node.PACKAGE} {node.require().version}"
    for distribution in (row.distribution, f"{row.distribution}-gpu"):
        try:
            return f"{row.distribution} {importlib.metadata.version(distribution)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return row.distribution


def _tensorrt() -> Any:
    """The flavour of TensorRT that is installed. Raises MissingDependencyError."""
    from foldexport.exporters.tensorrt.flavour import choose
    from foldexport.exporters.tensorrt.options import TensorRTOptions

    return choose(TensorRTOptions())


#: Formats whose runtime no Python package is: what raises MissingDependencyError where it is not there.
OTHERS = {"tensorrt": _tensorrt, node.PACKAGE: node.require}


def _no_gpu(row: Runtime) -> str:
    if reason := environment.no_gpu():
        return reason if "cpu" in row.devices else f"{reason}; {row.name} runs on NVIDIA GPUs only"
    if row.distribution == "torch":
        from foldexport import device

        return device.why_not("cuda")
    if row.distribution == "onnxruntime":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "this onnxruntime has no CUDA in it: pip install onnxruntime-gpu in place of onnxruntime"
    return ""

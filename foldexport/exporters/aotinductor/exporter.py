"""AOTInductor packages, ``NAME.aoti.pt2``: the network compiled to one shared library that libtorch runs, with Python or without.

The library holds AVX2 code whatever the exporting processor has, and takes the number of threads from its host. Weights lie
beside it in one record, in the module's own bits. Source: PyTorch's "AOTInductor: Ahead-Of-Time Compilation" documentation.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from foldexport.artifact import sha256
from foldexport.errors import CheckpointError, EquivalenceError, MissingDependencyError, UsageError
from foldexport.exporters.aotinductor import package
from foldexport.exporters.aotinductor.compiler import compiler, require
from foldexport.exporters.options import FLOATS, ExportOptions
from foldexport.exporters.program import exported, leaves, outputs_of, silent
from foldexport.exporters.tensorrt import known
from foldexport.trace.exporting import quiet

X86 = ("x86_64", "AMD64")
#: Of x86 processors since 2013: AVX2 vectors, and no other instruction beyond that level either. Inductor's defaults are the
#: widest vectors and every instruction of the exporting processor.
PORTABLE: dict[str, Any] = {"cpp.simdlen": 256, "cpp.march": "x86-64-v3"}
SETTINGS: dict[str, Any] = {
    "cpp.dynamic_threads": True,  # else the exporting process's number of threads is compiled in
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "binary_blob",
    "aot_inductor.precompile_headers": False,  # one network is compiled, and they would stay behind
    "always_keep_tensor_constants": True,  # else short vectors become literals in the code, where nothing can read them back
    "joint_graph_constant_folding": False,  # else a bias of zeros is no weight any more
    "aot_inductor.enable_line_tables": False,  # which name source files
}


class AOTInductorExporter:
    """Plain eval-mode modules to AOTInductor packages for the CPU."""

    name = "aotinductor"
    suffix = ".aoti.pt2"

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}  # SHA-256 of the packages built here

    def export(self, module: nn.Module, example: tuple, path: str | Path, options: ExportOptions | None = None) -> dict[str, Any]:
        """Compile ``module`` to ``path``; equal modules give equal bytes with one compiler and one PyTorch.

        Returns notes for the manifest. Raises :class:`MissingDependencyError` without a C++ compiler, :class:`UsageError` for
        a network that cannot be compiled as asked, and :class:`PrecisionError` for another precision than fp32, fp16 and bf16.
        """
        options = options or ExportOptions()
        options.require_precision(self.name, FLOATS)
        require()
        path = Path(path)
        program = exported(self.name, module, example, options)
        outputs = outputs_of(program)
        with tempfile.TemporaryDirectory(prefix=package.PREFIX) as folder:
            raw = _compiled(program, Path(folder))
            package.rewrite(raw, path, Path(folder))
        self._known[path.resolve()] = sha256(path)
        return {
            "inputs": options.names("input", len(example)),
            "outputs": options.names("output", outputs),
            "processor": "x86-64-v3 (AVX2)" if platform.machine() in X86 else f"{platform.machine()}, as where it was exported",
            "torch": str(torch.__version__),
        }

    def load(self, path: str | Path, *, threads: int = 0) -> Callable[..., list[np.ndarray]]:
        """A callable that runs the package on the CPU, ``*arrays -> [arrays]``.

        threads: not a property of a loaded package, 0 only. Raises :class:`CheckpointError` for a file whose SHA-256 no manifest
        beside it names (it is executable code), :class:`EquivalenceError` when PyTorch refuses the file.
        """
        if threads:
            raise UsageError("aotinductor: threads belong to the process; call torch.set_num_threads instead.")
        network = opened(path, self._known.get(Path(path).resolve()))

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            with torch.inference_mode():
                return leaves(network(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)))

        return run

    def weights(self, path: str | Path) -> dict[str, np.ndarray]:
        """Every constant of the package, by name, in the file's own bits."""
        return package.weights(path)

    def runtime(self) -> str:
        """The runtime and its version, "AOTInductor 2.13.0"."""
        return f"AOTInductor {torch.__version__}"


def opened(path: str | Path, built: str | None = None) -> Callable:
    """The compiled network. built: the SHA-256 of a file that this process has made, which needs no manifest."""
    path = Path(path)
    digest = sha256(path)
    if digest != built:
        entry = known.entry(path)
        if entry is None or digest not in entry["sha256"]:
            what = "differs from the one in its manifest" if entry else f"is in no manifest beside it ({known.MANIFESTS})"
            raise CheckpointError(f"{path.name}: its SHA-256 {what}; a package is executable code, so it is not opened.")
    try:
        with silent(), quiet():
            return torch._inductor.aoti_load_package(str(path))
    except Exception as error:  # torch's C++ raises RuntimeError or its own types on a bad package
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise EquivalenceError(f"aotinductor: PyTorch {torch.__version__} refuses the file: {lines[0][:300]}") from error


def _compiled(program: ExportedProgram, folder: Path) -> Path:
    """The package as Inductor writes it, built in ``folder`` alone."""
    import torch._inductor
    from torch._inductor.utils import fresh_cache

    raw = folder / "network.pt2"
    settings = SETTINGS | (PORTABLE if platform.machine() in X86 else {})
    if "CXX" not in os.environ:  # which Inductor reads itself; without it, it knows g++ alone
        settings["cpp.cxx"] = (compiler(),)
    try:
        with silent(), quiet(), fresh_cache(dir=str(folder)):
            torch._inductor.aoti_compile_and_package(program, package_path=str(raw), inductor_configs=settings)
    except Exception as error:  # Inductor raises what it, sympy or the compiler met
        raise _failure(error) from error
    return raw


def _failure(error: Exception) -> Exception:
    text = f"{type(error).__name__}: {error}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if "CppCompileError" in text or "C++ compiler" in text:
        telling = [line for line in lines if "error:" in line] or lines
        return MissingDependencyError(f"aotinductor: the C++ compiler fails: {telling[0][:300]}")
    return UsageError(f"aotinductor: TorchInductor cannot compile this network: {lines[0][:300]}")

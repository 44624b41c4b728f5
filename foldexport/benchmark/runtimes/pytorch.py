"""PyTorch: eager, torch.compile, TorchScript and CUDA graphs. TF32 is off in all of them."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from foldexport.benchmark.runtimes import Ready
from foldexport.device import with_device

WARM_RUNS = 3  # in front of the capture of a CUDA graph, on a stream of their own, as PyTorch's notes on CUDA graphs ask


def eager(path: Path, arrays: Sequence[np.ndarray], threads: int, device: str) -> Ready:
    """The module itself."""
    inputs = _prepare(arrays, threads, device)
    return _ready(_module(path, device), inputs, device)


def compiled(path: Path, arrays: Sequence[np.ndarray], threads: int, device: str) -> Ready:
    """``torch.compile`` at its defaults, for these sizes only."""
    inputs = _prepare(arrays, threads, device)
    return _ready(torch.compile(_module(path, device), dynamic=False), inputs, device)


def torchscript(path: Path, arrays: Sequence[np.ndarray], threads: int, device: str) -> Ready:
    """The archive, frozen, as PyTorch recommends for inference."""
    inputs = _prepare(arrays, threads, device)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        loaded = torch.jit.load(str(path), map_location=device).eval()
        with contextlib.suppress(RuntimeError):  # frozen already
            loaded = torch.jit.freeze(loaded)
    return _ready(loaded, inputs, device)


def source(path: Path, arrays: Sequence[np.ndarray], threads: int, device: str) -> Ready:
    """The written network, whose source is read before it is run."""
    from foldexport.exporters.pytorch.exporter import require_network

    require_network(path)
    inputs = _prepare(arrays, threads, device)
    name = f"_foldexport_source_{path.stem}"
    _import_file(name, str(path))
    return _ready(sys.modules[name].load().to(device), inputs, device)


def exported(path: Path, arrays: Sequence[np.ndarray], threads: int, device: str) -> Ready:
    """The program of torch.export, operator after operator."""
    inputs = _prepare(arrays, threads, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = move_to_device_pass(torch.export.load(str(path)), device)
    return _ready(program.module(), inputs, device)


def ahead_of_time(path: Path, arrays: Sequence[np.ndarray], threads: int, device: str) -> Ready:
    """The package that AOTInductor compiled; refused where no manifest beside it names its hash."""
    from foldexport.exporters.aotinductor.exporter import opened

    inputs = _prepare(arrays, threads, device)
    return _ready(opened(path), inputs, device)


def cuda_graph(path: Path, arrays: Sequence[np.ndarray], threads: int, device: str) -> Ready:
    """The module's kernels, captured once and replayed.

    A replay reads inputs and weights at their old addresses, and a graph does not keep alive what it reads.
    """
    inputs, module = _prepare(arrays, threads, device), _module(path, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(side):
        for _ in range(WARM_RUNS):
            module(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        result = module(*inputs)

    def run(_reads: Any = (module, inputs)) -> Any:  # held, else their memory would be the next network's
        graph.replay()
        torch.cuda.synchronize()
        return result

    return Ready(run, _arrays)


def _prepare(arrays: Sequence[np.ndarray], threads: int, device: str) -> list[Tensor]:
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    return [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays]


def _ready(module: Callable, inputs: Sequence[Tensor], device: str) -> Ready:
    wait = torch.cuda.synchronize if device == "cuda" else None

    def run() -> Any:
        with torch.inference_mode():
            result = module(*inputs)
        if wait is not None:
            wait()
        return result

    return Ready(run, _arrays)


def _arrays(result: Any) -> list[np.ndarray]:
    return [value.detach().cpu().numpy().copy() for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]


def _module(path: Path, device: str) -> Callable:
    """What `transport.save` wrote: a pickled module with the places of its classes, or an exported program."""
    if path.suffix == ".pt2":
        return move_to_device_pass(torch.export.load(path), device).module()
    # The file was written by the process that started this one.
    record = torch.load(path, map_location="cpu", weights_only=False)
    for folder in record["folders"]:
        if folder not in sys.path:
            sys.path.append(folder)
    for name, file in record["files"].items():
        _import_file(name, file)
    module = torch.load(path.with_suffix(".module"), map_location="cpu", weights_only=False)
    return with_device(module.eval(), device).to(device)


def _import_file(name: str, file: str) -> None:
    found = importlib.util.spec_from_file_location(name, file)
    if found is None or found.loader is None:
        return
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)

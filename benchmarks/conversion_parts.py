"""Parts of `conversion.py` that need torch, each run in a fresh process: prints one JSON object.

    python conversion_parts.py PART '{"network": …}'

Every part alternates what it compares, A B A B …, and gives one number per round for each.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import io
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import torch
from conversion_report import PROOF
from torch import nn
from torch.fx.experimental.optimization import fuse

from foldexport.fold.passes import fold_graph
from foldexport.fold.rebuild import rebuild
from foldexport.trace import Graph, trace

KILOBYTE = 1024
FORWARDS = 5  # float64 passes before and after each proof, of which the median counts
SMALL = 8  # height and width at which networks are traced whose number of layers matters


def fold_stage(graph: Graph) -> nn.Module:
    """Traced graph → folded module with its weights in float32."""
    with torch.no_grad():
        return rebuild(fold_graph(graph)).to(torch.float32)


def checkpoint(network: str, path: str) -> dict[str, Any]:
    """Draw a network's weights and write them, as users do; says how many bytes they are."""
    module = networks.randomise(getattr(networks, network)())
    torch.save(module.state_dict(), path)
    return {"weight_bytes": weight_bytes(module), "threads": torch.get_num_threads()}


def fold(network: str, shape: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of the fold stage and of torch.fx's fuse on the same module."""
    module = networks.randomise(getattr(networks, network)())
    graph = trace(module, torch.randn(_sizes(shape)))
    return _alternate({"fold": lambda: fold_stage(graph), "fuse": lambda: fuse(module)}, rounds)


def layers(network: str, counts: list[int], rounds: int) -> dict[str, list[float]]:
    """Seconds of the fold stage per layer, at each number of layers."""
    graphs = {}
    for count in counts:
        module = networks.randomise(getattr(networks, network)(count))
        graphs[count] = trace(module, torch.randn(1, 3, SMALL, SMALL))
    calls = {str(count): (lambda graph=graph: fold_stage(graph)) for count, graph in graphs.items()}
    return {name: [value / int(name) for value in found] for name, found in _alternate(calls, rounds).items()}


def proof(network: str, shape: str, path: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of a command's proof stages, and of one float64 forward pass at batch 1 before and after it."""
    from foldexport import pipeline
    from foldexport.exporters import resolve

    module = getattr(networks, network)()
    module.load_state_dict(torch.load(path, weights_only=True))
    module = copy.deepcopy(module).eval().double()
    sizes = _sizes(shape)
    x = torch.randn(1, *sizes[1:], dtype=torch.float64)
    question = pipeline.Question(Path(path), arch=f"{networks.__file__}:{network}", input_shapes=(sizes,))
    order = pipeline.Order(tuple(resolve("onnx")), output=f"{path}.proof/", overwrite=True)
    found: dict[str, list[float]] = {"proof": [], "forward": [], **{name: [] for name in PROOF}}
    for _ in range(rounds):
        forwards = _forwards(module, x)
        with contextlib.redirect_stdout(io.StringIO()):
            seconds = pipeline.convert(question, order).manifest["seconds"]
        forwards += _forwards(module, x)
        found["forward"].append(statistics.median(forwards))
        found["proof"].append(sum(seconds[name] for name in PROOF))
        for name in PROOF:
            found[name].append(seconds[name])
    return found


def fold_memory(network: str, shape: str, subject: str) -> dict[str, Any]:
    """Bytes by which the peak of resident memory grows over the state before the fold stage, or torch.fx's fuse."""
    module = networks.randomise(getattr(networks, network)())
    graph = trace(module, torch.randn(_sizes(shape)))
    before = _reset_peak()
    kept = fold_stage(graph) if subject == "fold" else fuse(module)
    grown = _peak() - before
    return {"grown_bytes": grown, "weight_bytes": weight_bytes(kept)}


def weight_bytes(module: nn.Module) -> int:
    """Of parameters and floating-point buffers."""
    tensors = [value for value in module.state_dict().values() if value.is_floating_point()]
    return sum(value.numel() * value.element_size() for value in tensors)


def _alternate(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, once per round in turn, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            gc.collect()
            began = time.perf_counter()
            call()
            seconds = time.perf_counter() - began
            if turn:
                found[name].append(seconds)
    return found


@torch.no_grad()
def _forwards(module: nn.Module, x: torch.Tensor) -> list[float]:
    module(x)
    found = []
    for _ in range(FORWARDS):
        began = time.perf_counter()
        module(x)
        found.append(time.perf_counter() - began)
    return found


def _reset_peak() -> int:
    """Forget the peak so far; returns the bytes that are resident now.

    Memory that was freed but not handed back would hide growth, so it is handed back first. Where the kernel does not
    let a process reset its peak (proc(5), ``clear_refs``), growth is what goes beyond the old one: too small.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS") or _peak()


def _peak() -> int:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE


def _status(name: str) -> int:
    """Bytes of one field of /proc/self/status; 0 where there is none."""
    path = Path("/proc/self/status")
    lines = path.read_text(encoding="ascii").splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * KILOBYTE for line in lines if line.startswith(f"{name}:")), 0)


def _sizes(shape: str) -> tuple[int, ...]:
    return tuple(int(size) for size in shape.split("x"))


PARTS = {each.__name__: each for each in (checkpoint, fold, layers, proof, fold_memory)}

if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]](**json.loads(sys.argv[2]))))

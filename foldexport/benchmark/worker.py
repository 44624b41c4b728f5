"""One process of a measurement: ``python -m foldexport.benchmark.worker TASK.json``, started by `processes`.

It loads every variant in the order given, keeps the first outputs for the comparison, warms up, times rounds and writes what
it found beside the task. Nothing is imported that the asked runtimes do not need.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foldexport.benchmark import environment, gpu
from foldexport.benchmark.measure import measure
from foldexport.benchmark.runtimes import RUNTIMES, Ready

MEMORY_RUNS = 3


@dataclass(frozen=True)
class Task:
    """What one process does.

    variants: ``(runtime, file)`` each.   order: in which they are loaded.   inputs: an .npz of the arrays, in order.
    outputs: where the first outputs go (.npz), "" for nowhere.   latencies: where ``[rounds, variants]`` go (.npz),
    "" where only loading and memory are measured.   result: where the rest goes (.json).
    """

    variants: list[tuple[str, str]]
    order: list[int]
    inputs: str
    outputs: str
    latencies: str
    result: str
    threads: int
    device: str
    seconds: float
    rounds: int | None
    seed: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main(path: str) -> None:
    task = Task(**json.loads(Path(path).read_text(encoding="utf-8")))
    found = _work(task)
    Path(task.result).write_text(json.dumps(found), encoding="utf-8")


def _work(task: Task) -> dict[str, Any]:
    with np.load(task.inputs) as stored:
        arrays = [stored[name] for name in stored.files]
    loads = {name: RUNTIMES[name].load for name, _ in task.variants}
    before_bytes = environment.peak_memory_bytes()
    ready: list[Ready | None] = [None] * len(task.variants)
    first: list[list[np.ndarray]] = [[] for _ in task.variants]
    load_s = [0.0] * len(task.variants)
    for place in task.order:
        runtime, file = task.variants[place]
        began = time.perf_counter()
        try:
            ready[place] = loads[runtime](Path(file), arrays, task.threads, task.device)
            result = ready[place].run()
        except Exception as error:  # every runtime has exceptions of its own; the variant is the news
            return {"failed": {"variant": place, "reason": _reason(error)}}
        load_s[place] = time.perf_counter() - began
        first[place] = ready[place].outputs(result)
    if task.outputs:
        np.savez(task.outputs, **{f"{v}_{i}": array for v, outputs in enumerate(first) for i, array in enumerate(outputs)})
    found: dict[str, Any] = {"load_s": load_s, "clocks_mhz": [environment.clocks_mhz()]}
    runs = [each.run for each in ready if each is not None]
    if task.latencies:
        measured = measure(
            runs, seconds=task.seconds, rounds=task.rounds, seed=task.seed, interruptions=environment.interruptions
        )
        found["gpu"] = gpu.reading() if task.device == "cuda" else None  # at once: it slows down when it has nothing to do
        np.savez(task.latencies, latencies_s=measured.latencies_s, disturbed=measured.disturbed)
        found |= {"warmup_rounds": measured.warmup_rounds, "steady": measured.steady}
    else:
        for _ in range(MEMORY_RUNS):
            runs[0]()
    found["clocks_mhz"].append(environment.clocks_mhz())
    peak = environment.peak_memory_bytes()
    return found | {"peak_bytes": peak, "above_libraries_bytes": peak - before_bytes, "device_bytes": _device_bytes(task)}


def _device_bytes(task: Task) -> int | None:
    """What the GPU's memory held at most: PyTorch's own where it ran the network, else what is taken now."""
    if task.device != "cuda" or "torch" not in sys.modules:
        return None
    import torch

    if all(RUNTIMES[name].distribution == "torch" for name, _ in task.variants):
        return int(torch.cuda.max_memory_allocated())
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


if __name__ == "__main__":
    main(sys.argv[1])

"""The processes of a measurement, one after the other: each with fresh memory, so that layout is drawn anew."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from foldexport.benchmark.worker import Task
from foldexport.errors import FoldexportError

WORKER = "foldexport.benchmark.worker"
PADDING_BYTES = 4096  # of the environment, drawn: it moves the stack (Mytkowicz et al. 2009)


class VariantFailed(Exception):
    """A runtime could not load or run a variant."""

    def __init__(self, variant: int, reason: str) -> None:
        super().__init__(reason)
        self.variant = variant


@dataclass(eq=False)
class Samples:
    """What the processes of one comparison found.

    latencies_s, disturbed: per process ``[rounds, variants]``.   records: per process what the worker wrote beside.
    alone: per variant, from a process of its own; empty where memory was not asked for.
    """

    latencies_s: list[np.ndarray] = field(default_factory=list)
    disturbed: list[np.ndarray] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    alone: list[dict[str, Any]] = field(default_factory=list)


def plan(task: Task, count: int, seed: int) -> list[Task]:
    """The tasks of ``count`` processes: every order of loading equally often, as far as ``count`` allows."""
    generator = random.Random(seed)
    places = list(range(len(task.variants)))
    start = generator.randrange(len(places))
    orders = []
    for place in range(count):
        turn = (start + place) % len(places)
        rest = places[:turn] + places[turn + 1 :]
        generator.shuffle(rest)
        orders.append([turn, *rest])
    return [
        dataclasses.replace(task, order=order, seed=generator.randrange(2**31), seconds=task.seconds / count)
        for order in orders
    ]


def run(task: Task, folder: Path, name: str, environ: dict[str, str] | None = None) -> tuple[dict[str, Any], Task]:
    """Run one process: what it wrote, and the task with its files in place.

    Raises VariantFailed where a variant does not load or run, and FoldexportError where the process ended otherwise.
    """
    placed = dataclasses.replace(
        task, outputs=str(folder / f"{name}.outputs.npz") if task.outputs else "",
        latencies=str(folder / f"{name}.latencies.npz") if task.latencies else "", result=str(folder / f"{name}.json"),
    )  # fmt: skip
    file = folder / f"{name}.task.json"
    file.write_text(placed.to_json(), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", WORKER, str(file)], env=_environ(placed, environ or {}), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    if done.returncode or not Path(placed.result).is_file():
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["nothing was said"]
        if done.returncode < 0:
            raise VariantFailed(task.order[0], f"its process was ended by signal {-done.returncode} ({last[0][:200]})")
        raise FoldexportError(f"a process of the benchmark ended with code {done.returncode}: {last[0][:300]}")
    record = json.loads(Path(placed.result).read_text(encoding="utf-8"))
    if "failed" in record:
        raise VariantFailed(record["failed"]["variant"], record["failed"]["reason"])
    return record, placed


def outputs_of(task: Task) -> list[list[np.ndarray]]:
    """Per variant, what it computed first."""
    with np.load(task.outputs) as stored:
        names = [[name for name in stored.files if name.split("_")[0] == str(v)] for v in range(len(task.variants))]
        return [[stored[name] for name in sorted(each, key=lambda name: int(name.split("_")[1]))] for each in names]


def latencies_of(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """``[rounds, variants]`` seconds, and whether each run was disturbed."""
    with np.load(task.latencies) as stored:
        return stored["latencies_s"], stored["disturbed"]


def alone(task: Task, variant: int) -> Task:
    """A task that loads and runs one variant only, for its outputs and its memory."""
    return dataclasses.replace(task, variants=[task.variants[variant]], order=[0], latencies="")


def _environ(task: Task, more: dict[str, str]) -> dict[str, str]:
    threads = str(task.threads)
    given = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "NVIDIA_TF32_OVERRIDE": "0"}
    padding = "x" * random.Random(task.seed).randrange(PADDING_BYTES)
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **given, **more, "FOLDEXPORT_LAYOUT": padding}

"""Latencies drawn from a model of a busy machine: every nuisance that a benchmark has to live with, and a known ratio."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Machine:
    """Relative sizes of what disturbs a latency.

    noise: of a single run.   memory: of the noise that a run shares with the one before, AR(1).   layout: of a process, drawn
    for each variant.   drift: along the whole benchmark, both variants alike.   late: share of runs that take ten times as long.
    """

    noise: float = 0.03
    memory: float = 0.0
    layout: float = 0.0
    drift: float = 0.0
    late: float = 0.0


def pairs(ratio: float, machine: Machine, generator: np.random.Generator, processes: int = 6, rounds: int = 40) -> list:
    """``(variant, baseline)`` of every process, milliseconds."""
    found = []
    for process in range(processes):
        time = (process + np.linspace(0, 1, rounds)) / processes
        shared = machine.drift * time + autocorrelated(machine.noise if machine.memory else 0.0, machine.memory, rounds, generator)
        both = []
        for factor in (ratio, 1.0):
            own = autocorrelated(machine.noise, machine.memory, rounds, generator) + machine.layout * generator.normal()
            late = np.where(generator.random(rounds) < machine.late, np.log(10.0), 0.0)
            both.append(2.0 * factor * np.exp(shared + own + late))
        found.append((both[0], both[1]))
    return found


def autocorrelated(size: float, memory: float, count: int, generator: np.random.Generator) -> np.ndarray:
    """AR(1) of the given deviation, begun in its own distribution."""
    steps = size * generator.normal(size=count)
    values = np.empty(count)
    values[0] = steps[0]
    for place in range(1, count):
        values[place] = memory * values[place - 1] + np.sqrt(1 - memory**2) * steps[place]
    return values

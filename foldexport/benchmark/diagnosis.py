"""What is wrong with a measurement, in sentences: outliers, drift, two levels, clocks, a busy machine. Numbers in, text out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

OUTLIER = 1.5  # times the process's median
MANY_OUTLIERS = 0.02  # of the runs
DRIFTED = 0.05  # from the fastest to the slowest process, or along a process
CLOCK_RANGE = 0.05
SEPARATED = 3.0  # Ashman's D of two levels; 2 is clean (Ashman, Bird and Zepf 1994)
APART = 0.08  # of their means
FEWEST_IN_LEVEL = 0.15  # share of the runs
ENOUGH_RUNS = 40


def findings(name: str, processes: Sequence[np.ndarray]) -> list[str]:
    """About one variant: its latencies ``[rounds]`` of every process, in the order in which they ran."""
    found = []
    medians = np.array([np.median(each) for each in processes])
    late = np.concatenate([each / median > OUTLIER for each, median in zip(processes, medians, strict=True)])
    if late.mean() > MANY_OUTLIERS:
        found.append(f"{name}: {_percent(late.mean())} of the runs took more than {OUTLIER:g} times the median")
    spread = float(medians.max() / medians.min()) - 1
    if spread > DRIFTED:
        trend = "later ones slower" if _rises(medians) else "later ones faster" if _rises(-medians) else "in no order"
        found.append(f"{name}: the medians of the processes lie {_percent(spread)} apart, {trend}")
    if (along := _drift(processes)) is not None and abs(along) > DRIFTED:
        found.append(f"{name}: latency {'rose' if along > 0 else 'fell'} by {_percent(abs(along))} while it was measured")
    levels = two_levels(np.concatenate([each / median for each, median in zip(processes, medians, strict=True)]))
    if levels is not None:
        low, high, share = levels
        found.append(f"{name}: two levels, {_percent(share)} of the runs {_percent(high / low - 1)} slower than the others")
    return found


def clock_findings(readings_mhz: Sequence[Sequence[float]]) -> list[str]:
    """About the clocks read before and after every process, ``[readings][cores]``."""
    every = [value for reading in readings_mhz for value in reading]
    if not every or max(every) <= (1 + CLOCK_RANGE) * min(every):
        return []
    return [f"clocks between {min(every):.0f} and {max(every):.0f} MHz: fix them for closer intervals"]


def gpu_findings(readings: Sequence[Mapping[str, Any]]) -> list[str]:
    """About the GPU's clock at the end of every process (`foldexport.benchmark.gpu`)."""
    if not readings:
        return ["the GPU's clock is not known: pip install nvidia-ml-py"]
    clocks = [reading["sm_mhz"] for reading in readings]
    held = Counter(each for reading in readings for each in reading["held_by"])
    found = [f"the GPU was held down by {each} in {count} of {len(readings)} processes" for each, count in held.items()]
    if max(clocks) > (1 + CLOCK_RANGE) * min(clocks):
        found.append(f"the GPU's clock was between {min(clocks)} and {max(clocks)} MHz: fix it with nvidia-smi --lock-gpu-clocks")
    return found


def load_findings(load_average: float | None, cores: int, threads: int) -> list[str]:
    """About other work on the machine, from the load average before the measurement began, and more threads than cores."""
    found = []
    if threads > cores:
        found.append(f"{threads} threads on {_cores(cores)} take turns, which is slower than --threads {cores}")
    if load_average is None or load_average + min(threads, cores) <= cores + 0.5:
        return found
    return found + [f"load average {load_average:.1f} on {_cores(cores)} before it began: other work ran on this machine"]


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def two_levels(values: np.ndarray) -> tuple[float, float, float] | None:
    """(lower mean, upper mean, share of the upper) where the values lie at two clearly separated levels, else None.

    Logarithms are split where the variance within both parts is least (Otsu 1979); Ashman's D tells the levels apart. The
    farthest hundredth on both sides is left out.
    """
    logs = np.sort(np.log(values))
    logs = logs[len(logs) // 100 : len(logs) - len(logs) // 100]
    count = len(logs)
    if count < ENOUGH_RUNS:
        return None
    sums, squares, below = np.cumsum(logs)[:-1], np.cumsum(logs**2)[:-1], np.arange(1, count)
    total, total_squares, above = logs.sum(), (logs**2).sum(), count - below
    within = squares - sums**2 / below + (total_squares - squares) - (total - sums) ** 2 / above
    cut = int(np.argmin(within)) + 1
    low, high = logs[:cut], logs[cut:]
    apart = float(high.mean() - low.mean())
    distance = math.sqrt(2) * apart / math.sqrt(max(float(low.var() + high.var()), 1e-18))
    if distance < SEPARATED or apart < APART or not FEWEST_IN_LEVEL <= len(high) / count <= 1 - FEWEST_IN_LEVEL:
        return None
    return math.exp(low.mean()), math.exp(high.mean()), len(high) / count


def _drift(processes: Sequence[np.ndarray]) -> float | None:
    """Relative change from the first to the last third of the rounds, the median over processes; None for few rounds."""
    changes = []
    for each in processes:
        third = len(each) // 3
        if third >= 5:
            changes.append(math.log(np.median(each[-third:]) / np.median(each[:third])))
    return math.expm1(float(np.median(changes))) if changes else None


def _rises(values: np.ndarray) -> bool:
    """Whether later values are larger, most of the time (Kendall's tau above one half)."""
    signs = [np.sign(values[j] - values[i]) for i in range(len(values)) for j in range(i + 1, len(values))]
    return bool(signs) and float(np.mean(signs)) > 0.5


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0095 else f"{100 * share:.1f} %"

"""How much slower one variant is than another, with an interval that holds although latencies are not independent.

Latencies of one process follow each other (caches, clocks, other work on the machine), so an ordinary bootstrap over runs
gives intervals that are far too narrow; and where the loader put a network's weights makes a whole process systematically
faster or slower, which no number of runs in that process can show. So the unit is the process. With the latencies
a_si, b_si of round i in process s, measured right after each other in an order drawn for each round,

    d_s = median_i log(b_si / a_si)         ratio = exp(mean_s d_s)

    reach = max( t(P − 1) · sd_s(d_s) / √P,  z · √(Σ_s se_s²) / P )         log ratio ± reach

sd_s is the deviation over the P processes, with everything in it; se_s is the standard error of d_s from a circular block
bootstrap over the rounds of process s, which keeps P processes that agree by luck from claiming too much; t and z are the
quantiles of Student's and the normal distribution. One report makes k such comparisons; at the level 1 − (1 − level) / k
each, all of its intervals hold together with `level` at least, whatever their dependence (Bonferroni; Dunn, Multiple
Comparisons Among Means, JASA 1961). Sources: Kalibera
and Jones, Rigorous Benchmarking in Reasonable Time, ISMM 2013 (repetition at the highest level that varies); Georges, Buytaert
and Eeckhout, OOPSLA 2007 (Student's t over process invocations); Mytkowicz et al., ASPLOS 2009 (layout); Politis and Romano
1992 (circular block bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

LEVEL = 0.99
RESAMPLES = 200
FEWEST_FOR_P99 = 500  # runs: five of them lie above it; of a hundred one does, which any late run is
NOISY_ABOVE = 2.0  # the upper end of an interval over the lower one
FEWEST_UNDISTURBED = 5  # rounds of a process


@dataclass(frozen=True)
class Ratio:
    """Latency of a variant over that of the baseline: below 1 it is faster.

    low, high: of the interval at ``level``.         processes, rounds: behind it, the rounds of all processes together.
    between, within: the standard errors of the log ratio, from the spread over processes and from block resampling.
    """

    value: float
    low: float
    high: float
    level: float
    processes: int
    rounds: int
    between: float
    within: float

    @property
    def measurable(self) -> bool:
        """Whether the interval leaves out 1."""
        return not self.low <= 1.0 <= self.high

    @property
    def noisy(self) -> bool:
        """Whether the interval holds 1 and is so wide that it says nothing, not that there is no difference."""
        return not self.measurable and not self.high <= NOISY_ABOVE * self.low

    def at(self, level: float) -> Ratio:
        """The same measurement with its interval at another level."""
        reach = _reach(self.between, self.within, self.processes, level)
        return replace(self, low=self.value * math.exp(-reach), high=self.value * _exp(reach), level=level)


@dataclass(frozen=True)
class Latency:
    """Of all timed runs of a variant, in milliseconds. p99: None under `FEWEST_FOR_P99` runs."""

    median_ms: float
    p90_ms: float
    p99_ms: float | None
    fastest_ms: float
    runs: int


def ratio(pairs: Sequence[tuple[np.ndarray, np.ndarray]], level: float = LEVEL, seed: int = 0) -> Ratio:
    """The ratio of a variant to the baseline from ``(variant, baseline)`` of every process, each ``[rounds]``, any unit.

    With one process the interval knows of that process only. Raises ValueError without rounds.
    """
    if not pairs or any(len(variant) == 0 or len(variant) != len(baseline) for variant, baseline in pairs):
        raise ValueError("wanted as many latencies of the variant as of the baseline, at least one, in every process")
    generator = np.random.default_rng(seed)
    logs = [np.log(np.asarray(variant, float) / np.asarray(baseline, float)) for variant, baseline in pairs]
    medians = np.array([np.median(each) for each in logs])
    count = len(medians)
    within = math.sqrt(sum(median_error(each, generator) ** 2 for each in logs)) / count
    between = float(medians.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    reach = _reach(between, within, count, level)
    centre = float(medians.mean())
    rounds = sum(map(len, logs))
    return Ratio(
        math.exp(centre), math.exp(centre - reach), _exp(centre + reach), level, count, rounds, between, within
    )


def together(level: float, comparisons: int) -> float:
    """The level of each of several intervals that are all to hold with ``level`` (Bonferroni)."""
    return 1 - (1 - level) / max(1, comparisons)


def _reach(between: float, within: float, processes: int, level: float) -> float:
    reach = normal(level) * within
    return max(reach, student(level, processes - 1) * between) if processes > 1 else reach


def undisturbed(latencies: np.ndarray, disturbed: np.ndarray) -> np.ndarray:
    """The rounds ``[rounds, variants]`` in which no run was taken off its core; all where fewer than `FEWEST_UNDISTURBED` are.

    A run that was interrupted tells how long other work took. Only ratios leave it out: quantiles have every run in them.
    """
    clean = latencies[~disturbed.any(axis=1)]
    return clean if len(clean) >= FEWEST_UNDISTURBED else latencies


def latency(values_ms: np.ndarray) -> Latency:
    """What is told of one variant's latencies, all processes together."""
    values = np.asarray(values_ms, float)
    median, p90, p99 = (float(each) for each in np.quantile(values, (0.5, 0.9, 0.99)))
    enough = len(values) >= FEWEST_FOR_P99
    return Latency(median, p90, p99 if enough else None, float(values.min()), len(values))


def median_error(values: np.ndarray, generator: np.random.Generator, resamples: int = RESAMPLES) -> float:
    """Standard error of the median of a series ``[N]`` whose neighbours depend on each other: circular block bootstrap."""
    count = len(values)
    length = block_length(count)
    starts = generator.integers(0, count, (resamples, math.ceil(count / length)))
    drawn = (starts[:, :, None] + np.arange(length)).reshape(resamples, -1)[:, :count] % count
    return float(np.median(values[drawn], axis=1).std(ddof=1)) if count > 1 else 0.0


def block_length(count: int) -> int:
    """Rounds of one block: twice the cube root of their number, the rate at which the estimate's error is least."""
    return max(1, min(count, round(2 * count ** (1 / 3))))


def normal(level: float) -> float:
    """The z with ``P(|Z| ≤ z) = level``."""
    return NormalDist().inv_cdf((1 + level) / 2)


def student(level: float, freedom: int) -> float:
    """The t with ``P(|T| ≤ t) = level`` for ``freedom`` degrees of freedom, by bisection."""
    low, high = 0.0, 1.0
    while _student_within(high, freedom) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, freedom) < level else (low, middle)
    return high


def _student_within(t: float, freedom: int) -> float:
    """``P(|T| ≤ t)`` as a finite sum (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle) ** 2
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(1, (freedom - 1) // 2 if odd else freedom // 2):
        term *= cosine * (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf

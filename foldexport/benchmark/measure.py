"""Latencies of callables, taken in turn: a warm-up until they are steady, then rounds in an order drawn for each.

Imports numpy and nothing else: it runs where memory and imports count.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

STEADY = 0.02  # medians of two windows that follow each other differ by less
WINDOW_S = 0.02  # that a window of the warm-up should last at least
FEWEST_IN_WINDOW, MOST_IN_WINDOW = 3, 50  # rounds
SLOW_S = 0.1  # windows of slower rounds are one round each
FEWEST_ROUNDS, MOST_ROUNDS = 5, 4000  # timed, of one process
ENOUGH_UNDISTURBED = 20  # rounds; for fewer the time is exceeded, at most
PATIENCE = 3  # times
SETTLES_BELOW_S = 0.01  # a faster network is run once untimed first: the other one has just emptied the caches


@dataclass(frozen=True)
class Measured:
    """latencies_s: ``[rounds, variants]``. disturbed: of the same shape, whether the process was taken off its core meanwhile.

    warmup_rounds; steady: whether the warm-up ended because latencies agreed.
    """

    latencies_s: np.ndarray
    disturbed: np.ndarray
    warmup_rounds: int
    steady: bool


def measure(
    runs: Sequence[Callable[[], object]],
    *,
    seconds: float,
    rounds: int | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    interruptions: Callable[[], int] = lambda: 0,
) -> Measured:
    """Time ``runs`` against one another for about ``seconds``, or for exactly ``rounds`` rounds.

    Each runs once in every round. At least `FEWEST_ROUNDS` rounds are made, however long they last, and where other work
    interrupts many of them, up to `PATIENCE` times as many seconds are spent. clock: in seconds. interruptions: how often the
    system has taken the process off its core so far.
    """
    generator = np.random.default_rng(seed)
    began = clock()
    warmup, steady, settles = _warm_up(runs, seconds / 3, generator, clock)
    left = max(seconds - (clock() - began), seconds / 2)
    count = rounds or MOST_ROUNDS
    started, undisturbed = clock(), 0
    taken: list[tuple[np.ndarray, np.ndarray]] = []

    def enough() -> bool:
        if rounds or len(taken) < FEWEST_ROUNDS:
            return False
        spent = clock() - started
        disturbed = len(taken) - undisturbed
        return spent > left * (PATIENCE if undisturbed < ENOUGH_UNDISTURBED and disturbed > undisturbed / 2 else 1)

    collecting = gc.isenabled()
    gc.disable()
    try:
        while len(taken) < count and not enough():
            taken.append(one_round(runs, generator, settles, clock, interruptions))
            undisturbed += not taken[-1][1].any()
    finally:
        if collecting:
            gc.enable()
    latencies, disturbed = (np.array(each) for each in zip(*taken, strict=True))
    return Measured(latencies, disturbed > 0, warmup, steady)


def one_round(
    runs: Sequence[Callable[[], object]],
    generator: np.random.Generator,
    settles: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    interruptions: Callable[[], int] = lambda: 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each run and its interruptions, ``[variants]``, in an order drawn anew. settles: each once untimed before."""
    taken, disturbed = np.empty(len(runs)), np.empty(len(runs))
    for place in generator.permutation(len(runs)):
        if settles:
            runs[place]()
        before = interruptions()
        began = clock()
        runs[place]()
        taken[place] = clock() - began
        disturbed[place] = interruptions() - before
    return taken, disturbed


def _warm_up(
    runs: Sequence[Callable[[], object]], seconds: float, generator: np.random.Generator, clock: Callable[[], float]
) -> tuple[int, bool, bool]:
    """Run until the medians of two windows agree, at most about ``seconds``: (rounds, steady, settles)."""
    one_round(runs, generator, clock=clock)  # what a first run allocates says nothing about the second
    began = clock()
    slowest = float(one_round(runs, generator, clock=clock)[0].max())
    settles = slowest < SETTLES_BELOW_S
    once = max(clock() - began, 1e-9) * (2 if settles else 1)
    window = min(MOST_IN_WINDOW, max(FEWEST_IN_WINDOW if once < SLOW_S else 1, math.ceil(WINDOW_S / once)))
    before, done, end = None, 2, began + seconds
    while True:
        medians = np.median([one_round(runs, generator, settles, clock)[0] for _ in range(window)], axis=0)
        done += window
        if before is not None and steady(medians, before):
            return done, True, settles
        if before is not None and clock() >= end:
            return done, False, settles
        before = medians


def steady(medians: np.ndarray, before: np.ndarray) -> bool:
    """Whether every variant's median is within `STEADY` of the last window's."""
    return bool(np.all(np.abs(np.log(medians / before)) < STEADY))

"""Latencies of several ONNX files under onnxruntime, taken in turn, as ratios with a bootstrap confidence interval."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort


def sessions(files: Mapping[str, Path], threads: int = 1) -> dict[str, ort.InferenceSession]:
    """A CPU session of every file, with onnxruntime's own optimisations."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return {name: ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]) for name, path in files.items()}


def latencies_ms(
    found: Mapping[str, ort.InferenceSession], inputs: np.ndarray, rounds: int, warmup: int = 10
) -> dict[str, np.ndarray]:
    """``[rounds]`` milliseconds of each session; in every round each runs once, in an order drawn anew."""
    order, generator = list(found), np.random.default_rng(0)
    feeds = {name: {session.get_inputs()[0].name: inputs} for name, session in found.items()}
    taken: dict[str, list[float]] = {name: [] for name in found}
    for round_ in range(warmup + rounds):
        generator.shuffle(order)
        for name in order:
            began = time.perf_counter()
            found[name].run(None, feeds[name])
            if round_ >= warmup:
                taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: np.array(values) for name, values in taken.items()}


def ratio(values: np.ndarray, baseline: np.ndarray, samples: int = 2000, level: float = 0.95) -> tuple[float, float, float]:
    """Ratio of the medians, and its bootstrap interval: rounds are drawn again, both of a round together."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(values), (samples, len(values)))
    ratios = np.median(values[drawn], axis=1) / np.median(baseline[drawn], axis=1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(np.median(values) / np.median(baseline)), float(low), float(high)

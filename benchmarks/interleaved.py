"""Latencies of several ONNX files under onnxruntime, taken in turn in one process, as ratios with a confidence interval.

The parts are those of ``foldexport bench``. One process only: how memory happens to be laid out is not averaged out, which
``foldexport bench a.onnx b.onnx`` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort

from foldexport.benchmark import statistics
from foldexport.benchmark.measure import one_round
from foldexport.benchmark.runtimes.onnx_runtime import session


def sessions(files: Mapping[str, Path], threads: int = 1) -> dict[str, ort.InferenceSession]:
    """A CPU session of every file, with onnxruntime's own optimisations."""
    return {name: session(path, threads) for name, path in files.items()}


def latencies_ms(
    found: Mapping[str, ort.InferenceSession], inputs: np.ndarray, rounds: int, warmup: int = 10
) -> dict[str, np.ndarray]:
    """``[rounds]`` milliseconds of each session; in every round each runs once, in an order drawn anew."""
    generator = np.random.default_rng(0)
    runs = [partial(each.run, None, {each.get_inputs()[0].name: inputs}) for each in found.values()]
    for _ in range(warmup):
        one_round(runs, generator)
    taken = np.array([one_round(runs, generator)[0] for _ in range(rounds)]).reshape(rounds, len(runs))
    return dict(zip(found, 1e3 * taken.T, strict=True))


def ratio(values: np.ndarray, baseline: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """The median ratio over rounds, and its interval from a block bootstrap over the rounds of this one process."""
    found = statistics.ratio([(values, baseline)], level)
    return found.value, found.low, found.high

"""A benchmark's records from drawn samples, for what shows them."""

from __future__ import annotations

import numpy as np

from foldexport.benchmark import environment, statistics
from foldexport.benchmark.timing import Entry, Measurement, Timing
from tests.benchmark.simulated import Machine, pairs

NAMES = ("unfolded", "folded")


def measurement(runtime: str = "onnxruntime", ratio: float = 0.8, batch: int = 1, base_ms: float = 2.0, **more) -> Measurement:
    """Six processes of forty rounds."""
    drawn = pairs(ratio, Machine(layout=0.005), np.random.default_rng(0))
    samples = [base_ms / 2e3 * np.stack([baseline, variant], axis=1) for variant, baseline in drawn]
    entries = []
    for place, name in enumerate(NAMES):
        found = statistics.latency(1e3 * np.concatenate([each[:, place] for each in samples]))
        against = statistics.ratio([(each[:, place], each[:, 0]) for each in samples]) if place else None
        entries.append(Entry(name, found, 1e3 * batch / found.median_ms, 0.04, 0.05, 3_560_000, 73_000_000, 9_000_000,
                             operators=55 - 32 * place, max_error=3e-7, check="✓", ratio=against))  # fmt: skip
    return Measurement(
        runtime, f"{runtime} 1.0", [[batch, 3, 32, 32]], 1, "cpu", "none", 0.99, entries, 0, 6, 240, [8] * 6, [True] * 6, 0,
        [[2600.0]], samples_s=samples, **more,
    )  # fmt: skip


def timing(*measurements: Measurement, subject: str = "DiracNet v2, CIFAR, depth 16, width 2, 10 classes", **more) -> Timing:
    here = environment.describe() | {"load_average": 0.1, "tf32": "off", "gpu": None, "omp_wait_policy": "PASSIVE"}
    return Timing(subject, list(measurements) or [measurement()], here, settings={"device": "cpu"}, **more)

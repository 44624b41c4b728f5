"""What a benchmark gives: plain records with their units in their names, ready for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from foldexport.benchmark import statistics
from foldexport.benchmark.statistics import Latency, Ratio

SAME = "no measurable difference"
NOISY = "too noisy to tell"


@dataclass(eq=False)
class Entry:
    """One variant of a measurement.

    load_s: from the file to the first result in a fresh process, imports left out; the median over processes, and the longest
    (torch.compile compiles in the first and reads its cache in the others).   file_bytes: what the runtime reads.
    peak_memory_bytes: of a process of its own, runtime included; memory_above_libraries_bytes: of it, what came with the
    network.   device_memory_bytes: on the GPU.   operators: nodes of an ONNX file, None elsewhere.
    max_error: largest difference from what it was checked against, over the peak; check: the proof in words.
    """

    name: str
    latency: Latency
    throughput_per_s: float
    load_s: float
    longest_load_s: float
    file_bytes: int
    peak_memory_bytes: int | None = None
    memory_above_libraries_bytes: int | None = None
    device_memory_bytes: int | None = None
    operators: int | None = None
    max_error: float | None = None
    check: str = ""
    ratio: Ratio | None = None  # None for the baseline

    @property
    def verdict(self) -> str:
        """ "1.32 times faster", "1.10 times slower", "no measurable difference", "too noisy to tell" or "baseline"."""
        if self.ratio is None:
            return "baseline"
        if self.ratio.noisy:
            return NOISY
        if not self.ratio.measurable:
            return SAME
        faster = self.ratio.value < 1
        return f"{_times(1 / self.ratio.value if faster else self.ratio.value)} times {'faster' if faster else 'slower'}"

    def to_dict(self) -> dict[str, Any]:
        record = {name: value for name, value in asdict(self).items() if name not in ("latency", "ratio")}
        latency = {
            "median": self.latency.median_ms, "p90": self.latency.p90_ms, "p99": self.latency.p99_ms,
            "fastest": self.latency.fastest_ms,
        }  # fmt: skip
        record |= {"latency_ms": latency, "runs": self.latency.runs, "verdict": self.verdict}
        record |= {"speedup": None, "latency_ratio": None, "measurable": None}
        if self.ratio is not None:
            found = self.ratio
            record["latency_ratio"] = {"value": found.value, "interval": [found.low, found.high]}
            record["speedup"] = {"value": 1 / found.value, "interval": [1 / found.high, 1 / found.low]}
            record["measurable"] = found.measurable
            record["standard_error"] = {"between_processes": found.between, "within_processes": found.within}
        return record


@dataclass(eq=False)
class Measurement:
    """Variants timed against one another in one runtime at one size; the baseline is `entries[baseline]`.

    disturbed_rounds: in which a run was taken off its core; left out of the ratios.   load_average: before it began.
    gpu: of every process, `foldexport.benchmark.gpu.reading` when its last round had ended; empty where nothing tells.
    samples_s: per process ``[rounds, variants]``.   findings: what is wrong with the measurement, in sentences.
    level: of each of its intervals, which is above that of the whole report where that has several (`Timing.comparisons`).
    """

    runtime: str
    version: str
    input_shapes: list[list[int]]
    threads: int
    device: str
    transfers: str
    level: float
    entries: list[Entry]
    baseline: int
    processes: int
    rounds: int
    warmup_rounds: list[int]
    warmup_steady: list[bool]
    disturbed_rounds: int
    clocks_mhz: list[list[float]]
    gpu: list[dict[str, Any]] = field(default_factory=list)
    load_average: float | None = None
    findings: list[str] = field(default_factory=list)
    samples_s: list[np.ndarray] = field(default_factory=list, repr=False)

    @property
    def batch(self) -> int:
        return self.input_shapes[0][0] if self.input_shapes and self.input_shapes[0] else 1

    @property
    def sizes(self) -> str:
        """ "8x3x224x224", several inputs with a plus between them."""
        return "+".join("x".join(map(str, shape)) for shape in self.input_shapes)

    def to_dict(self) -> dict[str, Any]:
        every = [value for reading in self.clocks_mhz for value in reading]
        there = [reading["sm_mhz"] for reading in self.gpu]
        return {
            "runtime": self.runtime, "version": self.version, "input_shapes": self.input_shapes, "batch": self.batch,
            "threads": self.threads, "device": self.device, "transfers": self.transfers, "level": self.level,
            "baseline": self.entries[self.baseline].name, "variants": [each.to_dict() for each in self.entries],
            "processes": self.processes, "rounds": self.rounds,
            "warmup": {"rounds": self.warmup_rounds, "steady": self.warmup_steady},
            "disturbed_rounds": self.disturbed_rounds,
            "load_average_before": self.load_average,
            "clocks_mhz": {"lowest": min(every), "highest": max(every)} if every else None,
            "gpu_clocks_mhz": {"lowest": min(there), "highest": max(there)} if there else None,
            "gpu_held_by": sorted({each for reading in self.gpu for each in reading["held_by"]}), "findings": self.findings,
        }  # fmt: skip


@dataclass(eq=False)
class Timing:
    """A whole benchmark. unavailable: runtime → why it was not measured.   notes: what the reader should know.

    All intervals hold together at the level of the settings (`together`).
    """

    subject: str
    measurements: list[Measurement]
    environment: dict[str, Any]
    unavailable: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def comparisons(self) -> int:
        """How many intervals the report has."""
        return sum(entry.ratio is not None for each in self.measurements for entry in each.entries)

    def together(self, level: float) -> Timing:
        """The report with every interval at the level at which all of them hold with ``level``."""
        each_at = statistics.together(level, self.comparisons)
        for made in self.measurements:
            made.level = each_at
            for entry in made.entries:
                entry.ratio = None if entry.ratio is None else entry.ratio.at(each_at)
        return self

    def to_dict(self) -> dict[str, Any]:
        return {
            "subject": self.subject, "settings": self.settings, "environment": self.environment, "comparisons": self.comparisons,
            "measurements": [each.to_dict() for each in self.measurements], "unavailable": self.unavailable, "notes": self.notes,
        }  # fmt: skip

    def __str__(self) -> str:
        """One line per variant."""
        lines = [
            f"{each.runtime} {each.sizes} {entry.name}: {entry.latency.median_ms:.3g} ms, {entry.verdict}"
            for each in self.measurements
            for entry in each.entries
        ]
        return "\n".join(lines)


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"

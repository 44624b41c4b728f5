"""One measurement: variants checked against each other, then timed in several processes, then judged."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foldexport.benchmark import diagnosis, environment, processes, statistics
from foldexport.benchmark.processes import Samples
from foldexport.benchmark.runtimes import RUNTIMES, version
from foldexport.benchmark.timing import Entry, Measurement
from foldexport.benchmark.worker import Task
from foldexport.errors import EquivalenceError
from foldexport.verify import Comparison, Tolerance, compare, on_device

SECONDS = 6.0  # of timing, of all processes of one measurement together
PROCESSES = 6
FEWEST_PROCESSES = 2
RTOL = 1e-3  # of the peak, between files that nothing else is known of
MANY_DISTURBED = 0.1  # of the rounds


@dataclass(frozen=True)
class Settings:
    """How to measure. rounds: of each process, None for as many as fit in `seconds`.   rtol: in place of float32 noise.

    memory: measure peak memory, in one process more for every variant.
    compile_cache: where torch.compile may keep what it made from one process to the next; "" for nowhere of ours.
    """

    threads: int
    device: str = "cpu"
    seconds: float = SECONDS
    rounds: int | None = None
    processes: int = PROCESSES
    level: float = statistics.LEVEL
    seed: int = 0
    rtol: float | None = None
    memory: bool = True
    compile_cache: str = ""


@dataclass(frozen=True)
class Variant:
    """A file for a runtime. note: what the reader should know about it."""

    name: str
    runtime: str
    file: Path
    size_bytes: int
    operators: int | None = None
    note: str = ""


@dataclass(eq=False)
class Case:
    """Variants to be timed against one another on the same inputs.

    expected: the training graph's outputs in float64 with its float32 noise per output, or None: then the baseline's outputs
    are what the others are compared with.
    """

    variants: list[Variant]
    arrays: list[np.ndarray]
    baseline: int = 0
    expected: list[Tensor] | None = None
    levels: list[float] = field(default_factory=list)

    @property
    def runtime(self) -> str:
        return " | ".join(dict.fromkeys(each.runtime for each in self.variants))


def hold(case: Case, settings: Settings, progress: Callable[[str], None] = lambda step: None) -> Measurement:
    """Check and time one case.

    Raises EquivalenceError where a variant computes something else, and processes.VariantFailed where one does not run.
    """
    load = environment.load_average()
    with tempfile.TemporaryDirectory(prefix="foldexport-bench-") as folder:
        samples, comparisons = _collect(case, settings, Path(folder), progress)
    return judge(case, settings, samples, comparisons, load)


def _collect(
    case: Case, settings: Settings, folder: Path, progress: Callable[[str], None]
) -> tuple[Samples, list[Comparison]]:
    np.savez(folder / "inputs.npz", **{f"input_{place}": array for place, array in enumerate(case.arrays)})
    task = Task(
        variants=[(each.runtime, str(each.file.resolve())) for each in case.variants], order=[],
        inputs=str(folder / "inputs.npz"), outputs="yes", latencies="yes", result="", threads=settings.threads,
        device=settings.device, seconds=settings.seconds, rounds=settings.rounds, seed=settings.seed,
    )  # fmt: skip
    environ = {"TORCHINDUCTOR_CACHE_DIR": settings.compile_cache} if settings.compile_cache else {}
    samples, alone, comparisons = Samples(), [], []
    what = f"{case.runtime} at {'+'.join('x'.join(map(str, array.shape)) for array in case.arrays)}"
    for place, variant in enumerate(case.variants if settings.memory else ()):
        progress(f"checking {variant.name} in {what}")
        try:
            record, done = processes.run(processes.alone(task, place), folder, f"alone_{place}", environ)
        except processes.VariantFailed as error:
            raise processes.VariantFailed(place, str(error)) from error
        samples.alone.append(record)
        alone.append(processes.outputs_of(done)[0])
    if alone:
        comparisons = check(case, alone, settings.rtol, settings.device)
    for place, each in enumerate(processes.plan(task, settings.processes, settings.seed)):
        progress(f"timing {what}: process {place + 1} of {settings.processes}")
        record, done = processes.run(each, folder, f"process_{place}", environ)
        again = check(case, processes.outputs_of(done), settings.rtol, settings.device)
        comparisons = comparisons or again
        latencies_s, disturbed = processes.latencies_of(done)
        samples.records.append(record)
        samples.latencies_s.append(latencies_s)
        samples.disturbed.append(disturbed)
    return samples, comparisons


def _noise(case: Case, outputs: Sequence[Sequence[np.ndarray]], expected: Sequence[Tensor], device: str) -> list[float]:
    """The training graph's own noise; on a GPU as it is in this runtime there, the baseline's (foldexport.verify.on_device)."""
    if device == "cpu":
        return case.levels
    there = on_device.noise([outputs[case.baseline]], [expected], case.levels)
    return there if on_device.times(there, case.levels) <= on_device.OWN_ALLOWED else case.levels


def check(case: Case, outputs: Sequence[Sequence[np.ndarray]], rtol: float | None, device: str = "cpu") -> list[Comparison]:
    """Every variant's outputs against the training graph's, or the baseline's. Raises EquivalenceError."""
    inputs = [torch.from_numpy(np.ascontiguousarray(array)) for array in case.arrays]
    known = case.expected is not None
    expected = case.expected if known else [torch.from_numpy(np.asarray(each)) for each in outputs[case.baseline]]
    expected = [each.double() if each.is_floating_point() else each for each in expected or ()]
    allowed = rtol if rtol is not None or known else RTOL
    # Eight times the noise is what may differ, so an eighth of what is allowed takes its place.
    levels = _noise(case, outputs, expected, device) if allowed is None else [allowed / 8] * len(expected)
    found = []
    for variant, computed in zip(case.variants, outputs, strict=True):
        row = RUNTIMES[variant.runtime]
        one = compare(
            [expected], lambda *_, computed=computed: list(computed), [inputs], levels, format=variant.name,
            label=version(row), tolerance=None if allowed is None else Tolerance(relative=allowed),
        )  # fmt: skip
        if not one.ok:
            against = "the training graph" if known else case.variants[case.baseline].name
            more = "" if known else "; a difference that is meant is let through by --rtol"
            raise EquivalenceError(
                f"{variant.name}, run by {one.runtime}, does not compute what {against} computes, so it was not timed: "
                f"{one.message.replace('the training graph', against)}{more}."
            )
        found.append(one)
    return found


def judge(
    case: Case, settings: Settings, samples: Samples, comparisons: Sequence[Comparison], load: float | None = None
) -> Measurement:
    """From samples to records; computes only."""
    batch = case.arrays[0].shape[0] if case.arrays and case.arrays[0].ndim else 1
    per_variant = [[each[:, place] for each in samples.latencies_s] for place in range(len(case.variants))]
    clean = list(map(statistics.undisturbed, samples.latencies_s, samples.disturbed))
    entries = []
    for place, variant in enumerate(case.variants):
        latency = statistics.latency(1e3 * np.concatenate(per_variant[place]))
        own = samples.alone[place] if samples.alone else {}
        loads = [record["load_s"][place] for record in samples.records] + own.get("load_s", [])
        pairs = [(each[:, place], each[:, case.baseline]) for each in clean]
        entries.append(Entry(
            name=variant.name, latency=latency, throughput_per_s=1e3 * batch / latency.median_ms,
            load_s=float(np.median(loads)), longest_load_s=float(max(loads)), file_bytes=variant.size_bytes,
            peak_memory_bytes=own.get("peak_bytes"), memory_above_libraries_bytes=own.get("above_libraries_bytes"),
            device_memory_bytes=own.get("device_bytes"), operators=variant.operators,
            max_error=comparisons[place].max_error, check=str(comparisons[place]),
            ratio=None if place == case.baseline else statistics.ratio(pairs, settings.level, settings.seed),
        ))  # fmt: skip
    rounds = sum(map(len, samples.latencies_s))
    rows = [RUNTIMES[name] for name in dict.fromkeys(each.runtime for each in case.variants)]
    transfers = "; ".join(dict.fromkeys(row.transfers for row in rows)) if settings.device == "cuda" else "none"
    made = Measurement(
        runtime=case.runtime, version=", ".join(version(row) for row in rows),
        input_shapes=[list(array.shape) for array in case.arrays], threads=settings.threads, device=settings.device,
        transfers=transfers, level=settings.level, entries=entries, baseline=case.baseline,
        processes=len(samples.latencies_s), rounds=rounds,
        warmup_rounds=[record["warmup_rounds"] for record in samples.records],
        warmup_steady=[record["steady"] for record in samples.records],
        disturbed_rounds=sum(int(each.any(axis=1).sum()) for each in samples.disturbed),
        clocks_mhz=[reading for record in samples.records for reading in record["clocks_mhz"]],
        gpu=[record["gpu"] for record in samples.records if record.get("gpu")], samples_s=samples.latencies_s,
    )  # fmt: skip
    made.load_average = load
    made.findings = _findings(made, case, per_variant, load)
    return made


def _findings(made: Measurement, case: Case, per_variant: list[list[np.ndarray]], load: float | None) -> list[str]:
    found = diagnosis.load_findings(load, environment.cores(), made.threads)
    if made.disturbed_rounds > MANY_DISTURBED * made.rounds:
        share = round(100 * made.disturbed_rounds / made.rounds)
        found.append(f"{share} % of the rounds were interrupted by other work; ratios are of the others where enough are left")
    if not all(made.warmup_steady):
        unsteady = made.warmup_steady.count(False)
        found.append(f"the warm-up ended without steady latencies in {unsteady} of {made.processes} processes")
    found += diagnosis.gpu_findings(made.gpu) if made.device == "cuda" else diagnosis.clock_findings(made.clocks_mhz)
    for variant, each in zip(case.variants, per_variant, strict=True):
        found += diagnosis.findings(variant.name, each)
    return found


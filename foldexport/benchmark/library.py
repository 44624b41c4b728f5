"""The benchmark as one call: for a fold, for a checkpoint, for files."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foldexport.api import Folded
from foldexport.benchmark import environment, files, plan
from foldexport.benchmark.contest import FEWEST_PROCESSES, PROCESSES, SECONDS, Case, Settings, hold
from foldexport.benchmark.processes import VariantFailed
from foldexport.benchmark.runtimes import RUNTIMES, Runtime, get, missing, unsuited
from foldexport.benchmark.statistics import LEVEL
from foldexport.benchmark.timing import Measurement, Timing
from foldexport.errors import FoldexportError, MissingDependencyError, UsageError
from foldexport.study import Clock, Progress, Question, study

Shapes = tuple[tuple[int, ...], ...]  # of all inputs of a network


@dataclass(frozen=True)
class Wish:
    """What the user asks to be timed. runtimes: () for those that work here.   batches: () for the example's own."""

    settings: Settings
    runtimes: tuple[Runtime, ...] = ()
    batches: tuple[int, ...] = ()
    baseline: str | None = None


@dataclass(eq=False)
class _Board:
    """What has been measured so far."""

    wish: Wish
    progress: Callable[[str], None]
    measurements: list[Measurement] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, make: Callable[[], Case], row: Runtime) -> None:
        """Measure one case; a runtime that nobody asked for by name and that cannot run the network is left out, and told."""
        try:
            case = make()
            case.baseline = _baseline(self.wish.baseline, case)
            self.measurements.append(hold(case, self.wish.settings, self.progress))
            self.notes += [each.note for each in case.variants if each.note and each.note not in self.notes]
        except (VariantFailed, UsageError, MissingDependencyError) as error:
            if not isinstance(error, VariantFailed) and (self.wish.runtimes or str(error).startswith("--")):
                raise
            reason = str(error)
            if isinstance(error, VariantFailed):
                reason = f"{case.variants[error.variant].name} does not run in it: {reason}"
            if self.wish.runtimes:
                raise _failure(row, reason) from error
            self.unavailable[row.name] = reason


def benchmark(
    folded: Folded,
    runtimes: Sequence[str] | None = None,
    *,
    batch: int | Sequence[int] | None = None,
    threads: int | None = None,
    device: str = "cpu",
    seconds: float = SECONDS,
    rounds: int | None = None,
    processes: int = PROCESSES,
    level: float = LEVEL,
    seed: int = 0,
    progress: Progress | None = None,
) -> Timing:
    """Time a folded network against the one it came from, in every runtime asked for.

    runtimes: names of `foldexport.benchmark.runtimes`; None for those that work here. batch: one or several, of which the
    example's is the default. threads: None for every core. seconds: of timing, per runtime and batch. rounds: of each process,
    in place of seconds. processes: that each measurement is repeated in. level: at which all intervals hold together.

    Every variant is compared with the training graph in float64 before it is timed, in the runtime and at the size that are
    timed. Raises EquivalenceError where one differs, MissingDependencyError for a runtime or device that is not there, and
    UsageError.
    """
    settings = settings_of(threads, device, seconds, rounds, processes, level, seed, None)
    batches = () if batch is None else (batch,) if isinstance(batch, int) else tuple(batch)
    wish = Wish(settings, tuple(dict.fromkeys(get(name) for name in runtimes or ())), batches)
    rounding = None if folded.certificate is None else folded.certificate.rounding
    levels = None if rounding is None else rounding.levels
    with _board(wish, progress or (lambda step: None)) as (board, folder, rows):
        networks = plan.Networks(
            folded.source, folded.module, folded.graph, folded.example, folder / "files", levels, settings.seed, settings.device
        )
        _measure(board, networks, rows)
    return _timing(type(folded.source).__name__, board)


def of_checkpoint(question: Question, shapes: Sequence[Shapes], wish: Wish, progress: Progress | None = None) -> Timing:
    """Fold a checkpoint and time it. shapes: several to time at several sizes; () for the network's own."""
    clock = Clock(progress)
    subject = ""
    with _board(wish, clock.tell) as (board, folder, rows):
        for place, each in enumerate(_at_one_batch(shapes) or [((), wish.batches)]):
            sizes, batches = each
            found = study(dataclasses.replace(question, input_shapes=sizes), clock)
            subject = found.network.description
            networks = plan.Networks(
                found.network.module, found.module, found.graph, found.example, folder / f"files{place}", found.levels,
                wish.settings.seed, wish.settings.device,
            )  # fmt: skip
            board.wish = dataclasses.replace(wish, batches=wish.batches or batches)
            _measure(board, networks, rows)
    return _timing(subject, board)


def of_files(paths: Sequence[Path], shapes: Sequence[Shapes], wish: Wish, progress: Progress | None = None) -> Timing:
    """Time files against one another, all in each asked runtime, or each in the usual one of its format."""
    chosen = [files.choose(path, wish.runtimes) for path in paths]
    known = [files.inputs(path) for path in paths]
    with _board(wish, progress or (lambda step: None), tuple(row for rows in chosen for row in rows)) as (board, _, _):
        for sizes in shapes or (None,):
            for batch in wish.batches or (None,):
                said = next((place for place, each in enumerate(known) if each is not None), 0)
                wanted = files.shapes(known[said], sizes, batch, paths[said])
                for path, found in zip(paths, known, strict=True):
                    files.check(found, wanted, path)
                kinds = [kind for _, kind in known[said] or []] or [files.FLOAT] * len(wanted)
                arrays = plan.drawn(list(zip(wanted, kinds, strict=True)), wish.settings.seed)
                for rows in zip(*chosen, strict=True):
                    board.add(lambda rows=rows, arrays=arrays: plan.of_files(list(zip(paths, rows, strict=True)), arrays), rows[0])
    return _timing(" against ".join(plan.distinct(paths)), board)


def settings_of(
    threads: int | None, device: str, seconds: float, rounds: int | None, processes: int, level: float, seed: int,
    rtol: float | None,
) -> Settings:  # fmt: skip
    """Raises UsageError for numbers that make no measurement."""
    for name, value, fewest in (("--threads", threads, 1), ("--rounds", rounds, 1), ("--processes", processes, FEWEST_PROCESSES)):
        if value is not None and value < fewest:
            raise UsageError(f"{name} {value}: wanted {fewest} or more.")
    if not 0 < seconds < float("inf"):
        raise UsageError(f"--seconds {seconds}: wanted more than 0.")
    if not 0.5 <= level < 1:
        raise UsageError(f"--level {level}: wanted a number from 0.5 to below 1, such as 0.99.")
    return Settings(threads or environment.cores(), device, seconds, rounds, processes, level, seed, rtol)


def available(wish: Wish) -> tuple[list[Runtime], dict[str, str]]:
    """The runtimes to time, and why the others are not. Raises MissingDependencyError and UsageError for what was asked for."""
    device = wish.settings.device
    if device == "cuda" and (reason := environment.no_gpu()):
        raise MissingDependencyError(f"--device cuda: {reason}. Run with --device cpu.")
    for row in wish.runtimes:
        if reason := missing(row, device):
            raise MissingDependencyError(f"{row.name}: {reason}.")
        if reason := unsuited(row, device):
            raise UsageError(f"{row.name} {reason}.")
    if wish.runtimes:
        return list(wish.runtimes), {}
    usual = [row for row in RUNTIMES.values() if row.by_default]
    reasons = {row.name: missing(row, device) or unsuited(row, device) for row in usual}
    rows = [row for row in usual if not reasons[row.name]]
    return rows, {name: reason for name, reason in reasons.items() if reason}


class _board:
    """A board, a folder that lasts as long, and the runtimes; what the runtimes lack is told before any work is done."""

    def __init__(self, wish: Wish, progress: Callable[[str], None], chosen: tuple[Runtime, ...] = ()) -> None:
        self._wish, self._progress, self._chosen = wish, progress, chosen

    def __enter__(self) -> tuple[_Board, Path, list[Runtime]]:
        rows, unavailable = available(dataclasses.replace(self._wish, runtimes=self._chosen or self._wish.runtimes))
        self._folder = tempfile.TemporaryDirectory(prefix="foldexport-bench-")
        cache = str(Path(self._folder.name) / "compiled")
        wish = dataclasses.replace(self._wish, settings=dataclasses.replace(self._wish.settings, compile_cache=cache))
        board = _Board(wish, self._progress)
        board.unavailable |= {} if self._chosen else unavailable
        return board, Path(self._folder.name), rows

    def __exit__(self, *error: Any) -> None:
        self._folder.cleanup()


def _measure(board: _Board, networks: plan.Networks, rows: Iterable[Runtime]) -> None:
    for row in rows:
        if row.name in board.unavailable:
            continue
        for batch in board.wish.batches or (networks.batch(),):
            board.add(lambda row=row, batch=batch: networks.case(row, batch), row)


def _at_one_batch(shapes: Sequence[Shapes]) -> list[tuple[Shapes, tuple[int, ...]]]:
    """Sizes that differ in the batch only are one network: ``[(sizes, batches)]``."""
    found: dict[tuple, tuple[Shapes, list[int]]] = {}
    for each in shapes:
        _, batches = found.setdefault(tuple(shape[1:] for shape in each), (each, []))
        batches.append(each[0][0])
    return [(sizes, tuple(dict.fromkeys(batches))) for sizes, batches in found.values()]


def _baseline(asked: str | None, case: Case) -> int:
    if asked is None:
        return case.baseline
    for place, variant in enumerate(case.variants):
        if asked in (variant.name, str(variant.file), variant.file.name):
            return place
    names = ", ".join(each.name for each in case.variants)
    raise UsageError(f"--baseline {asked}: is none of {names}.")


def _failure(row: Runtime, reason: str) -> FoldexportError:
    """A compiler that fails is a thing to install; anything else is about the network."""
    if row.compiler and "compil" in reason.lower():
        return MissingDependencyError(f"{row.name}: {reason}.")
    return UsageError(f"{row.name}: {reason}.")


def _timing(subject: str, board: _Board) -> Timing:
    if not board.measurements:
        raise UsageError(f"nothing could be timed: {'; '.join(f'{name}: {why}' for name, why in board.unavailable.items())}.")
    settings = board.wish.settings
    described = environment.describe() | {
        "load_average": environment.load_average(), "tf32": "off", "gpu": _gpu(settings.device),
        "omp_wait_policy": "PASSIVE", "measured_on": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    made = Timing(
        subject, board.measurements, described, board.unavailable, board.notes,
        {
            "threads": settings.threads, "device": settings.device, "seconds": settings.seconds, "rounds": settings.rounds,
            "processes": settings.processes, "level": settings.level, "seed": settings.seed, "rtol": settings.rtol,
        },
    )  # fmt: skip
    return made.together(settings.level)


def _gpu(device: str) -> dict[str, Any] | None:
    if device != "cuda":
        return None
    import torch

    return {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}

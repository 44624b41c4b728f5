"""Whether a quantised file still does what the network is for, on samples, output by output; the worst one decides.

Class scores ``[N, K]`` agree where the largest is the same, and are right where it is the label; of other floating outputs there is
the signal-to-quantisation-noise ratio ``SQNR = 10·log10(Σ r² / Σ (y − r)²)`` in dB against the training graph in float32; of class
numbers the share that is equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from foldexport.errors import EquivalenceError, UsageError
from foldexport.precision.quality import LEAST_AGREEMENT, LEAST_SQNR_DB, MAX_DROP, SLACK, Output, Quality, wilson_low

BATCH = 16
NO_LABELS = "--data has no labels: name the folders of images after the network's classes"
FEW = 100  # judged samples, below which a share says little


@dataclass(frozen=True)
class Samples:
    """What a network is calibrated and judged on: arrays per input, class numbers of the judged ones where there are any.

    certain: the labels are numbered as the network's classes are. shared: those that calibrate judge too.
    """

    calibration: list[np.ndarray]
    judged: list[np.ndarray]
    labels: np.ndarray | None
    certain: bool = False
    shared: bool = False


def batches(arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """The samples, `BATCH` at a time."""
    return [[np.ascontiguousarray(a[at : at + BATCH]) for a in arrays] for at in range(0, len(arrays[0]), BATCH)]


@dataclass
class _Tally:
    """One output's sums over all batches."""

    kind: str = ""
    signal: float = 0.0
    noise: float = 0.0
    same: int = 0
    count: int = 0
    before: list[np.ndarray] = field(default_factory=list)
    after: list[np.ndarray] = field(default_factory=list)

    def add(self, wanted: np.ndarray, found: np.ndarray, samples: int) -> None:
        if wanted.dtype.kind != "f":
            self.kind = "integers"
            self.same += int((wanted == found).sum()) if wanted.shape == found.shape else 0
            self.count += wanted.size
            return
        scores = wanted.ndim == 2 and wanted.shape[1] > 1 and len(wanted) == samples
        self.kind = "scores" if scores and self.kind != "numbers" else "numbers"
        if wanted.shape != found.shape:
            self.noise = np.inf
            return
        wanted, found = wanted.astype(np.float64), found.astype(np.float64)
        equal = (wanted == found) | np.isnan(wanted) & np.isnan(found)  # an infinite score, for one
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.square(np.where(equal, 0.0, found - wanted))
        self.noise += float(error.sum()) if np.isfinite(error).all() else np.inf
        self.signal += float(np.square(np.where(np.isfinite(wanted), wanted, 0.0)).sum())
        if self.kind == "scores":
            self.before.append(wanted.argmax(1))
            self.after.append(found.argmax(1))

    def output(self, name: str) -> Output:
        if self.kind == "integers":
            return Output(name, self.kind, None, self.same / self.count if self.count else 1.0)
        sqnr = -np.inf if self.noise else np.inf
        if 0 < self.noise < np.inf and self.signal:
            sqnr = 10 * float(np.log10(self.signal / self.noise))
        if self.kind != "scores":
            return Output(name, "numbers", sqnr, None)
        return Output(name, self.kind, sqnr, float(np.mean(np.concatenate(self.before) == np.concatenate(self.after))))


def judge(
    run: Callable[..., list[np.ndarray]],
    reference: Callable[[tuple], list[Any]],
    samples: Samples,
    equalisation: tuple[int, int],
    names: Sequence[str] = (),
) -> Quality:
    """Run the file and the training graph on the judged samples. reference: ``inputs → outputs``; names: of the outputs."""
    tallies: list[_Tally] = []
    for part in batches(samples.judged):
        wanted = [torch.as_tensor(each) for each in reference(tuple(torch.as_tensor(a) for a in part))]
        found = run(*part)
        tallies = tallies or [_Tally() for _ in wanted]
        for tally, one, other in zip(tallies, wanted, found, strict=True):
            tally.add((one.double() if one.is_floating_point() else one).numpy(), np.asarray(other), len(part[0]))
    outputs = [tally.output(names[place] if place < len(names) else f"output {place}") for place, tally in enumerate(tallies)]
    first, count = outputs[0], len(samples.judged[0])
    known: dict[str, Any] = {}
    if samples.labels is not None and first.kind == "scores":
        truth = samples.labels[:count]
        before, after = (np.concatenate(each) == truth for each in (tallies[0].before, tallies[0].after))
        known["doubt"] = _doubt(truth, int(before.sum()), int(wanted[0].shape[1]), samples.certain)
        if not known["doubt"]:
            known |= {"lost": int((before & ~after).sum()), "gained": int((after & ~before).sum())}
            known |= {"accuracy_before": float(before.mean()), "accuracy_after": float(after.mean())}
    known = {"accuracy_before": None, "accuracy_after": None} | known
    return Quality(
        first.sqnr_db, first.agreement, samples=count, calibration_samples=len(samples.calibration[0]),
        equalised_groups=equalisation[0], proved_values=equalisation[1], shared=samples.shared, outputs=tuple(outputs), **known,
    )  # fmt: skip


def _doubt(truth: np.ndarray, right: int, classes: int, certain: bool) -> str:
    """Why labels cannot be used: float32 is no better than a network that always says one class. Empty where they can.

    A network at chance cannot lose accuracy, whatever int8 does to it. Where the numbering is the network's own, chance is 1/K, for
    samples of one class are samples too.
    """
    most = float(np.bincount(truth).max()) / len(truth)
    chance = 1.0 / classes if certain else most
    if wilson_low(right, len(truth)) > chance or right == len(truth):  # right on all: then accuracy is agreement
        return ""
    than = f"chance, 1 in {classes}" if certain else f"the {most:.1%} of the largest class"
    return f"labels do not fit the network: float32 is right on {right} of {len(truth)} samples, not surely more than {than}"


def require_quality(found: Quality, max_drop: float | None) -> None:
    """Raises EquivalenceError (exit 4) where quantisation costs more than is allowed, UsageError for --max-drop without labels."""
    if found.drop_points is None and max_drop is not None:
        raise UsageError(f"--max-drop: is about accuracy, and {found.doubt or NO_LABELS}.")
    allowed = MAX_DROP if max_drop is None else max_drop
    if found.drop_points is not None:
        surely = found.drop_interval[0] if found.drop_interval else found.drop_points
        if not surely <= allowed:
            raise EquivalenceError(
                f"int8: accuracy falls by {found.drop_points:.2f} points ({found}), {allowed:g} allowed: give more samples like "
                "those it will see, raise --max-drop, or ask for fp16."
            )
    outputs = found.outputs or (_only(found),)
    for output in sorted(outputs, key=lambda each: each.closeness_db):
        _require(output, found, allowed if output is outputs[0] else None, several=len(outputs) > 1)


def _require(output: Output, found: Quality, allowed: float | None, *, several: bool) -> None:
    where = f"output {output.name!r}: " if several else ""
    if output.kind == "scores":
        least = LEAST_AGREEMENT
        if found.drop_points is not None and allowed is not None:  # where float32 is wrong, and may become wrong, it need not agree
            least = min(least, found.accuracy_before - allowed / 100 - SLACK)
        if not output.agreement >= least:
            hint = "" if found.drop_points is not None else "give labelled samples to be judged by accuracy, or "
            hint = f"{found.samples} samples are few: give more, or " if found.samples < FEW else hint
            raise EquivalenceError(
                f"int8: {where}the largest class differs on {1 - output.agreement:.1%} of {found.samples} samples ({found}), "
                f"{1 - least:.1%} allowed: {hint}ask for fp16."
            )
    elif output.kind == "integers":
        if not output.agreement >= LEAST_AGREEMENT:
            raise EquivalenceError(
                f"int8: {where}{1 - output.agreement:.1%} of the integers differ ({found}), {1 - LEAST_AGREEMENT:.0%} allowed: "
                "ask for fp16."
            )
    elif not output.sqnr_db >= LEAST_SQNR_DB:
        raise EquivalenceError(f"int8: {where}{found}, {LEAST_SQNR_DB:g} dB wanted: ask for fp16.")


def _only(found: Quality) -> Output:
    """Of a quality without its outputs."""
    return Output("output", "numbers" if found.agreement is None else "scores", found.sqnr_db, found.agreement)


def cautions(found: Quality, max_drop: float | None) -> list[str]:
    """What to say of a file that is good enough: labels that were not used, few samples, a drop that may be larger than allowed."""
    said = [f"{found.doubt}; judged by agreement with float32"] if found.doubt else []
    allowed, ends = MAX_DROP if max_drop is None else max_drop, found.drop_interval
    if ends is not None and ends[1] > allowed:
        beyond = found.drop_points > allowed
        how = f"accuracy falls by {found.drop_points:.2f} points on these samples, {allowed:g} allowed, but " if beyond else ""
        said.append(
            f"{how}the drop of all samples like these lies between {ends[0]:.2f} and {ends[1]:.2f} (95 %), so it may be "
            f"{'less' if beyond else 'more'} than {allowed:g}; more labelled samples would tell"
        )
    if found.samples < FEW:
        each = f"{100 / found.samples:.1f} points"
        said.append(f"judged on {found.samples} samples only, of which each counts {each}: give more, {FEW} at least")
    if found.shared:
        said.append("the samples that calibrated judged too: it is better on them than on others")
    return said

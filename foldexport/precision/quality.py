"""What quantisation cost, as it is judged and told on the console, in the manifest and on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

LEAST_AGREEMENT = 0.98  # of samples or class numbers
LEAST_SQNR_DB = 20.0  # where outputs are no class scores
MAX_DROP = 1.0  # points of accuracy
SLACK = 0.02  # of agreement, beside the errors of float32 and the drop that is allowed
Z95, Z99 = 1.959963984540054, 2.5758293035489004  # of a two-sided interval


@dataclass(frozen=True)
class Output:
    """One output against float32's. kind: "scores" ``[N, K]`` (agreement: of the largest), "integers" (agreement: share equal),
    "numbers" (by sqnr_db, of all that is floating)."""

    name: str
    kind: str
    sqnr_db: float | None
    agreement: float | None

    @property
    def closeness_db(self) -> float:
        """One scale for the choice between files: the SQNR, or how rarely class numbers differ, ``−10·log10(1 − share)``."""
        if self.sqnr_db is not None:
            return self.sqnr_db
        return math.inf if self.agreement == 1 else -10 * math.log10(1 - (self.agreement or 0.0))

    def __str__(self) -> str:
        if self.kind == "numbers":
            return f"SQNR {self.sqnr_db:.1f} dB"
        return f"top-1 agreement {self.agreement:.2%}" if self.kind == "scores" else f"{self.agreement:.2%} equal"


@dataclass(frozen=True)
class Quality:
    """What quantisation cost, on ``samples`` judged ones; of the first output, and ``outputs`` of every one.

    Accuracies are shares, None without labels that fit. lost, gained: samples that were right in float32 and are no longer, and
    the other way round. shared: those that calibrate judge too. doubt: why labels were not used.
    """

    sqnr_db: float | None
    agreement: float | None
    accuracy_before: float | None
    accuracy_after: float | None
    samples: int
    calibration_samples: int
    equalised_groups: int
    proved_values: int
    lost: int | None = None
    gained: int | None = None
    shared: bool = False
    outputs: tuple[Output, ...] = ()
    doubt: str = ""

    @property
    def drop_points(self) -> float | None:
        if self.accuracy_before is None or self.accuracy_after is None:
            return None
        return 100.0 * (self.accuracy_before - self.accuracy_after)

    @property
    def drop_interval(self) -> tuple[float, float] | None:
        """Of the drop in points, at 95 %: of all samples like these, not of these alone."""
        if self.drop_points is None or self.lost is None or self.gained is None:
            return None
        low, high = paired_interval(self.lost, self.gained, self.samples)
        return 100.0 * low, 100.0 * high

    @property
    def closeness_db(self) -> float:
        """Of the output that is worst."""
        return min((each.closeness_db for each in self.outputs), default=math.inf)

    def __str__(self) -> str:
        parts = [] if self.sqnr_db is None else [f"SQNR {self.sqnr_db:.1f} dB"]
        if self.drop_points is not None:
            ends = self.drop_interval
            within = f", at 95 % between {ends[0]:.2f} and {ends[1]:.2f}" if ends else ""
            drop = f"drop {self.drop_points:.2f} points{within}"
            parts.append(f"accuracy {self.accuracy_before:.2%} → {self.accuracy_after:.2%} ({drop})")
        if self.agreement is not None:
            kind = "equal" if self.outputs and self.outputs[0].kind == "integers" else "top-1 agreement"
            parts.append(f"{kind} {self.agreement:.2%} of {self.samples}" + (" samples" if kind == "equal" else ""))
        parts += [f"{each.name}: {each}" for each in self.outputs[1:]]
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "drop_points": self.drop_points, "drop_interval": self.drop_interval}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Quality:
        """Of what `to_dict` gave."""
        given = {each.name: record[each.name] for each in fields(cls) if each.name in record}
        outputs = [each if isinstance(each, Output) else Output(**each) for each in given.get("outputs", ())]
        return cls(**{**given, "outputs": tuple(outputs)})


def paired_interval(lost: int, gained: int, count: int, z: float = Z95) -> tuple[float, float]:
    """Of the difference ``(lost − gained)/count`` of two shares on the same samples.

    With half a sample added to each of the four cells, so that it keeps its level on few samples and has a width where nothing
    changed (Agresti & Min 2005, "Simple improved confidence intervals for comparing matched proportions", section 3).
    """
    total, lost_, gained_ = count + 2.0, lost + 0.5, gained + 0.5
    middle = (lost_ - gained_) / total
    width = z * math.sqrt(max(0.0, lost_ + gained_ - (lost_ - gained_) ** 2 / total)) / total
    return max(-1.0, middle - width), min(1.0, middle + width)


def wilson_low(right: int, count: int, z: float = Z99) -> float:
    """The lower end of a share's interval (Wilson 1927, "Probable inference, the law of succession, and statistical inference")."""
    if not count:
        return 0.0
    share, square = right / count, z * z / count
    return (share + square / 2 - z * math.sqrt(share * (1 - share) / count + square / (4 * count))) / (1 + square)

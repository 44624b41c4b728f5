"""What quantisation cost, as it is told on the console, in the manifest and on the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Quality:
    """What quantisation cost, on ``samples`` judged ones. Accuracies are shares, None without labels."""

    sqnr_db: float
    agreement: float | None
    accuracy_before: float | None
    accuracy_after: float | None
    samples: int
    calibration_samples: int
    equalised_groups: int
    proved_values: int

    @property
    def drop_points(self) -> float | None:
        if self.accuracy_before is None or self.accuracy_after is None:
            return None
        return 100.0 * (self.accuracy_before - self.accuracy_after)

    def __str__(self) -> str:
        parts = [f"SQNR {self.sqnr_db:.1f} dB"]
        if self.drop_points is not None:
            parts.append(f"accuracy {self.accuracy_before:.2%} → {self.accuracy_after:.2%} (drop {self.drop_points:.2f} points)")
        if self.agreement is not None:
            parts.append(f"top-1 agreement {self.agreement:.2%} of {self.samples}")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "drop_points": self.drop_points}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Quality:
        """Of what `to_dict` gave."""
        return cls(**{each.name: record[each.name] for each in fields(cls)})

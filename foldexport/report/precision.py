"""What a type of fewer digits cost, from the manifest's record: the words of the console and of the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from foldexport.precision.quality import Quality
from foldexport.precision.types import HALF


@dataclass(frozen=True)
class Said:
    """type: "fp16". parts: what it is now. other: int8 with ranges as the file has them not. without_care: what the type does not
    hold of the folded network with the scales that it had.
    single: layers that stay in float32, and why. notes: what to be careful about."""

    type: str
    parts: list[str]
    other: str = ""
    without_care: list[str] = field(default_factory=list)
    single: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def said(found: Mapping[str, Any]) -> Said | None:
    """Of the manifest's ``precision``; None for float32."""
    if found.get("quality"):
        return _int8(found)
    return _half(found) if "layers_in_type" in found else None


def _int8(found: Mapping[str, Any]) -> Said:
    quality = Quality.from_dict(found["quality"])
    parts = [str(quality), f"calibrated on {quality.calibration_samples} samples"]
    if quality.equalised_groups:
        parts.append(f"{quality.equalised_groups} channels equalised, {quality.proved_values} values proved equal")
    how = "without equalised ranges" if quality.equalised_groups else "with equalised ranges"
    other = f"{how}: {Quality.from_dict(found['other_quality'])}" if found["other_quality"] else ""
    return Said("int8", parts, other, notes=list(found["notes"]))


def _half(found: Mapping[str, Any]) -> Said:
    kind, multiple = HALF[found["precision"]], found["rounding"]["multiples"]["folded"]["multiple"]
    parts = [f"{found['layers_in_type']} of {found['layers']} layers in {kind.label}"]
    parts += [] if multiple is None else [f"{float(multiple):.1f}× {kind.name} noise of the unfolded network"]
    if found["groups_rescaled"]:
        low, high = found["exponents"]
        count, proved = found["groups_rescaled"], found["values_proved"]
        groups, by = "1 group" if count == 1 else f"{count} groups", f"2^{low}" if low == high else f"2^{low} to 2^{high}"
        parts.append(f"{groups} of values rescaled by {by}, {proved} values proved equal")
    weight, activation = (float(found[f"largest_{what}"]) for what in ("weight", "activation"))
    parts.append(f"largest weight {weight:.3g}, activation {activation:.3g} (of {kind.largest:.3g})")
    if found.get("headroom") and found["measured_on"]:
        times = f"{float(found['headroom']):.{0 if float(found['headroom']) >= 10 else 1}f}"
        parts.append(f"ranges measured on {' and '.join(found['measured_on'])}: values {times} times as large fit")
    without = [f"{each['what']} of '{each['layer']}' {each['problem']}" for each in found["misfits_before"]]
    return Said(kind.name, parts, "", without, dict(found["float32_layers"]), list(found.get("notes", ())))

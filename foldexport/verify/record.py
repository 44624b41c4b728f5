"""Whether a manifest says what one of foldexport's says: before files are judged by its numbers.

A manifest is a text file. One that was cut or edited must not turn a wrong file into a right one, nor end in a traceback.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foldexport.errors import CheckpointError, UsageError
from foldexport.verify import DISCRETE_MOST, LITTLE, NOISE_FLOOR, UNTOLD, Tolerance
from foldexport.verify.golden import Noises, packed_outputs

MOST = 2.0  # of peak: what two values of the same size can differ by, so that no noise is larger


def tolerance_of(path: Path, document: Mapping[str, Any]) -> Tolerance | None:
    """What the user allowed at the export. Raises UsageError for anything but two numbers, 0 or more."""
    given = document.get("tolerance")
    if given is None:
        return None
    names = ("absolute", "relative")
    if not isinstance(given, dict) or set(given) - set(names) or not all(map(_is_size, given.values())) or not given:
        raise UsageError(f"{path}: its tolerance is {_short(given)}; wanted {' and '.join(names)}, numbers of 0 or more.")
    return Tolerance(**given)


def units_of(path: Path, entry: Mapping[str, Any], outputs: int) -> Noises | None:
    """Run -> the noise per output that the export found there, where it was more than the usual; None where it nowhere was.

    One above 64 times the usual keeps its run from being counted, so that no number here makes a wrong file right by much.
    Raises UsageError where these are no numbers.
    """
    held = entry.get("comparison")
    units = held.get("units") if isinstance(held, dict) else None
    if not units:
        return None
    rows = units.values() if isinstance(units, dict) else [None]
    if not all(isinstance(each, list) and len(each) == outputs and all(map(_is_size, each)) for each in rows):
        raise UsageError(f"{path}: the units of {_short(entry['file'])} are {_short(units)}; wanted numbers per run: export again.")
    return lambda run: [units[str(run)]] if str(run) in units else []


def require_golden(path: Path, document: Mapping[str, Any], arrays: bool) -> None:
    """Raises UsageError unless the golden set can be compared with, by the noise that was found at the export.

    arrays: there are golden inputs and outputs beside the manifest. An n32 is the training graph's own error, and the record of
    the proof has it a second time, per output; where it has not, one above 1 % of the peak is none that outputs are judged by.
    """
    golden = document["golden"]
    if golden is None:
        if not arrays and _one_float_input(document):
            raise UsageError(f"{path}: has no golden inputs, which an export of such a network leaves: export again.")
        return
    try:
        runs = golden["runs"]
        outputs = [packed_outputs(run, golden["step"]) for run in runs]
        levels = golden["n32"] if isinstance(golden["n32"], list) else [golden["n32"]] * max(map(len, outputs), default=1)
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UsageError(f"{path}: its golden set was not written by foldexport, or was cut ({_short(error)}).") from error
    if not outputs or not all(outputs):
        raise UsageError(f"{path}: its golden set has no runs, so nothing would be compared: export again.")
    if any(len(each) != len(levels) for each in outputs):
        raise UsageError(f"{path}: its golden set has n32 of {len(levels)} outputs: export again.")
    for level in levels:
        _require_level(path, document, level)
    shares = golden.get("discrete", [])
    if not isinstance(shares, list) or len(shares) not in (0, len(levels)) or not all(map(_is_share, shares)):
        raise UsageError(f"{path}: its golden shares of integers are {_short(shares)}; wanted up to {DISCRETE_MOST} per output.")


def _require_level(path: Path, document: Mapping[str, Any], level: Any) -> None:
    name = (document.get("precision") or {}).get("precision", "fp32")
    known = None if name == "int8" else _measured(document, name)
    what = f"{path}: its golden n32 of {_short(level)} is"
    if not _is_size(level) or not NOISE_FLOOR / 2 <= level <= MOST:
        raise UsageError(f"{what} no noise that an export finds ({NOISE_FLOOR:.0e} to {MOST:g} of the peak): export again.")
    if known is not None and level not in known:
        raise UsageError(f"{what} not the one that was measured ({', '.join(map(_short, known[:3]))}): export again.")
    if known is None and name == "fp32" and level > UNTOLD and not _told(document):
        raise UsageError(f"{what} above {UNTOLD:.0%} of the peak, and no proof beside it says so: export again.")


def _measured(document: Mapping[str, Any], precision: str) -> list[float] | None:
    """The noise per output as the record of the proof has it; None where there is none."""
    held = document.get("certificate") if precision == "fp32" else document.get("precision")
    rounding = held.get("rounding") if isinstance(held, dict) else None
    levels = rounding.get("levels") if isinstance(rounding, dict) else None
    return levels if isinstance(levels, list) else None


def _told(document: Mapping[str, Any]) -> bool:
    """Whether the export said of its files that the network itself loses as much."""
    said = [(entry.get("comparison") or {}).get("message") for entry in document["artifacts"]]
    return any(LITTLE in str(each) for each in said)


def _one_float_input(document: Mapping[str, Any]) -> bool:
    inputs = document.get("inputs")
    one = inputs[0] if isinstance(inputs, Sequence) and len(inputs) == 1 else None
    return isinstance(one, dict) and str(one.get("type", "")).startswith("float") and bool(one.get("shape"))


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_share(value: Any) -> bool:
    return _is_size(value) and value <= DISCRETE_MOST


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:60]

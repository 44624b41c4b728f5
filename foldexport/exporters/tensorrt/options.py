"""What the user asks of an engine, checked before any work."""

from __future__ import annotations

import re
from dataclasses import dataclass

from foldexport.errors import UsageError

FLAVOURS = ("auto", "full", "rtx")
HARDWARE = {  # TensorRT's own names of the levels, as `HardwareCompatibilityLevel` spells them
    "none": "NONE",
    "ampere-plus": "AMPERE_PLUS",
    "same-compute-capability": "SAME_COMPUTE_CAPABILITY",
}
HIGHEST_LEVEL = 5  # of IBuilderConfig.builder_optimization_level; above it TensorRT takes 5 without a word
CAPABILITY = r"\d{1,2}\.\d"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class TensorRTOptions:
    """How an engine is built.

    flavour: "full" TensorRT, "rtx", or "auto": the one that is installed (see `foldexport.exporters.tensorrt.flavour`).
    compute_capabilities: GPUs that TensorRT-RTX builds for, "8.6"; empty for its own default.
    workspace_bytes: that the engine's layers may use while they run; None for the library's default.
    timing_cache: keep what full TensorRT measured, for the next build on the same GPU with the same version.
    hardware_compatibility, version_compatible: whether a full engine works on other GPUs, and in later versions.
    optimisation_level: 0 (fast build) to 5; None for the library's default. tf32: let float32 layers round to TF32.
    """

    flavour: str = "auto"
    compute_capabilities: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    timing_cache: bool = True
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    optimisation_level: int | None = None
    tf32: bool = False

    def __post_init__(self) -> None:
        _one_of("--flavour", self.flavour, FLAVOURS)
        _one_of("--hardware-compatibility", self.hardware_compatibility, tuple(HARDWARE))
        for each in self.compute_capabilities:
            if not re.fullmatch(CAPABILITY, each):
                raise UsageError(f"--compute-capability {each}: wanted a version such as 8.6, several with commas.")
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise UsageError(f"--workspace {self.workspace_bytes}: wanted a size above 0, such as 2GiB.")
        level = self.optimisation_level
        if level is not None and not 0 <= level <= HIGHEST_LEVEL:
            raise UsageError(f"--optimisation-level {level}: wanted 0 to {HIGHEST_LEVEL}.")


def size_bytes(text: str) -> int:
    """``"2GiB"`` → 2147483648, ``"500 MB"`` → 500000000. Raises ValueError where the unit or the number is missing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?(b)?", text.strip().lower())
    if match is None or not (match[2] or match[3]):
        raise ValueError(f"{text!r}: wanted a number with its unit, such as 2GiB or 512MiB")
    return int(float(match[1]) * UNITS[match[2] or ""])


def size_text(value: int) -> str:
    """2147483648 → ``"2GiB"``, in the largest unit of which it is a whole number."""
    units = {2**30: "GiB", 2**20: "MiB", 2**10: "KiB"}
    return next((f"{value // unit}{name}" for unit, name in units.items() if value % unit == 0), f"{value}B")


def compute_capabilities(text: str) -> tuple[str, ...]:
    """``"8.6,8.9"`` → ``("8.6", "8.9")``; ``sm_86`` and ``86`` are understood too; each once, in order.

    Raises UsageError, with the whole text, where a word is no version: ``8,6`` is a comma for a point.
    """
    found = []
    for word in text.replace(" ", "").lower().split(","):
        digits = re.fullmatch(r"(?:sm_?)?(\d{1,2})(\d)", word)
        found.append(f"{digits[1]}.{digits[2]}" if digits else word)
    words = [each for each in found if each]
    if not words or not all(re.fullmatch(CAPABILITY, each) for each in words):
        point = re.fullmatch(r"(\d{1,2}),(\d)", text.strip())
        meant = f"{point[1]}.{point[2]}, with a point" if point else "a version such as 8.6, several with commas"
        raise UsageError(f"--compute-capability {text}: wanted {meant}.")
    return tuple(dict.fromkeys(words))


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{option} {value}: wanted {', '.join(known)}.")

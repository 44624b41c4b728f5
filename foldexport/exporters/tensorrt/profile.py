"""Optimisation profiles: the shapes that an engine takes, and the one that it is tuned for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foldexport.errors import UsageError

Shapes = tuple[tuple[int, ...], ...]
OPTIONS = ("--min-shape", "--opt-shape", "--max-shape")


@dataclass(frozen=True)
class Profile:
    """Shapes per input, batch first: ``minimum ≤ optimum ≤ maximum`` on every axis."""

    minimum: Shapes
    optimum: Shapes
    maximum: Shapes

    def __post_init__(self) -> None:
        counts = {len(shapes) for shapes in self.points()}
        if len(counts) > 1 or 0 in counts:
            given = ", ".join(f"{len(shapes)} × {option}" for option, shapes in zip(OPTIONS, self.points(), strict=True))
            raise UsageError(f"{given}: wanted all three, once per input.")
        for smallest, usual, largest in zip(*self.points(), strict=True):
            said = " ".join(f"{option} {text(shape)}" for option, shape in zip(OPTIONS, (smallest, usual, largest), strict=True))
            if len({len(smallest), len(usual), len(largest)}) > 1:
                raise UsageError(f"{said}: wanted the same number of axes in all three.")
            if not all(low <= middle <= high for low, middle, high in zip(smallest, usual, largest, strict=True)):
                raise UsageError(f"{said}: wanted min ≤ opt ≤ max on every axis.")

    @staticmethod
    def given(minimum: Sequence, optimum: Sequence, maximum: Sequence) -> Profile | None:
        """The profile of three options, None where none of them is given."""
        if not (minimum or optimum or maximum):
            return None
        return Profile(*(tuple(tuple(shape) for shape in each) for each in (minimum, optimum, maximum)))

    def points(self) -> tuple[Shapes, Shapes, Shapes]:
        return self.minimum, self.optimum, self.maximum

    def free_axes(self) -> tuple[str, ...]:
        """The axes that vary: "batch" (axis 0), "height" and "width" (the last two of four or more).

        Raises UsageError where another axis does.
        """
        found = set()
        for smallest, largest in zip(self.minimum, self.maximum, strict=True):
            names = axis_names(len(smallest))
            for axis, (low, high) in enumerate(zip(smallest, largest, strict=True)):
                if low != high and axis not in names:
                    raise UsageError(
                        f"--min-shape {text(smallest)} --max-shape {text(largest)}: axis {axis} varies; only the batch, and height "
                        "and width of inputs of four axes or more, can."
                    )
                if low != high:
                    found.add(names[axis])
        return tuple(name for name in ("batch", "height", "width") if name in found)

    def check(self, names: Sequence[str], shapes: Sequence[Sequence[int]], free: Sequence[str]) -> None:
        """Raise UsageError unless the profile fits inputs of these names and example shapes, free on the named axes."""
        if len(self.minimum) != len(shapes):
            raise UsageError(f"--min-shape is given {len(self.minimum)} times, but the network has {len(shapes)} inputs.")
        for name, shape, smallest, largest in zip(names, shapes, self.minimum, self.maximum, strict=True):
            if len(shape) != len(smallest):
                raise UsageError(f"--min-shape {text(smallest)}: input {name!r} has {len(shape)} axes, such as {text(shape)}.")
            axes = axis_names(len(shape))
            for axis, (size, low, high) in enumerate(zip(shape, smallest, largest, strict=True)):
                said = f"--min-shape {text(smallest)} --max-shape {text(largest)}"
                if axes.get(axis) not in free and not low == high == size:
                    raise UsageError(f"{said}: axis {axis} of input {name!r} is {size} here; pass --input-shape for another size.")
                if axis and not low <= size <= high:
                    where = f"the {axes[axis]} of input {name!r} is {size} here, outside of it"
                    raise UsageError(f"{said}: {where}; pass --input-shape with one inside.")


def axis_names(rank: int) -> dict[int, str]:
    """Names of the axes that can be free in an input of this rank."""
    names = {0: "batch"} if rank else {}
    return names | ({rank - 2: "height", rank - 1: "width"} if rank >= 4 else {})


def text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))

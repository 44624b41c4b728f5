"""What the user asks of an artifact, in the terms that every format shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foldexport.errors import PrecisionError, UsageError

if TYPE_CHECKING:
    from foldexport.exporters.tensorrt.options import TensorRTOptions
    from foldexport.exporters.tensorrt.profile import Profile

AXES = ("batch", "height", "width")
FLOATS = ("fp32", "fp16", "bf16")  # what a writer of modules as they are can write


@dataclass(frozen=True)
class ExportOptions:
    """Names, axes and numbers of one export.

    input_names, output_names: None for ``input``/``output``, or ``input_0``, ``input_1``, … where there are several.
    opset:     of ONNX; None for the exporter's own default.
    dynamic:   axes whose length the artifact leaves free: any of ``batch`` (axis 0), ``height`` and ``width`` (the last
               two axes of inputs of four or more); empty for fixed sizes.
    precision: of weights and arithmetic in the artifact; the module that an exporter is given is in it already.
    half_io: inputs and outputs are in that precision too.
    tensorrt, profile: how an engine is built, and the shapes that it takes; for tensorrt only.
    own_outputs: what the network itself calls its outputs, by the keys of what forward returns; where output_names is None.
    """

    input_names: tuple[str, ...] | None = None
    output_names: tuple[str, ...] | None = None
    opset: int | None = None
    dynamic: tuple[str, ...] = ("batch",)
    precision: str = "fp32"
    half_io: bool = False
    tensorrt: TensorRTOptions | None = None
    profile: Profile | None = None
    own_outputs: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        unknown = [axis for axis in self.dynamic if axis not in AXES]
        if unknown:
            raise UsageError(f"unknown dynamic axis {unknown[0]!r}: name any of {', '.join(AXES)}.")
        for kind, given in (("input", self.input_names), ("output", self.output_names)):
            if given is not None and (len(set(given)) < len(given) or not all(given)):
                raise UsageError(f"{kind} names {', '.join(map(repr, given))}: each must be distinct and not empty.")
        shared = set(self.input_names or ()) & set(self.output_names or ())
        if shared:
            raise UsageError(f"{sorted(shared)[0]!r} names both an input and an output: give each its own name.")

    def names(self, kind: str, count: int) -> list[str]:
        """The ``count`` names of ``kind`` "input" or "output".

        Raises :class:`UsageError` when the user gave another number of names.
        """
        given = self.input_names if kind == "input" else self.output_names
        own = self.own_outputs or ()
        if given is None and kind == "output" and len(own) == count > 0:
            return self._beside_inputs(own)
        if given is None:
            return [kind] if count == 1 else [f"{kind}_{place}" for place in range(count)]
        if len(given) != count:
            raise UsageError(
                f"{len(given)} {kind} names given ({', '.join(given)}), but the network has {count} {kind}s."
            )
        return list(given)

    def _beside_inputs(self, own: Sequence[str]) -> list[str]:
        """The network's names of its outputs; one that the user gave to an input gets trailing underscores."""
        found: list[str] = []
        for name in own:
            while name in {*(self.input_names or ()), *found}:
                name += "_"
            found.append(name)
        return found

    def require_precision(self, format_name: str, supported: Sequence[str] = ("fp32",)) -> None:
        """Raise :class:`PrecisionError` unless the format writes the asked precision."""
        if self.precision not in supported:
            raise PrecisionError(f"{format_name} is written in {' or '.join(supported)}, not {self.precision}.")

    def dynamic_axes(self, shape: Sequence[int]) -> dict[int, str]:
        """The free axes of an input of this shape, ``{axis: name}``."""
        axes = {0: "batch"} if "batch" in self.dynamic and len(shape) else {}
        if len(shape) >= 4:
            axes |= {len(shape) - 2: "height"} if "height" in self.dynamic else {}
            axes |= {len(shape) - 1: "width"} if "width" in self.dynamic else {}
        return axes

"""How far beyond the numbers that ranges were measured on a network in a half type may go.

Without the user's own samples ranges are measured on normal numbers. A network of raw pixels reads numbers up to 255, and float16
ends at 65504: so where nothing says what pictures it reads, pixels from 0 to 255 are measured too.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from foldexport import probes
from foldexport.precision.ranges import HEADROOM, Size, Sizes
from foldexport.precision.types import NumberType
from foldexport.trace import Graph

TOP = 255.0
CHANNELS = (1, 3, 4)  # of a picture


def pixels(graph: Graph, seed: int = 0) -> tuple | None:
    """Inputs uniform in [0, 255] for the pictures that a network reads; None where it reads none, or is known to take pixels."""
    if graph.raw is not None:
        return None
    uniform = next((each.inputs for each in probes.make(graph, seed=seed) if each.name == "uniform"), ())
    pictures = [_is_picture(each) for each in uniform]
    if not any(pictures):
        return None
    return tuple(each * TOP if picture else each for each, picture in zip(uniform, pictures, strict=True))


def _is_picture(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == 4 and value.shape[1] in CHANNELS


def overflows(sizes: Sizes, kind: NumberType) -> bool:
    """Whether some activation is too large for the type, with the head room that is wanted."""
    return any(each.peak * HEADROOM > kind.largest for each in sizes.activations.values())


def joined(first: Sizes, second: Sizes) -> Sizes:
    """What was measured on the inputs of both."""
    found = Sizes(shapes=first.shapes | second.shapes)
    for name in first.activations | second.activations:
        both = [each.activations[name] for each in (first, second) if name in each.activations]
        found.activations[name] = Size(max(each.peak for each in both), min(each.rms for each in both))
    return found


def headroom(sizes: Sizes, single: Collection[str], kind: NumberType) -> float | None:
    """By what factor every value that is in the type may grow before one overflows."""
    peaks = [each.peak for name, each in sizes.activations.items() if name not in single]
    return kind.largest / max(peaks) if any(peaks) else None

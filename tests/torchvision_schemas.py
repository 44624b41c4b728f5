"""torchvision beside a build of torch that it was not made for.

Its compiled operators then do not load, and ``import torchvision`` fails where it describes two of them to torch. Its
networks need neither: with the schemas declared the import works, and only calling the operators fails.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@functools.cache
def declare_missing() -> torch.library.Library | None:
    """Declares what ``import torchvision`` misses; None where it misses nothing. Call it before that import."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    for file in Path(found.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(file))
            return None
        except OSError:
            break
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    return library

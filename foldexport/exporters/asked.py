"""What is asked of formats that take less than a PyTorch module does, and how they refuse it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foldexport.errors import PrecisionError, UsageError
from foldexport.exporters.options import ExportOptions


def require(
    name: str,
    example: tuple,
    options: ExportOptions,
    *,
    precisions: Sequence[str] = ("fp32", "fp16"),
    axes: Sequence[str] = ("batch",),
    half_io: bool = False,
    floats: bool = True,
) -> None:
    """Raise PrecisionError and UsageError for what the format ``name`` cannot hold.

    precisions, axes, half_io: what it can. floats: its inputs are floating tensors, all with a batch.
    """
    options.require_precision(name, precisions)
    if options.half_io and not half_io:
        raise PrecisionError(f"{name}: inputs and outputs are float32 in this format: leave out --half-io.")
    for axis in options.dynamic:
        if axis not in axes:
            instead = f"--dynamic {','.join(axes)}" if axes else "--dynamic none"
            raise UsageError(f"{name}: cannot leave the {axis} free: pass {instead}, and export once per size.")
    for place, value in enumerate(example):
        if not isinstance(value, Tensor):
            raise UsageError(f"{name}: input {place} is a {type(value).__name__}; it takes tensors only.")
        if floats and not (value.is_floating_point() and value.dim()):
            kind = str(value.dtype).removeprefix("torch.")
            raise UsageError(f"{name}: input {place} is {kind} of shape {list(value.shape)}; it takes batches of floats only.")


def at_batch(example: tuple, batch: int) -> tuple:
    """The example cut, or repeated, to ``batch`` samples; what has no axes as it is."""
    return tuple(value[torch.arange(batch) % len(value)] if value.dim() else value for value in example)


def batch_of(example: tuple) -> int:
    """Samples in the example."""
    return next((len(value) for value in example if isinstance(value, Tensor) and value.dim()), 1)

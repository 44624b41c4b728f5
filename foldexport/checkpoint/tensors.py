"""Tensors of a checkpoint: made plain, and checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from foldexport.errors import CheckpointError

HALF_TYPES = (torch.float16, torch.bfloat16)


def plain(key: str, tensor: Tensor, path: Path) -> Tensor:
    """``tensor`` as a contiguous, detached CPU ``torch.Tensor``; values and dtype unchanged.

    Raises :class:`CheckpointError` for a quantised, sparse, nested or meta tensor, which have no plain values to fold.
    """
    problem = _problem(tensor)
    if problem:
        raise CheckpointError(f"{path}: {key} is {problem}")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return tensor.as_subclass(torch.Tensor).to("cpu").contiguous()


def _problem(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "a meta tensor: it has a shape but no values. Save the state dict of a network that holds its weights."
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype}); foldexport folds float networks. Pass the checkpoint before quantisation."
    if tensor.is_nested:
        return "a nested tensor; dense weights are wanted."
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout}); dense weights are wanted. Save it with .to_dense()."
    return ""


def describe_precision(tensors: Mapping[str, Tensor]) -> list[str]:
    """A note for each kind of half-precision weights."""
    floats = Counter(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    total = sum(floats.values())
    return [
        f"half precision: {floats[dtype]} of {total} float tensors are {str(dtype).removeprefix('torch.')}"
        for dtype in HALF_TYPES
        if floats[dtype]
    ]


def check_finite(tensors: Mapping[str, Tensor], source: str | Path = "checkpoint") -> None:
    """Raise :class:`CheckpointError` for the first tensor with NaN or infinite values: key, how many, first index."""
    for key, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        bad = ~torch.isfinite(tensor)
        count = int(bad.sum())
        if count:
            index = [int(i) for i in bad.nonzero()[0]]
            value = tensor[tuple(index)].item()
            raise CheckpointError(
                f"{source}: {key} has {count} of {tensor.numel()} values that are not finite, "
                f"the first {value} at {index}.\n"
                "The training diverged or the file is damaged; pass an earlier checkpoint."
            )


def check_running_var(tensors: Mapping[str, Tensor], source: str | Path = "checkpoint") -> None:
    """Raise :class:`CheckpointError` for the first batch norm with a negative running variance: its key and channel."""
    for key, tensor in tensors.items():
        if key.rsplit(".", 1)[-1] != "running_var":
            continue
        negative = (tensor < 0).nonzero()
        if len(negative):
            channel = int(negative[0, 0]) if tensor.dim() else 0
            raise CheckpointError(
                f"{source}: {key} is negative ({tensor.reshape(-1)[channel].item():.4g}) in channel {channel}"
                f"{f' and {len(negative) - 1} more' if len(negative) > 1 else ''}; a variance cannot be.\n"
                "The file is damaged or its keys are mixed up; pass an earlier checkpoint."
            )

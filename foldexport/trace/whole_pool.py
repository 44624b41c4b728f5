"""Global pooling written as a pool of the input's own size, ``F.avg_pool2d(x, x.shape[2:])``.

The window of PyTorch's pools is a number of the graph and no size, so a free height or width would become fixed by it. The
mean, or the maximum, over those axes is the same:

    avg_pool(x, (H, W))[n, c, 0, 0] = 1/(H·W) · Σ_{h,w} x[n, c, h, w] = mean(x, (h, w))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foldexport.trace.views import is_symbolic, same_sizes


def _whole(value: Tensor, window: Any, padding: Any, rank: int) -> bool:
    """Whether a window that is read from a shape covers the last ``rank`` axes of the value, and nothing else."""
    sizes = list(window) if isinstance(window, Sequence) else [window]
    if not any(isinstance(size, torch.SymInt) and is_symbolic(size) for size in sizes):
        return False
    sizes = sizes * rank if len(sizes) == 1 else sizes
    pads = padding if isinstance(padding, Sequence) else [padding]
    return same_sizes(sizes, value.shape[-rank:]) and not any(pads)


def _average(pool: Callable, rank: int) -> Callable:
    def average(
        input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Tensor:  # fmt: skip
        if divisor_override is None and _whole(input, kernel_size, padding, rank):
            return input.mean(tuple(range(-rank, 0)), keepdim=True)
        rest = () if rank == 1 else (divisor_override,)
        return pool(input, kernel_size, () if stride is None else stride, padding, ceil_mode, count_include_pad, *rest)

    return average


def _maximum(pool: Callable, rank: int) -> Callable:
    def maximum(
        input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:  # fmt: skip
        if not return_indices and _whole(input, kernel_size, padding, rank):  # PyTorch refuses to dilate a window this large
            return input.amax(tuple(range(-rank, 0)), keepdim=True)
        rest = (return_indices,) if return_indices else ()
        return pool(input, kernel_size, () if stride is None else stride, padding, dilation, ceil_mode, *rest)

    return maximum


#: PyTorch's pools, and what is called in their place.
WHOLE: dict[Any, Callable] = {
    torch.avg_pool1d: _average(torch.avg_pool1d, 1),
    torch._C._nn.avg_pool2d: _average(torch._C._nn.avg_pool2d, 2),
    torch._C._nn.avg_pool3d: _average(torch._C._nn.avg_pool3d, 3),
    torch.max_pool1d: _maximum(torch.max_pool1d, 1),
    torch.max_pool2d: _maximum(torch.max_pool2d, 2),
    torch.max_pool3d: _maximum(torch.max_pool3d, 3),
    F.max_pool1d: _maximum(F.max_pool1d, 1),
    F.max_pool2d: _maximum(F.max_pool2d, 2),
    F.max_pool3d: _maximum(F.max_pool3d, 3),
}

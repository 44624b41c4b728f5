"""Whether a file holds the weights of the module that it was written from, bit for bit.

Outputs alone do not show a wrong weight: in a deep network an error in an early layer leaves no trace in the result.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class WeightMatch:
    """``identical`` of ``total`` weight tensors were found bit for bit; ``missing`` names the others."""

    identical: int
    total: int
    missing: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.missing

    def __str__(self) -> str:
        return f"weights {self.identical}/{self.total} bit-identical"


def expected_weights(module: nn.Module) -> dict[str, Tensor]:
    """The floating parameters and buffers of ``module`` that a file must hold, under their state names.

    Scalars (no axes) are left out, since writers turn them into attributes; counters are not floating.
    """
    state = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return {name: value.detach() for name, value in state.items() if value.is_floating_point() and value.dim()}


def match_weights(expected: Mapping[str, Tensor], found: Mapping[str, np.ndarray]) -> WeightMatch:
    """Look up every expected tensor among the arrays of a file.

    A tensor whose name is in the file must be there; one that is not may go by any name, since writers merge equal
    tensors and rename those that they transpose. Either way its bits must be the same, in its own order of elements or
    with two axes exchanged (``[out, in]`` stored as ``[in, out]``). A half may be stored as the float32 of the same value:
    some formats have no half biases. A bias of zeros may be absent, which writers leave out because nothing is added either way;
    not where the file has an array of its length that is none of the module's.
    """
    arrays = {name: np.ascontiguousarray(value) for name, value in found.items() if value.dtype.kind not in "OSU"}
    held = {name: digest(value) for name, value in arrays.items()}
    everything = set(held.values())
    missing = []
    strange = functools.cache(lambda: _strange(expected, arrays, held))
    for name, value in expected.items():
        allowed = {held[name]} if name in held else everything
        if not any(each in allowed for each in digests(value)):
            zero = name not in held and name.rpartition(".")[2] == "bias" and not bool(value.any())
            if not zero or value.numel() in strange():
                missing.append(name)
    return WeightMatch(len(expected) - len(missing), len(expected), tuple(missing))


def _strange(expected: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray], held: Mapping[str, bytes]) -> set[int]:
    """Lengths of the floating arrays of a file that are no tensor of the module."""
    known = {each for value in expected.values() for each in digests(value)}
    return {value.size for name, value in arrays.items() if value.dtype.kind == "f" and held[name] not in known}


def digests(value: Tensor) -> Iterator[bytes]:
    """Of the forms in which a file may hold the tensor bit for bit, its own first."""
    forms = [value, value.float()] if value.dtype in (torch.float16, torch.bfloat16) else [value]
    return (digest(order) for form in forms for order in _orders(as_array(form)))


def as_array(tensor: Tensor) -> np.ndarray:
    """The tensor's bits as numpy holds them; bfloat16, which numpy lacks, in the type that onnx gives it."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy(force=True)
    import ml_dtypes  # comes with onnx

    return tensor.detach().cpu().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _orders(value: np.ndarray) -> Iterator[np.ndarray]:
    """The orders in which a writer may store the elements, the usual one first."""
    yield np.ascontiguousarray(value)
    if value.ndim >= 2:
        yield np.ascontiguousarray(np.swapaxes(value, -1, -2))
        yield np.ascontiguousarray(np.swapaxes(value, 0, 1))


def digest(array: np.ndarray) -> bytes:
    """Of the bits and their type; not of the shape, since writers add and drop axes of length one."""
    found = hashlib.blake2b(str(array.dtype).encode(), digest_size=16)
    found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return found.digest()

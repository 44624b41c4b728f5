"""Inputs of any batch through a file that takes fixed ones: in parts, the last one filled up.

Outputs must have the batch on their first axis, ``[N·k, …]`` for N samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Runtime = Callable[..., list[np.ndarray]]


def fitted(run: Runtime, lowest: int, highest: int) -> Runtime:
    """``run`` for any batch, where it takes ``lowest`` to ``highest`` samples at once."""

    def call(*arrays: np.ndarray) -> list[np.ndarray]:
        counts = {array.shape[0] for array in arrays if array.ndim}
        if len(counts) != 1 or any(array.ndim == 0 for array in arrays):
            return run(*arrays)
        count = counts.pop()
        if lowest <= count <= highest:
            return run(*arrays)
        parts = [_part(run, arrays, at, min(highest, count - at), lowest) for at in range(0, count, highest)]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    return call


def _part(run: Runtime, arrays: tuple, at: int, count: int, lowest: int) -> list[np.ndarray]:
    """Outputs of ``count`` samples from ``at`` on; where that is too few, the last sample is repeated and cut again."""
    rows = np.minimum(np.arange(max(count, lowest)), count - 1) + at
    outputs = run(*(np.ascontiguousarray(array[rows]) for array in arrays))
    return [_cut(np.asarray(output), len(rows), count) for output in outputs]


def _cut(output: np.ndarray, run: int, wanted: int) -> np.ndarray:
    if output.ndim == 0 or output.shape[0] % run:
        raise ValueError(f"an output of shape {list(output.shape)} has no batch axis, so the file takes its own batch only")
    return output[: output.shape[0] // run * wanted]


class Fitted:
    """An exporter whose files are run in parts: for a file of a fixed batch that is compared on others."""

    def __init__(self, exporter: Any, batch: int) -> None:
        self._exporter, self._batch, self.name = exporter, batch, exporter.name
        self.devices, self.lacks = exporter.devices, exporter.lacks

    def load(self, path: Any, device: str = "cpu") -> Runtime:
        return fitted(self._exporter.load(path, device=device), self._batch, self._batch)

    def weights(self, path: Any) -> dict[str, np.ndarray]:
        return self._exporter.weights(path)

    def runtime(self) -> str:
        return self._exporter.runtime()

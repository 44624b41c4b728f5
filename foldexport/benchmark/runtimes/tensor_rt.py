"""TensorRT engines, through the exporter that writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from foldexport import exporters
from foldexport.benchmark.runtimes import Ready


def load(path: Path, arrays: Sequence[np.ndarray], threads: int, device: str) -> Ready:
    """The engine as ``foldexport verify`` runs it: inputs are copied to the GPU and outputs back in every run."""
    run = exporters.exporter(exporters.get("tensorrt")).load(path)
    given = [np.ascontiguousarray(array) for array in arrays]
    return Ready(lambda: run(*given), lambda result: [np.asarray(each) for each in result])

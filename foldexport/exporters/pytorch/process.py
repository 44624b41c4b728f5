"""A written file at work in a process of its own, which has torch and safetensors and cannot import foldexport."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import torch

from foldexport.device import product_precision
from foldexport.errors import EquivalenceError
from foldexport.exporters.child import Child

RUNNER = Path(__file__).with_name("runner.py")


class Process:
    """``*arrays -> [arrays]``; the process ends with this object.

    Raises :class:`EquivalenceError` where the file does not load, RuntimeError where it does not run on an input.
    """

    def __init__(self, path: str | Path, device: str = "cpu") -> None:
        settings = [str(torch.get_num_threads()), product_precision(), device]
        self._child = Child([sys.executable, str(RUNNER), str(Path(path).resolve()), *settings])
        try:
            self._receive()
        except RuntimeError as error:
            self._child.end()
            raise EquivalenceError(f"pytorch: the written file does not load: {' '.join(str(error).split())[:300]}") from error

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        buffer = io.BytesIO()
        np.savez(buffer, **{str(place): np.ascontiguousarray(array) for place, array in enumerate(arrays)})
        try:
            self._child.send(len(buffer.getvalue()).to_bytes(8, "little"), buffer.getvalue())
        except OSError as error:
            raise RuntimeError(f"its {self._child.last_words()}") from error
        return self._receive()

    def _receive(self) -> list[np.ndarray]:
        head = self._child.read(8)
        content = self._child.read(int.from_bytes(head, "little"))
        if not head or len(content) < int.from_bytes(head, "little"):
            raise RuntimeError(f"its {self._child.last_words()}")
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            if "error" in found.files:
                raise RuntimeError(str(found["error"]))
            return [found[str(place)] for place in range(len(found.files))]

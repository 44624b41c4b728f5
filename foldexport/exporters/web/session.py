"""A model at work in onnxruntime-web, in a Node process of its own; ``runner.mjs`` is the other side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foldexport.exporters.child import Child
from foldexport.exporters.web.node import Web

RUNNER = Path(__file__).with_name("runner.mjs")


class WebSession:
    """``*arrays -> [arrays]``; the process ends with this object.

    inputs, outputs: names. Raises RuntimeError where onnxruntime-web takes neither the model nor an input.
    """

    def __init__(self, web: Web, path: str | Path, threads: int = 1) -> None:
        self._child = Child([web.node, str(RUNNER)])
        request = {"op": "load", "package": str(web.package.resolve()), "model": str(Path(path).resolve()), "threads": threads}
        names = self._ask(request)
        self.inputs, self.outputs = names["inputs"], names["outputs"]

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        self.feed(arrays)
        self.run()
        return self.fetch()

    def feed(self, arrays: Sequence[np.ndarray]) -> None:
        """Put the inputs of the coming runs into the process."""
        if len(arrays) != len(self.inputs):
            raise RuntimeError(f"it has {len(self.inputs)} inputs, {len(arrays)} were given")
        held = [np.ascontiguousarray(array) for array in arrays]
        tensors = [{"type": str(array.dtype), "dims": array.shape, "bytes": array.nbytes} for array in held]
        self._ask({"op": "feed", "tensors": tensors}, held)

    def run(self) -> None:
        """Run the model once; returns when it has finished."""
        self._ask({"op": "run"})

    def fetch(self) -> list[np.ndarray]:
        """The outputs of the last run."""
        self._send({"op": "fetch"})
        found = self._receive()
        return [self._tensor(each) for each in found["tensors"]]

    def _tensor(self, told: dict[str, Any]) -> np.ndarray:
        kind = np.dtype(told["type"])
        content = self._read(told["bytes"])
        if math.prod(told["dims"]) * kind.itemsize != len(content):
            raise RuntimeError(f"an output of {told['dims']} in {told['type']} came as {len(content)} bytes")
        return np.frombuffer(content, kind).reshape(told["dims"])

    def _ask(self, header: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> dict[str, Any]:
        self._send(header, arrays)
        return self._receive()

    def _send(self, header: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        text = json.dumps(header).encode()
        try:
            self._child.send(len(text).to_bytes(4, "little"), text, *(array.reshape(-1).view(np.uint8).data for array in arrays))
        except OSError as error:
            raise RuntimeError(f"its Node {self._child.last_words('Error')}") from error

    def _receive(self) -> dict[str, Any]:
        header = json.loads(self._read(int.from_bytes(self._read(4), "little")))
        if "error" in header:
            raise RuntimeError(header["error"])
        return header

    def _read(self, count: int) -> bytes:
        content = self._child.read(count)
        if len(content) < count:
            raise RuntimeError(f"its Node {self._child.last_words('Error')}")
        return content

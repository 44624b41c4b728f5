"""onnxruntime-web under Node: WebAssembly, with inputs that lie in the Node process already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from foldexport.benchmark.runtimes import Ready
from foldexport.exporters.web import node
from foldexport.exporters.web.session import WebSession


def load(path: Path, arrays: Sequence[np.ndarray], threads: int, device: str) -> Ready:
    """A run is a message to the process and its answer, some tenths of a millisecond at most; no tensor moves."""
    session = WebSession(node.require(), path, threads)
    session.feed(arrays)
    return Ready(session.run, lambda _: session.fetch())

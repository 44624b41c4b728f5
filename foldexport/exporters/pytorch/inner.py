"""Inner values of a written source file: its network, loaded here and traced, computed call by call."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from torch import fx

from foldexport.errors import EquivalenceError
from foldexport.exporters import graph_inner
from foldexport.exporters.inner import Inner


def inner(path: Path, weights: dict[str, np.ndarray]) -> Inner:
    """The calls of the file, whose text was checked before: it is run in this process. weights: of the file's own modules.

    Raises :class:`EquivalenceError` where it does not load.
    """
    spec = importlib.util.spec_from_file_location("network", path)
    written = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(written)
        network = fx.symbolic_trace(written.load())
    except Exception as error:  # of the file's own code, torch or safetensors
        reason = " ".join(str(error).split())[:300]
        raise EquivalenceError(f"pytorch: the written file does not load: {type(error).__name__}: {reason}") from error
    return graph_inner.inner(network, weights)

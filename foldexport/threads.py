"""How many threads this process may use where it shares the machine with others of the same command. Imports no torch.

OpenMP and MKL are told through their environment variables and PyTorch directly; runtimes with threads of their own
(onnxruntime) ask :func:`share`.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "FOLDEXPORT_THREADS"
LIBRARIES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def share() -> int:
    """Threads that this process may use; 0 where nobody said, and every runtime uses its own default."""
    value = os.environ.get(VARIABLE, "")
    return int(value) if value.isdigit() else 0


def divided(cores: int, jobs: int) -> int:
    """Threads of each of ``jobs`` processes: ``jobs · threads ≤ cores``, and no more than OMP_NUM_THREADS where that is set."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    most = int(given) if given.isdigit() and int(given) else cores
    return max(1, min(most, cores // jobs))


def limit(count: int) -> None:
    """Hold this process, and those that it starts, to ``count`` threads."""
    os.environ |= {name: str(count) for name in (VARIABLE, *LIBRARIES)}
    if "torch" in sys.modules:  # which has read the variables already
        sys.modules["torch"].set_num_threads(count)

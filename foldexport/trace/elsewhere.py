"""The user's network at other sizes than it was traced at."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from foldexport.trace.calling import run
from foldexport.trace.exporting import quiet
from foldexport.trace.kept import kept


def takes(module: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether the network runs on these inputs; what its forward changes is put back."""
    try:
        with kept(module), quiet(), torch.no_grad():
            run(module, inputs, ())
    except Exception:  # the user's forward may raise anything
        return False
    return True

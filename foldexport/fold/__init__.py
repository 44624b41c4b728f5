"""Folding: a graph of ATen operators becomes a graph of plain operators and a ledger.

The package is callable, ``foldexport.fold(model, example)``, whichever of its modules was imported first.
"""

from __future__ import annotations

import sys
from types import ModuleType


class _CallableModule(ModuleType):
    def __call__(self, *args, **kwargs):
        from foldexport.api import fold

        return fold(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

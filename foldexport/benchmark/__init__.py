"""Latency of networks and files, folded against unfolded, measured so that the answer can be relied on.

The package is callable, ``foldexport.benchmark(folded, runtimes=["onnxruntime"])``, whichever of its modules was imported
first. Importing it imports nothing heavy: what it starts (`worker`) must not carry the memory of libraries it does not time.
"""

from __future__ import annotations

import sys
from types import ModuleType


class _CallableModule(ModuleType):
    def __call__(self, *args, **kwargs):
        from foldexport.benchmark.library import benchmark

        return benchmark(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

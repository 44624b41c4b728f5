"""foldexport: folds trained convolutional networks into plain convolutions, proves it, and exports them.

    model    = foldexport.load("checkpoint.pth")
    folded   = foldexport.fold(model, example_input)
    artifact = foldexport.export(folded, "onnx", "net.onnx")
    timing   = foldexport.benchmark(folded, runtimes=["onnxruntime"])

Importing this package imports nothing heavy; the names below load what they need when they are first used.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["Folded", "benchmark", "export", "fold", "load"]


def __getattr__(name: str):
    if name in ("fold", "benchmark"):  # packages that can be called
        return import_module(f"foldexport.{name}")
    if name in __all__:
        return getattr(import_module("foldexport.api"), name)
    raise AttributeError(f"module 'foldexport' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

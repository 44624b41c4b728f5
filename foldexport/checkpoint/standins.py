"""Inert stand-ins for harmless classes that lie beside weights in checkpoints.

A weights-only unpickler calls what it is allowed to by name. Each name below is answered by a few lines of our own, so
that neither NumPy's reconstruction nor anybody's ``__setstate__`` sees bytes from the file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# bool, signed, unsigned, float, complex, text: the NumPy kinds whose bytes hold no pointer.
PLAIN_KINDS = "biufcSU"


class Bag:
    """``argparse.Namespace``: its attributes arrive in ``__dict__``."""


class PlainDict:
    """A dict subclass, read as a dict."""

    def __new__(cls, *_: Any) -> dict:  # type: ignore[misc]
        return {}


class PlainText:
    """A str subclass, read as a str."""

    def __new__(cls, text: str = "", *_: Any) -> str:  # type: ignore[misc]
        return str(text)


class NumpyDtype:
    """``numpy.dtype('f4', False, True)`` with the byte order in its state: ``(version, order, ...)``."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else str(code)
        self.order = "="

    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        self.order = order.decode("ascii") if isinstance(order, bytes) else str(order)

    def resolve(self) -> np.dtype:
        dtype = np.dtype(self.code)
        if dtype.kind not in PLAIN_KINDS:
            raise ValueError(f"a NumPy {dtype} array beside the weights cannot be read safely")
        return dtype if self.order in "|=" else dtype.newbyteorder(self.order)


class NumpyArray:
    """``numpy.ndarray``, whose state is ``(version, shape, dtype, Fortran order, bytes)``."""

    array = np.zeros(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, NumpyDtype):
            raise ValueError("a NumPy array without a dtype")
        flat = np.frombuffer(_as_bytes(data), dtype.resolve())
        self.array = flat.reshape(shape, order="F" if fortran else "C").copy()


def _as_bytes(data: bytes | str) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else data


def _numpy_reconstruct(*_: Any) -> NumpyArray:
    return NumpyArray()


def _numpy_scalar(dtype: NumpyDtype, data: bytes | str = b"") -> Any:
    return np.frombuffer(_as_bytes(data), dtype.resolve(), count=1)[0].item()


def _joined_path(*parts: str) -> str:
    return "/".join(str(part) for part in parts).replace("//", "/")


def _variable(data: Tensor, *_: Any) -> nn.Parameter:
    """``torch.autograd.Variable`` of PyTorch 0.3: (data,), then the state (requires_grad, volatile, hooks).

    A Parameter takes that state; a plain tensor's would be (storage, offset, size, stride).
    """
    return nn.Parameter(data, requires_grad=False)


_DICTS = (
    "collections.defaultdict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)
_PATHS = [
    f"{module}.{name}"
    for module in ("pathlib", "pathlib._local")
    for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
]
_NUMPY_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")

STANDINS: dict[str, Callable] = {
    **dict.fromkeys(_DICTS, PlainDict),
    **dict.fromkeys(_PATHS, _joined_path),
    **{f"{core}.scalar": _numpy_scalar for core in _NUMPY_CORES},
    **{f"{core}._reconstruct": _numpy_reconstruct for core in _NUMPY_CORES},
    # The factory of a defaultdict.
    **{f"builtins.{kind.__name__}": kind for kind in (int, float, str, bool, list, dict, tuple, frozenset)},
    "numpy.ndarray": NumpyArray,
    "numpy.dtype": NumpyDtype,
    "argparse.Namespace": Bag,
    "types.SimpleNamespace": Bag,
    "torch.torch_version.TorchVersion": PlainText,
    "torch.autograd.variable.Variable": _variable,
}


def safe_globals() -> torch.serialization.safe_globals:
    """The context in which ``torch.load(weights_only=True)`` knows the stand-ins."""
    return torch.serialization.safe_globals([(standin, name) for name, standin in STANDINS.items()])

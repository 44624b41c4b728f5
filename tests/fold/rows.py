"""A row of the table of blocks: what it is built from and which operators it must have once folded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from tests.fold.layers import chain


@dataclass(frozen=True)
class Block:
    """One row: ``operators`` after folding an input ``[N, *shape]``; ``signs``, ``zero`` as in `randomise`."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    operators: Counter[str]
    kept: str = ""
    signs: bool = True
    zero: float = 0.0


def block(build: Callable[[], nn.Module], shape: tuple[int, ...] = (8, 8, 8), *, kept: str = "", signs: bool = True,
          zero: float = 0.0, **operators: int) -> Block:
    """A row of the table, the expected operators as keywords."""
    return Block(build, shape, Counter(operators), kept, signs, zero)


def normed(layer: nn.Module, channels: int = 8, dims: int = 2) -> nn.Sequential:
    """The layer, then batch norm."""
    return chain(conv=layer, bn=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](channels))


def bn(channels: int = 8) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)

"""The operators inside an artifact, as far as they are needed to find where it goes wrong.

An exporter opts in by a method ``inner(path) -> Inner``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Operator:
    """One operator on data.

    kind: its name in its format. inputs: the values that it reads and that depend on the network's inputs, each once.
    output: its first result. weights: names of the weights that it reads, also of those that are cast or reshaped before.
    fused: the activation that is a part of it, so that what lies before is nowhere. pads: it pads for the next layer, maybe.
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    weights: tuple[str, ...] = ()
    fused: str = ""
    pads: bool = False


@dataclass(frozen=True)
class Inner:
    """A loaded artifact whose inner values can be asked for.

    operators: in the order in which they run. inputs, outputs: names of the network's own.
    run: ``(names, arrays) -> values`` of those names on the network's inputs; it holds no others.
    constants: of a format with names of its own, its weights by these, as PyTorch has them.
    channels_last: values may have their channels behind.
    """

    operators: list[Operator]
    inputs: list[str]
    outputs: list[str]
    run: Callable[[Sequence[str], Sequence[np.ndarray]], list[np.ndarray]]
    constants: Mapping[str, np.ndarray] | None = None
    channels_last: bool = False


@dataclass(frozen=True)
class Row:
    """A node as a format has it: all that it reads, by name, and all that it makes."""

    kind: str
    reads: Sequence[str]
    makes: Sequence[str]
    weights: Sequence[str] = ()
    fused: str = ""
    pads: bool = False


def operators_of(
    inputs: Iterable[str], rows: Iterable[Row], *, passing: Collection[str], sizes: Collection[str]
) -> tuple[list[Operator], dict[str, str]]:
    """The operators on data, and for every value on data the name that operators know it by.

    passing: kinds that hand a value on, in another number type at most. sizes: kinds that read shapes, not data.
    """
    known = {name: name for name in inputs}
    held: dict[str, tuple[str, ...]] = {}  # what is computed from weights alone
    found: list[Operator] = []
    for row in rows:
        if row.kind in sizes or not row.makes:
            continue
        reads = tuple(dict.fromkeys(known[name] for name in row.reads if name in known))
        weights = tuple(dict.fromkeys([*row.weights, *(each for name in row.reads for each in held.get(name, ()))]))
        if not reads:
            held.update((name, weights) for name in row.makes)
        elif row.kind in passing and len(reads) == 1:
            known.update((name, reads[0]) for name in row.makes)
        else:
            known.update((name, name) for name in row.makes)
            found.append(Operator(row.kind, reads, row.makes[0], weights, row.fused, row.pads))
    return found, known

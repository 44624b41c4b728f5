"""The operators inside an artifact, as far as they are needed to find where it goes wrong.

An exporter opts in by a method ``inner(path) -> Inner``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Operator:
    """One operator on data.

    kind: its name in its format. inputs: the values that it reads and that depend on the network's inputs, each once.
    output: its first result. weights: names of the weights that it reads.
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inner:
    """A loaded artifact whose inner values can be asked for.

    operators: in the order in which they run. inputs, outputs: names of the network's own.
    run: ``(names, arrays) -> values`` of those names on the network's inputs; it holds no others.
    """

    operators: list[Operator]
    inputs: list[str]
    outputs: list[str]
    run: Callable[[Sequence[str], Sequence[np.ndarray]], list[np.ndarray]]


@dataclass(frozen=True)
class Row:
    """A node as a format has it: all that it reads, by name, and all that it makes."""

    kind: str
    reads: Sequence[str]
    makes: Sequence[str]
    weights: Sequence[str] = ()


def operators_of(
    inputs: Iterable[str], rows: Iterable[Row], *, passing: Collection[str], sizes: Collection[str]
) -> tuple[list[Operator], dict[str, str]]:
    """The operators on data, and for every value on data the name that operators know it by.

    passing: kinds that hand a value on, in another number type at most. sizes: kinds that read shapes, not data.
    """
    known = {name: name for name in inputs}
    found: list[Operator] = []
    for row in rows:
        reads = tuple(dict.fromkeys(known[name] for name in row.reads if name in known))
        if not reads or row.kind in sizes or not row.makes:
            continue
        if row.kind in passing and len(reads) == 1:
            known[row.makes[0]] = reads[0]
            continue
        known.update((name, name) for name in row.makes)
        found.append(Operator(row.kind, reads, row.makes[0], tuple(row.weights)))
    return found, known

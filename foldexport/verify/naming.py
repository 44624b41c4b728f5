"""Which constant of an artifact is which weight of the module, where a format gives them names of its own.

By its name, as far as that survives as an identifier; else by its bits; else, for a weight that differs, by its size and its place
among those of that size which are left over.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from foldexport.exporters.inner import Inner
from foldexport.exporters.weights import digest, digests


def named(artifact: Inner, module: Inner, weights: Mapping[str, Tensor]) -> Inner:
    """The artifact with the module's names of its weights; itself where it has them. weights: the module's."""
    constants = artifact.constants
    if constants is None:
        return artifact
    mine = [name for name in _read(module) if name in weights and weights[name].is_floating_point() and weights[name].dim()]
    its = [name for name in _read(artifact) if name in constants and constants[name].dtype.kind not in "biu"]
    found: dict[str, str] = {}
    bits = {name: list(digests(weights[name])) for name in mine}
    held = {name: digest(constants[name]) for name in its}
    known = {each: order[0] for order in bits.values() for each in order}  # all orders of a tensor are one
    for key, other in (
        (_identifier, _identifier),
        (lambda name: bits[name][0], lambda name: known.get(held[name])),
        (lambda name: weights[name].numel(), lambda name: constants[name].size),
    ):
        left = [name for name in mine if name not in found.values()]
        found |= _pairs(_groups(left, key), _groups([name for name in its if name not in found], other))
    operators = [replace(each, weights=tuple(found.get(name, name) for name in each.weights)) for each in artifact.operators]
    return replace(artifact, operators=operators)


def _read(graph: Inner) -> list[str]:
    return list(dict.fromkeys(name for operator in graph.operators for name in operator.weights))


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _groups(names: Iterable[str], key: Callable[[str], Hashable]) -> dict[Hashable, list[str]]:
    found: dict[Hashable, list[str]] = defaultdict(list)
    for name in names:
        found[key(name)].append(name)
    return found


def _pairs(mine: Mapping[Hashable, Sequence[str]], its: Mapping[Hashable, Sequence[str]]) -> dict[str, str]:
    """In order, where both have as many; the artifact's name → the module's."""
    equal = [key for key, names in mine.items() if len(names) == len(its.get(key, ()))]
    return {one: other for key in equal for one, other in zip(its[key], mine[key], strict=True)}

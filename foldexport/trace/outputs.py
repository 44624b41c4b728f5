"""What a network's outputs are called: by the keys and fields of what forward returns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from foldexport.trace import Graph

#: The names of inputs that nobody named; an output has none of these.
_INPUT = re.compile(r"input(_\d+)?")


def output_names(graph: Graph) -> tuple[str, ...] | None:
    """``{"seg": y, "aux": (a, b)}`` → ``("seg", "aux_0", "aux_1")``, of the outputs that are tensors, in their order.

    Keys and fields are joined by ``_``; a place in a tuple is its number, behind ``output`` where the name begins with it. What is
    no letter, digit, ``_`` or ``.`` becomes ``_``, and equal names are numbered. None where forward returns tensors, tuples and
    lists only, or a container of the user's own whose fields PyTorch does not know.
    """
    leaves = graph.fx.output_node().args[0]
    try:
        marked = pytree.tree_unflatten(list(range(len(leaves))), graph.out_spec)
        paths = {place: path for path, place in pytree.tree_flatten_with_path(marked)[0]}
        kept = [paths[place] for place, leaf in enumerate(leaves) if _is_tensor(leaf)]
    except Exception:  # a container that cannot be made of numbers, or has no keys
        return None
    if not any(_is_named(key) for path in kept for key in path):
        return None
    return _distinct([_name(path) for path in kept])


def _is_named(key: Any) -> bool:
    return isinstance(key, pytree.GetAttrKey) or isinstance(key, pytree.MappingKey) and isinstance(key.key, str)


def _name(path: Sequence[Any]) -> str:
    words = [str(key.name if isinstance(key, pytree.GetAttrKey) else key.key if hasattr(key, "key") else key.idx) for key in path]
    name = re.sub(r"[^A-Za-z0-9_.]+", "_", "_".join(words))
    if not re.search(r"[A-Za-z0-9]", name):
        return "output"
    return f"output_{name}" if not re.match(r"[A-Za-z_]", name) or _INPUT.fullmatch(name) else name


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    found: list[str] = []
    for name in names:
        others = {*found, *(each for each in names if each != name)}
        found.append(name if name not in found else _free(name, others))
    return tuple(found)


def _free(name: str, taken: set[str]) -> str:
    """``name``, numbered from 2 on."""
    return next(each for each in (f"{name}_{number}" for number in range(2, len(taken) + 3)) if each not in taken)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf, Tensor)

"""Names for the layers of the folded module: the user's own wherever a layer is still that module."""

from __future__ import annotations

import re
from collections import Counter

from foldexport.fold.layers import Step
from foldexport.fold.stored import Stored

UNSPEAKABLE = re.compile(r"""["'\\\x00-\x1f\x7f]""")  # ends the string in which torch.fx writes a name into the source of forward


def module_names(order: list[Stored], steps: dict[Stored, Step]) -> dict[Stored, str]:
    """Stored tensor → dotted path. A user's module that became one layer keeps its path, and so do the calls of one without
    weights, numbered; functional code gets the path of the module it stands in, and the operator's name behind it."""
    paths = {stored: UNSPEAKABLE.sub("_", stored.module) for stored in order}
    owners = Counter(path for stored, path in paths.items() if stored in steps and path and _is_layer(steps[stored]))
    folders = {path[: i] for path in owners for i, c in enumerate(path) if c == "."}
    repeated = _repeated(order, steps, paths)
    taken: set[str] = set()
    names: dict[Stored, str] = {}
    for stored in order:
        step = steps.get(stored)
        if step is None or step.kind == "constant":
            continue
        path = paths[stored]
        alone = path and (owners[path] == 1 or path in repeated) and path not in folders and _is_layer(step)
        base = path if alone else f"{path}.{step.kind}" if path else step.kind
        name, count = base, 1
        while name in taken or name in folders:
            name, count = f"{base}_{count}", count + 1
        taken.add(name)
        names[stored] = name
    return names


def _repeated(order: list[Stored], steps: dict[Stored, Step], paths: dict[Stored, str]) -> set[str]:
    """Modules without weights that are called several times: everything under their path is one kind of layer."""
    kinds: dict[str, set[str]] = {}
    for stored in order:
        if paths[stored] and stored in steps:
            step = steps[stored]
            plain = _is_layer(step) and step.before is None and not any(True for _ in step.module.parameters())
            kinds.setdefault(paths[stored], set()).add(step.kind if plain else "")
    return {path for path, found in kinds.items() if len(found) == 1 and "" not in found}


def _is_layer(step: Step) -> bool:
    return step.module is not None

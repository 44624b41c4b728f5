"""Names for the layers of the folded module: the user's own wherever a layer is still that module."""

from __future__ import annotations

from collections import Counter

from foldexport.fold.layers import Step
from foldexport.fold.stored import Stored


def module_names(order: list[Stored], steps: dict[Stored, Step]) -> dict[Stored, str]:
    """Stored tensor → dotted path. A user's module that became one layer keeps its path; functional code gets the path
    of the module it stands in, and the operator's name behind it."""
    owners = Counter(stored.module for stored in order if stored in steps and stored.module and _is_layer(steps[stored]))
    folders = {path[: i] for path in owners for i, c in enumerate(path) if c == "."}
    taken: set[str] = set()
    names: dict[Stored, str] = {}
    for stored in order:
        step = steps.get(stored)
        if step is None or step.kind == "constant":
            continue
        path = stored.module
        alone = path and owners[path] == 1 and path not in folders and _is_layer(step)
        base = path if alone else f"{path}.{step.kind}" if path else step.kind
        name, count = base, 1
        while name in taken or name in folders:
            name, count = f"{base}_{count}", count + 1
        taken.add(name)
        names[stored] = name
    return names


def _is_layer(step: Step) -> bool:
    return step.module is not None

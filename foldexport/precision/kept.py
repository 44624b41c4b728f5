"""Which operators of a folded network a user means by the name of a module that is to stay in float32.

A name is that of a layer of the folded network, of the user's module that an operator comes from, or of an operator that comes
from none; the name of a module stands for everything below it. Messages about operators use the same names.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import fx

from foldexport.errors import UsageError

if TYPE_CHECKING:
    from foldexport.fold.rebuild import Program
    from foldexport.trace import Graph

WORKING = ("call_module", "call_function")
NEAREST = 3


def kept_as_asked(graph: Graph, program: Program, keep: Sequence[str]) -> dict[str, str]:
    """Operator of the folded network → the name in ``keep`` that stands for it.

    Raises UsageError for a name of nothing in it, with the nearest names, or with where that module was folded into.
    """
    known = {node.name: names_of(program, node) for node in program.module.graph.nodes if node.op in WORKING}
    found: dict[str, str] = {}
    for given in keep:
        mine = [name for name, names in known.items() if any(_is_below(each, given) for each in names)]
        if not mine:
            raise UsageError(_unknown(graph, program, known, given))
        for name in mine:
            found.setdefault(name, given)
    return found


def names_of(program: Program, node: fx.Node) -> tuple[str, ...]:
    """What an operator may be called: its layer, the user's module that it comes from, itself."""
    layer = str(node.target) if node.op == "call_module" else ""
    names = (layer, program.labels.get(node.name, ""), node.meta.get("module") or "", node.name)
    return tuple(dict.fromkeys(filter(None, names)))


def _is_below(name: str, given: str) -> bool:
    return name == given or name.startswith(f"{given}.")


def _unknown(graph: Graph, program: Program, known: dict[str, tuple[str, ...]], given: str) -> str:
    into = _folded_into(graph, program, given)
    if into:
        return f"--keep-fp32 {given}: it is folded into {' and '.join(into[:NEAREST])}; name that."
    names = [each for names in known.values() for each in _with_parents(names)]
    near = difflib.get_close_matches(given, dict.fromkeys(names), n=NEAREST, cutoff=0.5)
    said = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(list(dict.fromkeys(names))[:5])}, …"
    return f"--keep-fp32 {given}: the folded network has no module of that name; {said}"


def _with_parents(names: Iterable[str]) -> list[str]:
    """``("a.b.c",)`` → ``["a.b.c", "a.b", "a"]``."""
    return [name.rsplit(".", up)[0] for name in names for up in range(name.count(".") + 1)]


def _folded_into(graph: Graph, program: Program, given: str) -> list[str]:
    """The layers of the folded network that hold what a module of the training graph computed."""
    values = {node.name for node in graph.fx.nodes if _is_below(node.meta.get("module") or "", given)}
    nodes = {node.name: node for node in program.module.graph.nodes}
    holding = [name for name, records in program.records.items() if any(each.value in values for each in records)]
    return list(dict.fromkeys(names_of(program, nodes[name])[0] for name in holding if nodes[name].op in WORKING))

"""The operators of both networks by the user's own modules: ``layer1.0``, ``features.denseblock1.denselayer2``, …

A module is one block where it is small, or does something of its own beside calling its children (a residual block adds, an
Inception block concatenates). A larger one is looked into; what merely holds others (a ``Sequential`` of blocks) and the network
as a whole always are.
Operators beside the blocks of a module (a stem, a head) are a block of their own. Neighbours of one structure are one group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

LARGE = 30  # operators, of a block that is looked into
FEWEST = 3  # operators, of a child that is worth a block of its own

Operator = dict[str, Any]


@dataclass
class Block:
    """Operators that stand together. before, after: places in the two networks.

    label: the user's module, or "conv1 … maxpool" for operators beside the blocks of one. type: its class, "" where it has none.
    """

    label: str
    type: str
    before: list[int]
    after: list[int] = field(default_factory=list)


def blocks(before: Sequence[Operator], after: Sequence[Operator]) -> list[Block]:
    """Every operator of both networks in exactly one block, in the order of execution."""
    tree = _Tree(before)
    found: list[Block] = []
    for key, places in _runs([tree.block_of(each["module"]) for each in before]):
        path, whole = key
        pieces = [places] if whole and len(places) <= 2 * LARGE else _pieces(before, places)
        for piece in pieces:
            label = (path or "the network") if whole and len(pieces) == 1 else _label([before[at]["module"] for at in piece], path)
            kinds = {before[at]["type"] for at in piece if before[at]["module"] == path}
            found.append(Block(label, kinds.pop() if whole and len(kinds) == 1 else "", piece))
    _place(found, before, after)
    return found


def groups(found: Sequence[Block], before: Sequence[Operator], after: Sequence[Operator]) -> list[list[Block]]:
    """Neighbours whose operators, folds and connections are alike."""
    made: list[list[Block]] = []
    last = None
    for block in found:
        this = _structure(block, before, after)
        if made and this == last:
            made[-1].append(block)
        else:
            made.append([block])
        last = this
    return made


class _Tree:
    """Modules by their dotted paths."""

    def __init__(self, operators: Sequence[Operator]) -> None:
        paths = [each["module"] for each in operators]
        self._all: Counter[str] = Counter(part for path in paths for part in _ancestors(path))
        self._own = Counter(paths)
        self._children: dict[str, set[str]] = {}
        for path in self._all:
            if path:
                self._children.setdefault(path.rpartition(".")[0], set()).add(path)

    def block_of(self, path: str) -> tuple[str, bool]:
        """(module, whether all of it is the block or only what stands beside the blocks in it)."""
        at = ""
        for part in _ancestors(path):
            at = part
            if not self._children.get(part):  # a single layer
                return part.rpartition(".")[0], False
            if not self._is_opened(part):
                return part, True
        return at, False

    def _is_opened(self, path: str) -> bool:
        if self._all[path] > LARGE:
            return True
        children = self._children[path]
        within = sum(self._all[child] >= FEWEST and child in self._children for child in children)
        return within > 0 if not path else not self._own[path] and (within > 1 or within == len(children))


def _ancestors(path: str) -> list[str]:
    """``"a.b"`` → ``["", "a", "a.b"]``."""
    parts = path.split(".") if path else []
    return ["", *(".".join(parts[: count + 1]) for count in range(len(parts)))]


def _runs(keys: Sequence[tuple[str, bool]]) -> list[tuple[tuple[str, bool], list[int]]]:
    found: list[tuple[tuple[str, bool], list[int]]] = []
    for place, key in enumerate(keys):
        if found and found[-1][0] == key:
            found[-1][1].append(place)
        else:
            found.append((key, [place]))
    return found


def _pieces(operators: Sequence[Operator], places: list[int]) -> list[list[int]]:
    """A long run cut where the size of the image changes, behind a pool rather than before it."""
    if len(places) <= LARGE:
        return [places]
    pieces: list[list[int]] = [[]]
    for place, following in zip(places, [*places[1:], None], strict=True):
        pieces[-1].append(place)
        if following is None:
            break
        pool = "pool" in operators[place]["kind"]
        resized = _space(operators[place]) != _space(operators[following]) and "pool" not in operators[following]["kind"]
        if (pool or resized) and len(pieces[-1]) >= FEWEST or len(pieces[-1]) >= 2 * LARGE:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _space(operator: Operator) -> list[int]:
    return (operator["shape"] or [])[1:]


def _label(modules: Sequence[str], path: str) -> str:
    names = [name for name in modules if name != path]
    if not names:
        return path or "the network"
    first, last = names[0], names[-1]
    span = first if first == last else f"{first} … {last}"
    return span if len(names) == len(modules) else f"{path or 'the network'}: {span}"


def _place(found: Sequence[Block], before: Sequence[Operator], after: Sequence[Operator]) -> None:
    """Each folded operator beside the operator that it stands for; one that stands for none beside the one before it."""
    of = {before[place]["name"]: block for block in found for place in block.before}
    becoming = {place: block for block in reversed(found) for at in block.before for place in before[at]["became"]}
    block = found[0] if found else None
    for place, each in enumerate(after):
        block = of.get(each["origin"]) or becoming.get(place) or block
        if block is not None:
            block.after.append(place)


def _structure(block: Block, before: Sequence[Operator], after: Sequence[Operator]) -> tuple:
    """What two blocks must share to be drawn as one: all but names and numbers of channels."""
    first = {place: row for row, place in enumerate(block.after)}

    def target(place: int) -> Any:
        return first.get(place, "above" if block.after and place < block.after[0] else "below")

    left = [(*_alike(before, block.before, row), each["how"], tuple(sorted({str(target(at)) for at in each["became"]})))
            for row, each in enumerate(before[at] for at in block.before)]  # fmt: skip
    return block.type, tuple(left), tuple(_alike(after, block.after, row) for row in range(len(block.after)))


def _alike(operators: Sequence[Operator], places: Sequence[int], row: int) -> tuple:
    inside = {operators[place]["name"]: at for at, place in enumerate(places)}
    each = operators[places[row]]
    return each["kind"], each["detail"], tuple(sorted({inside.get(name, -1) for name in each["reads"]}))

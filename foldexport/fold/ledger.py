"""What was folded, what was kept, and why: one entry per operator of the training graph that a fold concerns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

FOLDED = "folded"
KEPT = "kept"
SKIP_CONNECTION = "skip connection"


@dataclass
class Entry:
    """One line of the ledger.

    module: the user's own module name, with the operator where a module has several ("layer1.0.bn1").
    rule:   what was done or would have been ("batch_norm", "residual scalar", "merge by sum").
    status: ``"folded"`` or ``"kept"``.
    into:   where it went: the user's names of the layers that absorbed it; empty when kept.
    reason: why it was kept, or what the fold rests on where that is not obvious.
    """

    module: str
    rule: str
    status: str = FOLDED
    into: str = ""
    reason: str = ""


class Ledger(Sequence[Entry]):
    """Entries in the order of the training graph; a node has one entry at most."""

    def __init__(self) -> None:
        self._entries: dict[object, Entry] = {}

    def note(self, key: object, module: str, rule: str) -> Entry:
        """The entry of ``key`` (a node of the training graph), made on first use."""
        if key not in self._entries:
            self._entries[key] = Entry(module, rule)
        return self._entries[key]

    def folded(self, key: object, into: str, reason: str = "") -> None:
        """Record where an operator went; an operator that was kept once stays kept."""
        entry = self._entries.get(key)
        if entry is None or entry.status == KEPT:
            return
        names = entry.into.split(", ") if entry.into else []
        if into and into not in names and len(names) < 4:
            entry.into = ", ".join([*names, into])
        entry.reason = entry.reason or reason

    def kept(self, key: object, module: str, rule: str, reason: str) -> None:
        """Record that an operator stays, with the reason."""
        entry = self.note(key, module, rule)
        entry.status, entry.into, entry.reason = KEPT, "", reason

    def arrange(self, order: dict[object, int]) -> None:
        """Sort the entries by the place of their nodes in the training graph."""
        place = lambda key: order.get(key[-1] if isinstance(key, tuple) else key, len(order))  # noqa: E731
        self._entries = dict(sorted(self._entries.items(), key=lambda item: place(item[0])))

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index):
        return list(self._entries.values())[index]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def with_nodes(self) -> Iterator[tuple[object, Entry]]:
        """Every entry with the node of the training graph that it is about, in order."""
        for key, entry in self._entries.items():
            yield key[-1] if isinstance(key, tuple) else key, entry

    def with_status(self, status: str) -> list[Entry]:
        """The entries of one status, in order."""
        return [entry for entry in self if entry.status == status]

    def to_list(self) -> list[dict[str, str]]:
        """Plain dictionaries for JSON."""
        return [asdict(entry) for entry in self]

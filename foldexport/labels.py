"""Class numbers of images that lie in one folder per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from foldexport.errors import UsageError

SHOWN = 5


class Labels(NamedTuple):
    """values: class numbers ``[N]``, None where there are none. classes: how many they are of.

    source: what they are numbered by: "names" (the network's own class names), "numbers" (folders 0, 1, …), "order" (of the
    folders' names, which is right only where there is one for each class), "array" (of an .npz, or given).
    """

    values: np.ndarray | None
    classes: int = 0
    source: str = ""

    @property
    def certain(self) -> bool:
        """Whether the numbering is the network's own."""
        return self.source == "names"


NONE = Labels(None)


def of_folders(data: Path, folders: Sequence[str], known: Sequence[str]) -> Labels:
    """The class number of each image from the name of its folder: by the network's class names ``known`` where it has any.

    Names are compared without regard to case, "_" and " "; of a name with synonyms, "tench, Tinca tinca", each will do. Folders
    whose names are all numbers are class numbers. Raises UsageError for folders that are none of the known classes.
    """
    names = sorted(set(folders))
    numbers = {name: int(name) for name in names if name.isascii() and name.isdigit()}
    numbers = numbers if len(numbers) == len(names) == len(set(numbers.values())) else {}
    if not known:
        places = numbers or {name: place for place, name in enumerate(names)}
        count = max(places.values()) + 1
        return Labels(np.asarray([places[each] for each in folders]), count, "numbers" if numbers else "order")
    places = _places(known)
    if unknown := [name for name in names if _plain(name) not in places]:
        if numbers and max(numbers.values()) < len(known):
            return Labels(np.asarray([numbers[each] for each in folders]), len(known), "numbers")
        raise UsageError(
            f"--data {data}: {_some(unknown)} {'is' if len(unknown) == 1 else 'are'} none of the network's {len(known)} classes "
            f"({_some(known)}): name the folders after those or their numbers, say others with --class-names, or put the images in "
            "one folder without classes to be judged by agreement."
        )
    return Labels(np.asarray([places[_plain(each)] for each in folders]), len(known), "names")


def _places(known: Sequence[str]) -> Mapping[str, int]:
    """Every name of each class; the whole of a name comes before a synonym of another, and what two classes share names none."""
    places: dict[str, Any] = {}
    for synonyms in (True, False):
        found: dict[str, set[int]] = {}
        for place, name in enumerate(known):
            for each in name.split(",") if synonyms else [name]:
                found.setdefault(_plain(each), set()).add(place)
        for each, classes in found.items():
            places.pop(each, None)
            if len(classes) == 1:
                places[each] = next(iter(classes))
    return places


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (", …" if len(names) > SHOWN else "")

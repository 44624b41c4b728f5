"""Writes ``foldexport/fingerprints/table.json`` from the torchvision and timm that are installed.

    python tools/fingerprints.py [--only REGEX] [--out FILE] [--keep TABLE]

Every network is built on the meta device, where it has shapes and no weights, three times: with two numbers of classes
and of input channels, which shows the dimensions that depend on them, and without a classifier. Networks with the same
keys and shapes are then run with the same random weights, to tell those that compute the same.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tests.torchvision_schemas import declare_missing  # noqa: E402

declare_missing()

import timm  # noqa: E402
import torchvision  # noqa: E402
from fingerprint_functions import build, functions  # noqa: E402
from fingerprint_networks import Offer, former_names, is_convolutional, offers  # noqa: E402

from foldexport.checkpoint.select import strip_prefix  # noqa: E402
from foldexport.fingerprints.data import USUAL_CLASSES, parsed  # noqa: E402
from foldexport.fingerprints.table import CHANNELS, Candidate, Dimension, Relation, Shape, Table, counted, fingerprint  # noqa: E402

OUT = HERE.parent / "foldexport" / "fingerprints" / "table.json"

# Counts that are told apart by the differences they make: multiples of 101 and of 7.
CLASSES, OTHER_CLASSES = 1000, 1101
OTHER_CHANNELS = CHANNELS + 7


@dataclass
class Group:
    """Candidates of one fingerprint."""

    relation: Relation
    shapes: Mapping[str, Shape]
    stem: Relation = ()
    candidates: list[Candidate] = field(default_factory=list)
    headless: set[str] = field(default_factory=set)
    video: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """What its shapes were made with, where they depend on it."""
        return {"num_classes": CLASSES} if self.relation else {}


def shapes(candidate: Candidate, **counts: int) -> dict[str, Shape]:
    """Keys and shapes as they are read from a file: without the prefixes that reading strips."""
    state = empty(candidate, **counts).state_dict()
    return {key: tuple(tensor.shape) for key, tensor in strip_prefix(state)[0].items() if counted(key)}


def empty(candidate: Candidate, **counts: int) -> nn.Module:
    """The network on the meta device, or in memory where its constructor computes widths with tensors."""
    try:
        with torch.device("meta"):
            return build(candidate, **counts)
    except NotImplementedError:
        return build(candidate, **counts)


def relation(first: Mapping[str, Shape], second: Mapping[str, Shape], low: int, high: int) -> Relation:
    """The dimensions that depend on a count which was ``low`` in the first and ``high`` in the second: f·count + c.

    Raises ValueError where keys differ, or no such f and c are whole.
    """
    if first.keys() != second.keys():
        raise ValueError(f"keys depend on the count: {sorted(first.keys() ^ second.keys())[:3]}")
    found = []
    for key, shape in sorted(first.items()):
        if len(shape) != len(second[key]):
            raise ValueError(f"the rank of {key} depends on the count")
        for axis, (size, other) in enumerate(zip(shape, second[key])):
            if size != other:
                factor, rest = divmod(other - size, high - low)
                if rest or factor < 1:
                    raise ValueError(f"{key} is {size} at {low} and {other} at {high}")
                found.append(Dimension(key, axis, factor, size - factor * low))
    return tuple(found)


def add(offer: Offer, candidate: Candidate, groups: dict[str, Group], complaints: list[str]) -> None:
    """Puts one candidate into the group of its fingerprint."""
    usual = shapes(candidate, num_classes=CLASSES)
    try:
        head = relation(usual, shapes(candidate, num_classes=OTHER_CLASSES), CLASSES, OTHER_CLASSES)
    except ValueError as error:
        complaints.append(f"{candidate}: {error}")
        head = ()
    group = groups.setdefault(fingerprint(usual, head), Group(head, usual))
    group.candidates.append(candidate)
    group.video |= any(len(weights.inputs[0]) == 4 for weights in offer.weights)
    if offer.package != "timm":
        return
    try:
        other = shapes(candidate, num_classes=CLASSES, in_chans=OTHER_CHANNELS)
        stem = relation(usual, other, CHANNELS, OTHER_CHANNELS)
        if group.stem and stem != group.stem:
            complaints.append(f"{candidate}: its stem is not that of {group.candidates[0]}")
        group.stem = stem
    except Exception as error:
        complaints.append(f"{candidate}: in_chans: {type(error).__name__}: {error}")
    if head:
        try:
            group.headless.add(fingerprint(shapes(candidate, num_classes=0)))
        except Exception as error:
            complaints.append(f"{candidate}: num_classes=0: {type(error).__name__}: {error}")


def collect(only: str) -> tuple[dict[str, Group], list[Offer], list[str]]:
    groups: dict[str, Group] = {}
    taken, complaints = [], []
    began = time.perf_counter()
    for number, offer in enumerate(offers()):
        if not re.search(only, offer.name):
            continue
        if offer.package == "timm" and not is_convolutional(empty(offer.variants[0])):
            continue
        taken.append(offer)
        for candidate in offer.variants:
            add(offer, candidate, groups, complaints)
        print(f"{number:5d} {offer.name:45s} {time.perf_counter() - began:7.1f} s", file=sys.stderr)
    return groups, taken, complaints


class Interned:
    """Values that many records share, written once: their place in a list."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[str, int] = {}

    def place(self, value: Any) -> int:
        key = json.dumps(value)
        if key not in self._places:
            self._places[key] = len(self.values)
            self.values.append(value)
        return self._places[key]


def settle(key: str, group: Group, known: Table | None) -> tuple[list[list[Candidate]], int | None, list[str]]:
    """`functions` of a group, from a table where that has the same candidates."""
    row = known.rows.get(key) if known else None
    kept = [list(members) for members in row.functions] if row else []
    if sum(map(len, kept)) == len(group.candidates) and all(any(each in members for members in kept) for each in group.candidates):
        return kept, row.zoo, []
    return functions(group.candidates, group.shapes, group.video, **group.counts)


def document(
    groups: Mapping[str, Group], taken: Iterable[Offer], complaints: list[str], known: Table | None = None
) -> dict[str, Any]:
    """The table in the form that `foldexport.fingerprints.data.parsed` reads."""
    relations, inputs, arguments = Interned(), Interned(), Interned()
    rows, headless, settled = {}, defaultdict(list), defaultdict(list)
    began = time.perf_counter()
    for number, (key, group) in enumerate(sorted(groups.items(), key=lambda item: item[1].candidates[0].name)):
        found, of_zoo, doubts = settle(key, group, known)
        print(f"{number:5d} {group.candidates[0].name:45s} {len(group.candidates)} in {len(found)}, zoo {of_zoo} "
              f"{time.perf_counter() - began:7.1f} s", file=sys.stderr)  # fmt: skip
        complaints += [f"{group.candidates[0]}: {doubt}" for doubt in dict.fromkeys(doubts)]
        written = [[[each.spec, arguments.place(dict(each.arguments))] for each in members] for members in found]
        rows[key] = [
            relations.place([_row(each) for each in group.relation]), relations.place([_row(each) for each in group.stem]),
            of_zoo, written,
        ]  # fmt: skip
        for each in sorted(group.headless):
            headless[each].append(key)
        settled[len(group.candidates), len(found)].append(group.candidates[0].name)
    published, files = _published(taken, inputs, arguments)
    names = {offer.name for offer in taken}
    print(*sorted((sizes, len(each)) for sizes, each in settled.items()), sep="\n", file=sys.stderr)
    return {
        "versions": {"torchvision": torchvision.__version__.partition("+")[0], "timm": timm.__version__},
        "relations": relations.values, "inputs": inputs.values, "arguments": arguments.values,
        "fingerprints": dict(sorted(rows.items())), "headless": dict(sorted(headless.items())), "published": published,
        "files": dict(sorted(files.items())),
        "former_names": {old: today for old, today in sorted(former_names().items()) if today[0] in names},
    }  # fmt: skip


def _row(each: Dimension) -> list:
    return [each.key, each.axis, each.factor, each.offset]


def _published(taken: Iterable[Offer], inputs: Interned, arguments: Interned) -> tuple[dict, dict]:
    published: dict[str, dict] = {"torchvision": {}, "timm": {}}
    files: dict[str, list] = {}
    for offer in taken:
        tags = {}
        for weights in offer.weights:
            place = inputs.place(weights.inputs)
            row = [place, weights.num_classes, *([arguments.place(weights.arguments)] if weights.arguments else [])]
            tags[weights.tag] = row if weights.num_classes != USUAL_CLASSES or weights.arguments else place
            if weights.prefix:
                files.setdefault(weights.prefix, [offer.package, offer.name, weights.tag])
        published[offer.package][offer.name] = tags
    return published, files


def lines(document: Mapping[str, Any]) -> str:
    """JSON with one record per line, so that a new version's changes can be read."""
    parts = []
    for key, value in document.items():
        if isinstance(value, dict):
            rows = [f"{json.dumps(name)}: {json.dumps(row, separators=(',', ':'))}" for name, row in value.items()]
            if key == "published":
                rows = [f"{json.dumps(name)}: {{\n" + ",\n".join(_record(each) for each in row.items()) + "\n}"
                        for name, row in value.items()]  # fmt: skip
            parts.append(f"{json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n}")
        else:
            rows = [json.dumps(row, separators=(",", ":")) for row in value]
            parts.append(f"{json.dumps(key)}: [\n" + ",\n".join(rows) + "\n]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _record(item: tuple[str, Any]) -> str:
    return f"{json.dumps(item[0])}: {json.dumps(item[1], separators=(',', ':'))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="networks whose name matches; for a trial")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--keep", type=Path, metavar="TABLE", help="of the same versions: its networks are not run again")
    options = parser.parse_args()
    known = parsed(json.loads(options.keep.read_text("utf-8"))) if options.keep else None
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    groups, taken, complaints = collect(options.only)
    options.out.write_text(lines(document(groups, taken, complaints, known)), "utf-8")
    print(*complaints, sep="\n")
    print(f"{options.out}: {len(taken)} networks, {len(groups)} fingerprints, {options.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()

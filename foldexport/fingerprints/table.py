"""The table of published networks: what a fingerprint is, and which networks have it.

    fingerprint = the first 16 hexadecimal digits of SHA-256 over the sorted lines ``key d0,d1,…`` of a state dict

``num_batches_tracked``, which evaluation does not read, is left out. A dimension that depends on the number of classes N
as ``f·N + c`` is written ``fN+c``, so that a fine-tuned head has the fingerprint of the published one. Which dimensions
those are was found by building every network with two numbers of classes; they are its *relation*.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]

CHANNELS = 3  # of the networks in the table

# Arguments that every use of a constructor needs and that change nothing in what it computes.
SILENT_ARGUMENTS = ("weights_backbone", "init_weights", "model")

# Heads that help to train. Who changes the number of classes often leaves these as they were.
AUXILIARY_HEADS = ("aux_classifier", "AuxLogits", "aux1", "aux2")

# Names in files that torchvision itself renames while it loads them: (regular expression, name in the network).
RENAMED = (
    (re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))"), r"\1\2"),
)  # fmt: skip


@dataclass(frozen=True)
class Dimension:
    """``shape[axis] = factor · count + offset`` of one tensor."""

    key: str
    axis: int
    factor: int = 1
    offset: int = 0

    def count(self, shapes: Mapping[str, Shape]) -> int | None:
        """The count that this dimension gives, None where the tensor is not there or no count gives it."""
        shape = shapes.get(self.key, ())
        if self.axis >= len(shape):
            return None
        count, rest = divmod(shape[self.axis] - self.offset, self.factor)
        return count if not rest and count > 0 else None

    @property
    def auxiliary_head(self) -> str:
        """The auxiliary head that it is of, if it is of one."""
        return next((each for each in AUXILIARY_HEADS if self.key.startswith(f"{each}.")), "")


Relation = tuple[Dimension, ...]


@dataclass(frozen=True)
class Candidate:
    """A constructor with its arguments: ``spec`` "torchvision.models:resnet50", as ``--arch`` takes it."""

    spec: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.arguments.get("model") or self.spec.partition(":")[2]

    @property
    def package(self) -> str:
        """The distribution that has it."""
        return "timm" if self.spec.startswith("timm.") else "torchvision"

    def __str__(self) -> str:
        said = ", ".join(f"{key}={value}" for key, value in self.arguments.items() if key not in SILENT_ARGUMENTS)
        return f"{self.package}'s {self.name}" + (f" ({said})" if said else "")


@dataclass(frozen=True)
class Function:
    """Candidates with the same keys and shapes that compute the same in eval mode.

    ``zoo``: whether the zoo's own network of these keys and shapes computes it too, None where the zoo had none.
    ``num_classes`` and ``in_chans`` are the file's, None where no shape says them.
    """

    candidates: tuple[Candidate, ...]
    zoo: bool | None = None
    num_classes: int | None = None
    in_chans: int | None = None

    def arguments(self, candidate: Candidate) -> dict[str, Any]:
        """What the constructor is called with for this file."""
        counts = {"num_classes": self.num_classes, "in_chans": self.in_chans}
        return {**candidate.arguments, **{key: count for key, count in counts.items() if count is not None}}


@dataclass(frozen=True)
class Inputs:
    """How published weights take their images, in timm's field names; ``input_size`` is (channels, [frames,] height, width)."""

    input_size: Shape
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float

    def fields(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Published:
    """Published weights: ``tag`` "a1_in1k"; ``num_classes`` of their head; ``arguments`` that the constructor needs for them."""

    tag: str
    inputs: Inputs
    num_classes: int
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class PublishedFile:
    """What a file whose SHA-256 begins with a known prefix holds."""

    package: str
    name: str
    tag: str


@dataclass(frozen=True)
class Row:
    """The networks of one fingerprint. ``stem``: the dimensions that depend on the number of input channels. ``zoo``: the place
    of the function that the zoo's network computes, -1 where it computes another, None where it has none."""

    relation: Relation
    stem: Relation
    functions: tuple[tuple[Candidate, ...], ...]
    zoo: int | None

    def made(self, num_classes: int | None, in_chans: int | None = None, package: str = "") -> list[Function]:
        """Its functions for a file with these counts, of the candidates of one package where it is given."""
        found = []
        for place, candidates in enumerate(self.functions):
            kept = tuple(each for each in candidates if package in ("", each.package))
            same = None if self.zoo is None else place == self.zoo
            found += [Function(kept, same, num_classes, in_chans)] if kept else []
        return found


@dataclass(frozen=True)
class Table:
    """``rows`` by fingerprint; ``headless``: fingerprints of whole networks by that of the network without its classifier;
    ``published[package][name]``: the weights that there are, the default first; ``files`` by the first eight digits of their
    SHA-256; ``former_names``: what networks were called before, and (name, tag) today."""

    versions: Mapping[str, str]
    rows: Mapping[str, Row]
    headless: Mapping[str, Sequence[str]]
    published: Mapping[str, Mapping[str, Sequence[Published]]]
    files: Mapping[str, PublishedFile]
    former_names: Mapping[str, tuple[str, str]]

    def known_name(self, name: str) -> bool:
        return name in self.former_names or any(name in networks for networks in self.published.values())

    @functools.cached_property
    def relations(self) -> tuple[Relation, ...]:
        return tuple(dict.fromkeys(row.relation for row in self.rows.values()))

    @functools.cached_property
    def stems(self) -> tuple[Relation, ...]:
        return tuple(dict.fromkeys(row.stem for row in self.rows.values() if row.stem))

    def lookup(self, shapes: Mapping[str, Shape]) -> list[Function]:
        """Every function that a network with these keys and shapes may compute; empty where none is known.

        Networks with another number of input channels, and those without their classifier, are found too: timm's, whose
        constructors take both.
        """
        return self._whole(shapes) or self._other_channels(shapes) or self._without_head(shapes)

    def _whole(self, shapes: Mapping[str, Shape]) -> list[Function]:
        return [function for row, count in self._rows(shapes) for function in row.made(count)]

    def _other_channels(self, shapes: Mapping[str, Shape]) -> list[Function]:
        found: list[Function] = []
        for stem in self.stems:
            channels = solve(stem, shapes)
            if channels is None or channels == CHANNELS:
                continue
            for row, count in self._rows(with_count(shapes, stem, CHANNELS)):
                if row.stem == stem:
                    found += row.made(count, channels, "timm")
        return found

    def _without_head(self, shapes: Mapping[str, Shape]) -> list[Function]:
        whole = self.headless.get(fingerprint(shapes), ())
        return [function for each in whole for function in self.rows[each].made(0, None, "timm")]

    def _rows(self, shapes: Mapping[str, Shape]) -> Iterator[tuple[Row, int | None]]:
        """Rows with the fingerprint, and the number of classes of each."""
        for relation in self.relations:
            count = classes(relation, shapes)
            if relation and count is None:
                continue
            row = self.rows.get(fingerprint(shapes, relation))
            if row is not None and row.relation == relation:
                yield row, count


def plain_keys(keys: Iterable[str]) -> dict[str, str]:
    """Keys of a file under the names that networks have today: {key in the file: key in the network}."""
    named = {}
    for key in keys:
        matches = ((pattern.fullmatch(key), name) for pattern, name in RENAMED)
        named[key] = next((match.expand(name) for match, name in matches if match), key)
    return named


def counted(key: str) -> bool:
    """Whether a tensor is part of the fingerprint."""
    return key.rpartition(".")[2] != "num_batches_tracked"


def solve(relation: Relation, shapes: Mapping[str, Shape]) -> int | None:
    """The count that every dimension of the relation agrees on, None where they do not."""
    counts = {dimension.count(shapes) for dimension in relation}
    return counts.pop() if len(counts) == 1 else None


def classes(relation: Relation, shapes: Mapping[str, Shape]) -> int | None:
    """The number of classes, as `solve` finds it; auxiliary heads may have one of their own."""
    heads: dict[str, list[Dimension]] = {}
    for dimension in relation:
        heads.setdefault(dimension.auxiliary_head, []).append(dimension)
    counts = {name: solve(tuple(dimensions), shapes) for name, dimensions in heads.items()}
    return None if None in counts.values() else counts.get("")


def with_count(shapes: Mapping[str, Shape], relation: Relation, count: int) -> dict[str, Shape]:
    """The shapes that a network built with another count has."""
    changed = dict(shapes)
    for each in relation:
        shape = list(changed[each.key])
        shape[each.axis] = each.factor * count + each.offset
        changed[each.key] = tuple(shape)
    return changed


def fingerprint(shapes: Mapping[str, Shape], relation: Relation = ()) -> str:
    """The fingerprint of keys and shapes, with the dimensions of the relation factored out."""
    written = {key: [str(size) for size in shape] for key, shape in shapes.items() if counted(key)}
    for each in relation:
        written[each.key][each.axis] = f"{each.factor}N+{each.offset}"
    lines = sorted(f"{key} {','.join(sizes)}" for key, sizes in written.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

"""The table as it is shipped: ``table.json``, one record per line, written by ``tools/fingerprints.py``."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from foldexport.fingerprints.table import Candidate, Dimension, Inputs, Published, PublishedFile, Relation, Row, Table

USUAL_CLASSES = 1000  # where a record of weights does not say how many


@functools.cache
def table() -> Table:
    """The shipped table, read once."""
    return parsed(json.loads((resources.files(__package__) / "table.json").read_text("utf-8")))


def parsed(document: Mapping[str, Any]) -> Table:
    """The table that a document of ``table.json``'s form holds.

    ``relations``: lists of [key, axis, factor, offset].   ``arguments``: of constructors.   ``inputs``: rows of `Inputs`.
    ``fingerprints``: {fingerprint: [relation, stem, zoo, [[[spec, arguments], …], …]]}, the first two and the arguments as
    places in those lists.   ``headless``: {fingerprint: [fingerprint of the whole network, …]}.
    ``published``: {package: {name: {tag: place in inputs, or [place, classes], or [place, classes, place in arguments]}}}.
    ``files``: {SHA-256 prefix: [package, name, tag]}.   ``former_names``: {name: [name, tag]}.
    """
    relations = [_relation(rows) for rows in document["relations"]]
    inputs = [_inputs(row) for row in document["inputs"]]
    arguments = document["arguments"]
    return Table(
        versions=document["versions"],
        rows={key: _row(row, relations, arguments) for key, row in document["fingerprints"].items()},
        headless=document["headless"],
        published={
            package: {
                name: tuple(_published(tag, row, inputs, arguments) for tag, row in tags.items()) for name, tags in networks.items()
            }
            for package, networks in document["published"].items()
        },
        files={prefix: PublishedFile(*row) for prefix, row in document["files"].items()},
        former_names={name: (today, tag) for name, (today, tag) in document["former_names"].items()},
    )


def _relation(rows: list) -> Relation:
    return tuple(Dimension(*row) for row in rows)


def _inputs(row: list) -> Inputs:
    size, interpolation, mean, std, crop_pct = row
    return Inputs(tuple(size), interpolation, tuple(mean), tuple(std), crop_pct)


def _row(row: list, relations: list[Relation], arguments: list[dict]) -> Row:
    relation, stem, zoo, functions = row
    made = tuple(tuple(Candidate(spec, arguments[place]) for spec, place in each) for each in functions)
    return Row(relations[relation], relations[stem], made, zoo)


def _published(tag: str, row: int | list, inputs: list[Inputs], arguments: list[dict]) -> Published:
    place, classes, *needed = [row, USUAL_CLASSES] if isinstance(row, int) else row
    return Published(tag, inputs[place], classes, arguments[needed[0]] if needed else {})

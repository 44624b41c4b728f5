"""The sections of the page that are words and tables: what it is, what it costs, what was kept, how to make it again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from foldexport.report import ledger as phrases
from foldexport.report.html import kinds
from foldexport.report.words import size


def heading(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the file is, in the words of the console."""
    source, known = record["checkpoint"], record["architecture"]
    taken = f" under {source['taken']}" if source.get("taken") else ""
    rows = [
        ("file", f"{source['file']}, {size(source['size_bytes'])}B, {source['format']}"),
        ("recognised by", known["recognised_by"]),
        ("weights", f"{source['tensors']} {'EMA ' if source.get('ema') else ''}tensors{taken}"),
        *_interface(record),
        *_preprocessing(record.get("preprocessing") or {}),
        *(("note", note) for note in known["notes"] if not note.startswith("took the ")),
    ]
    title, _, rest = known["description"].partition(", ")
    return {"title": title, "rest": rest, "file": source["file"], "rows": [(name, text) for name, text in rows if text]}


def _interface(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, "; ".join(map(_value, record.get(f"{name}s", ())))) for name in ("input", "output")]


def _value(known: Mapping[str, Any]) -> str:
    return f"{known['name']} {'×'.join(map(str, known['shape']))} {known['type']}"


def _preprocessing(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not known.get("mean") or not known.get("std"):
        return []
    if known.get("inside_network"):
        return [("preprocessing", f"inside the network: it takes pixels from 0 to {known['value_range'][1]:g}")]
    mean, std = (" ".join(f"{value:.3f}" for value in known[name]) for name in ("mean", "std"))
    return [("preprocessing", f"mean {mean}, deviation {std}")]


def costs(record: Mapping[str, Any]) -> dict[str, Any]:
    """The table before and after, and the tiles at the top."""
    before, after = record["costs"]["before"], record["costs"]["after"]
    both = [each for each in (before, after) if each]
    names = list(dict.fromkeys(kind for each in both for kind in each["operators"]))
    most = max((each["operators"].get(kind, 0) for each in both for kind in names), default=1)
    rows = []
    for kind in names:
        counts = [each["operators"].get(kind, 0) for each in both]
        shares = [round(100 * count / most, 1) for count in counts]
        rows.append({"words": kinds.words(kind), "family": kinds.family(kind, 2), "counts": counts, "shares": shares,
                     "changed": len(set(counts)) > 1})  # fmt: skip
    totals = [
        ("operators", [sum(each["operators"].values()) for each in both], ""),
        ("parameters", [each["parameters"] for each in both], ""),
        ("multiply-adds", [each["multiply_adds"] for each in both], ""),
        ("weights", [each["weight_bytes"] for each in both], "B"),
    ]
    table = [{"name": name, "texts": [_amount(value, unit) for value in values], "values": values} for name, values, unit in totals]
    return {"rows": rows, "totals": table, "folded": after is not None, "tiles": _tiles(rows, table)}


def _amount(value: int | None, unit: str) -> str:
    return "unknown" if value is None else f"{size(value)}{unit}".strip()


def _tiles(rows: Sequence[Mapping[str, Any]], totals: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A number before and after each: what shrank most, then the totals."""
    shrunk = [row for row in rows if len(row["counts"]) > 1 and row["counts"][0] > row["counts"][1]]
    largest = max(shrunk, key=lambda row: row["counts"][0] - row["counts"][1], default=None)
    tiles = [{"name": largest["words"], "texts": list(map(str, largest["counts"])), "note": ""}] if largest else []
    for row in totals:
        first, last = row["values"][0], row["values"][-1]
        change = 100 * (last - first) / first if first and last is not None else 0.0
        note = "" if len(row["values"]) < 2 else "unchanged" if abs(change) < 0.05 else f"{change:+.1f} %".replace("-", "−")
        if row["name"] != "parameters":
            same = len(set(row["texts"])) == 1
            tiles.append({"name": row["name"], "texts": row["texts"][:1] if same else row["texts"], "note": note})
    return tiles


def folded(record: Mapping[str, Any]) -> list[str]:
    """One line per kind of fold, as the console has them."""
    return phrases.folded([_Entry(each) for each in record["ledger"] or ()], record["evaluated"])


def kept(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What stays, grouped where only names differ: how many, of what, the reason, and the user's modules."""
    groups: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for entry in record["ledger"] or ():
        if entry["status"] == "kept":
            groups.setdefault((entry["rule"], re.sub(r"`[^`]*`", "`…`", entry["reason"])), []).append(entry)
    return [
        {
            "count": len(found), "what": phrases.name(rule, len(found)), "modules": [entry["module"] for entry in found],
            "reason": found[0]["reason"] if len({entry["reason"] for entry in found}) == 1 else reason,
        }
        for (rule, reason), found in groups.items()
    ]  # fmt: skip


def ledger(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every entry, its rule in words."""
    return [{**entry, "what": phrases.name(entry["rule"])} for entry in record["ledger"] or ()]


def reproduce(document: Mapping[str, Any]) -> dict[str, Any]:
    """The command line, and what it met: versions and digests."""
    record = document["record"]
    digests = []
    if "checkpoint" in record:
        digests.append({"name": record["checkpoint"]["file"], "bytes": record["checkpoint"]["size_bytes"],
                        "sha256": record["checkpoint"]["sha256"]})  # fmt: skip
    for artifact in record.get("artifacts", ()):
        digests += [{"name": each["name"], "bytes": each["size_bytes"], "sha256": each["sha256"]} for each in artifact["files"]]
    return {
        "command": shlex.join(document["command"]) if document["command"] else "",
        "versions": [("foldexport", document["version"]), *document["versions"].items()],
        "digests": [{**each, "size": f"{size(each['bytes'])}B"} for each in digests],
        "manifest": document.get("manifest", ""),
    }


class _Entry:
    """An entry of the ledger read back from plain data."""

    def __init__(self, known: Mapping[str, str]) -> None:
        self.rule, self.status, self.into = known["rule"], known["status"], known["into"]

"""README.md of a bundle: what it is, how it is fed, how it was proven and how to prove it again, from the manifest alone.

The checkpoint's own card, where one lies beside it (NAME.md), is taken in, with the pictures that lie beside that.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foldexport import exporters
from foldexport.bundle import GOLDEN, SUMS, VERIFY
from foldexport.bundle.recipe import recipe
from foldexport.destination import MANIFEST_SUFFIX
from foldexport.report import ledger
from foldexport.report.words import OPERATORS, size

SHOWN_KEPT = 20
SHOWN_CLASSES = 100
FIELDS = ("input_size", "mean", "std", "value_range", "color_order", "layout", "interpolation", "crop_pct")
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
ONNX = """\
```python
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
outputs = session.run(None, {{{feeds}}})
```"""


def page(name: str, document: Mapping[str, Any], own: str = "") -> str:
    """The card as Markdown. name: of the files; document: the manifest; own: the text of the checkpoint's own card."""
    written = f"Made from `{document['checkpoint']['file']}` (SHA-256 `{document['checkpoint']['sha256']}`) by foldexport"
    written += f" {document['foldexport']['version']}: `{shlex.join(document['command'])}`"
    parts = [
        f"# {name}", f"{document['architecture']['description']}. {written}",
        _costs(document["costs"]),
        "## Files", _files(name, document), _interface(document), _run(document),
        "## Preprocessing", *_preprocessing(document),
        *_classes(document["preprocessing"].get("label_names") or ()),
        "## How it was proven", *_proof(document),
        "## Verify it here", *_verify(document),
    ]  # fmt: skip
    if own:
        parts += ["## The checkpoint's own card", own.strip()]
    return "\n\n".join(part for part in parts if part) + "\n"


def taken_in(path: Path) -> tuple[str, dict[str, Path]]:
    """The text of a card as a part of another, and the pictures in it that lie beside it, by name."""
    pictures: dict[str, Path] = {}

    def picture(match: re.Match) -> str:
        text, target = match.groups()
        if not _is_relative(target):
            return match[0]
        if Path(target).name == target and (path.parent / target).is_file():
            pictures[target] = path.parent / target
            return match[0]
        return f"*{text}*" if text else ""

    lines, fenced = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        fenced ^= line.lstrip().startswith("```")
        if not fenced:
            line = re.sub(r"^(#{1,4}) ", r"##\1 ", line)
            line = LINK.sub(lambda match: match[1] if _is_relative(match[2]) else match[0], PICTURE.sub(picture, line))
        lines.append(line)
    return "\n".join(lines), pictures


def _is_relative(target: str) -> bool:
    return not re.match(r"[a-z][a-z0-9+.-]*:|#|//", target, re.IGNORECASE)


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def _costs(costs: Mapping[str, Any]) -> str:
    before, after = costs["before"], costs["after"]
    both = [before, after] if after else [before]
    kinds = dict.fromkeys(kind for each in both for kind in each["operators"])
    rows = [
        [OPERATORS.get(kind) or ledger.name(kind).replace("_", " "), *(each["operators"].get(kind, 0) or "–" for each in both)]
        for kind in kinds
    ]
    rows.append(["parameters", *(size(each["parameters"]) for each in both)])
    rows.append(["multiply-adds", *("unknown" if each["multiply_adds"] is None else size(each["multiply_adds"]) for each in both)])
    rows.append(["weights", *(f"{size(each['weight_bytes'])}B" for each in both)])
    return _table(["", "before", "after folding"] if after else ["", "as it was trained"], rows)


def _files(name: str, document: Mapping[str, Any]) -> str:
    rows = []
    for entry in document["artifacts"]:
        for each in entry["files"]:
            what = exporters.get(entry["format"]).description if each["name"] == entry["file"] else f"belongs to {entry['file']}"
            rows.append([f"`{each['name']}`", what, f"{size(each['size_bytes'])}B"])
    rows.append([f"`{name}{MANIFEST_SUFFIX}`", "all that is known: ledger, certificate, comparisons, versions", ""])
    rows.append([f"`{GOLDEN}`", "golden inputs and outputs, for `numpy.load`", ""])
    rows.append([f"`{VERIFY}`", "proves the files again; needs numpy and a runtime", ""])
    rows.append([f"`{SUMS}`", f"SHA-256 of every file: `sha256sum -c {SUMS}`", ""])
    return _table(["file", "what it is", "size"], rows)


def _interface(document: Mapping[str, Any]) -> str:
    rows = [
        [kind, f"`{each['name']}`", f"{' × '.join(map(str, each['shape'])) or 'a number'}", each["type"]]
        for kind, ends in (("input", document["inputs"]), ("output", document["outputs"]))
        for each in ends
    ]
    return _table(["", "name", "shape", "type"], rows)


def _run(document: Mapping[str, Any]) -> str:
    entry = next((each for each in document["artifacts"] if each["format"] == "onnx"), None)
    if entry is None:
        return ""
    feeds = ", ".join(f'"{each["name"]}": x{place or ""}' for place, each in enumerate(document["inputs"]))
    return ONNX.format(file=entry["file"], feeds=feeds)


def _preprocessing(document: Mapping[str, Any]) -> list[str]:
    fields = document["preprocessing"]
    code = recipe(fields, document["inputs"][0]["type"]) if len(document["inputs"]) == 1 else ""
    rows = [[f"`{key}`", _words(fields[key])] for key in FIELDS if fields.get(key) is not None]
    found = [_table(["field", "value"], rows)] if rows else []
    inside = fields.get("inside_network")
    if inside:
        low, top = inside["value_range"]
        found.append(
            f"Mean {_words(inside['mean'])} and deviation {_words(inside['std'])} are inside of the network: feed it pixels "
            f"from {low:g} to {top:g} as they are."
        )
    if code:
        found.append(f"```python\n{code}```")
    elif not fields.get("mean"):
        found.append("Nothing in the checkpoint says how its inputs are made: feed it what the training code made.")
    return found


def _classes(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(f"{place} `{name}`" for place, name in enumerate(names[:SHOWN_CLASSES]))
    more = f" and {len(names) - SHOWN_CLASSES} more: `label_names` in the manifest" if len(names) > SHOWN_CLASSES else ""
    return ["## Classes", f"{shown}{more}."]


def _proof(document: Mapping[str, Any]) -> list[str]:
    found, certificate = [], document["certificate"]
    if certificate:
        probes = ", ".join(each["name"] for each in certificate["probes"])
        ends = certificate["end_to_end"]
        outputs = f" The outputs differ by {float(ends['error']):.1e} of their peak." if ends else ""
        found.append(
            f"**The fold**, in float64: {certificate['n_values']} values in {certificate['n_nodes']} operators were compared "
            f"with the training graph's own, per channel, on the probes {probes}, and are equal to 1e-11.{outputs}"
        )
    else:
        found.append("Not folded: the files hold the training graph as it is.")
    rows = [[f"`{each['file']}`", *_compared(each["comparison"])] for each in document["artifacts"]]
    found.append("**The files**, each run in its own runtime and compared with the training graph in float64:")
    found.append(_table(["file", "runtime", "max error, of peak", "in units of noise", "top-1", "weights"], rows))
    found.append(
        "The unit is the training graph's own noise: the RMS of its error in the files' number type, relative to the largest "
        "output. 1 rounds like the training graph; above 8 nothing would have been written."
    )
    kept = ledger.kept([_Entry(each) for each in document["ledger"] or ()])
    if kept:
        lines = [f"- {what}: {reason}" for what, reason in kept[:SHOWN_KEPT]]
        lines += [f"- and {len(kept) - SHOWN_KEPT} more, in the manifest"] if len(kept) > SHOWN_KEPT else []
        found += ["Kept as it was, with the reason:", "\n".join(lines)]
    return found


class _Entry:
    """An entry of the manifest's ledger, by attribute."""

    def __init__(self, record: Mapping[str, str]) -> None:
        self.module, self.rule = record["module"], record["rule"]
        self.status, self.into, self.reason = record["status"], record["into"], record["reason"]


def _compared(comparison: Mapping[str, Any] | None) -> list[str]:
    if not comparison:
        return ["–"] * 5
    error, multiple = comparison["max_error"], comparison["noise_multiple"]
    unit, top1, weights = comparison["unit"], comparison["top1"], comparison["weights_identical"]
    noise = f"{multiple:.1f}× {unit}" if multiple is not None and unit != "int8" else "–"
    return [
        f"{comparison['runtime']}{', ' + comparison['not_run'] if comparison.get('not_run') else ''}",
        "–" if error is None else f"{error:.1e}", noise,
        f"{top1['agree']}/{top1['counted']}" if top1 else "–",
        "–" if not weights else f"{weights[0]}/{weights[1]} {'to half a step' if unit == 'int8' else 'bit-identical'}",
    ]  # fmt: skip


def _verify(document: Mapping[str, Any]) -> list[str]:
    from foldexport.bundle.standalone import RUNNERS

    packages = [rows[0][1] for each in document["artifacts"] if (rows := RUNNERS.get(each["format"]))]
    install = " ".join(dict.fromkeys(["numpy", *" ".join(packages[:1]).split()]))
    return [
        f"```\npip install {install}\npython {VERIFY}\n```",
        "It checks the SHA-256 of every file, runs each file whose runtime is installed on the golden inputs, and compares. Exit "
        "codes: 0 all that ran agree, and one did; 4 a file was changed or computes something else; 5 nothing could be run here. "
        "Where foldexport is installed, `foldexport verify .` does the same.",
    ]


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_words(each) for each in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)

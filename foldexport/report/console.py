"""What people see: plain sentences and tables that fit 80 columns."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from foldexport.artifact import size_bytes
from foldexport.report import ledger, precision
from foldexport.report.words import OPERATORS, size

if TYPE_CHECKING:
    from foldexport.costs import Costs
    from foldexport.exporters import Status
    from foldexport.pipeline import Outcome
    from foldexport.precision.prepare import Prepared
    from foldexport.precision.quantised import Quantised
    from foldexport.recheck import Checked
    from foldexport.study import Study
    from foldexport.verify import Comparison

KEPT_SHOWN = 8
WIDEST = 120
INDENT = 2
ROOM_FOR_ALIASES = 105  # columns of the terminal from which formats have their other names beside them
LEAD = 17  # columns of ✓ and a format's name, or "training graph"


def outcome(screen: Console, done: Outcome) -> None:
    """The main command's result."""
    _identified(screen, done.study)
    _costs(screen, done.study)
    _ledger(screen, done.study, KEPT_SHOWN)
    _certificate(screen, done.study)
    if done.reduced is not None:
        _reduced(screen, done.reduced)
    if done.on_device:
        heading(screen, f"on {done.on_device[0].device}")
        for each in done.on_device:
            proof(screen, each)
    heading(screen, "artifacts")
    for artifact in done.artifacts:
        if artifact.comparison:
            proof(screen, artifact.comparison)
        if "precision" in artifact.notes:
            _sentence(screen, "", [_types(artifact.notes["precision"])], "dim")
    for name in done.manifest["probes_left_out"]:
        said = f"probe {name} left out: the training graph itself is imprecise on it in float32"
        _sentence(screen, "", [said], "dim")
    screen.print()
    _files(screen, done)
    for artifact in done.artifacts:
        if artifact.comparison and not artifact.comparison.proven:
            said = f"not proven here: {artifact.path.name}; verify it where it runs"
            screen.print(Text(" " * INDENT + said, "yellow"), soft_wrap=True)
    screen.print()
    screen.print(Text(f"{_seconds(done.study.seconds)}", "dim"))
    screen.print(Text.assemble(("next: ", "dim"), f"foldexport verify {_shell(done.bundle or done.manifest_path)}"), soft_wrap=True)


def study(screen: Console, found: Study) -> None:
    """What ``inspect`` shows."""
    _identified(screen, found)
    _costs(screen, found)
    _ledger(screen, found, None)
    _certificate(screen, found)


def checked(screen: Console, found: Sequence[Checked]) -> None:
    """One proof line per artifact of a manifest."""
    for each in found:
        if each.comparison is not None:
            proof(screen, each.comparison)
            continue
        if each.unrun:
            said = [f"{each.file}: SHA-256 as in the manifest", f"cannot be run here: {each.unrun}"]
            _sentence(screen, f"– {each.format}", said, "yellow")
            continue
        said = each.reason or "SHA-256 as in the manifest; it has no golden inputs to run"
        _sentence(screen, f"{'✓' if each.ok else '✗'} {each.file}", [said], "green" if each.ok else "red")


def formats(screen: Console, rows: Sequence[Status]) -> None:
    """The table of formats; other names have a column of their own where there is room."""
    wide = screen.width >= ROOM_FOR_ALIASES
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for title in ("format", *(["also"] if wide else []), "file", "here"):
        table.add_column(title, no_wrap=True)
    for row in rows:
        here = Text(f"✓ {row.runtime or row.format.runtime} {row.version}", "green") if row.works else Text("✗ see below", "yellow")
        also = [", ".join(row.format.aliases)] if wide else []
        table.add_row(row.format.name, *also, row.format.file_names, here)
    screen.print(table)
    if not wide:
        other = "; ".join(f"{', '.join(row.format.aliases)} for {row.format.name}" for row in rows if row.format.aliases)
        screen.print(Text(f"also: {other}", "dim"))
    for row in rows:
        if row.reason:  # a command to paste must not be broken across lines
            screen.print(Text(f"{row.format.name}: {row.reason}", "dim" if row.works else "yellow"), soft_wrap=True)


def heading(screen: Console, title: str) -> None:
    screen.print()
    screen.print(Text(title, "bold"))


def proof(screen: Console, found: Comparison) -> None:
    """``✓ onnx  onnxruntime 1.31.1  max error 3.1e-07 of peak (0.9× float32 noise)  weights 22/22 identical  …``"""
    parts = [found.runtime]
    if found.not_run:
        parts += [found.not_run, *found.instead]
    if found.probes:
        parts.append(found.error)
    if found.weights_identical is not None:
        how = "to half a step" if found.unit == "int8" else "identical"
        parts.append("weights {}/{} {}".format(*found.weights_identical, how))
    if found.top1 is not None:
        ties = f" ({len(found.top1.near_ties)} near-ties left out)" if found.top1.near_ties else ""
        parts.append(f"top-1 {found.top1.agree}/{found.top1.counted}{ties}")
    _sentence(screen, f"{found.mark} {found.format}", parts, {"✓": "green", "–": "yellow", "✗": "red"}[found.mark])
    if found.message:
        _sentence(screen, "", [found.message], "yellow" if found.ok else "red")


def _identified(screen: Console, found: Study) -> None:
    network, source = found.network, found.network.source
    screen.print(Text.assemble((source["file"], "bold"), " is ", (network.description, "bold cyan")), soft_wrap=False)
    _rows(screen, [
        ("recognised by", network.reason),
        ("weights", _weights(source)),
        ("input", _shapes(found) + _normalisation(network.preprocessing)),
        *(("note", note) for note in network.notes if not note.startswith("took the ")),
    ])  # fmt: skip


def _weights(source: dict) -> str:
    taken = f" under `{source['taken']}`" if source["taken"] else ""
    which = f"{source['tensors']} {'EMA ' if source['ema'] else ''}tensors{taken}"
    prefix = f", stripped of `{source['prefix']}`" if source["prefix"] else ""
    return f"{which}{prefix}, {source['format']}, {size(source['size_bytes'])}B, SHA-256 {source['sha256'][:12]}…"


def _shapes(found: Study) -> str:
    return ", ".join("x".join(map(str, value.shape)) for value in found.example)


def _normalisation(preprocessing: dict) -> str:
    if not preprocessing.get("mean") or not preprocessing.get("std"):
        return ""
    if preprocessing.get("inside_network"):
        return f", RGB from 0 to {preprocessing['value_range'][1]:g}"
    mean, std = (" ".join(f"{value:.3f}" for value in preprocessing[name]) for name in ("mean", "std"))
    return f", RGB with mean {mean} and deviation {std}"


def _rows(screen: Console, rows: Iterable[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for title, text in rows:
        table.add_row(" " * INDENT + title, text)
    screen.print(table, width=_width(screen))


def _costs(screen: Console, found: Study) -> None:
    """Operators, parameters, multiply-adds and bytes, before and after."""
    before, after = found.before, found.after
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(" " * INDENT)
    for title in ("before", "after") if after else ("as it is",):
        table.add_column(title, justify="right")
    for kind in [*before.operators, *(k for k in (after.operators if after else {}) if k not in before.operators)]:
        label = OPERATORS.get(kind) or ledger.name(kind).replace("_", " ")
        cells = [str(costs.operators.get(kind, 0) or "–") for costs in (before, after) if costs]
        changed = after is not None and before.operators.get(kind, 0) != after.operators.get(kind, 0)
        table.add_row(" " * INDENT + label, *cells, style="bold" if changed else "")
    for label, cells in _totals([costs for costs in (before, after) if costs]):
        table.add_row(" " * INDENT + label, *cells)
    screen.print()
    screen.print(table)


def _totals(costs: Sequence[Costs]) -> list[tuple[str, list[str]]]:
    adds = ["unknown" if each.multiply_adds is None else size(each.multiply_adds) for each in costs]
    return [
        ("parameters", [size(each.parameters) for each in costs]),
        ("multiply-adds", adds),
        ("weight bytes", [f"{size(each.weight_bytes)}B" for each in costs]),
    ]


def _ledger(screen: Console, found: Study, most: int | None) -> None:
    if found.ledger is None:
        heading(screen, "not folded, as asked")
        return
    lines = ledger.folded(found.ledger, found.evaluated)
    heading(screen, "folded" if lines else "nothing to fold")
    for line in lines:
        screen.print(" " * INDENT + line)
    if most is None:
        _whole_ledger(screen, found)
    kept = ledger.kept(found.ledger)
    if not kept:
        return
    heading(screen, "kept")
    _rows(screen, kept[:most])
    if most is not None and len(kept) > most:
        screen.print(Text(f"{' ' * INDENT}and {len(kept) - most} more: foldexport inspect, or --json", "dim"))


def _whole_ledger(screen: Console, found: Study) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in (" " * INDENT + "module", "what", "into"):
        table.add_column(title, overflow="fold")
    for entry in found.ledger or ():
        if entry.status == "folded":
            into = entry.into + (f" ({entry.reason})" if entry.reason else "")
            table.add_row(" " * INDENT + entry.module, ledger.name(entry.rule), into)
    if table.row_count:
        screen.print()
        screen.print(table)


def _certificate(screen: Console, found: Study) -> None:
    if found.certificate is None:
        return
    heading(screen, "proof")
    _sentence(screen, "✓ float64", found.certificate.summary().split(", "), "green")
    rounding = found.certificate.rounding
    for warning in rounding.warnings() if rounding else ():
        _sentence(screen, "", [warning], "yellow")
    for name, reason in found.certificate.dropped:
        _sentence(screen, "", [f"probe {name} left out: {reason}"], "dim")
    if found.extremes is not None:
        peaks = [("weight or bias", found.extremes.weight), ("activation", found.extremes.activation)]
        _sentence(screen, "largest", [f"{kind} {peak.value:.3g} in {peak.layer}" for kind, peak in peaks], "dim")


def _reduced(screen: Console, done: Prepared | Quantised) -> None:
    """What the type holds, what was rescaled, and what stays in float32; of int8, what it cost."""
    said = precision.said(done.to_dict())
    heading(screen, "precision")
    _sentence(screen, f"✓ {said.type}", said.parts, "green")
    if said.other:
        _sentence(screen, "", [said.other], "dim")
    if said.without_care:
        more = len(said.without_care) - KEPT_SHOWN
        named = ", ".join(said.without_care[:KEPT_SHOWN]) + (f" and {more} more" if more > 0 else "")
        _sentence(screen, "unscaled", [named], "dim")
    for layer, why in list(said.single.items())[:KEPT_SHOWN]:
        _sentence(screen, "float32", [f"'{layer}': {why}"], "yellow")
    for note in said.notes:
        _sentence(screen, "", [note], "yellow")


def _types(read: dict) -> str:
    """What the file was read back to be in."""
    total, largest = sum(read["weight_bytes"].values()) or 1, lambda pair: -pair[1]
    shares = [f"{100 * count / total:.0f} % {name}" for name, count in sorted(read["weight_bytes"].items(), key=largest)]
    layers = [f"{count} in {name}" for name, count in sorted(read["layers"].items(), key=largest)]
    return f"read back: weights {', '.join(shares)}" + (f"; layers {', '.join(layers)}" if layers else "")


def _files(screen: Console, done: Outcome) -> None:
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    for path in [*done.files, *([done.report] if done.report is not None else [])]:
        table.add_row(" " * INDENT + _here(path), f"{size(size_bytes(path))}B")
    screen.print(table)


def _seconds(stages: dict[str, float]) -> str:
    """``"4.1 s: trace 0.5, certify 0.3, …"``, the longest stages first."""
    longest = sorted(stages.items(), key=lambda item: -item[1])[:4]
    return f"{sum(stages.values()):.1f} s: " + ", ".join(f"{name} {value:.1f}" for name, value in longest)


def _sentence(screen: Console, lead: str, parts: Sequence[str], style: str) -> None:
    """A lead and its parts, two spaces apart, broken between parts where the line is full."""
    indent = max(INDENT + LEAD, INDENT + len(lead) + 2)  # the name of a format may be longer
    width = _width(screen)
    lines = [""]
    for part in parts:
        joined = f"{lines[-1]}  {part}" if lines[-1] else part
        if lines[-1] and indent + len(joined) > width:
            lines.append(part)
        else:
            lines[-1] = joined
    table = Table.grid()
    table.add_column(width=indent, no_wrap=True, style=style)
    table.add_column(overflow="fold")
    for place, line in enumerate(lines):
        table.add_row(" " * INDENT + lead if place == 0 else "", Text(line, "" if lead else style))
    screen.print(table)


def _width(screen: Console) -> int:
    return min(screen.width, WIDEST) if screen.is_terminal else screen.width


def _here(path: Path) -> str:
    """The shorter of the path as it is and relative to the current folder."""
    return min((str(path), os.path.relpath(path)), key=len)


def _shell(path: Path) -> str:
    return shlex.quote(_here(path))

"""Operators left by a network's own re-parameterisation against operators left by folding it, for timm's networks that have one.

    python benchmarks/reparameterize.py [--only REGEX] [--per-family 2] [--again] [--list]

Every timm network with a ``reparameterize``, ``fuse`` or ``switch_to_deploy`` among its modules, the smallest ones of each family
(a file of timm and the set of classes that have the method). Random weights and statistics, γ of both signs. Both results are
traced and counted alike, views left out; both must compute what the training graph computes, in float64. Exits 1 where folding
leaves more operators than the method, or where a result of ours is another.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import inspect
import json
import re
import sys
import time
from pathlib import Path

import machine
import torch
from coverage_page import VIEWS, working
from coverage_worker import randomised
from peers import METHODS, has_method, reparameterized
from torch import Tensor, nn

import foldexport
from foldexport.api import FREE, count_operators
from foldexport.trace import trace
from tests.torchvision_schemas import declare_missing

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-10  # of peak, in float64
OF_NOISE = 2.0**-19  # or this much of the network's own float32 noise, as for the certificate: 2^-29 is what float64 leaves of it
SIZES = (64, 128, 224, 256)


def candidates() -> dict[str, tuple[str, int, int]]:
    """Networks that have such a method: name → (family, parameters, size of its inputs), built without memory where possible."""
    import timm
    from timm.models._registry import _model_entrypoints

    defines = re.compile(rf"def ({'|'.join(METHODS)})\(")
    found = {}
    for name in timm.list_models():
        file = sys.modules[_model_entrypoints[name].__module__]
        if not _mentions(file, defines):
            continue
        network = _built(name)
        if classes := has_method(network):
            family = f"{file.__name__.rsplit('.', 1)[1]}: {', '.join(classes)}"
            size = timm.get_pretrained_cfg(name)
            found[name] = (family, sum(p.numel() for p in network.parameters()), (size.input_size if size else (3, 224, 224))[-1])
    return found


def _mentions(file, defines: re.Pattern) -> bool:
    """Whether one of a file's classes, its own or imported, defines the method."""
    own = {inspect.getmodule(value) for value in vars(file).values() if inspect.isclass(value) and issubclass(value, nn.Module)}
    return any(defines.search(inspect.getsource(each)) for each in own if each and each.__name__.startswith("timm.models"))


def _built(name: str) -> nn.Module:
    import timm

    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False)
    except Exception:  # whatever a constructor that looks at its weights raises on tensors without values
        return timm.create_model(name, pretrained=False)


def chosen(found: dict[str, tuple[str, int, int]], count: int) -> list[str]:
    """The ``count`` smallest of each family, families in the order of their names."""
    order = sorted(found, key=lambda name: (found[name][0], found[name][1], name))
    return [name for name in order if [other for other in order if found[other][0] == found[name][0]].index(name) < count]


def measure(name: str, size: int) -> dict:
    """Operators of the training graph, of its own method's result and of ours, with both errors in float64, of peak."""
    torch.manual_seed(0)
    shapes = [[3, side, side] for side in sorted({*(side for side in SIZES if side < size), size})]
    network, shape = randomised({"source": "timm", "model": name, "shapes": shapes})
    network.double()
    example = torch.randn(2, *shape, dtype=torch.float64)
    began = time.perf_counter()
    folded = foldexport.fold(network, example, certify=False)  # compared below; coverage.py has the certificates
    seconds = time.perf_counter() - began
    torch.set_default_dtype(torch.float64)  # some methods build layers of the default type
    try:
        own = reparameterized(network)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        wanted = _tensors(network(example))
        errors = [_error(_tensors(module(example)), wanted) for module in (own, folded.module)]
        noise = _error(_tensors(copy.deepcopy(network).float()(example.float())), wanted)
    return {
        "shape": list(shape),
        "before": _counts(network, example), "own": _counts(own, example), "ours": _counts(folded.module, example),
        "own_error": errors[0], "our_error": errors[1], "noise": noise, "seconds": seconds,
    }  # fmt: skip


def _counts(module: nn.Module, example: Tensor) -> dict[str, int]:
    return dict(sorted(count_operators(trace(module, example)).items()))


def _tensors(value: object) -> list[Tensor]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference over the largest value; NaN where the results do not correspond."""
    if len(found) != len(wanted) or any(f.shape != w.shape for f, w in zip(found, wanted, strict=True)):
        return float("nan")
    peak = max(float(w.abs().max()) for w in wanted)
    return max(float((f - w).abs().max()) for f, w in zip(found, wanted, strict=True)) / peak


def operators(counts: dict[str, int]) -> int:
    return working({kind: number for kind, number in counts.items() if kind not in FREE})


def bound(row: dict) -> float:
    """How far a result may be off in float64, of peak: more in a network that turns roundoff into much."""
    return max(TOLERANCE, OF_NOISE * row.get("noise", 0.0))


def verdict(row: dict) -> str:
    """Empty where the row meets the requirement, else what it misses."""
    if "refused" in row:
        return row["refused"]
    if not row["our_error"] <= bound(row):
        return f"ours computes something else: {row['our_error']:.1e} of peak"
    more = operators(row["ours"]) - operators(row["own"])
    return f"ours leaves {more} more" if more > 0 else ""


def difference(first: dict[str, int], second: dict[str, int]) -> str:
    """Kinds that differ: "3 conv, 1 add" less or more."""
    found = {kind: second.get(kind, 0) - first.get(kind, 0) for kind in sorted({*first, *second}) if kind not in {*VIEWS, *FREE}}
    return ", ".join(f"{number:+d} {kind.replace('_', ' ')}" for kind, number in found.items() if number)


def page(found: dict) -> str:
    rows = found["rows"]
    missed = {name: verdict(row) for name, row in rows.items() if verdict(row)}
    fewer = [name for name, row in rows.items() if not verdict(row) and operators(row["ours"]) < operators(row["own"])]
    wrong = [name for name, row in rows.items() if "own_error" in row and not row["own_error"] <= bound(row)]
    lines = [
        "# Folding against the networks' own re-parameterisation",
        "",
        f"Generated by `python benchmarks/reparameterize.py`, {found['date']}. {len(rows)} networks of timm "
        f"{found['machine'].get('timm', '')} with a method of their own ({', '.join(f'`{name}`' for name in METHODS)}), of "
        f"{len({row['family'] for row in rows.values()})} families; {len(found['candidates'])} networks have one. Random "
        "weights and statistics, γ of both signs. Operators are counted on the graph traced from each, those on constants and "
        "views of the same memory left out. *Error*: the largest difference from the training graph in float64, of peak.",
        "",
        f"Folding leaves fewer operators than the network's own method in {len(fewer)} of {len(rows)}, as many in "
        f"{len(rows) - len(fewer) - len(missed)}, more in {sum('more' in text for text in missed.values())}."
        + (f" The network's own method computes something else in {len(wrong)}: {', '.join(wrong)}." if wrong else ""),
        "",
        "| network | input | training graph | its own method | folded | kinds that differ | error, own method | error, folded |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "refused" in row:
            lines.append(f"| {name} | – | – | – | – | {' '.join(row['refused'].split())[:200]} | – | – |")
            continue
        before, own, ours = (operators(row[key]) for key in ("before", "own", "ours"))
        lines.append(
            f"| {name} | {'×'.join(map(str, row['shape']))} | {before} | {own} | {ours} | {difference(row['own'], row['ours'])} "
            f"| {row['own_error']:.0e} | {row['our_error']:.0e} |"
        )
    if missed:
        lines += ["", "## Missed", "", *(f"- {name}: {text}" for name, text in missed.items())]
    return "\n".join([*lines, "", *machine_lines(found)]) + "\n"


def machine_lines(found: dict) -> list[str]:
    return ["Measured on: " + ", ".join(f"{key} {value}" for key, value in found["machine"].items()) + "."]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name matches")
    parser.add_argument("--per-family", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="measure what was measured")
    parser.add_argument("--list", action="store_true", help="say which networks there are, and stop")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    declare_missing()
    import timm

    path = args.json or HERE / "results" / f"reparameterize-{datetime.date.today()}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    same = before.get("machine", {}).get("timm") == timm.__version__
    known = {name: tuple(one) for name, one in before["candidates"].items()} if same and "candidates" in before else candidates()
    names = chosen(known, args.per_family)
    if args.list:
        print("\n".join(f"{name}: {known[name]}" for name in names))
        return 0
    rows = before.get("rows", {})
    for name in names:
        if not re.search(args.only, name) or (name in rows and not args.again):
            continue
        try:
            rows[name] = {**measure(name, known[name][2]), "family": known[name][0]}
        except Exception as error:  # its row says so, and the run fails in the end
            rows[name] = {"refused": f"{type(error).__name__}: {error}", "family": known[name][0]}
        print(f"{name}: {verdict(rows[name]) or 'ok'}", file=sys.stderr, flush=True)
        found = {"date": f"{datetime.date.today()}", "machine": machine.describe() | {"timm": timm.__version__},
                 "candidates": known, "rows": {each: rows[each] for each in names if each in rows}}  # fmt: skip
        path.write_text(json.dumps(found, indent=1) + "\n")
        path.with_suffix(".md").write_text(page(found))
    return 1 if any(verdict(row) for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

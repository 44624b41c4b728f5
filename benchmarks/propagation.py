"""How the variance of gradients runs through residual networks without batch norm at initialisation.

Civitelli et al. 2021 (arXiv 2112.12299, figure 2), from our own networks: ResNet-50 for CIFAR, initialised with ten seeds. The
three sums c·(h(x) + f(x)) with their own initialisation, which keeps the variance of gradients, beside the one that it is
compared with, Brock et al.'s, which keeps that of activations. Writes the picture, one folded network's picture, and a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine
import torch

from foldexport import propagation
from foldexport.fold.passes import fold_graph
from foldexport.fold.rebuild import rebuild
from foldexport.propagation import Propagation
from foldexport.report import plot
from foldexport.trace import Graph, trace
from foldexport.zoo.nfresnet import nfresnet

HERE = Path(__file__).resolve().parent
DEPTH, WIDTH, SEEDS = 50, 16, 10
FLAT, GROWN = 10.0, 100.0  # largest over smallest block at most; first over last block at least


@dataclass(frozen=True)
class Curve:
    """A network and its initialisation. wanted: "flat", "grown", or "" for what is only told."""

    label: str
    scheme: str
    init: str
    wanted: str = ""
    width: int = WIDTH
    seeds: int = SEEDS


CURVES = (
    Curve("IdShort", "idshort", "backward", "flat"),
    Curve("LearnScalar", "learnscalar", "backward", "flat"),
    Curve("ConvShort", "convshort", "backward", "flat"),
    Curve("IdShort, Brock's initialisation", "idshort", "brock", "grown"),
)
BESIDE = (
    Curve("LearnScalar, Brock's initialisation", "learnscalar", "brock"),
    Curve("ConvShort, Brock's initialisation", "convshort", "brock"),
    Curve("NF-ResNet itself, x + αf(x/β)", "nf", "brock"),
    Curve("IdShort, n_out = k²·Cout at any stride", "idshort", "fan_out"),
    Curve("IdShort, width 64", "idshort", "backward", width=64, seeds=2),
    Curve("ConvShort, width 64", "convshort", "backward", width=64, seeds=2),
    Curve("IdShort, Brock's initialisation, width 64", "idshort", "brock", width=64, seeds=2),
)


@dataclass(frozen=True)
class Row:
    """One curve, measured. found: per seed."""

    curve: Curve
    found: Sequence[Propagation]

    @property
    def growth(self) -> list[float]:
        """Gradient variance at the first block over that at the last, per seed."""
        return [each.training.gradient[0] / each.training.gradient[-1] for each in self.found]

    @property
    def spread(self) -> list[float]:
        """Largest over smallest gradient variance of the blocks, per seed."""
        return [max(each.training.gradient) / min(each.training.gradient) for each in self.found]

    @property
    def slope(self) -> float:
        """Decades per block from the last to the first, fitted to log10 of the median over seeds (least squares)."""
        heights = [math.log10(value) for value in self.median("gradient")]
        middle, mean = (len(heights) - 1) / 2, statistics.mean(heights)
        over = sum((at - middle) ** 2 for at in range(len(heights)))
        return -sum((at - middle) * (value - mean) for at, value in enumerate(heights)) / over

    @property
    def passes(self) -> bool | None:
        if not self.curve.wanted:
            return None
        return max(self.spread) <= FLAT if self.curve.wanted == "flat" else min(self.growth) >= GROWN

    def median(self, what: str) -> list[float]:
        return [statistics.median(values) for values in self.values(what)]

    def values(self, what: str) -> list[tuple[float, ...]]:
        """Per block, over the seeds; gradients relative to the last block."""
        return list(zip(*(_relative(getattr(each.training, what), what) for each in self.found), strict=True))


def _relative(values: Sequence[float], what: str) -> list[float]:
    return [value / values[-1] for value in values] if what == "gradient" else list(values)


def measured(curve: Curve, depth: int = DEPTH, size: int = 32) -> Row:
    """Every seed of a curve; one trace serves them all, for they differ in weights only."""
    found = [propagation.measure(graph, seed=seed) for seed, graph in enumerate(graphs(curve, depth, size))]
    return Row(curve, found)


def graphs(curve: Curve, depth: int = DEPTH, size: int = 32) -> Iterator[Graph]:
    """The training graph of each seed."""
    graph: Graph | None = None
    for seed in range(curve.seeds):
        torch.manual_seed(seed)
        network = nfresnet(depth, curve.scheme, width=curve.width, init=curve.init).eval()
        graph = graph or trace(network, torch.zeros(2, 3, size, size))
        state = network.state_dict()
        yield replace(graph, tensors={name: state[name] for name in graph.tensors})


def panels(rows: Sequence[Row]) -> list[plot.Panel]:
    """Median over seeds, with a band from the smallest to the largest; curves that coincide share one."""
    titles = {"activation": "activation variance", "gradient": "gradient variance, relative to the last block"}
    made = []
    for what, title in titles.items():
        lines, seen = [], []
        for style, row in enumerate(rows):
            values = row.values(what)
            band = None if values in seen else ([*map(min, values)], [*map(max, values)])
            lines.append(plot.Line(row.curve.label, row.median(what), style, band))
            seen.append(values)
        made.append(plot.Panel(title, lines))
    return made


def folded(depth: int = DEPTH, size: int = 32) -> Propagation:
    """One IdShort network beside what it folds to."""
    graph = next(graphs(replace(CURVES[0], seeds=1), depth, size))
    return propagation.measure(graph, rebuild(fold_graph(graph)).program)


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| network | first / last block | largest / smallest block | decades per block | wanted | |",
        "|---|---:|---:|---:|---|---|",
    ]
    wanted = {"flat": f"largest / smallest ≤ {FLAT:g}", "grown": f"first / last ≥ {GROWN:g}", "": "–"}
    for row in rows:
        verdict = {True: "PASS", False: "FAIL", None: ""}[row.passes]
        cells = [row.curve.label, _range(row.growth), _range(row.spread), f"{row.slope:+.3f}", wanted[row.curve.wanted], verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    middle, low, high = (f"{float(f'{value:.3g}'):g}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} … {high})"


def document(rows: Sequence[Row], depth: int, date: str) -> dict[str, Any]:
    return {
        "date": date,
        "machine": machine.describe(),
        "depth": depth,
        "samples": rows[0].found[0].samples,
        "blocks": rows[0].found[0].names,
        "rows": [
            {
                "network": row.curve.label, "scheme": row.curve.scheme, "init": row.curve.init, "width": row.curve.width,
                "seeds": row.curve.seeds, "wanted": row.curve.wanted, "passes": row.passes,
                "decades_per_block": round(row.slope, 4),
                **{name: _digits(getattr(row, name)) for name in ("growth", "spread")},
                **{f"{what}_variance": _digits(row.median(what)) for what in ("activation", "gradient")},
            }
            for row in rows
        ],
    }  # fmt: skip


def _digits(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def page(rows: Sequence[Row], found: dict[str, Any]) -> str:
    drawn = rows[0].curve
    kind = "\n".join(f"- {name}: {found['machine'][name]}" for name in ("processor", "cores", "python", "torch"))
    return f"""# Gradient variance at initialisation

`benchmarks/propagation.py`, {found["date"]}: ResNet-{found["depth"]} for CIFAR, width {drawn.width} and {drawn.seeds} seeds
where nothing else is said, {found["samples"]} normal samples, in float64. Variance of the gradient of Σ ⟨u, logits⟩, u of unit
variance, behind each of the {len(found["blocks"])} residual sums: median over seeds, in brackets the smallest and the largest.
After figure 2 of Civitelli et al. 2021.

{table(rows)}

- IdShort and LearnScalar are one function at initialisation, α being 1: their rows are equal.
- The slight fall towards the first block is zero padding: on the 4×4 maps of the last stage a 3×3 convolution gives its
  input (10/12)² = 0.69 of the gradient that an interior position gets. With circular padding it is gone.
- Brock et al.'s Var[W] = 2/((1 − 1/π)·n_in) keeps activations level and multiplies the gradient's variance by 2.1 in every
  block of equal sizes (by 1.04 in a transition). Their own network does not show it: α² = 0.04 stands in front of f.
- n_out counts the positions of the output that an input position reaches, k²·Cout/stride². With k²·Cout at any stride each
  of the three transitions takes the variance down to a quarter.

{kind}
"""


def pictures(rows: Sequence[Row], depth: int, folder: Path) -> None:
    """The curves side by side, and one network beside what it folds to."""
    folder.mkdir(parents=True, exist_ok=True)
    title = f"ResNet-{depth} without batch norm at initialisation, {rows[0].curve.seeds} seeds"
    plot.save(panels(rows), rows[0].found[0].names, plot.axis_label(propagation.SUM), title, folder / "propagation.png")
    one = f"ResNet-{depth}, IdShort: training graph and folded network"
    plot.propagation(folded(depth), one, folder / "propagation_folded.png")


def main(arguments: Sequence[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    seeds = asked.seeds
    curves = [replace(curve, seeds=min(curve.seeds, seeds), width=asked.width or curve.width) for curve in CURVES]
    beside = [] if asked.quick else [replace(curve, seeds=min(curve.seeds, seeds)) for curve in BESIDE]
    rows = []
    for curve in (*curves, *beside):
        print(f"measuring {curve.label} …", file=sys.stderr, flush=True)
        rows.append(measured(curve, asked.depth))
    drawn = rows[: len(curves)]
    found = document(rows, asked.depth, datetime.datetime.now(datetime.timezone.utc).date().isoformat())
    text = page(rows, found)
    print(text)
    if asked.pictures or not asked.quick:
        pictures(drawn, asked.depth, asked.pictures or HERE.parent / "docs")
    if not asked.quick:
        stem = asked.output / f"propagation-{found['date']}"
        stem.with_suffix(".json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(text, encoding="utf-8")
    if not all(row.passes for row in drawn):
        sys.exit("a curve is not what the paper says: see the table")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--seeds", type=int, default=SEEDS, help=f"per curve (default: {SEEDS})")
    option("--depth", type=int, default=DEPTH, choices=(18, 34, 50, 101))
    option("--width", type=int, help=f"of the four curves that are drawn (default: {WIDTH})")
    option("--quick", action="store_true", help="the four curves alone; writes nothing but the pictures asked for")
    option("--pictures", type=Path, help="folder of the pictures (default: docs)")
    option("--output", type=Path, default=HERE / "results", help="folder of the results (default: benchmarks/results)")
    return parser


if __name__ == "__main__":
    main()

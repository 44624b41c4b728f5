"""Does ``foldexport bench`` find differences that are there, and none that are not?

    python benchmarks/bench_calibration.py [--runs 100] [--seconds 1.2] [--processes 6] [--folder benchmarks/results]

A small network is timed against itself, and against a copy that one layer more makes about a tenth slower (an identity
convolution, so that both compute the same), each ``--runs`` times, in turn, under onnxruntime with one thread. A 99 % interval
should leave out 1 in hardly any of the first and in nearly all of the second. The results are written after every run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch
from torch import nn

from foldexport.benchmark import files, plan
from foldexport.benchmark.contest import Settings, hold
from foldexport.benchmark.runtimes import RUNTIMES
from foldexport.exporters.onnx.exporter import OnnxExporter

SHAPE = (1, 3, 32, 32)
WIDTH, DEPTH = 16, 10
LONG = {"seconds": 20.0, "processes": 12}  # of the measurement that tells how much slower the slower copy is
KINDS = {"itself": "a network against itself", "slower": "a network against a copy with one layer more"}


def network(extra: bool) -> nn.Sequential:
    """Convolutions and ReLUs; ``extra`` adds one convolution that passes on what it is given."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, WIDTH, 3, padding=1), nn.ReLU()]
    for _ in range(DEPTH):
        layers += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU()]
    if extra:
        identity = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        nn.init.dirac_(identity.weight)
        nn.init.zeros_(identity.bias)
        layers += [identity, nn.ReLU()]
    torch.manual_seed(1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10)).eval()


def export(folder: Path) -> dict[str, list[Path]]:
    """The files of each experiment, the baseline first."""
    base, slower = folder / "network.onnx", folder / "slower.onnx"
    for path, extra in ((base, False), (slower, True)):
        OnnxExporter().export(network(extra), (torch.randn(2, *SHAPE[1:]),), path)
    return {"itself": [base, base], "slower": [base, slower]}


def measure(paths: list[Path], seed: int, seconds: float, processes: int) -> dict[str, Any]:
    """One benchmark, as ``foldexport bench A B`` makes it, without peak memory."""
    load, began = machine.load(), time.perf_counter()
    arrays = plan.drawn([(SHAPE, files.FLOAT)], 0)
    case = plan.of_files([(path, RUNTIMES["onnxruntime"]) for path in paths], arrays)
    made = hold(case, Settings(threads=1, seconds=seconds, processes=processes, seed=seed, memory=False))
    found = made.entries[1].ratio
    return {
        "ratio": found.value, "low": found.low, "high": found.high, "found": found.measurable, "rounds": found.rounds,
        "between": found.between, "within": found.within, "load_average": load, "wall_s": round(time.perf_counter() - began, 1),
        "median_ms": made.entries[0].latency.median_ms, "disturbed_rounds": made.disturbed_rounds,
    }  # fmt: skip


def table(document: dict[str, Any]) -> str:
    """The report in Markdown."""
    truth = document["truth"]
    lines = [
        "# Calibration of `foldexport bench`", "",
        f"{document['date']}, {document['machine']['processor']}, {document['machine']['cores']} cores, "
        f"onnxruntime {document['machine']['onnxruntime']}, one thread. Runs of {document['processes']} processes with "
        f"{document['seconds']:g} s of timing together; intervals at 99 %. The machine was shared with other work.", "",
        "| experiment | runs | difference reported | as it should be | ratio, median | interval, median width | load average |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for kind, title in KINDS.items():
        rows = document["runs"][kind]
        if not rows:
            continue
        reported = sum(row["found"] for row in rows)
        right = reported if kind == "slower" else len(rows) - reported
        width = sorted((row["high"] - row["low"]) for row in rows)[len(rows) // 2]
        ratio = sorted(row["ratio"] for row in rows)[len(rows) // 2]
        loads = [row["load_average"] for row in rows if row["load_average"] is not None]
        span = f"{min(loads):.1f} to {max(loads):.1f}" if loads else "unknown"
        lines.append(f"| {title} | {len(rows)} | {reported} | {right} of {len(rows)} | {ratio:.3f} | {width:.3f} | {span} |")
    if truth:
        held = [row["low"] <= truth["ratio"] <= row["high"] for row in document["runs"]["slower"]]
        lines += ["", f"One long measurement ({LONG['seconds']:g} s, {LONG['processes']} processes) says that the copy takes "
                  f"{truth['ratio']:.3f} times as long ({truth['low']:.3f} to {truth['high']:.3f}); "
                  f"{sum(held)} of {len(held)} short intervals hold that number."]  # fmt: skip
    every = [row for rows in document["runs"].values() for row in rows]
    wall = sorted(row["wall_s"] for row in every)[len(every) // 2] if every else 0
    return "\n".join([*lines, "", f"A run lasted {wall:g} s (median). Made by `benchmarks/bench_calibration.py`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=1.2)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=Path(__file__).with_name("results"))
    asked = parser.parse_args()
    document: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "machine": machine.describe(), "seconds": asked.seconds, "processes": asked.processes,
        "truth": None, "runs": {kind: [] for kind in KINDS},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        paths = export(Path(folder))
        for run in range(asked.runs):
            for kind in KINDS:
                document["runs"][kind].append(measure(paths[kind], 2 * run + (kind == "slower"), asked.seconds, asked.processes))
            if run in (0, asked.runs // 2):  # the better of two
                truth = measure(paths["slower"], 10**6 + run, **LONG)
                if document["truth"] is None or truth["high"] - truth["low"] < document["truth"]["high"] - document["truth"]["low"]:
                    document["truth"] = truth
            write(document, asked.folder)


def write(document: dict[str, Any], folder: Path) -> None:
    stem = f"bench-calibration-{document['date']}"
    (folder / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (folder / f"{stem}.md").write_text(table(document), encoding="utf-8")


if __name__ == "__main__":
    main()

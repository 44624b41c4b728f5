"""Every runtime on this machine with trained checkpoints: error, agreement on real images, size, load time, latency.

    python benchmarks/runtimes.py --data PATH [--only REGEX] [--formats onnx,openvino] [--images 1000] [--rounds 30] [--page]

--data: as for models/train.py, labelled images of the checkpoints' classes. For each checkpoint of models/ every format that works
here is exported with its proof, loaded again by its own runtime, and run: on the images, against the labels that the training graph
gives in float64; on one image after another, in turn with all other formats, in an order drawn anew in each round. Errors are those
of the proof, in multiples of the training graph's own float32 noise. Writes results/runtimes.json and docs/runtimes.md. Exits 1
where a format fails, or disagrees on an image that is no near-tie.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))

import machine
import numpy as np
import torch
from data import load_split, normalize

import foldexport
from foldexport import exporters
from foldexport.artifact import contents
from foldexport.benchmark.measure import one_round
from foldexport.errors import FoldexportError
from foldexport.manifest import artifact_record, dumps, plain
from foldexport.recognise import recognise

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent / "models"
CHECKPOINTS = ("diracnet16_cifar10", "idshort18_cifar10", "preresnet20_cifar10", "repvgg_cifar10")
NEAR_TIE = 1e-4  # of the peak of the outputs: two classes closer than this may change places by rounding
BATCH = 50
WARMUP = 5
LOADS = 3
Run = Callable[..., list[np.ndarray]]


def measure(checkpoint: Path, formats: list[str], data: str, images: int, rounds: int) -> dict:
    """``{format: row}`` of one checkpoint; a format that cannot be written or run has its reason."""
    network = recognise(checkpoint)
    shape = network.preprocessing["input_size"]
    split = load_split(data, "test", shape[-1])
    chosen = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(0))[:images]
    inputs = normalize(split.images[chosen], network.preprocessing["mean"], network.preprocessing["std"])
    with torch.no_grad():
        wanted = torch.cat([network.module.double()(part.double()) for part in inputs.split(BATCH)])
    network.module.float()
    folded = foldexport.fold(network.module, torch.randn(1, *shape))
    rows, runs = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in formats:
            row = exporters.get(name)
            path = Path(folder) / name / f"network{row.suffix}"
            path.parent.mkdir()
            try:
                artifact = foldexport.export(folded, name, path)
            except FoldexportError as error:
                rows[name] = {"failed": f"{error}"}
                continue
            rows[name] = _written(artifact)
            manifest = plain({"artifacts": [artifact_record(artifact)]})  # without one no executable code is opened
            (path.parent / "network.manifest.json").write_text(dumps(manifest))
            if artifact.comparison.not_run:
                rows[name]["not_run"] = artifact.comparison.not_run
                continue
            exporter = exporters.exporter(row)
            rows[name]["load_ms"], run = _loaded(exporter, artifact.path, inputs[:1].numpy())
            given = np.concatenate([run(part.numpy())[0] for part in inputs.split(BATCH)])
            rows[name] |= _agreement(torch.from_numpy(np.asarray(given, np.float64)), wanted, split.labels[chosen])
            runs[name] = run
        for name, taken in _latencies(runs, inputs[:1].numpy(), rounds).items():
            rows[name]["latency_ms"] = taken
    return rows


def _written(artifact) -> dict:
    comparison = artifact.comparison
    size = sum(each.stat().st_size for file in artifact.files for _, each in contents(file))
    same = list(comparison.weights_identical) if comparison.weights_identical else None
    return {"runtime": comparison.runtime, "size_bytes": size, "weights": same,
            "noise_multiple": None if comparison.not_run else comparison.noise_multiple,
            "max_error": None if comparison.not_run else comparison.max_error}  # fmt: skip


def _loaded(exporter, path: Path, image: np.ndarray) -> tuple[float, Run]:
    """Median milliseconds from the file to the first result, and the callable."""
    taken = []
    for _ in range(LOADS):
        began = time.perf_counter()
        run = exporter.load(path)
        run(image)
        taken.append(1e3 * (time.perf_counter() - began))
    return float(np.median(taken)), run


def _agreement(given: torch.Tensor, wanted: torch.Tensor, labels: torch.Tensor) -> dict:
    best = wanted.topk(2, dim=1).values
    margin = (best[:, 0] - best[:, 1]) / wanted.abs().max()
    other = given.argmax(1) != wanted.argmax(1)
    return {"images": len(labels), "agree": int((~other).sum()), "near_ties": int((other & (margin <= NEAR_TIE)).sum()),
            "correct": int((given.argmax(1) == labels).sum())}  # fmt: skip


def _latencies(runs: dict[str, Run], image: np.ndarray, rounds: int) -> dict[str, float]:
    """Median milliseconds of one image, all formats in turn."""
    generator = np.random.default_rng(0)
    calls = [lambda run=run: run(image) for run in runs.values()]
    for _ in range(WARMUP):
        one_round(calls, generator)
    taken = np.array([one_round(calls, generator)[0] for _ in range(rounds)])
    return {name: float(1e3 * np.median(column)) for name, column in zip(runs, taken.T, strict=True)}


def page(found: dict) -> str:
    first = next(iter(found["rows"].values()))
    lines = [
        "# Runtimes", "",
        f"Every format that is written and run on this machine, on trained checkpoints. Generated by `benchmarks/runtimes.py`,"
        f" {found['date']}.", "",
        "*Error*: of the proof, in multiples of the training graph's own float32 noise; above 8 an export fails. *Agreement*:",
        "top-1 labels of test images that are those of the training graph in float64. *Load*: from the file to the first result.",
        "*Latency*: one 32×32 image through the loaded file, all formats in turn, median, with each runtime's usual threads; for",
        "comparisons that bear weight use `foldexport bench`. A runtime in a process of its own (plain PyTorch, Node) pays for the",
        "way there.", "",
    ]  # fmt: skip
    for checkpoint, rows in found["rows"].items():
        lines += [f"## {checkpoint}", "", "| format | runtime | error | weights | agreement | size | load | latency |",
                  "|---|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
        lines += [_line(name, row) for name, row in rows.items() if "failed" not in row]
        lines += ["", *(f"- {name}: {row['failed']}" for name, row in rows.items() if "failed" in row), ""]
    unrun = {name: row["not_run"] for name, row in first.items() if "not_run" in row}
    lines += [f"- {name}: {why}" for name, why in unrun.items()] + ([""] if unrun else [])
    described = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    return re.sub(r"\n{3,}", "\n\n", "\n".join([*lines, f"Measured on: {described}."])) + "\n"


def _line(name: str, row: dict) -> str:
    same = f"{row['weights'][0]}/{row['weights'][1]}" if row["weights"] else "–"
    size = f"{row['size_bytes'] / 1e6:.2f} MB"
    if "not_run" in row:
        return f"| {name} | {row['runtime']} | not run | {same} | – | {size} | – | – |"
    ties = f" ({row['near_ties']} near-ties)" if row["near_ties"] else ""
    return (f"| {name} | {row['runtime']} | {row['noise_multiple']:.1f}× | {same} | {row['agree']}/{row['images']}{ties} | {size} "
            f"| {row['load_ms']:.0f} ms | {row['latency_ms']:.2f} ms |")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="labelled images")
    parser.add_argument("--only", default="", help="checkpoints whose name matches")
    parser.add_argument("--formats", default="", help="default: all that work here")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--page", action="store_true", help="write the page again from what was measured")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "runtimes.json")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "runtimes.md")
    args = parser.parse_args(argv)
    os.environ.setdefault("CI", "true")  # a converter otherwise reports its use
    rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else {}
    formats = [row.name for row in exporters.resolve(args.formats)] if args.formats else [
        each.format.name for each in exporters.status() if each.works and each.format.name != "tensorrt"
    ]  # fmt: skip
    for name in [] if args.page else [name for name in CHECKPOINTS if re.search(args.only, name)]:
        if not args.data:
            parser.error("--data PATH: wanted labelled images, as for models/train.py")
        rows[name] = rows.get(name, {}) | measure(MODELS / f"{name}.pth", formats, args.data, args.images, args.rounds)
        found = {"date": f"{datetime.date.today()}", "machine": machine.describe() | _versions(), "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {json.dumps(rows[name])}", file=sys.stderr, flush=True)
    args.out.write_text(page(json.loads(args.json.read_text())))
    every = [(name, form, row) for name, found in rows.items() for form, row in found.items()]
    wrong = [f"{name} {form}: {row.get('failed') or row}" for name, form, row in every
             if "failed" in row or row.get("images", 0) - row.get("agree", 0) > row.get("near_ties", 0)]  # fmt: skip
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


def _versions() -> dict[str, str]:
    found = {}
    for package in ("openvino", "executorch", "ai-edge-litert", "litert-torch", "ncnn", "pnnx", "coremltools"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())

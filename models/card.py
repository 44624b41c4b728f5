"""The card of a trained checkpoint: what it is, how it was trained, what folding changed.

    python models/card.py models/diracnet16_cifar10.pth --data PATH [--to onnx,torchscript]

Reads ``NAME.json``, the record that train.py wrote beside the checkpoint, measures accuracy on the 10,000 test images with
evaluate.py, and writes ``NAME.md`` and ``NAME.png``, the curve of the training.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import torch
from evaluate import measure

import foldexport
from foldexport import exporters
from foldexport.recognise import Network, recognise

matplotlib.use("Agg")
from matplotlib import pyplot

SHOWN_EPOCHS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32)
KINDS = {"conv": "convolution", "batch_norm": "batch norm", "relu": "ReLU", "add": "addition", "mul": "multiplication",
         "max_pool": "max pool", "avg_pool": "average pool", "clamp": "clamp"}  # fmt: skip
DATA = (
    "**Data**: CIFAR-10 (Krizhevsky 2009) re-encoded as JPEG, which costs accuracy: a ResNet-56 trained on the original images "
    "scores about 83 % on these test images."
)


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Training loss and test accuracy by epoch, as a picture."""
    epochs = [each["epoch"] for each in record["epochs"]]
    figure, left = pyplot.subplots(figsize=(6.4, 3.2), dpi=150, layout="constrained")
    right = left.twinx()
    (loss,) = left.plot(epochs, [each["train_loss"] for each in record["epochs"]], color="#b34700", linestyle="--", marker=".")
    (accuracy,) = right.plot(epochs, [100 * each["test_accuracy"] for each in record["epochs"]], color="#00539b", marker="o")
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    right.set(ylabel="test accuracy, %")
    left.grid(alpha=0.3)
    left.legend([loss, accuracy], ["training loss", "test accuracy"], loc="center right", frameon=False)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def operators(folded: foldexport.Folded) -> str:
    """The operators before and after, as a table."""
    before, after = folded.counts_before, folded.counts_after
    kinds = dict.fromkeys([*before, *after])
    rows = [f"| {KINDS.get(kind, kind)} | {before.get(kind, 0) or '–'} | {after.get(kind, 0) or '–'} |" for kind in kinds]
    return "\n".join(["| operator | before | after |", "|---|---|---|", *rows])


def accuracy(rows: list[dict]) -> str:
    """Accuracy of each runtime, as a table; beside it the images whose label folding changed."""
    lines = [
        f"| | top-1 on the {rows[0]['images']:,} test images | labels that differ | largest difference of a score, of peak |",
        "|---|---|---|---|",
    ]
    for row in rows:
        title = "training graph" if row["runtime"] == "training graph" else _runtime(row["runtime"])
        own = row["runtime"] == "training graph"
        changed = "" if own else len(row["changed"])
        error = "" if own else f"{row['max_error']:.1e}"
        lines.append(f"| {title} | {100 * row['correct'] / row['images']:.2f} % | {changed} | {error} |")
    return "\n".join(lines)


def _runtime(name: str) -> str:
    if name == "folded module":
        return name
    row = exporters.resolve(name)[0]
    return f"{row.name}, {exporters.exporter(row).runtime()}"


def curve(record: Mapping[str, Any]) -> str:
    """Some epochs of the curve, and the last one, as a table."""
    last = record["epochs"][-1]["epoch"]
    shown = [each for each in record["epochs"] if each["epoch"] in SHOWN_EPOCHS or each["epoch"] == last]
    rows = [f"| {each['epoch']} | {each['train_loss']:.3f} | {100 * each['test_accuracy']:.2f} % |" for each in shown]
    return "\n".join(["| epoch | training loss | test accuracy |", "|---|---|---|", *rows])


def page(path: Path, network: Network, folded: foldexport.Folded, record: Mapping[str, Any], rows: list[dict], extra: str) -> str:
    """The card as Markdown."""
    parameters = sum(p.numel() for p in network.module.parameters())
    mean, std = (", ".join(f"{value:.4f}" for value in network.preprocessing[key]) for key in ("mean", "std"))
    proof = folded.certificate.rounding.multiples["folded"]
    parts = [
        f"# {path.name}",
        f"{network.description}. {parameters / 1e3:,.0f} k parameters, {path.stat().st_size / 1e6:.1f} MB. "
        f"Recognised by: {network.reason}.",
        accuracy(rows),
        f"From `python models/evaluate.py models/{path.name} --data PATH`, {date.today():%d %B %Y}, float32 on a CPU, torch "
        f"{torch.__version__.partition('+')[0]}, Python {platform.python_version()}. Float32 error of the folded module on the "
        f"certificate's probes: {proof.error:.1e} of peak, {proof.multiple:.1f} times the float32 noise of the unfolded network.",
        operators(folded),
        extra,
        f"{DATA} Inputs are RGB in [0, 1], minus mean ({mean}), divided by ({std}).",
        f"**Recipe**: `{record['command']}`, that is {record['recipe']}. {' '.join(record.get('remarks', []))}".rstrip(),
        f"![Training loss and test accuracy by epoch]({path.with_suffix('.png').name})",
        curve(record),
        "Test accuracies of the curve were taken under bfloat16 autocast; the table on top is float32.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", required=True, help="as for train.py")
    parser.add_argument("--to", default="onnx,torchscript")
    parser.add_argument("--extra", type=Path, nargs="*", default=[], help="files of Markdown to stand behind the operators")
    args = parser.parse_args(argv)
    network = recognise(args.checkpoint)
    record = json.loads(args.checkpoint.with_suffix(".json").read_text())
    folded = foldexport.fold(network.module, torch.randn(1, *network.preprocessing["input_size"]))
    rows = measure(args.checkpoint, args.data, args.to)
    draw(record, args.checkpoint.with_suffix(".png"))
    extra = "\n\n".join(path.read_text(encoding="utf-8").strip() for path in args.extra)
    args.checkpoint.with_suffix(".md").write_text(page(args.checkpoint, network, folded, record, rows, extra))
    return 0


if __name__ == "__main__":
    sys.exit(main())

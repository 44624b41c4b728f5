"""Accuracy of the trained checkpoints in int8, with and without equalised ranges, beside float32.

Calibrated on training images, judged on the test images, which calibration never sees. ``--data`` as for models/train.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import torch

import foldexport
from foldexport import interpret
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.options import ExportOptions
from foldexport.precision import int8
from foldexport.recognise import recognise

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent / "models"
HELD = ("diracnet16_cifar10", "preresnet20_cifar10")  # to WITHIN points
WITHIN = 0.5


def rows_of(path: Path, data: str, limit: int | None) -> list[dict[str, Any]]:
    """One checkpoint: int8 plain and equalised."""
    from data import load_split, normalize

    network = recognise(path)
    size = network.preprocessing["input_size"]
    folded = foldexport.fold(network.module, torch.randn(1, *size))
    train, test = (load_split(data, split, size[-1]) for split in ("train", "test"))
    chosen = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))[: int8.CALIBRATION_SAMPLES]

    def as_input(images: torch.Tensor):
        return normalize(images, network.preprocessing["mean"], network.preprocessing["std"]).numpy()

    calibration = [as_input(train.images[chosen])]
    judged = int8.Samples(calibration, [as_input(test.images[:limit])], test.labels[:limit].numpy())
    rows, exporter = [], OnnxExporter()
    print(f"{path.stem}, float32 …", file=sys.stderr, flush=True)
    images = torch.from_numpy(judged.judged[0]).split(int8.BATCH)
    wanted = [interpret.outputs(folded.graph, part, torch.float32) for part in images]
    for equalise in (False, True):
        print(f"{path.stem}, {'equalised' if equalise else 'plain'} …", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "network.onnx"
            example = (torch.randn(1, *size),)
            _, _, info = int8.quantise(folded.refold().module, example, file, calibration, ExportOptions(), equalise=equalise)
            read = int8.require_int8(exporter, file)
            known = iter(wanted)
            found = int8.judge(exporter.load(file), lambda inputs, known=known: next(known), judged, info)
            rows.append({"checkpoint": path.stem, "equalised": equalise, "size_bytes": file.stat().st_size,
                         "layers": read.layers, **found.to_dict()})  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| checkpoint | ranges | ONNX file | SQNR | float32 | int8 | drop, points | top-1 agreement |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        how = f"equalised, {row['equalised_groups']} channels" if row["equalised"] else "as folded"
        lines.append(f"| {row['checkpoint']} | {how} | {row['size_bytes'] / 1e6:.2f} MB | {row['sqnr_db']:.1f} dB | "
                     f"{row['accuracy_before']:.2%} | {row['accuracy_after']:.2%} | {row['drop_points']:.2f} | "
                     f"{row['agreement']:.2%} |")  # fmt: skip
    return lines


def page(rows: list[dict[str, Any]], found: dict[str, Any]) -> str:
    images, calibrated = rows[0]["samples"], rows[0]["calibration_samples"]
    return "\n".join([
        "# int8", "",
        f"`benchmarks/int8.py`, {found['date']}: post-training quantisation to ONNX, one step per tensor of activations and per",
        f"output channel of weights, symmetric, calibrated on {calibrated} training images. Accuracy on {images} test images under",
        "onnxruntime; float32 is the training graph. Every convolution and linear layer computes in int8, read back from the file.",
        "Equalised ranges change exponents only and are proved equal bit for bit in float64.", "",
        *table(rows), "", *(f"- {name}: {value}" for name, value in found["machine"].items()), "",
    ])  # fmt: skip


def cards(rows: list[dict[str, Any]], folder: Path) -> None:
    """``NAME.int8.md`` for each checkpoint: what ``models/card.py --extra`` puts into its card."""
    for name in sorted({row["checkpoint"] for row in rows}):
        own = [row for row in rows if row["checkpoint"] == name]
        text = [f"**int8**, calibrated on {own[0]['calibration_samples']} training images, on {own[0]['samples']} test images "
                "under onnxruntime:", "", *table(own), "", "From `python benchmarks/int8.py --data PATH`."]  # fmt: skip
        (folder / f"{name}.int8.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def main() -> None:
    asked = _parser().parse_args()
    sys.path.insert(0, str(MODELS))
    paths = sorted(MODELS.glob("*.pth"), key=lambda path: (path.stem not in HELD, path.stem))
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    rows: list[dict[str, Any]] = []
    found = {"date": date, "machine": machine.describe(), "rows": rows}
    for path in paths:
        if asked.only and path.stem not in asked.only:
            continue
        rows += rows_of(path, asked.data, asked.limit)
        if asked.cards:
            cards(rows, asked.cards)
        if not asked.limit and not asked.only:
            stem = asked.output / f"int8-{date}"
            stem.with_suffix(".json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            stem.with_suffix(".md").write_text(page(rows, found), encoding="utf-8")
    print(page(rows, found))
    failed = [name for name in HELD if not _holds([row for row in rows if row["checkpoint"] == name])]
    if failed:
        sys.exit(f"more than {WITHIN} points lost: {', '.join(failed)}")


def _holds(rows: list[dict[str, Any]]) -> bool:
    return not rows or min(row["drop_points"] for row in rows) <= WITHIN


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--data", required=True, help="CIFAR-10, as for models/train.py")
    option("--only", nargs="*", help="names of checkpoints; then nothing is written")
    option("--limit", type=int, help="test images (default: all); then nothing is written")
    option("--cards", type=Path, help="folder for NAME.int8.md, what models/card.py --extra takes")
    option("--output", type=Path, default=HERE / "results", help="folder of the results (default: benchmarks/results)")
    return parser


if __name__ == "__main__":
    main()

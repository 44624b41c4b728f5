"""Top-1 accuracy of a checkpoint on labelled images: the training graph, the folded module, and each exported format.

    python models/evaluate.py models/diracnet16_cifar10.pth --data PATH --to onnx,torchscript

Prints one row per runtime, and every image on which a row differs from the training graph, with the margin between its two
best classes in the training graph: a label may differ only on a near-tie. Exits 1 when one differs elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from data import load_split, normalize
from torch import Tensor
from tqdm import tqdm

import foldexport
from foldexport import exporters
from foldexport.recognise import recognise

NEAR_TIE = 1e-4  # of the peak of the outputs: two classes closer than this may change places by rounding


def scores(run: Callable[[Tensor], Tensor], images: Tensor, preprocessing: dict, title: str, batch: int = 250) -> Tensor:
    """``[N, K]`` class scores in float64 of uint8 images ``[N, 3, H, W]``."""
    parts = []
    with torch.no_grad():
        for start in tqdm(range(0, len(images), batch), title, file=sys.stderr, disable=not sys.stderr.isatty()):
            inputs = normalize(images[start : start + batch], preprocessing["mean"], preprocessing["std"])
            parts.append(torch.as_tensor(run(inputs)).double())
    return torch.cat(parts)


def runtimes(checkpoint: Path, formats: str) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict]:
    """Name → ``images → scores`` for the training graph, the folded module and every format; and the preprocessing."""
    network = recognise(checkpoint)
    folded = foldexport.fold(network.module, torch.randn(1, *network.preprocessing["input_size"]))
    found: dict[str, Callable] = {"training graph": network.module, "folded module": folded.module}
    for row in exporters.resolve(formats):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"network{row.suffix}"
            artifact = foldexport.export(folded, row.name, path)
            run = exporters.exporter(row).load(artifact.path)
        found[row.name] = lambda images, run=run: run(images.numpy())[0]
    return found, network.preprocessing


def differences(found: Tensor, wanted: Tensor) -> list[dict]:
    """Images whose label differs, with the margin of the training graph relative to the peak of all outputs."""
    best = wanted.topk(2, dim=1).values
    margin = (best[:, 0] - best[:, 1]) / wanted.abs().max()
    places = (found.argmax(1) != wanted.argmax(1)).nonzero()[:, 0]
    return [{"image": int(i), "margin": float(margin[i])} for i in places]


def measure(checkpoint: Path, data: str, formats: str) -> list[dict]:
    """Top-1 of every runtime on the test images, its largest difference from the training graph, labels that differ."""
    runs, preprocessing = runtimes(checkpoint, formats)
    split = load_split(data, "test", preprocessing["input_size"][-1])
    reference, rows = None, []
    for name, run in runs.items():
        found = scores(run, split.images, preprocessing, name)
        reference = found if reference is None else reference
        correct = int((found.argmax(1) == split.labels).sum())
        changed = differences(found, reference)
        error = float((found - reference).abs().max() / reference.abs().max())
        rows.append({"runtime": name, "correct": correct, "images": len(split.labels), "max_error": error, "changed": changed})
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", required=True, help="as for train.py: CIFAR-10, an image folder, or zips of one")
    parser.add_argument("--to", default="onnx,torchscript")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    rows = measure(args.checkpoint, args.data, args.to)
    print(json.dumps(rows, indent=2) if args.json else table(rows))
    return int(any(each["margin"] > NEAR_TIE for row in rows for each in row["changed"]))


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = [f"{'':16}top-1      correct   labels changed   max error / peak"]
    for row in rows:
        share = row["correct"] / row["images"]
        lines.append(f"{row['runtime']:16}{share:6.2%} {row['correct']:8} of {row['images']}"
                     f"{len(row['changed']):8}         {row['max_error']:.1e}")  # fmt: skip
        lines += [f"    image {each['image']}: margin {each['margin']:.1e} of peak" for each in row["changed"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

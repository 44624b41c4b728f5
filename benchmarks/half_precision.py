"""What float16 and bfloat16 cost a folded network, beside its unfolded training graph and a fold that ignores ranges.

A residual network without batch norm, x' = c·(h(x) + f(x)), is folded by dividing its trunk by c at every block. Pushed all
one way, 33 blocks of c = √½ make the trunk 2^16.5 times larger than it was, which float16 does not hold; centred and rescaled, it
does. Writes a table of errors for such networks, and one of the trained checkpoints with their accuracy (``--data``, as for
models/train.py).
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from torch import nn

import foldexport
from foldexport import interpret, probes
from foldexport.certify.rounding import Errors
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.precision.emulate import folded_run, own_run
from foldexport.precision.prepare import prepare
from foldexport.precision.ranges import measure
from foldexport.precision.types import HALF, NumberType
from foldexport.trace import Graph, trace
from foldexport.zoo.nfresnet import NFResNet, ResidualBlock, nfresnet

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent / "models"
WITHIN = 2.0  # times the unfolded network's error in the same type
NETWORKS = (("ResNet-101 IdShort, width 64, initialised", 101, 64, 0), ("ResNet-101 IdShort, width 16, biases drawn", 101, 16, 1))
MEANING = """errors in multiples of the unfolded network's own noise in the type, of the ONNX file run by onnxruntime; accuracy
on the test images of the file under onnxruntime, whose CPU kernels keep activations in float32 between layers, and with every
value in the type, as a GPU has them:"""
Run = Callable[[tuple], list[Any]]


def naively_folded(network: NFResNet) -> NFResNet:
    """``s_k = v_k·c^-k``: every c pushed forwards, none taken back before the classifier."""
    result, total = copy.deepcopy(network).double(), 1.0
    with torch.no_grad():
        for block in (each for each in result.modules() if isinstance(each, ResidualBlock)):
            last = getattr(block, f"conv{block.convolutions}")
            block.conv1.weight.mul_(total)
            last.weight.div_(total), last.bias.div_(total)
            if block.shortcut is not None:
                block.shortcut.bias.div_(total)
            total *= float(block.sum_scale)
            block.sum_scale.fill_(1.0)
        result.fc.weight.mul_(total)
    return result


def drawn(network: NFResNet, seed: int) -> NFResNet:
    """With biases that are not zero, as a trained network has them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in network.modules():
            if seed and isinstance(layer, nn.Conv2d | nn.Linear):
                layer.bias.copy_(0.1 * torch.randn(layer.bias.shape, generator=generator))
    return network.eval()


def errors(run: Run, graph: Graph, samples: list, wanted: list) -> dict[str, Any]:
    """RMS and largest error over the peak, and how many outputs are not finite."""
    found, broken, total = Errors(), 0, 0
    for probe, reference in zip(samples, wanted):
        output = run(probe.inputs)[0]
        broken += int((~output.isfinite()).sum())
        total += output.numel()
        found.add(reference, output)
    return {"rms": found.rms, "largest": found.largest, "not_finite": broken, "outputs": total}


def _ranges(module, samples: list) -> tuple[float, float]:
    sizes = measure(module, [samples[0].inputs])
    weights = max(float(each.abs().max()) for each in module.parameters())
    return weights, max(size.peak for size in sizes.activations.values())


def compared(title: str, depth: int, width: int, seed: int) -> list[dict[str, Any]]:
    """Rows for each type: the unfolded network, the naive fold, our fold without rescaling, ours."""
    torch.manual_seed(seed)
    network = drawn(nfresnet(depth, "idshort", width=width), seed)
    folded = foldexport.fold(network, torch.randn(2, 3, 32, 32))
    graph, samples = folded.graph, probes.noise_probes(folded.graph, seed=7)
    wanted = [interpret.outputs(graph, probe.inputs)[0] for probe in samples]
    naive = trace(naively_folded(network), torch.randn(2, 3, 32, 32, dtype=torch.float64))
    exact = interpret.outputs(naive, samples[0].inputs)[0]
    assert float((exact - wanted[0]).abs().max()) <= 1e-11 * float(wanted[0].abs().max()), "the naive fold is not the network"
    program = folded.refold()
    sizes = measure(program.module, [samples[0].inputs])
    inputs = [each for each, _ in folded.certificate.references]
    held = [_graph_ranges(graph, samples), _graph_ranges(naive, samples), _ranges(program.module, samples)]
    found = []
    for kind in HALF.values():
        ours = prepare(graph, folded.refold(), kind, inputs=inputs)
        rows = []
        for name, run, (weight, activation) in (
            ("unfolded", own_run(graph, kind, ranged=True), held[0]),
            ("folded, every c pushed forwards", own_run(naive, kind, ranged=True), held[1]),
            ("folded, centred", folded_run(program.module, sizes.shapes, kind, ()), held[2]),
            ("folded, centred and rescaled (ours)", _as_run(ours.module), ours.report.largest),
        ):
            print(f"{title}, {kind.name}: {name} …", file=sys.stderr, flush=True)
            rows.append({"network": title, "type": kind.name, "variant": name, "largest_weight": weight,
                         "largest_activation": activation, **errors(run, graph, samples, wanted)})  # fmt: skip
        for row in rows:
            row["times_unfolded"] = row["rms"] / rows[0]["rms"]
        rows[-1] |= {"layers": ours.report.layers[0], "layers_in_type": ours.report.layers[1], "rescaled": ours.report.rescaled}
        rows[-1]["passes"] = not rows[-1]["not_finite"] and rows[-1]["times_unfolded"] <= WITHIN
        found += rows
    return found


def _as_run(module: nn.Module) -> Run:
    """The module that is exported, by PyTorch's own half kernels."""

    def run(inputs: tuple) -> list[Any]:
        with torch.no_grad():
            return [module(*(each.float() for each in inputs))]

    return run


def _graph_ranges(graph: Graph, samples: list) -> tuple[float, float]:
    weight = activation = 0.0
    constants = interpret.constant_nodes(graph)
    for node, value in interpret.steps(graph, samples[0].inputs, torch.float64):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            peak = float(value.abs().max())
            weight, activation = (max(weight, peak), activation) if node in constants else (weight, max(activation, peak))
    return weight, activation


def checkpoint_rows(path: Path, data: str | None, limit: int | None) -> list[dict[str, Any]]:
    """One trained checkpoint in float32 and in both half types: error, agreement on the golden inputs, accuracy."""
    from foldexport.recognise import recognise

    network = recognise(path)
    folded = foldexport.fold(network.module, torch.randn(1, *network.preprocessing["input_size"]))
    split = _split(data, network.preprocessing, limit)
    rows, exporter = [], OnnxExporter()
    for precision in ("fp32", *HALF):
        print(f"{path.stem}, {precision} …", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            artifact = foldexport.export(folded, "onnx", Path(folder) / "network.onnx", precision=precision)
            run = exporter.load(artifact.path)
            comparison, size = artifact.comparison, artifact.path.stat().st_size
        row = {"checkpoint": path.stem, "type": precision, "size_bytes": size, "noise_multiple": comparison.noise_multiple,
               "max_error": comparison.max_error, "agree": comparison.top1.agree, "counted": comparison.top1.counted,
               "near_ties": len(comparison.top1.near_ties)}  # fmt: skip
        if split is not None:
            row |= _accuracy(split, network.preprocessing, lambda images, run=run: torch.as_tensor(run(images.numpy())[0]), "onnx")
        if split is not None and precision in HALF:
            row |= _accuracy(split, network.preprocessing, _emulated(folded, HALF[precision]), "in_type")
        rows.append(row)
    return rows


def _emulated(folded, kind: NumberType) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network with every value in the type: onnxruntime's CPU keeps activations in float32 between its layers."""
    inputs = [each for each, _ in folded.certificate.references]
    program = folded.refold()
    made = prepare(folded.graph, program, kind, inputs=inputs)
    if made.report.rescaled or made.report.single:
        return lambda images: made.module(images)
    run = folded_run(program.module, measure(program.module, inputs[:1]).shapes, kind, ())
    return lambda images: run((images.double(),))[0]


def _accuracy(split, preprocessing: dict, run: Callable, name: str) -> dict[str, Any]:
    sys.path.insert(0, str(MODELS))
    from evaluate import scores

    found = scores(run, split.images, preprocessing, name)
    return {f"correct_{name}": int((found.argmax(1) == split.labels).sum()), "images": len(split.labels)}


def _split(data: str | None, preprocessing: dict, limit: int | None):
    if data is None:
        return None
    sys.path.insert(0, str(MODELS))
    from data import load_split

    split = load_split(data, "test", preprocessing["input_size"][-1])
    if limit:
        split.images, split.labels = split.images[:limit], split.labels[:limit]
    return split


def page(networks: list[dict], checkpoints: list[dict], found: dict) -> str:
    lines = [
        "# Half precision", "",
        f"`benchmarks/half_precision.py`, {found['date']}. Errors against float64 over eight normal samples, over the peak of the",
        "output. Every value rounded to the type, sums in float32; ours by PyTorch's own half kernels.", "",
        "| network | type | variant | largest weight | largest activation | RMS error | times unfolded | not finite | |",
        "|---|---|---|---:|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    for row in networks:
        times = f"{row['times_unfolded']:.2f}" if _finite(row["times_unfolded"]) else "–"
        rms = f"{row['rms']:.2e}" if _finite(row["rms"]) else "–"
        verdict = "" if "passes" not in row else f"{'PASS' if row['passes'] else 'FAIL'} (≤ {WITHIN:g})"
        lines.append(f"| {row['network']} | {row['type']} | {row['variant']} | {row['largest_weight']:.3g} | "
                     f"{row['largest_activation']:.3g} | {rms} | {times} | {row['not_finite']} of {row['outputs']} | "
                     f"{verdict} |")  # fmt: skip
    if checkpoints:
        lines += ["", "## Trained checkpoints", "", f"{MEANING[0].upper()}{MEANING[1:]}", "", *checkpoint_table(checkpoints)]
    lines += ["", *(f"- {name}: {value}" for name, value in found["machine"].items()), ""]
    return "\n".join(lines)


def checkpoint_table(rows: list[dict]) -> list[str]:
    lines = [
        "| checkpoint | type | ONNX file | noise | top-1 agreement | top-1, onnxruntime | top-1, all in the type |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ties = f" ({row['near_ties']} near-ties)" if row["near_ties"] else ""
        lines.append(f"| {row['checkpoint']} | {row['type']} | {row['size_bytes'] / 1e6:.2f} MB | {row['noise_multiple']:.1f}× | "
                     f"{row['agree']}/{row['counted']}{ties} | "
                     f"{_share(row, 'correct_onnx')} | {_share(row, 'correct_in_type')} |")  # fmt: skip
    return lines


def card(rows: list[dict], path: Path) -> None:
    """What ``models/card.py --extra`` puts into the card of one checkpoint."""
    text = [f"**Half precision**, {MEANING}", "", *checkpoint_table(rows), "",
            "From `python benchmarks/half_precision.py --only checkpoints --data PATH`."]  # fmt: skip
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


def _share(row: dict, name: str) -> str:
    return f"{row[name] / row['images']:.2%}" if name in row else "–"


def main() -> None:
    asked = _parser().parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    cases = [("ResNet-18 IdShort, width 4", 18, 4, 1)] if asked.quick else NETWORKS
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    before = asked.output / f"half-precision-{date}.json"
    kept = json.loads(before.read_text()) if asked.only and before.exists() else {"networks": [], "checkpoints": []}
    networks, checkpoints = kept["networks"], kept["checkpoints"] if asked.only == "networks" else []
    if asked.only != "checkpoints":
        networks = [row for case in cases for row in compared(*case)]
    names = [] if asked.only == "networks" else sorted(MODELS.glob("*.pth"))[: 1 if asked.quick else None]
    found = {"date": date, "machine": machine.describe(), "networks": networks, "checkpoints": checkpoints}
    for path in (None, *names):  # written as it grows: accuracies take long
        checkpoints += checkpoint_rows(path, asked.data, asked.limit) if path is not None else []
        if not asked.quick:
            stem = asked.output / f"half-precision-{date}"
            stem.with_suffix(".json").write_text(json.dumps(_plain(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            stem.with_suffix(".md").write_text(page(networks, checkpoints, found), encoding="utf-8")
        if path is not None and asked.cards:
            rows = [row for row in checkpoints if row["checkpoint"] == path.stem]
            card(rows, asked.cards / f"{path.stem}.half.md")
    print(page(networks, checkpoints, found))
    if not all(row.get("passes", True) for row in networks):
        sys.exit("our fold is not within twice the unfolded network's error: see the table")


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--data", help="CIFAR-10, as for models/train.py; without it no accuracies")
    option("--limit", type=int, help="test images (default: all)")
    option("--threads", type=int, default=1)
    option("--only", choices=("networks", "checkpoints"), help="one of the two tables; the other stays as it was written today")
    option("--cards", type=Path, help="folder for NAME.half.md, what models/card.py --extra takes")
    option("--quick", action="store_true", help="one small network and one checkpoint; writes nothing")
    option("--output", type=Path, default=HERE / "results", help="folder of the results (default: benchmarks/results)")
    return parser


if __name__ == "__main__":
    main()

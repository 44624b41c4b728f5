"""Latency of folded networks under onnxruntime and OpenVINO, against the unfolded network and against the best peer's file.

    python benchmarks/latency_peers.py [--only REGEX] [--rounds 12] [--processes 12] [--runtimes onnxruntime,openvino] [--page]

One thread, 224x224, batch 1, float32 (OpenVINO is told so: it runs in bf16 where the processor can). All files of a network take
turns in an order drawn anew in each round, behind warm-up rounds. Two loads of one file can differ by percents, and the order in
which files are loaded counts, so there are several processes, and each loads them in another order. Ratios and their 95 % intervals
are those of ``foldexport bench``. The best peer is the one with the lowest median in that runtime. Files whose output is another
are left out, and named. Exits 1 where folding is slower than the best peer: where an interval lies above 1 that is wide enough to
hold for all the table's comparisons at once (Bonferroni).
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import machine
import numpy as np
import onnx
import peers
import torch
from interleaved import latencies_ms, sessions
from torch import nn

import foldexport
from foldexport.benchmark import statistics
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.options import ExportOptions
from tests.statistics import randomise
from tests.torchvision_schemas import declare_missing

HERE = Path(__file__).resolve().parent
SHAPE = (1, 3, 224, 224)
CLOSE = 1e-3  # of peak, in float32: a file that is further off computes something else
BUSY = 1.5  # load at which others use the machine: this run is 1 of it
LEVEL = 0.95
COMPARISONS = 12  # against the best peer: six networks in two runtimes
WARMUP = 5
Row = dict[str, dict]


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)


def networks() -> dict[str, Callable[[], nn.Module]]:
    """Title → training graph."""
    from foldexport.zoo.diracnet import diracnet
    from foldexport.zoo.nfresnet import nfresnet
    from foldexport.zoo.preresnet import preresnet

    return {
        "RepVGG-A0": partial(_timm, "repvgg_a0"), "MobileOne-S0": partial(_timm, "mobileone_s0"),
        "ResNet-50": partial(_timm, "resnet50"),
        "Pre-activation ResNet-50": partial(preresnet, 50, stem="imagenet", projection="trunk"),
        "DiracNet-18": partial(diracnet, "ImageNet", 18), "NF-ResNet-50": partial(nfresnet, 50, "nf", stem="imagenet"),
    }  # fmt: skip


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """With random statistics, and residual scalars that start at 0, which would delete their branch, away from it."""
    torch.manual_seed(0)
    network = randomise(build(), seed=0, example=torch.randn(4, 3, 64, 64))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 0:
                parameter.uniform_(0.5, 1.0)
    return network


def files(network: nn.Module, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """One ONNX file of each origin, and why others are missing."""
    example = torch.randn(SHAPE)
    folded = foldexport.fold(copy.deepcopy(network), example, certify=False)
    paths = {"folded": folder / "folded.onnx"}
    exporter = OnnxExporter()
    exporter.export(exporter.suited(folded.module), (example,), paths["folded"], ExportOptions(opset=peers.OPSET, dynamic=()))
    ways: dict[str, Callable] = {
        "unfolded": lambda: peers.onnx_program(network, example, optimise=False).model_proto,
        "torch.onnx + onnxsim": lambda: _exported(network, example),
        "torch.fx fuse + torch.onnx + onnxsim": lambda: _exported(peers.fx_fused(network), example),
    }
    if peers.has_method(network):
        ways["its own method + torch.onnx + onnxsim"] = lambda: _exported(peers.reparameterized(network), example)
    missing = {}
    for at, (name, way) in enumerate(ways.items()):
        try:
            onnx.save(way(), folder / f"{at}.onnx")
            paths[name] = folder / f"{at}.onnx"
        except Exception as error:  # that a peer fails is a result
            missing[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return paths, missing


def _exported(network: nn.Module, example: torch.Tensor):
    return peers.simplified(peers.onnx_program(network, example, optimise=True).model_proto)


class OpenVINO:
    """A compiled model with the two calls of an onnxruntime session that the timing uses."""

    def __init__(self, path: Path) -> None:
        os.environ.setdefault("CI", "true")  # the converter otherwise reports its use
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1", "NUM_STREAMS": "1"}
        compiled = openvino.Core().compile_model(openvino.convert_model(str(path)), "CPU", settings)
        self._request, self.name = compiled.create_infer_request(), compiled.inputs[0].get_any_name()

    def get_inputs(self) -> list[OpenVINO]:
        return [self]

    def run(self, _: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return list(self._request.infer(feed, share_inputs=True).values())


RUNTIMES: dict[str, Callable[[dict[str, Path]], dict]] = {
    "onnxruntime": sessions,
    "openvino": lambda paths: {name: OpenVINO(path) for name, path in paths.items()},
}


def measure(build: Callable[[], nn.Module], runtimes: list[str], rounds: int, processes: int) -> Row:
    """``{"nodes": …, "missing": …, runtime: {"median_ms", "unfolded", "best", "peer"}}``; ratios are ours over theirs."""
    network = built(build)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        paths, missing = files(network, Path(folder))
        row: Row = {"missing": missing, "seconds_to_export": round(time.perf_counter() - began, 1)}
        row["nodes"] = {name: dict(Counter(node.op_type for node in onnx.load(path).graph.node)) for name, path in paths.items()}
        for runtime in runtimes:
            before = machine.load()
            taken = [_in_a_process(runtime, _in_order(paths, process), rounds, missing) for process in range(processes)]
            row[runtime] = _compared(taken) | {"load": [before, machine.load()], "rounds": rounds, "processes": processes}
    return row


def _in_order(paths: dict[str, Path], process: int) -> dict[str, Path]:
    """The files in the order in which this process loads them."""
    return {name: paths[name] for name in np.random.default_rng(process).permutation(list(paths)).tolist()}


def _in_a_process(runtime: str, paths: dict[str, Path], rounds: int, missing: dict[str, str]) -> dict[str, list[float]]:
    """Milliseconds of every file in a process of its own; files that compute something else are named in ``missing``."""
    task = json.dumps({"runtime": runtime, "paths": {name: str(path) for name, path in paths.items()}, "rounds": rounds})
    done = subprocess.run([sys.executable, __file__, "--worker"], input=task, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{runtime}: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    missing.update(found["missing"])
    return found["latencies_ms"]


def _work() -> None:
    """What such a process does: one task on stdin, one line of JSON on stdout."""
    task = json.loads(sys.stdin.readline())
    runtime, missing = task["runtime"], {}
    inputs = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    found = RUNTIMES[runtime]({name: Path(path) for name, path in task["paths"].items()})
    outputs = {name: session.run(None, {session.get_inputs()[0].name: inputs})[0] for name, session in found.items()}
    for name, value in outputs.items():
        error = float(np.abs(value - outputs["unfolded"]).max() / np.abs(outputs["unfolded"]).max())
        if not error <= CLOSE:
            if name == "folded":
                raise SystemExit(f"the folded network is off by {error:.1e} of peak")
            missing[f"{name} in {runtime}"] = f"off by {error:.1e} of peak"
            del found[name]
    taken = latencies_ms(found, inputs, task["rounds"], WARMUP)
    print(json.dumps({"missing": missing, "latencies_ms": {name: values.tolist() for name, values in taken.items()}}))


def _compared(taken: list[dict[str, list[float]]]) -> dict:
    """Medians over all processes, and the folded file's ratios to the unfolded one and to the best peer's."""
    medians = {name: float(np.median(np.concatenate([each[name] for each in taken]))) for name in taken[0]}
    best = min((name for name in medians if name not in ("folded", "unfolded")), key=medians.__getitem__)
    pairs = {name: [(np.array(each["folded"]), np.array(each[name])) for each in taken] for name in ("unfolded", best)}
    return {"median_ms": medians, "unfolded": _interval(pairs["unfolded"], LEVEL), "best": best,
            "peer": _interval(pairs[best], LEVEL), "jointly": _interval(pairs[best], 1 - (1 - LEVEL) / COMPARISONS)}  # fmt: skip


def _interval(pairs: list[tuple[np.ndarray, np.ndarray]], level: float) -> list[float]:
    found = statistics.ratio(pairs, level)
    return [found.value, found.low, found.high]


def words(interval: list[float]) -> str:
    """What the interval of a ratio of latencies says."""
    middle, low, high = interval
    if low <= 1 <= high:
        return f"{middle:.3f} [{low:.3f}, {high:.3f}], no measurable difference"
    return f"{middle:.3f} [{low:.3f}, {high:.3f}], {'faster' if high < 1 else 'slower'}"


def slower(rows: dict[str, Row]) -> list[str]:
    timed = [(title, runtime, row[runtime]) for title, row in rows.items() for runtime in RUNTIMES if runtime in row]
    return [f"{title} in {runtime}: {words(one['peer'])} than {one['best']}" for title, runtime, one in timed
            if one["jointly"][1] > 1]  # fmt: skip


def page(found: dict) -> str:
    rows = found["rows"]
    timed = [row[runtime] for row in rows.values() for runtime in RUNTIMES if runtime in row]
    loads = [load for one in timed for load in one["load"] if load is not None]
    shared = ""
    if max(loads, default=0) > BUSY:
        cores = found["machine"]["cores"]
        shared = f"**Measured on a shared machine under load (up to {max(loads)} on {cores} cores): trust the intervals alone.**"
    lines = [
        "# Latency against peers",
        "",
        f"Generated by `python benchmarks/latency_peers.py`, {found['date']}. One thread, 224x224, batch 1, float32, random "
        "weights and statistics. Interleaved rounds in random order, in several processes, each of which loads the files in "
        "another order; ratios are of latencies, folded over the other, with 95 % intervals: below 1 folding is faster. "
        "*Unfolded*: `torch.onnx.export` of the training graph, its optimiser off; the runtime then optimises every file alike. "
        "*Best peer*: the file with the lowest median among torch.onnx with its optimiser and onnxsim, torch.fx fuse in front "
        "of that, and, where there is one, the network's own method in "
        "front of that.",
        "",
        *([shared, ""] if shared else []),
        "| network | runtime | rounds | unfolded | best peer | folded | folded / unfolded | folded / best peer | best peer is |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for title, row in rows.items():
        for runtime in RUNTIMES:
            if runtime in row:
                one, ms = row[runtime], row[runtime]["median_ms"]
                shown = " | ".join(f"{ms[name]:.2f} ms" for name in ("unfolded", one["best"], "folded"))
                lines.append(
                    f"| {title} | {runtime} | {one['processes']} × {one['rounds']} | {shown} | {words(one['unfolded'])} "
                    f"| {words(one['peer'])} | {one['best']} |"
                )
    lines += ["", "## Operators in each file", "", "| network | file | nodes |", "|---|---|---|"]
    for title, row in rows.items():
        for name, nodes in row["nodes"].items():
            counted = ", ".join(f"{number} {kind}" for kind, number in sorted(nodes.items(), key=lambda item: -item[1]))
            lines.append(f"| {title} | {name} | {sum(nodes.values())}: {counted} |")
    missing = [f"- {title}, {name}: {why}" for title, row in rows.items() for name, why in row["missing"].items()]
    if missing:
        lines += ["", "## Left out", "", *missing]
    return "\n".join([*lines, "", "Measured on: " + ", ".join(f"{k} {v}" for k, v in found["machine"].items()) + "."]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose title matches")
    parser.add_argument("--rounds", type=int, default=12, help="in each process")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), type=lambda text: text.split(","))
    parser.add_argument("--page", action="store_true", help="write the page again from what was measured")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    if args.worker:
        _work()
        return 0
    declare_missing()
    from importlib.metadata import version

    path = args.json or HERE / "results" / f"latency_peers-{datetime.date.today()}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    every = networks()
    for title in [] if args.page else [title for title in every if re.search(args.only, title)]:
        rows[title] = measure(every[title], args.runtimes, args.rounds, args.processes)
        print(f"{title}: " + "; ".join(f"{r} {words(rows[title][r]['peer'])}" for r in args.runtimes), file=sys.stderr, flush=True)
        versions = {package: version(package) for package in ("openvino", "timm")}
        found = {"date": f"{datetime.date.today()}", "machine": machine.describe() | versions,
                 "rows": {each: rows[each] for each in every if each in rows}}  # fmt: skip
        path.write_text(json.dumps(found, indent=1) + "\n")
    if path.exists():
        path.with_suffix(".md").write_text(page(json.loads(path.read_text())))
    missed = slower(rows)
    print("\n".join(missed), file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

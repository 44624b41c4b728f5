"""What folding and its proof cost, against peers that do neither.

    python benchmarks/conversion.py [--rounds 7] [--threads 2] [--quick]

Everything that is compared alternates, A B A B …, in one run; a row is the median of the rounds' ratios and their
range. Subprocesses do the work, so that peaks of memory are theirs; this process stays small, and imports no torch,
because Linux counts the memory of whoever starts a process towards its peak (getrusage(2), ``ru_maxrss``).

What counts as **proof** are three stages of the manifest: ``certify`` (every value in float64, and the rounding of the
outputs in float32), ``reference`` (the training graph's outputs in float64 that artifacts are compared with) and
``verify onnx`` (the file run by its runtime on those inputs, its weights compared bit by bit). All else of the command
is conversion: the check of the file by ``onnx.checker`` too, and that of what onnxsim made of it. A float64 forward
pass is the network itself, ``module.double()``, run eagerly at batch 1 in the process that made the proof.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
from conversion_report import PROOF, Limit, Row, document, page

HERE = Path(__file__).resolve().parent
KILOBYTE, MEBIBYTE = 1024, 2**20
FOLD_ROUNDS = 3  # of the fold stage for one of the command: it takes a tenth of a second


LIMITS = (
    Limit("fold", "fold stage / torch.fx.experimental.optimization.fuse", 3.0),
    Limit("chain", "seconds per layer, many layers / few: chain", 1.5),
    Limit("residual", "seconds per layer, many layers / few: residual network", 1.5),
    Limit("command", "command less its proof / export script", 1.25),
    Limit("proof", "proof, in float64 forward passes at batch 1", 60.0, " passes", 1),
    Limit("fold-memory", "growth of peak memory in the fold stage / bytes of the weights", 4.0),
    Limit("command-memory", "peak memory of the command / of the export script", 1.25),
    Limit("help", "foldexport --help", 0.5, " s"),
)


@dataclass(frozen=True)
class Settings:
    """What to measure on."""

    network: str
    shape: str
    layers: tuple[int, int]
    rounds: int
    threads: int
    weights: str  # the checkpoint

    @property
    def environment(self) -> dict[str, str]:
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@dataclass(frozen=True)
class Run:
    """Wall seconds and peak resident bytes of one process."""

    seconds: float
    peak_bytes: int
    output: str


class FailedRun(Exception):
    """A process that was to be measured did not end well."""


def run(arguments: Sequence[str], settings: Settings) -> Run:
    """One fresh Python process. Raises FailedRun, with its last line, where it ends with another code than 0."""
    command = [sys.executable, *arguments]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, env=settings.environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = [_text(file) for file in (out, err)]
    if process.returncode:
        lines = texts[1].strip().splitlines() or ["no message"]
        raise FailedRun(f"exit code {process.returncode}: {lines[-1][:200]}")
    unit = 1 if sys.platform == "darwin" else KILOBYTE
    return Run(seconds, usage.ru_maxrss * unit, texts[0])


def _text(file: Any) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def part(name: str, settings: Settings, **arguments: Any) -> dict[str, Any]:
    """What one part of `conversion_parts.py` says."""
    done = run([str(HERE / "conversion_parts.py"), name, json.dumps(arguments)], settings)
    return json.loads(done.output.strip().splitlines()[-1])


def fold(settings: Settings) -> dict[str, Row]:
    found = part("fold", settings, network=settings.network, shape=settings.shape, rounds=FOLD_ROUNDS * settings.rounds)
    detail = f"{_milliseconds(found['fold'])} / {_milliseconds(found['fuse'])}"
    return {"fold": Row(_ratios(found["fold"], found["fuse"]), detail)}


def layers(settings: Settings) -> dict[str, Row]:
    rows = {}
    few, many = (str(count) for count in settings.layers)
    for network in ("chain", "residual"):
        found = part("layers", settings, network=network, counts=settings.layers, rounds=settings.rounds)
        detail = f"{_milliseconds(found[many])} per layer of {many} / {_milliseconds(found[few])} of {few}"
        rows[network] = Row(_ratios(found[many], found[few]), detail)
    return rows


def command(settings: Settings) -> dict[str, Row]:
    """The command and the script in turn: seconds and peak memory of whole processes."""
    walls, proofs, scripts = [], [], []
    for _ in range(settings.rounds):
        with tempfile.TemporaryDirectory() as folder:
            walls.append(run(_command(settings, folder), settings))
            manifest = next(Path(folder).glob("*.manifest.json"))
            seconds = json.loads(manifest.read_text(encoding="utf-8"))["seconds"]
            proofs.append(sum(seconds[stage] for stage in PROOF))
            scripts.append(run(_script(settings, folder), settings))
    net = [each.seconds - proof for each, proof in zip(walls, proofs, strict=True)]
    plain = [each.seconds for each in scripts]
    ours, theirs = ([each.peak_bytes for each in runs] for runs in (walls, scripts))
    wall = statistics.median(each.seconds for each in walls)
    detail = f"({wall:.2f} s − {statistics.median(proofs):.2f} s of proof) / {statistics.median(plain):.2f} s"
    return {
        "command": Row(_ratios(net, plain), detail),
        "command-memory": Row(_ratios(ours, theirs), f"{_mebibytes(ours)} / {_mebibytes(theirs)}"),
    }


def _command(settings: Settings, folder: str) -> list[str]:
    return [
        "-m", "foldexport", settings.weights, "--arch", f"{HERE / 'networks.py'}:{settings.network}",
        "--input-shape", settings.shape, "--to", "onnx", "-o", f"{folder}/", "--quiet",
    ]  # fmt: skip


def _script(settings: Settings, folder: str) -> list[str]:
    return [str(HERE / "plain_export.py"), settings.weights, settings.network, settings.shape, f"{folder}/plain.onnx"]


def proof(settings: Settings) -> dict[str, Row]:
    found = part(
        "proof", settings, network=settings.network, shape=settings.shape, path=settings.weights, rounds=settings.rounds
    )
    stages = ", ".join(f"{name} {statistics.median(found[name]):.2f}" for name in PROOF)
    detail = f"{statistics.median(found['proof']):.2f} s ({stages}) / {_milliseconds(found['forward'])}"
    return {"proof": Row(_ratios(found["proof"], found["forward"]), detail)}


def fold_memory(settings: Settings) -> dict[str, Row]:
    """The fold stage and, for comparison, fuse: each in a fresh process, in turn."""
    found: dict[str, list[dict]] = {"fold": [], "fuse": []}
    for _ in range(settings.rounds):
        for subject, taken in found.items():
            taken.append(part("fold_memory", settings, network=settings.network, shape=settings.shape, subject=subject))
    ratios = {name: [each["grown_bytes"] / each["weight_bytes"] for each in taken] for name, taken in found.items()}
    weights = _mebibytes([each["weight_bytes"] for each in found["fold"]])
    grown = _mebibytes([each["grown_bytes"] for each in found["fold"]])
    return {"fold-memory": Row(ratios["fold"], f"{grown} / {weights}; fuse {statistics.median(ratios['fuse']):.2f}×")}


def help_text(settings: Settings) -> dict[str, Row]:
    run(["-m", "foldexport", "--help"], settings)  # compiles
    walls = [run(["-m", "foldexport", "--help"], settings).seconds for _ in range(max(5, settings.rounds))]
    return {"help": Row(walls, "fresh process")}


MEASURES = {
    fold: ("fold",), layers: ("chain", "residual"), command: ("command", "command-memory"), proof: ("proof",),
    fold_memory: ("fold-memory",), help_text: ("help",),
}  # fmt: skip


def measure(settings: Settings, only: Sequence[str] = ()) -> dict[str, Row]:
    """The rows asked for, all by default; one whose processes fail says why, and fails."""
    rows: dict[str, Row] = {}
    for call, keys in MEASURES.items():
        if only and not set(only) & set(keys):
            continue
        print(f"measuring {', '.join(keys)} …", file=sys.stderr, flush=True)
        try:
            rows |= call(settings)
        except FailedRun as error:
            rows |= {key: Row(failed=str(error)) for key in keys}
    return rows


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.3g} ms"


def _mebibytes(values: Sequence[float]) -> str:
    return f"{statistics.median(values) / MEBIBYTE:.0f} MiB"


@contextmanager
def checkpoint(network: str) -> Iterator[str]:
    """A file with random weights of the network."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/{network}.pth"
        part("checkpoint", Settings(network, "", (0, 0), 0, machine.cores(), path), network=network, path=path)
        yield path


def shown(settings: Settings) -> dict[str, Any]:
    return {
        "network": settings.network,
        "input_shape": settings.shape,
        "layers": settings.layers,
        "rounds": settings.rounds,
        "threads": settings.threads,
        "proof_stages": PROOF,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    if asked.quick:
        asked.rounds, asked.network, asked.input_shape, asked.layers = 2, "tiny_resnet", "1x3x32x32", (5, 10)
    with checkpoint(asked.network) as weights:
        settings = Settings(
            asked.network, asked.input_shape, tuple(asked.layers), asked.rounds, asked.threads, weights
        )
        rows = measure(settings, asked.only)
    found = document(LIMITS, rows, shown(settings), datetime.datetime.now(datetime.timezone.utc).date().isoformat())
    text = page(LIMITS, rows, found)
    print(text)
    if not asked.quick and not asked.only:
        _write(asked.output, found, text)


def _parser() -> argparse.ArgumentParser:
    keys = [limit.key for limit in LIMITS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--rounds", type=int, default=7, help="of everything that takes seconds (default: 7)")
    option("--threads", type=int, default=machine.cores(), help="of torch (default: all cores; 1 is steadier)")
    option("--quick", action="store_true", help="two rounds on a small network: shows that it works, writes nothing")
    option("--only", nargs="+", default=(), metavar="ROW", choices=keys, help=f"writes nothing: {', '.join(keys)}")
    option("--network", default="resnet50", help="a function of networks.py (default: resnet50)")
    option("--input-shape", default="1x3x224x224")
    option("--layers", type=int, nargs=2, default=(100, 1000), metavar=("FEW", "MANY"))
    option("--output", type=Path, default=HERE / "results", help="folder of the results (default: benchmarks/results)")
    return parser


def _write(folder: Path, found: dict[str, Any], text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"conversion-{found['date']}"
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

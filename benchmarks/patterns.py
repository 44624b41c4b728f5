"""How many foldable patterns each tool folds: the table of blocks of this project's tests, one small network each.

    python benchmarks/patterns.py [--only REGEX] [--out FILE.md]

A pattern counts as folded where no more operators run on the data than in our file behind the same tool (onnxruntime fuses a ReLU
into a convolution, in its peers' files and in ours), with views and the biases of layers aside, and with each weight that is
computed again at every inference counted as an operator. Statistics are random, gamma of both signs. A file whose outputs are off
by more than 1e-3 of peak in float32 is wrong. onnxruntime and OpenVINO get the unfolded file and torch.onnx's own, whichever serves
them better. Ours is measured by the operators that the table demands. Where a peer leaves fewer than we do the page says so.
Exits 1 where ours leaves more than the table says.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import affine_count
import machine
import numpy as np
import onnx
import onnxruntime as ort
import peers
import torch

import foldexport
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.options import ExportOptions
from tests.fold.blocks import BLOCKS, CONTROLS
from tests.fold.checks import operators
from tests.fold.merged_blocks import REFUSED_MERGES
from tests.statistics import randomise

HERE = Path(__file__).resolve().parent
BATCH = 2
CLOSE = 1e-3
OURS = "foldexport"
TOOLS = ("torch.fx fuse", "torch.onnx", "torch.onnx + onnxsim", "torch.onnx + onnxsim + onnxruntime", "OpenVINO")


def patterns() -> dict[str, object]:
    """What folds: the table without its refusals and without blocks that keep a module for a stated reason."""
    refused = {*CONTROLS, *REFUSED_MERGES}
    return {name: row for name, row in BLOCKS.items() if name not in refused and not row.kept}


def of_file(path: Path) -> int:
    model = onnx.load(path)
    return affine_count.operators(affine_count.onnx_nodes(model), [each.name for each in model.graph.initializer])


def by_onnxruntime(path: Path) -> int:
    """Behind onnxruntime's portable optimisations ("extended")."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return of_file(path.with_suffix(".optimised.onnx"))


def by_openvino(path: Path) -> int:
    return affine_count.operators(affine_count.openvino_nodes(peers.openvino_model(path)), ())


def _saved(proto, path: Path) -> Path:
    onnx.save(proto, path)
    return path


def measure(row) -> dict[str, tuple[int | None, int]]:
    """Tool → operators in its file and in ours behind it; None in place of the first where its file is wrong or missing."""
    network = randomise(row.build(), 0, signs=row.signs, zero=row.zero).eval()
    example = torch.randn(BATCH, *row.shape)
    with torch.no_grad():
        wanted = network(example)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = folder / "ours.onnx"
        folded = foldexport.fold(network, example)
        module = folded.module
        exporter = OnnxExporter()
        exporter.export(exporter.suited(module), (example,), ours, ExportOptions(opset=peers.OPSET, dynamic=()))
        require_close(ours, example, wanted)
        left, wished = (sum(operators(each).values()) for each in (folded.counts_after, row.operators))
        plain = _saved(peers.onnx_program(network, example, optimise=False).model_proto, folder / "plain.onnx")
        found: dict[str, tuple[int | None, int]] = {"unfolded": (of_file(plain), of_file(ours)), OURS: (left, wished)}
        optimised = folder / "optimised.onnx"
        for tool, way in {
            "torch.fx fuse": lambda: _saved(
                peers.onnx_program(peers.fx_fused(network), example, optimise=False).model_proto, folder / "fused.onnx"),
            "torch.onnx": lambda: _saved(peers.onnx_program(network, example, optimise=True).model_proto, optimised),
            "torch.onnx + onnxsim": lambda: _saved(peers.simplified(onnx.load(optimised)), folder / "simplified.onnx"),
        }.items():  # fmt: skip
            found[tool] = (_left(way, example, wanted), of_file(ours))
        files = [path for path in (plain, optimised, folder / "simplified.onnx") if path.exists()]
        chained = min(by_onnxruntime(path) for path in files)
        found["torch.onnx + onnxsim + onnxruntime"] = (chained, by_onnxruntime(ours))
        found["OpenVINO"] = _in_openvino(files, ours)
    return found


def _in_openvino(files: list[Path], ours: Path) -> tuple[int | None, int]:
    """None where it converts none of them; there our count is that of our file."""
    counts = []
    for path in files:
        with suppress(Exception):  # that a peer fails is a result
            counts.append(by_openvino(path))
    return (min(counts), by_openvino(ours)) if counts else (None, of_file(ours))


def _left(way: Callable[[], Path], example: torch.Tensor, wanted: torch.Tensor) -> int | None:
    try:
        path = way()
        require_close(path, example, wanted)
    except Exception:  # that a peer fails, or is wrong, is a result
        return None
    return of_file(path)


def require_close(path: Path, example: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise ValueError where the file computes something else."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = session.run(None, {session.get_inputs()[0].name: example.numpy()})[0]
    error = np.abs(given - wanted.numpy()).max()
    if not error <= CLOSE * np.abs(wanted.numpy()).max():
        raise ValueError(f"{path.name} is off by {error:.1e}")


def folds(pair: tuple[int | None, int]) -> bool:
    return pair[0] is not None and pair[0] <= pair[1]


def _cell(pair: tuple[int | None, int]) -> str:
    return "✓" if folds(pair) else "✗" if pair[0] is None else f"+{pair[0] - pair[1]}"


def behind(found: dict[str, dict[str, tuple[int | None, int]]]) -> list[str]:
    """Where a peer leaves fewer operators: a per-channel clamp is two nodes of ONNX, a ReLU that onnxruntime fuses none."""
    return [f"{name.replace('_', ' ')}: {tool} leaves {row[tool][0]}, ours {row[tool][1]}" for name, row in found.items()
            for tool in TOOLS if row[tool][0] is not None and row[tool][0] < row[tool][1]]  # fmt: skip


def page(found: dict[str, dict[str, tuple[int | None, int]]]) -> str:
    """The table, ours first; a cell is ✓, or the operators left beyond ours, or ✗ for a file that is wrong or missing."""
    counts = {tool: sum(folds(row[tool]) for row in found.values()) for tool in (OURS, *TOOLS)}
    lines = [
        "# Patterns folded", "",
        f"Generated by `python benchmarks/patterns.py`, {datetime.date.today()}. One small network a pattern, random statistics.",
        "foldexport is measured by the table of `tests/fold/blocks.py`, which says what each must come down to.",
        "Of the others, ✓: as few operators run as in our file behind the same tool; +n: n more; ✗: a file is wrong or missing.",
        "",
        f"| | foldexport | {' | '.join(TOOLS)} |", "|---|" + "---:|" * (1 + len(TOOLS)),
        f"| **folded, of {len(found)}** | " + " | ".join(f"**{counts[tool]}**" for tool in (OURS, *TOOLS)) + " |",
    ]  # fmt: skip
    for name, row in found.items():
        cells = [_cell(row[tool]) for tool in (OURS, *TOOLS)]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    fewer = behind(found)
    if fewer:
        lines += [
            "", "Where a peer's file runs in fewer nodes than ours behind the same tool (a per-channel clamp is `Max` and `Min`,",
            "while onnxruntime fuses a plain ReLU into the convolution in front of it):", "", *(f"- {each}" for each in fewer),
        ]  # fmt: skip
    described = machine.describe()
    return "\n".join([*lines, "", "Measured on: " + ", ".join(f"{k} {v}" for k, v in described.items()) + "."]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="patterns whose name matches")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "patterns.md")
    args = parser.parse_args(argv)
    found = {}
    for name, row in patterns().items():
        if re.search(args.only, name):
            found[name] = measure(row)
            print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    args.out.write_text(page(found))
    print("\n".join(behind(found)), file=sys.stderr)
    return 0 if all(folds(row[OURS]) for row in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

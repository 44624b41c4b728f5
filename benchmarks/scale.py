"""Memory and time at the ends of the scale: weights above 2 GB, inputs of 1024×1024, a thousand layers.

    python benchmarks/scale.py [--size 1024] [--width 8192] [--depth 8] [--only weights,image,command,layers] [--output FOLDER]

Every row is one process, measured from outside (``wait4``) by this one, which stays small and imports no torch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
from conversion import FailedRun, Settings, run

HERE = Path(__file__).resolve().parent
GIB = 2**30
NETWORKS = ("resnet50", "unet")


def weights(asked: argparse.Namespace, settings: Settings) -> Iterator[dict[str, Any]]:
    """A network with more than 2 GB of float32 weights: peak memory of each stage, as a multiple of the weights."""
    given = {"width": asked.width, "depth": asked.depth, "formats": asked.formats, "external": asked.external}
    yield {"case": f"{asked.depth} linear layers of {asked.width}²", **part("weights", settings, **given)}


def image(asked: argparse.Namespace, settings: Settings) -> Iterator[dict[str, Any]]:
    """Networks at large inputs, through the library."""
    for network in asked.networks:
        yield {"case": f"{network}, library", **part("image", settings, network=network, size=asked.size, formats=["onnx"])}


def command(asked: argparse.Namespace, settings: Settings) -> Iterator[dict[str, Any]]:
    """The same through the command."""
    for network in asked.networks:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{network}.pth"
            part("checkpoint", settings, network=network, path=str(path))
            words = ["-m", "foldexport", str(path), "--to", "onnx", "--input-shape", f"1x3x{asked.size}x{asked.size}"]
            words += ["--arch", f"{HERE / 'scale_networks.py'}:unet"] if network == "unet" else []
            done = run(words, settings)
            manifest = json.loads(next(Path(folder).glob("*.manifest.json")).read_text(encoding="utf-8"))
        yield {
            "case": f"{network}, command", "peak_bytes": done.peak_bytes, "wall_s": done.seconds, "seconds": manifest["seconds"],
            "probes": [[each["name"], each["shapes"]] for each in manifest["certificate"]["probes"]],
            "proof": f"{manifest['certificate']['n_values']} values",
            "files": [{"comparison": _line(each["comparison"])} for each in manifest["artifacts"]],
        }  # fmt: skip


def layers(asked: argparse.Namespace, settings: Settings) -> Iterator[dict[str, Any]]:
    """Seconds of the fold stage per layer."""
    from conversion import part as conversion_part

    for network in ("chain", "residual"):
        found = conversion_part("layers", settings, network=network, counts=asked.layers, rounds=1)
        spent = {count: values[0] for count, values in found.items()}
        yield {"case": f"{network} of {', '.join(map(str, asked.layers))} layers", "layers": spent}


def part(name: str, settings: Settings, **arguments: Any) -> dict[str, Any]:
    """What one part of `scale_parts.py` says, and its process's own peak and seconds."""
    done = run([str(HERE / "scale_parts.py"), name, json.dumps(arguments)], settings)
    return {**json.loads(done.output.strip().splitlines()[-1]), "peak_bytes": done.peak_bytes, "wall_s": done.seconds}


def _line(comparison: dict[str, Any]) -> str:
    return f"{comparison['runtime']}  max error {comparison['max_error']:.1e} of peak ({comparison['noise_multiple']:.1f}× noise)"


def page(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The table, and below it what each row was proved on."""
    lines = [
        "# Scale", "",
        f"`benchmarks/scale.py`, {facts['date']}: inputs of {facts['size']}×{facts['size']}, {facts['threads']} threads;",
        "every row is a process of its own.", "",
        "| case | peak memory | of the weights | seconds | of which |",
        "|---|---:|---:|---:|---|",
    ]  # fmt: skip
    for row in rows:
        if "layers" in row:
            spent = ", ".join(f"{1000 * value:.2f} ms per layer of {count}" for count, value in row["layers"].items())
            lines.append(f"| {row['case']} | | | | fold stage: {spent} |")
            continue
        size = row.get("weight_bytes")
        multiple = f"{row['peak_bytes'] / size:.1f}× of {size / GIB:.2f} GiB" if size else ""
        top = sorted(row["seconds"].items(), key=lambda item: -item[1])[:5]
        spent = ", ".join(f"{name} {value:.0f}" for name, value in top)
        lines.append(f"| {row['case']} | {row['peak_bytes'] / GIB:.2f} GiB | {multiple} | {row['wall_s']:.0f} | {spent} |")
    for row in rows:
        lines += ["", f"**{row['case']}**", *_details(row)] if "layers" not in row else []
    return "\n".join([*lines, "", *(f"- {name}: {value}" for name, value in facts["machine"].items()),
                      ""])  # fmt: skip


def _details(row: dict[str, Any]) -> list[str]:
    lines = ["", f"- proof: {row['proof']}", f"- load of the machine at its end, of {machine.cores()} cores: {row.get('load')}"]
    if row.get("probes"):
        lines.append("- probes: " + ", ".join(f"{name} {'x'.join(map(str, shapes[0]))}" for name, shapes in row["probes"]))
    for each in row["files"]:
        names = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in each.get("files", {}).items())
        lines.append(f"- {each['comparison']}{f' ({names})' if names else ''}")
    if row.get("peaks"):
        lines.append("- peaks: " + ", ".join(f"{name} {value / GIB:.2f}" for name, value in row["peaks"].items() if name) + " GiB")
    return lines


PARTS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "weights": weights, "image": image, "command": command, "layers": layers,
}  # fmt: skip


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of the same day, by case: parts may be run one by one."""
    found = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return {row["case"]: row for row in found}


def _write(place: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    place.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    place.with_suffix(".md").write_text(page(rows, facts), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--external", action="store_true", help="external data for small weights too")
    parser.add_argument("--formats", type=lambda text: text.split(","), default=["onnx", "torchscript"])
    parser.add_argument("--networks", type=lambda text: text.split(","), default=list(NETWORKS))
    parser.add_argument("--layers", type=lambda text: [int(each) for each in text.split(",")], default=[100, 300, 1000])
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    settings = Settings("", "", (0, 0), 1, asked.threads, "")
    os.environ.setdefault("OMP_NUM_THREADS", str(asked.threads))
    date = datetime.date.today().isoformat()
    facts = {"date": date, "size": asked.size, "threads": asked.threads, "machine": machine.describe()}
    asked.output.mkdir(parents=True, exist_ok=True)
    place = asked.output / f"scale-{date}"
    rows = _rows(place.with_suffix(".json"))
    try:
        for row in (row for name in asked.only for row in PARTS[name](asked, settings)):
            rows[row["case"]] = {**row, "load": machine.load()}
            _write(place, list(rows.values()), facts)
            print(f"{row['case']}: {row.get('wall_s', 0.0):.0f} s", file=sys.stderr, flush=True)
    except FailedRun as error:
        print(error, file=sys.stderr)
        return 1
    print(place.with_suffix(".md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The benchmark of large weights and images, on small stand-ins: it runs, and memory is what it is meant to be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def test_the_table(tmp_path: Path) -> None:
    words = ["--size", "64", "--width", "256", "--depth", "2", "--external", "--formats", "onnx", "--networks", "unet"]
    words += ["--layers", "2,4", "--threads", "1", "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, str(FOLDER / "scale.py"), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (page,), (record,) = tmp_path.glob("scale-*.md"), tmp_path.glob("scale-*.json")
    rows = {row["case"]: row for row in json.loads(record.read_text())["rows"]}
    assert list(rows) == [
        "2 linear layers of 256²", "unet, library", "unet, command", "chain of 2, 4 layers", "residual of 2, 4 layers",
    ]  # fmt: skip
    weights = rows["2 linear layers of 256²"]
    assert set(weights["files"][0]["files"]) == {"net.onnx", "net.onnx.data"} and weights["weight_bytes"] > 2 * 4 * 256**2
    assert ["normal", [[3, 3, 64, 64]]] in rows["unet, command"]["probes"]
    text = page.read_text(encoding="utf-8")
    assert "ms per layer of 4" in text and all(f"| {case} |" in text for case in rows)

"""Writes networks that format_coverage.py names to every format, one line of JSON in, one out."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from coverage_worker import randomised
from folded_share_worker import build as zoo_network

import foldexport
from foldexport import exporters
from foldexport.errors import FoldexportError


def measure(entry: dict) -> dict:
    """Fold the network, then write and prove each format; a format's refusal is its row."""
    torch.manual_seed(0)
    network, shape = zoo_network(entry) if entry["source"] == "zoo" else randomised(entry)
    folded = foldexport.fold(network, torch.randn(2, *shape))
    return {"shape": list(shape), "formats": {name: written(folded, name) for name in entry["formats"]}}


def written(folded: foldexport.Folded, name: str) -> dict:
    """The error of one file in multiples of the network's noise, or why there is none."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"net{exporters.FORMATS[name].suffix}"
        try:
            comparison = foldexport.export(folded, name, path).comparison
        except FoldexportError as error:
            return {"outcome": type(error).__name__, "detail": " ".join(str(error).split())}
        except Exception as error:  # a crash is what this script looks for
            return {"outcome": "crash", "detail": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
    return {"outcome": "equal", "multiple": comparison.noise_multiple, "weights": list(comparison.weights_identical),
            "batches": sorted(set(comparison.batches)), "seconds": time.perf_counter() - began}  # fmt: skip


def main() -> None:
    from tests.torchvision_schemas import declare_missing

    declare_missing()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        try:
            found = measure(json.loads(line))
        except Exception as error:  # the network could not be built, or not folded
            found = {"reason": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

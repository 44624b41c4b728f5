"""The script that calibrates the benchmark: its networks compute the same, and its report counts what it should."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("bench_calibration")


def test_the_slower_copy_computes_the_same(script):
    x = torch.randn(2, *script.SHAPE[1:])
    with torch.no_grad():
        assert torch.equal(script.network(extra=False)(x), script.network(extra=True)(x))
    assert len(script.network(extra=True)) == len(script.network(extra=False)) + 2


def test_the_report_counts_right_answers(script):
    row = {"low": 0.99, "high": 1.01, "ratio": 1.0, "found": False, "wall_s": 3.0, "load_average": 0.5}
    slower = row | {"low": 1.05, "high": 1.15, "ratio": 1.1, "found": True}
    document = {
        "date": "2000-01-01", "machine": {"processor": "P", "cores": "2", "onnxruntime": "1"}, "processes": 6, "seconds": 1.2,
        "truth": slower, "runs": {"itself": [row, row, row | {"found": True}], "slower": [slower, row]},
    }  # fmt: skip
    text = script.table(document)
    assert "| a network against itself | 3 | 1 | 2 of 3 |" in text
    assert "| a network against a copy with one layer more | 2 | 1 | 1 of 2 |" in text and "1 of 2 short intervals" in text

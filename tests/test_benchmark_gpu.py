"""The GPU's latency benchmark: what it times, what it writes, and that it says why where there is no GPU."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu_latency")


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_why_and_writes_nothing(script, tmp_path, capsys):
    assert script.main(["--output", str(tmp_path)]) == 5
    assert capsys.readouterr().err.startswith("error: --device cuda: ") and not list(tmp_path.iterdir())


def test_a_name_that_fits_none(script, tmp_path):
    assert script.main(["--device", "cpu", "--only", "AlexNet", "--output", str(tmp_path)]) == 2


def test_what_is_timed(script):
    wanted = ["DiracNet-18", "DiracNet-34", "NF-ResNet-50", "Pre-activation ResNet-50", "RepVGG-A0", "ResNet-50"]
    assert list(script.networks()) == wanted and script.RUNTIMES == ("eager", "cudagraphs", "compile")


def test_the_script_on_the_cpu(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "networks", lambda: {"Small": small})
    words = ["--device", "cpu", "--batch", "1,2", "--runtimes", "eager,cudagraphs", "--image", "3x16x16", "--rounds", "3"]
    assert script.main([*words, "--processes", "2", "--threads", "1", "--output", str(tmp_path)]) == 0
    document, page = (next(tmp_path.glob(f"gpu-latency-on-cpu-*{suffix}")) for suffix in (".json", ".md"))
    found = json.loads(document.read_text())["networks"]["Small"]
    assert [each["batch"] for each in found["measurements"]] == [1, 2] and found["settings"]["device"] == "cpu"
    assert all(len(each["variants"][1]["speedup"]["interval"]) == 2 for each in found["measurements"])
    assert list(found["left_out"]) == ["cudagraphs, batch 1", "cudagraphs, batch 2"]
    text = page.read_text()
    assert text.count("| Small | eager |") == 2 and "not the numbers of a GPU" in text and "## Left out" in text
    assert capsys.readouterr().out == text + "\n"

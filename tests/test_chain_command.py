"""``--chain`` on the command line: the files, what the console and the manifest say, and its exit codes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch

import foldexport as package
from tests.command import foldexport, save_plain

NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, cin, cout, stride, gate=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))
        self.gate = nn.Conv2d(cout, cout, 1) if gate else None

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.gate is not None:
            y = y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)

class Net(nn.Sequential):
    def __init__(self, gate=False):
        super().__init__(
            nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Block(4, 4, 1), Block(4, 8, 2), Block(8, 8, 1, gate),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        )
"""
PLAIN = {"Conv", "Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Gemm", "Flatten", "Reshape"}
GATED = NET.replace("gate=False):\n        super().__init__(\n", "gate=True):\n        super().__init__(\n")


def asked(folder: Path, source: str = NET) -> list:
    checkpoint, arch = save_plain(folder, source)
    return [checkpoint, "--arch", arch, "--input-shape", "1x3x16x16", "-o", folder / "out"]


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_a_residual_network_is_written_as_a_chain(tmp_path):
    result = foldexport(*asked(tmp_path), "--to", "onnx,ts", "--chain")
    assert result.code == 0, result.err
    found = operators(tmp_path / "out" / "net.onnx")
    assert set(found) <= PLAIN and found["Conv"] == 7 and found["Relu"] == 7
    for words in ("3 skip connections folded into 6 layers", "multiply-adds", "✓ onnx", "✓ torchscript", "addition"):
        assert words in result.out, words
    assert "kept" not in result.out
    graph = onnx.load(tmp_path / "out" / "net.onnx").graph
    readers = Counter(name for node in graph.node for name in node.input)
    assert all(readers[name] == 1 for node in graph.node for name in node.output if name not in {o.name for o in graph.output})


def test_the_manifest_tells_what_was_turned_and_what_it_costs(tmp_path):
    result = foldexport(*asked(tmp_path, GATED), "--to", "onnx", "--chain", "--json")
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "out" / "net.manifest.json").read_text())
    assert record["chain"]["turned"] == ["3", "4"]
    (kept,) = record["chain"]["kept"]
    assert kept["module"] == "5" and "a gate lies on its way" in kept["reason"]
    assert result.document["chain"] == record["chain"] and "--chain" in record["command"]
    before, after = (record["costs"][side]["multiply_adds"] for side in ("before", "after"))
    assert after > 1.3 * before
    assert operators(tmp_path / "out" / "net.onnx")["Add"] == 1
    assert record["certificate"]["ok"] and record["certificate"]["end_to_end"]["error"] < 1e-9


def test_the_console_names_what_stays(tmp_path):
    result = foldexport(*asked(tmp_path, GATED), "--to", "onnx", "--chain")
    assert result.code == 0 and "5 (skip connection)" in result.out and "2 skip connections folded" in result.out


def test_without_it_nothing_is_said_of_it(tmp_path):
    result = foldexport(*asked(tmp_path), "--to", "onnx", "--json")
    assert result.code == 0 and "chain" not in result.document
    assert operators(tmp_path / "out" / "net.onnx")["Add"] == 3


def test_it_is_part_of_the_fold(tmp_path):
    result = foldexport(*asked(tmp_path), "--to", "onnx", "--chain", "--no-fold")
    assert result.code == 2 and "--chain" in result.message


@pytest.mark.parametrize("preactivation", [False, True], ids=["post", "pre"])
def test_the_library_makes_the_same_file(tmp_path, preactivation: bool):
    from tests.fold.test_chain import resnet
    from tests.statistics import randomise

    network = randomise(resnet((1, 1), bottleneck=False, preactivation=preactivation), 0, example=torch.randn(4, 3, 16, 16))
    folded = package.fold(network, torch.randn(1, 3, 16, 16), chain=True)
    artifact = package.export(folded, "onnx", tmp_path / "net.onnx")
    assert artifact.comparison.ok and set(operators(artifact.path)) <= PLAIN

"""The shipped checkpoints: recognised, folded to a plain chain, exported, and as accurate as before."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch

import foldexport
from foldexport.recognise import recognise

MODELS = Path(__file__).resolve().parents[1] / "models"
DIRACNET = MODELS / "diracnet16_cifar10.pth"
IMAGES = 1000


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, str]:
    """The main command on the shipped checkpoint, in a process of its own."""
    folder = tmp_path_factory.mktemp("shipped")
    command = [sys.executable, "-m", "foldexport", str(DIRACNET), "--to", "onnx,torchscript", "-o", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_console_names_the_network(exported):
    assert "DiracNet v2, CIFAR, depth 16" in " ".join(exported[1].split())


def test_the_onnx_graph_is_plain(exported):
    model = onnx.load(exported[0] / "diracnet16_cifar10.onnx")
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts.pop("Conv") == 13 and counts.pop("Relu") == 13 and counts.pop("MaxPool") == 2
    assert counts.pop("AveragePool", 0) + counts.pop("GlobalAveragePool", 0) == 1 and counts.pop("Gemm") == 1
    assert set(counts) <= {"Flatten", "Reshape"}


def test_accuracy_is_unchanged(exported, shared):
    sys.path.insert(0, str(MODELS))
    from data import load_split
    from evaluate import NEAR_TIE, differences, scores

    network = recognise(DIRACNET)
    split = load_split(shared / "data" / "cifar10", "test", 32)
    chosen = torch.randperm(len(split.images), generator=torch.Generator().manual_seed(0))[:IMAGES]
    images, labels = split.images[chosen], split.labels[chosen]
    folded = foldexport.fold(network.module, torch.randn(1, 3, 32, 32))
    session = onnx_session(exported[0] / "diracnet16_cifar10.onnx")
    script = torch.jit.load(exported[0] / "diracnet16_cifar10.torchscript.pt")
    wanted = scores(network.module, images, network.preprocessing, "training graph")
    assert float((wanted.argmax(1) == labels).double().mean()) > 0.85
    for run in (folded.module, session, script):
        found = scores(run, images, network.preprocessing, "folded")
        assert all(each["margin"] <= NEAR_TIE for each in differences(found, wanted))


def onnx_session(path: Path):
    """The ONNX file as ``images → scores``."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {"input": inputs.numpy()})[0]

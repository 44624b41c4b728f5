"""The shipped checkpoints: recognised, folded, exported, as accurate as before, and each with its card."""

from __future__ import annotations

import json
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
IMAGES = 1000
LARGEST_BYTES = 5_000_000
# What the console calls each, and the operators of its ONNX file; views and the pooling's spelling apart.
SHIPPED = {
    "diracnet16_cifar10": ("DiracNet v2, CIFAR, depth 16", {"Conv": 13, "Relu": 13, "MaxPool": 2, "Gemm": 1}),
    "idshort18_cifar10": ("ResNet-18 without batch norm, idshort", {"Conv": 20, "Relu": 17, "Add": 8, "Gemm": 1}),
    "learnscalar18_cifar10": ("ResNet-18 without batch norm, learnscalar", {"Conv": 20, "Relu": 17, "Add": 8, "Gemm": 1}),
    "convshort18_cifar10": ("ResNet-18 without batch norm, convshort", {"Conv": 25, "Relu": 17, "Add": 8, "Gemm": 1}),
    "preresnet20_cifar10": ("pre-activation ResNet-20, order full", {"Conv": 21, "Add": 9, "Gemm": 1}),
    "repvgg_cifar10": ("RepVGG", {"Conv": 10, "Relu": 10, "Gemm": 1}),
}
ACTIVATIONS = ("Relu", "Max", "Min", "Clip")


def test_every_checkpoint_is_listed_small_and_has_a_card():
    assert {path.stem for path in MODELS.glob("*.pth")} == set(SHIPPED)
    for name in SHIPPED:
        assert (MODELS / f"{name}.pth").stat().st_size < LARGEST_BYTES
        card = (MODELS / f"{name}.md").read_text()
        assert f"]({name}.png)" in card and (MODELS / f"{name}.png").is_file()
        record = json.loads((MODELS / f"{name}.json").read_text())
        assert record["command"] in card and record["epochs"]


@pytest.fixture(scope="module", params=SHIPPED)
def exported(request, tmp_path_factory) -> tuple[str, Path, str]:
    """The main command on a shipped checkpoint with no option but the formats, in a process of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = MODELS / f"{request.param}.pth"
    command = [sys.executable, "-m", "foldexport", str(checkpoint), "--to", "onnx,torchscript", "-o", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return request.param, folder, done.stdout


def test_the_console_names_the_network(exported):
    name, _, stdout = exported
    assert SHIPPED[name][0] in " ".join(stdout.split())


def test_the_onnx_graph_is_plain(exported):
    name, folder, _ = exported
    counts = Counter(node.op_type for node in onnx.load(folder / f"{name}.onnx").graph.node)
    for kind, number in SHIPPED[name][1].items():
        assert counts.pop(kind) == number
    assert sum(counts.pop(kind, 0) for kind in ("AveragePool", "GlobalAveragePool", "ReduceMean")) == 1
    assert set(counts) <= {"Flatten", "Reshape", *(ACTIVATIONS if name.startswith("preresnet") else ())}


def test_accuracy_is_unchanged(exported, shared):
    name, folder, _ = exported
    sys.path.insert(0, str(MODELS))
    from data import load_split
    from evaluate import NEAR_TIE, differences, scores

    network = recognise(MODELS / f"{name}.pth")
    split = load_split(shared / "data" / "cifar10", "test", 32)
    chosen = torch.randperm(len(split.images), generator=torch.Generator().manual_seed(0))[:IMAGES]
    images, labels = split.images[chosen], split.labels[chosen]
    folded = foldexport.fold(network.module, torch.randn(1, 3, 32, 32))
    session = onnx_session(folder / f"{name}.onnx")
    script = torch.jit.load(folder / f"{name}.torchscript.pt")
    wanted = scores(network.module, images, network.preprocessing, "training graph")
    assert float((wanted.argmax(1) == labels).double().mean()) > 0.78
    for run in (folded.module, session, script):
        found = scores(run, images, network.preprocessing, "folded")
        assert all(each["margin"] <= NEAR_TIE for each in differences(found, wanted))


def onnx_session(path: Path):
    """The ONNX file as ``images → scores``."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {"input": inputs.numpy()})[0]

"""A network that is TorchScript as a whole, given to the command as the file that ``torch.jit.save`` wrote."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from tests.command import foldexport
from tests.statistics import randomise
from tests.torchvision_schemas import declare_missing

IMAGE = torch.linspace(-2, 2, 3 * 16 * 16).reshape(1, 3, 16, 16)


class Own(nn.Module):
    """Branches on its input's size, works in place, and takes means over space."""

    def __init__(self):
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.second, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        if x.shape[2] > 4:
            x = torch.relu(self.bn1(self.first(x)))
        x = self.bn2(self.second(x)).relu_().mean((2, 3))
        return self.head(x)


MAKERS = {
    "scripted": torch.jit.script,
    "traced": lambda network: torch.jit.trace(network, IMAGE),
    "in train mode": lambda network: torch.jit.script(network.train()),
    "half": lambda network: torch.jit.script(network.half()),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_an_own_network(make, tmp_path: Path):
    network = randomise(Own(), 0)
    wanted = network(IMAGE).detach()
    torch.jit.save(make(network), tmp_path / "own.pt")
    result = foldexport(tmp_path / "own.pt", "--to", "onnx", "--input-shape", "1x3x16x16", "--json")
    assert result.code == 0, result.err
    found = result.document
    assert found["architecture"]["name"] == "Own" and found["certificate"]["ok"]
    assert found["costs"]["after"]["operators"].get("batch_norm", 0) == 0
    (output,) = onnxruntime.InferenceSession(tmp_path / "own.onnx").run(None, {"input": IMAGE.numpy()})
    rounded = 1e-2 if "half" in str(make) or next(network.parameters()).dtype == torch.half else 1e-5
    assert float((torch.from_numpy(output) - wanted).abs().max()) <= rounded * float(wanted.abs().max())


def test_without_a_fold(tmp_path: Path):
    torch.jit.save(torch.jit.script(randomise(Own(), 0)), tmp_path / "own.pt")
    result = foldexport(tmp_path / "own.pt", "--to", "onnx,ts", "--no-fold", "--input-shape", "1x3x16x16", "--json")
    assert result.code == 0, result.err


def test_without_a_shape_it_is_asked_for(tmp_path: Path):
    torch.jit.save(torch.jit.script(randomise(Own(), 0)), tmp_path / "own.pt")
    result = foldexport(tmp_path / "own.pt", "--to", "onnx")
    assert result.code == 2 and "pass --input-shape" in result.message


@pytest.mark.parametrize("make", [torch.jit.script, lambda network: torch.jit.trace(network, torch.zeros(1, 3, 32, 32))],
                         ids=["scripted", "traced"])  # fmt: skip
def test_resnet18(make, tmp_path: Path):
    declare_missing()
    torchvision = pytest.importorskip("torchvision")
    network = randomise(torchvision.models.resnet18(num_classes=10), 0, example=torch.randn(2, 3, 32, 32))
    torch.jit.save(make(network), tmp_path / "net.pt")
    result = foldexport("inspect", tmp_path / "net.pt", "--input-shape", "1x3x32x32", "--json")
    assert result.code == 0, result.err
    assert result.document["certificate"]["ok"]
    operators = result.document["costs"]["after"]["operators"]
    assert (operators["conv"], operators["linear"], operators.get("batch_norm", 0)) == (20, 1, 0)

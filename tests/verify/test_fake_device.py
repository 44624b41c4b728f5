"""Every operator of a network on one device, told without it: PyTorch's fake tensors do not mix with those of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

import foldexport
from foldexport import device, interpret
from foldexport.fold.rebuild import in_dtype
from foldexport.recognise import recognise
from tests.statistics import randomise

CHECKPOINTS = sorted((Path(__file__).resolve().parents[2] / "models").glob("*.pth"))
IMAGE = (3, 16, 16)
#: A device that PyTorch knows and this machine lacks; a PyTorch without CUDA in it knows none but "lazy".
DEVICE = "cuda" if torch.backends.cuda.is_built() else "lazy"


class MakesItsOwn(nn.Module):
    """Positions made for the input's size, a mask of them and a constant that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.table = torch.linspace(0, 1, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        positions = torch.arange(y.shape[-1], device=y.device, dtype=y.dtype) + self.table
        y = y + torch.ones(y.shape[0], 1, 1, 1, device=y.device)  # of the batch, so that no fold makes it a constant
        mask = torch.ones(y.shape[-2], device=y.device).cumsum(0) > 3
        y = torch.where(mask[:, None], y, torch.zeros_like(y)) * positions
        return nn.functional.interpolate(y.relu(), scale_factor=2.0).mean((2, 3))


def networks() -> dict[str, nn.Module]:
    return {path.stem: recognise(path).module for path in CHECKPOINTS} | {"makes its own": randomise(MakesItsOwn().eval(), 0)}


@pytest.fixture(scope="module", params=[*(path.stem for path in CHECKPOINTS), "makes its own"])
def folded(request):
    module = networks()[request.param]
    size = IMAGE if request.param == "makes its own" else (3, 32, 32)
    return foldexport.fold(module, torch.zeros(1, *size))


def moved_and_run(mode: FakeTensorMode, module: nn.Module, image: torch.Size) -> list[Tensor]:
    moved = device.with_device(module, DEVICE)
    tensors = {name: each.detach() for name, each in (*moved.named_parameters(), *moved.named_buffers())}
    with mode:
        there = {name: mode.from_tensor(each).to(DEVICE) for name, each in tensors.items()}
        return pytree.tree_leaves(torch.func.functional_call(moved, there, (torch.empty(2, *image[1:], device=DEVICE),)))


def test_the_folded_module(folded):
    outputs = moved_and_run(FakeTensorMode(), in_dtype(folded.module, torch.float32), folded.example[0].shape)
    assert outputs and all(each.device.type == DEVICE for each in outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_training_graph(folded, dtype):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        image = mode.from_tensor(torch.zeros(2, *folded.example[0].shape[1:]))
        outputs = interpret.outputs(folded.graph, (image,), dtype, device=DEVICE)
    assert outputs and all(each.device.type == DEVICE and each.dtype == dtype for each in outputs)


def test_a_tensor_that_stays_behind_is_noticed():
    """Planted: a constant of the graph on the CPU."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.add, (x, graph.get_attr("constant"))))
    module = fx.GraphModule({"constant": torch.ones(3)}, graph)
    said = "two different devices|same device"
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(RuntimeError, match=said):
        module(mode.from_tensor(torch.ones(3, 3)).to(DEVICE))

"""Sizes that a folded graph reads stay free in the archive, and new tensors are made where the input is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import foldexport
from foldexport.errors import EquivalenceError, UsageError
from foldexport.exporters.torchscript import recording as torchscript_trace
from tests.statistics import randomise

EXAMPLE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def features(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class Shuffle(Stem):
    """Channel shuffle, as ShuffleNet writes it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        batch, channels, height, width = y.shape
        return y.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


class ClassToken(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1)


class Makes(Stem):
    """Tensors of the batch's size, made while running."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        noise_free = torch.ones(y.shape[0], 1, 1, 1, device=y.device, dtype=y.dtype) * x.mean()
        return y + noise_free + torch.arange(x.shape[0], device=x.device).to(y.dtype).view(-1, 1, 1, 1)


class Counts(Stem):
    """Arithmetic on sizes, and a slice that ends at one."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        pairs = torch.cat([y, y], 0)
        return pairs[: (x.shape[0] * 4) // 4].narrow(0, 0, x.shape[0]).reshape(x.shape[0], -1)


NETWORKS = [Shuffle, ClassToken, Makes, Counts]


def folded(network: type[Stem]) -> foldexport.Folded:
    return foldexport.fold(randomise(network(), seed=1, example=EXAMPLE), EXAMPLE)


def on_meta(path: Path) -> Tensor:
    """What the file gives on PyTorch's meta device, which TorchScript of PyTorch before 2.13 has no convolutions for."""
    try:
        return torch.jit.load(str(path), map_location="meta")(EXAMPLE.to("meta"))
    except NotImplementedError as error:
        pytest.skip(f"torch.jit of PyTorch {torch.__version__}: {str(error).splitlines()[-1][:80]}")


@pytest.mark.parametrize("network", NETWORKS, ids=lambda each: each.__name__)
def test_the_batch_stays_free(network, tmp_path):
    artifact = foldexport.export(folded(network), "torchscript", tmp_path / "net.torchscript.pt")
    assert set(artifact.comparison.batches) >= {1, 3}


@pytest.mark.parametrize("network", NETWORKS, ids=lambda each: each.__name__)
def test_without_the_readings_the_proof_fails(network, monkeypatch, tmp_path):
    monkeypatch.setattr(torchscript_trace, "sizes_recorded", lambda module: module)
    with pytest.raises(EquivalenceError):
        foldexport.export(folded(network), "torchscript", tmp_path / "net.torchscript.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("network", NETWORKS, ids=lambda each: each.__name__)
def test_every_tensor_is_made_where_the_input_is(network, tmp_path):
    """PyTorch's meta device stands for a GPU: its operators refuse tensors of another device as CUDA's do."""
    foldexport.export(folded(network), "torchscript", tmp_path / "net.torchscript.pt")
    assert on_meta(tmp_path / "net.torchscript.pt").device.type == "meta"


def test_a_device_that_is_fixed_is_seen_there(monkeypatch, tmp_path):
    monkeypatch.setattr(torchscript_trace, "devices_of_input", lambda traced: None)
    foldexport.export(folded(Makes), "torchscript", tmp_path / "net.torchscript.pt")
    with pytest.raises(RuntimeError, match="device"):
        on_meta(tmp_path / "net.torchscript.pt")


def test_a_graph_without_sizes_is_traced_as_it_is():
    module = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    assert torchscript_trace.sizes_recorded(module) is module


def test_an_operator_that_torch_has_no_function_for():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
    graph.output(graph.call_function(torch.ops.aten.fft_fft.default, (x, size)))
    with pytest.raises(UsageError, match="fft_fft"):
        torchscript_trace.sizes_recorded(torch.fx.GraphModule(nn.Module(), graph))

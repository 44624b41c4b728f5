"""Constants that LiteRT's converter stores in another form, or leaves out: faultless files pass, and one with a mistake fails."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import foldexport
from foldexport.errors import EquivalenceError
from foldexport.exporters.litert import batches as litert_batches
from foldexport.exporters.litert import file as litert_file
from foldexport.exporters.litert import rewrites as litert_rewrites
from foldexport.exporters.litert import units
from foldexport.exporters.litert.exporter import LiteRTExporter
from tests.exporters import formats
from tests.exporters.installed import need
from tests.statistics import randomise

X = (torch.zeros(1, 3, 10, 10),)


class Between(nn.Module):
    """A layer that nothing takes, between sines."""

    def __init__(self, layer: nn.Module, gamma: float | None = None, beta: float | None = None) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv2d(3, 8, 3), layer, nn.Conv2d(8, 4, 3, padding=1)
        self._values = gamma, beta

    def plain(self) -> nn.Module:
        randomise(self, 3)
        for name, value in zip(("weight", "bias"), self._values, strict=True):
            if value is not None:
                getattr(self.layer, name).data.fill_(value)
        if isinstance(self.layer, nn.BatchNorm2d):
            self.layer.running_mean.zero_()
            self.layer.running_var.fill_(1 - self.layer.eps)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.head(torch.sin(self.layer(torch.sin(self.stem(x))))))


class Pixels(nn.Module):
    """A layer norm over the channels of every pixel, and what reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.up, self.head = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        return self.head(torch.sin(self.up(y)).mean(1))


def _folded(network: nn.Module) -> foldexport.Folded:
    torch.manual_seed(0)
    return foldexport.fold(network, X, certify=False)


def _exported(folded: foldexport.Folded, folder: Path, **given):
    need("litert")
    return foldexport.export(folded, "litert", folder / "net.tflite", **given)


SPLATS = {
    "batch norm": lambda: Between(nn.BatchNorm2d(8), 0.375, 0.1875),
    "group norm": lambda: Between(nn.GroupNorm(2, 8), 0.375, 0.1875),
    "layer norm": lambda: Between(nn.LayerNorm([8, 8, 8]), 0.375, 0.1875),
    "local response norm": lambda: Between(nn.LocalResponseNorm(3, 0.1, 0.75, 2.0)),
}
UNITS = {
    "group norm": lambda: Between(nn.GroupNorm(2, 8), 1.0),
    "layer norm": lambda: Between(nn.LayerNorm([8, 8, 8]), None, 0.0),
    "instance norm": lambda: Between(nn.InstanceNorm2d(8, affine=True), 1.0, 0.0),
}


@pytest.mark.parametrize("kind", sorted(SPLATS))
def test_a_vector_that_is_stored_as_one_number_is_found(kind, tmp_path):
    made = _exported(_folded(SPLATS[kind]().plain()), tmp_path)
    assert made.comparison.ok and made.comparison.weights_identical == (6, 6)


def test_a_vector_that_is_stored_as_one_half_is_found(tmp_path):
    made = _exported(_folded(SPLATS["batch norm"]().plain()), tmp_path, precision="fp16")
    assert made.comparison.ok and made.comparison.weights_identical == (6, 6)


@pytest.mark.parametrize("kind, wrong", [("batch norm", "weight"), ("batch norm", "bias"), ("group norm", "weight")])
def test_a_wrong_number_in_place_of_a_vector_is_caught(kind, wrong, tmp_path, monkeypatch):
    """By one unit in the last place, which no output shows."""
    folded = _folded(SPLATS[kind]().plain())
    honest, value = LiteRTExporter.export, folded.module.state_dict()[f"layer.{wrong}"][0]

    def mistaken(self, module, example, path, options=None):
        notes = honest(self, module, example, path, options)
        formats.replace(Path(path), struct.pack("<f", value), struct.pack("<f", np.nextafter(np.float32(value), np.float32(9))))
        return notes

    monkeypatch.setattr(LiteRTExporter, "export", mistaken)
    with pytest.raises(EquivalenceError, match=rf"1 of 6 weights differ from the module's in their bits: layer\.{wrong};"):
        _exported(folded, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", sorted(UNITS))
def test_a_gamma_of_ones_and_a_beta_of_zeros_are_no_weights(kind, tmp_path):
    folded = _folded(UNITS[kind]().plain())
    plain, x = units.without_units(folded.module), torch.randn(2, 3, 10, 10)
    assert plain is not folded.module and torch.equal(plain(x), folded.module(x)) and units.without_units(plain) is plain
    assert _exported(folded, tmp_path).comparison.ok


def test_almost_ones_are_weights():
    norm = nn.GroupNorm(2, 8)
    norm.weight.data[3] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    norm.bias.data[1] = 1e-30
    assert units.without_units(norm) is norm


def test_a_bias_of_zeros_is_found_where_the_file_has_none_and_only_there(tmp_path):
    network, exporter = randomise(Pixels(), 3), need("litert")
    path = tmp_path / "net.tflite"
    network.head.bias.data.zero_()
    exporter.export(network, X, path)
    assert any(np.array_equal(each, np.zeros(5, np.float32)) for each in exporter.weights(path).values())
    network.head.bias.data[0] = 1e-30
    exporter.export(network, X, path)
    assert not any(np.array_equal(each, np.zeros(5, np.float32)) for each in exporter.weights(path).values())


def test_a_norm_is_not_multiplied_into_the_linear_layer_behind_it(tmp_path, monkeypatch):
    folded = _folded(randomise(Pixels(), 3))
    made = _exported(folded, tmp_path)
    assert made.comparison.ok and made.comparison.weights_identical == (8, 8)
    monkeypatch.setattr(litert_rewrites, "_behind_norms", lambda module: set())
    with pytest.raises(EquivalenceError, match=r"4 of 8 weights differ from the module's in their bits: .*norm\.weight"):
        _exported(folded, tmp_path, overwrite=True)


class Position(nn.Module):
    """An embedding of the columns, computed from their number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.register_buffer("periods", torch.rand(8) + 1)
        self.register_buffer("scale", torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        places = torch.ones(x.shape[0], x.shape[3]).cumsum(1)
        return self.head(x + torch.sin(places[:, :, None] / self.periods).transpose(1, 2)[:, :, None] * torch.sin(x * self.scale))


def test_numbers_that_only_constants_are_computed_from_are_no_weights(tmp_path):
    folded = _folded(randomise(Position(), 3))
    suited = LiteRTExporter().suited(folded.module)
    gone = set(folded.module.state_dict()) - set(suited.state_dict())
    assert gone and all(folded.module.state_dict()[name].numel() == 8 for name in gone), gone
    x = torch.randn(2, 3, 10, 10)
    assert torch.equal(suited(x), folded.module(x)) and "scale" in " ".join(suited.state_dict())
    assert _exported(folded, tmp_path).comparison.ok


class Split(nn.Module):
    """Halves of the channels that go different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, y = torch.relu(self.stem(x)).split(4, 1)
        return self.head(torch.cat([torch.sin(self.one(x)), torch.sin(y)], 1))


def test_a_split_takes_every_batch(tmp_path):
    made = _exported(_folded(randomise(Split(), 3)), tmp_path)
    assert made.notes["batch"] == "free" and made.comparison.ok and {1, 3} <= set(made.comparison.batches)
    content = made.path.read_bytes()
    model = litert_file.read(made.path)
    for tensor in model.subgraphs[0].tensors:
        data = model.buffers[tensor.buffer].data
        if data is not None and len(data) >= 64:
            assert content.index(np.asarray(data, np.uint8).tobytes()) % litert_batches.ALIGNMENT == 0


def test_a_slice_that_stays_fixed_keeps_the_batch(tmp_path, monkeypatch):
    """Where a file is not freed, it is found out, and is as the converter wrote it."""
    monkeypatch.setattr(litert_batches, "_freed", lambda model, graph, operator: False)
    made = _exported(_folded(randomise(Split(), 3)), tmp_path)
    assert made.notes["batch"] == 1 and "computes something else" in made.notes["fixed"] and made.comparison.ok

"""Weights that LiteRT, ExecuTorch and ncnn write in a form of their own: faultless files pass, and one with a mistake fails."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import foldexport
from foldexport import exporters
from foldexport.errors import EquivalenceError, UsageError
from foldexport.exporters import scales
from foldexport.exporters.litert import rewrites as litert_rewrites
from foldexport.exporters.ncnn import file as ncnn_file
from foldexport.exporters.ncnn.exporter import NcnnExporter
from foldexport.exporters.weights import expected_weights
from foldexport.exporters.widened import widened
from foldexport.precision.half import PlainHalf
from tests.exporters import formats
from tests.exporters.installed import need
from tests.statistics import randomise

X = (torch.zeros(1, 3, 10, 10),)


class Gate(nn.Module):
    """A squeeze-and-excitation gate; hard sigmoids in front of a convolution and behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.squeeze, self.pool = nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1)
        self.next = nn.Conv2d(8, 8, 3)
        self.head, self.gate = nn.Linear(8, 5), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = x * self.gate(self.squeeze(self.pool(x)))
        return self.gate(self.head(self.next(self.gate(x)).mean((2, 3))))


class Scaled(nn.Module):
    """A batch norm that no layer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.conv(x)))


class Signs(Scaled):
    """A batch norm of both signs behind a ReLU: its fold leaves a clamp with bounds of both kinds."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.norm(torch.relu(self.conv(x))))


class Mixer(nn.Module):
    """A block of ConvNeXt: its norm and its linear layers are over the channels of every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm = nn.Conv2d(3, 6, 7, padding=3, groups=3), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6)
        self.scale, self.head = nn.Parameter(torch.rand(6)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        y = self.down(nn.functional.gelu(self.up(self.norm(x.permute(0, 2, 3, 1)))))
        return self.head((x + (self.scale * y).permute(0, 3, 1, 2)).mean((2, 3)))


def _folded(network: type[nn.Module]) -> foldexport.Folded:
    torch.manual_seed(0)
    return foldexport.fold(randomise(network(), 3), X, certify=False)


def _exported(name: str, folded: foldexport.Folded, folder: Path, **given):
    need(name)
    return foldexport.export(folded, name, folder / f"net{exporters.get(name).suffix}", **given)


def _require_caught(name: str, folded: foldexport.Folded, folder: Path, monkeypatch, wrong: str, change) -> None:
    """An exporter that writes one value of the tensor ``wrong`` otherwise is found out, and the tensor is named."""
    kind, row = type(need(name)), exporters.get(name)
    honest, value = kind.export, folded.module.state_dict()[wrong].reshape(-1)
    value = value[:1] if change is _nudged else value  # kernels lie in other orders

    def mistaken(self, module, example, path, options=None):
        notes = honest(self, module, example, path, options)
        formats.replace(next(iter(row.beside(path)), Path(path)), _bytes(value), _bytes(change(value.clone())))
        return notes

    monkeypatch.setattr(kind, "export", mistaken)
    with pytest.raises(EquivalenceError, match=wrong.replace(".", r"\.")):
        _exported(name, folded, folder)
    assert not list(folder.iterdir())


def _bytes(value: Tensor) -> bytes:
    return value.numpy(force=True).astype("<f4").tobytes()


def _nudged(value: Tensor) -> Tensor:
    value[0] = torch.nextafter(value[0], torch.tensor(torch.inf))
    return value


@pytest.mark.parametrize("name", ("litert", "ncnn", "executorch"))
def test_hard_sigmoids_leave_the_weights_around_them_alone(name, tmp_path):
    made = _exported(name, _folded(Gate), tmp_path)
    assert made.comparison.ok and made.comparison.weights_identical == (8, 8)


@pytest.mark.parametrize("wrong", ("squeeze.bias", "head.bias", "next.weight"))
def test_a_wrong_weight_beside_a_hard_sigmoid_is_caught(wrong, tmp_path, monkeypatch):
    _require_caught("litert", _folded(Gate), tmp_path, monkeypatch, wrong, _nudged)


def test_the_closed_hard_sigmoid_is_the_same_function():
    x = torch.cat([torch.linspace(-9, 9, 10001), torch.tensor([-3.0, 3.0, 0.0, 1e30, -1e30, torch.inf, -torch.inf])])
    assert torch.allclose(litert_rewrites.Hardsigmoid()(x), nn.Hardsigmoid()(x), rtol=0, atol=2.0**-23)
    assert isinstance(litert_rewrites.closed(nn.Sequential(nn.Sequential(nn.Hardsigmoid())))[0][0], litert_rewrites.Hardsigmoid)


@pytest.mark.parametrize("name", ("litert", "executorch"))
def test_a_batch_norm_that_stays_is_held_by_what_it_computes(name, tmp_path):
    folded = _folded(Scaled)
    assert "norm.running_var" in folded.module.state_dict()
    made = _exported(name, folded, tmp_path)
    assert made.comparison.ok and made.comparison.weights_identical == (4, 4)
    made = _exported(name, folded, tmp_path, precision="fp16", overwrite=True)
    assert made.comparison.ok and made.comparison.weights_identical == (4, 4)


@pytest.mark.parametrize("name", ("litert", "executorch"))
def test_a_wrong_shift_of_a_batch_norm_that_stays_is_caught(name, tmp_path, monkeypatch):
    _require_caught(name, _folded(Scaled), tmp_path, monkeypatch, "norm.bias", _nudged)


def test_statistics_that_say_something_are_weights():
    norm = nn.Sequential(nn.BatchNorm2d(4, eps=2.0**-17)).eval()
    norm[0].running_var.fill_(1 - 2.0**-17)
    plain = scales.without_statistics(norm)
    assert set(expected_weights(plain)) == {"0.weight", "0.bias"} and isinstance(plain[0], nn.BatchNorm2d)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(plain(x), norm(x)) and plain.double()(x.double()).dtype == torch.float64
    norm[0].running_mean[1] = 1e-30
    assert scales.without_statistics(norm) is norm


@pytest.mark.parametrize("name", ("litert", "ncnn"))
def test_bounds_of_each_channel_that_are_none(name, tmp_path):
    made = _exported(name, _folded(Signs), tmp_path)
    assert made.comparison.ok and made.comparison.weights_identical == (4, 4)


@pytest.mark.parametrize("name", ("litert", "ncnn"))
def test_a_wrong_bound_is_caught(name, tmp_path, monkeypatch):
    folded = _folded(Signs)
    (wrong,) = (each for each in folded.module.state_dict() if each.endswith("_lower"))

    def changed(value: Tensor) -> Tensor:
        value[torch.isfinite(value)] += 1e-6
        return value

    if name == "litert":  # which writes infinite bounds as float32's last numbers
        value = folded.module.state_dict()[wrong].reshape(-1)
        monkeypatch.setattr(f"{__name__}._bytes", lambda value: value.numpy().clip(*_ends()).astype("<f4").tobytes())
        assert not torch.isfinite(value).all()
    _require_caught(name, folded, tmp_path, monkeypatch, wrong, changed)


def _ends() -> tuple[np.float32, np.float32]:
    return np.finfo(np.float32).min, np.finfo(np.float32).max


@pytest.mark.parametrize("precision", ("fp32", "fp16"))
def test_ncnn_linear_layers_over_pixels_are_read(precision, tmp_path):
    made = _exported("ncnn", _folded(Mixer), tmp_path, precision=precision)
    assert made.comparison.ok and len(set(made.comparison.weights_identical)) == 1
    kinds = {each.kind for each in ncnn_file.layers(made.path)}
    assert "Gemm" in kinds, kinds


@pytest.mark.parametrize("wrong", ("up.weight", "down.bias"))
def test_ncnn_a_wrong_linear_layer_over_pixels_is_caught(wrong, tmp_path, monkeypatch):
    _require_caught("ncnn", _folded(Mixer), tmp_path, monkeypatch, wrong, _nudged)


def test_ncnn_refuses_weights_in_an_order_of_their_own(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    with pytest.raises(UsageError, match="ncnn: keeps the weights of its LSTM in an order that cannot be compared: export to onnx"):
        need("ncnn").export(Recurrent().eval(), (torch.zeros(1, 5, 4),), tmp_path / "net.ncnn.param")
    assert not list(tmp_path.iterdir())


def test_ncnn_names_a_layer_whose_weights_are_not_read(tmp_path):
    param, binary = tmp_path / "net.ncnn.param", tmp_path / "net.ncnn.bin"
    param.write_text("7767517\n1 2\nGRU recurrent 1 1 in0 out0 0=4 1=48\n")
    binary.write_bytes(struct.pack("<f", 1.0))
    with pytest.raises(ncnn_file.Unreadable, match="the weights of a GRU, recurrent, cannot be read"):
        ncnn_file.blobs(param, binary)


def test_an_unfolded_half_module_widened_runs_in_float32():
    plain = PlainHalf(formats.Skip().eval(), torch.float16, torch.float32, 1)
    wide = widened(plain)
    seen = []
    wide.network.stem[0].register_forward_hook(lambda layer, given, made: seen.append(made.dtype))
    wide(formats.EXAMPLE[0])
    assert seen == [torch.float32] and next(plain.parameters()).dtype == torch.float16


class Slope(nn.Module):
    """PReLUs with one slope for all channels: behind a convolution, and by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fused, self.alone = nn.Conv2d(3, 8, 3), nn.PReLU(), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.alone(torch.sin(self.fused(self.conv(x))))


def test_ncnn_slopes_in_the_graph_are_weights(tmp_path, monkeypatch):
    folded = _folded(Slope)
    made = _exported("ncnn", folded, tmp_path)
    assert made.comparison.ok and made.comparison.weights_identical == (4, 4)
    honest = NcnnExporter.weights
    monkeypatch.setattr(
        NcnnExporter, "weights",
        lambda self, path: {name: np.nextafter(value, np.float32(9)) if "slope" in name else value
                            for name, value in honest(self, path).items()},
    )  # fmt: skip
    with pytest.raises(EquivalenceError, match="2 of 4 weights differ from the module's in their bits: fused.weight, alone.weight"):
        _exported("ncnn", folded, tmp_path, overwrite=True)


def test_ncnn_names_the_functions_that_it_lacks(tmp_path):
    class Threshold(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.threshold(x, 0.1, 0.5)

    with pytest.raises(UsageError, match="ncnn: has no F.threshold: export to onnx"):
        need("ncnn").export(Threshold().eval(), X, tmp_path / "net.ncnn.param")

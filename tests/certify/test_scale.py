"""The proof of networks that are large in weights or in images: what is kept alive, and what is run at which size."""

from __future__ import annotations

import importlib
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import foldexport
from foldexport import bands, probes
from foldexport.certify import certify
from foldexport.fold.passes import fold_graph
from foldexport.fold.rebuild import rebuild
from foldexport.fold.wishes import MAX_SIGMA
from foldexport.probes import is_huge, make
from foldexport.trace import trace
from tests.fold.checks import inputs
from tests.hand_folds import copy_of, run
from tests.statistics import randomise

rounding = importlib.import_module("foldexport.certify.rounding")  # the package has a function of this name
WIDTH, SIZE = 4, 16
FULL = WIDTH * SIZE * SIZE  # elements of one full-size map of the U-Net


def pair(channels_in: int, channels_out: int) -> nn.Sequential:
    layers = [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU()]
    layers += [nn.Conv2d(channels_out, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Two levels, and ``further`` convolutions at full size behind them."""

    def __init__(self, further: int = 0):
        super().__init__()
        self.down1, self.down2, self.up = pair(3, WIDTH), pair(WIDTH, WIDTH), nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2)
        self.join, self.out = pair(2 * WIDTH, WIDTH), nn.Conv2d(WIDTH, 2, 1)
        self.further = nn.Sequential(*[pair(WIDTH, WIDTH) for _ in range(further)])

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        up = self.up(self.down2(F.max_pool2d(first, 2)))
        return self.out(self.further(self.join(torch.cat([first, up], 1))))


class Alive(TorchDispatchMode):
    """Bytes of the storages of ``least`` bytes or more that are alive at once, at most."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.peak, self._least = 0, least
        self._storages: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= self._least:
                storage = value.untyped_storage()
                self._storages[storage.data_ptr()] = (weakref.ref(value), storage.nbytes())
        alive = {key: size for key, (value, size) in self._storages.items() if value() is not None}
        self.peak = max(self.peak, sum(alive.values()))
        return result


@pytest.mark.parametrize("further", [0, 6])
def test_maps_of_the_users_size_are_dropped_behind_their_last_reader(further):
    """Twelve maps of full size at most, whatever the depth: a skip connection, its concatenation, both networks' results."""
    graph = trace(randomise(UNet(further), 0), torch.zeros(1, 3, SIZE, SIZE))
    program = rebuild(fold_graph(graph, MAX_SIGMA)).program
    with Alive(8 * FULL) as alive:
        assert certify(graph, program, make(graph)[1:2]).ok
    assert 4 * 8 * FULL <= alive.peak <= 12 * 8 * FULL


def test_columns_of_convolutions_do_not_grow_with_the_image(monkeypatch):
    seen: list[int] = []
    plain = F.conv2d

    def counted(value, weight, *rest):
        seen.append(value.shape[0] * weight[0].numel() * value.shape[2] * value.shape[3] * 8)
        return plain(value, weight, *rest)

    graph = trace(randomise(UNet(), 0), torch.zeros(1, 3, 64, 64))
    program = rebuild(fold_graph(graph, MAX_SIGMA)).program
    monkeypatch.setattr(bands, "COLUMN_BYTES", 2**17)
    monkeypatch.setattr(bands.F, "conv2d", counted)
    assert certify(graph, program, make(graph)[1:2]).ok
    assert len(seen) > 40 and max(seen) <= 2 * 2**17  # the band, and the rows beside it that it reads


@pytest.fixture
def huge(monkeypatch):
    """Samples above 3·40·40 elements count as huge."""
    monkeypatch.setattr(probes, "LARGE_SAMPLE", 3 * 20 * 20)
    monkeypatch.setattr(probes, "HUGE_SAMPLE", 3 * 40 * 40)
    monkeypatch.setattr(probes, "_other_size", lambda example, large, huge: (16, 24) if huge else (36, 40))


def test_huge_inputs_are_proved_once_at_their_size_and_for_the_rest_smaller(huge):
    module, image = randomise(UNet(), 0), torch.zeros(1, 3, 64, 64)
    folded = foldexport.fold(module, image)
    certificate = folded.certificate
    assert is_huge(folded.graph) and certificate.ok and certificate.trace == ""
    assert dict(certificate.probes) == {
        "normal": [[1, 3, 64, 64]], "second size": [[3, 3, 16, 24]], "uniform": [[1, 3, 16, 24]],
        "constant": [[1, 3, 16, 24]], "impulse": [[1, 3, 16, 24]],
    }  # fmt: skip
    assert certificate.reduced == ["uniform", "constant", "impulse"]
    assert "normal at 1x3x64x64, uniform and constant and impulse at 1x3x16x24" in certificate.summary()
    assert certificate.to_dict()["reduced"] == certificate.reduced
    assert certificate.rounding.samples == probes.HUGE_NOISE_SAMPLES


def test_a_network_of_one_size_is_proved_at_that_on_every_probe(huge):
    module = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64, 5))
    certificate = foldexport.fold(randomise(module, 0), torch.zeros(1, 3, 64, 64)).certificate
    assert certificate.ok and certificate.reduced == [] and certificate.sizes == ""
    assert {name for name, _ in certificate.skipped} == {"second size"}
    assert dict(certificate.probes) == {name: [[1, 3, 64, 64]] for name in ("normal", "uniform", "constant", "impulse")}


def test_a_mistake_that_only_the_users_size_shows_is_caught(huge):
    """The planted mistake: a crop of the folded network holds for maps up to 24 wide."""

    class Cropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)[:, :, :48, :48]

    graph = trace(randomise(Cropped(), 0), torch.zeros(1, 3, 64, 64))
    program = copy_of(graph)
    assert run(graph, program).ok
    (node,) = [node for node in program.module.graph.nodes if "slice" in node.name and node.args[3] == 48][-1:]
    node.args = (*node.args[:3], 47)
    program.module.recompile()
    failures = run(graph, program).failures
    assert {finding.probe for finding in failures} == {"normal"}


def test_artifacts_are_compared_at_the_users_size(huge, tmp_path):
    folded = foldexport.fold(randomise(UNet(), 0), torch.zeros(1, 3, 64, 64))
    comparison = foldexport.export(folded, "torchscript", tmp_path / "net.pt").comparison
    assert comparison.ok and comparison.batches == (1, 2)


def test_large_weights_are_cast_layer_by_layer(monkeypatch):
    """Float32 noise is the same number, and no whole copy of the network is alive."""
    module = randomise(nn.Sequential(*[nn.Linear(64, 64) for _ in range(12)], nn.BatchNorm1d(64)), 0)
    (example,) = inputs([(64,)], batch=2, dtype=torch.float32)
    wanted = foldexport.fold(module, example).certificate.rounding
    monkeypatch.setattr(rounding, "COPIED_BYTES", 0)
    monkeypatch.setattr(rounding, "_rounded", None)
    found = foldexport.fold(module, example).certificate.rounding
    assert found.multiples == wanted.multiples and found.levels == wanted.levels

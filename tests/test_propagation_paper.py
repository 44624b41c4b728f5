"""What Civitelli et al. 2021 say of gradients at initialisation, measured on our own networks."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from foldexport import propagation
from foldexport.propagation import SUM, Propagation, Signal
from foldexport.trace import trace
from foldexport.zoo.nfresnet import INITIALISATIONS, RELU_GAIN, NFResNet, StandardizedConv2d, nfresnet


def wanted_variance(name: str, layer: nn.Conv2d, init: str) -> float:
    """As the docstring of `initialise` says it."""
    k2, shortcut = layer.kernel_size[0] * layer.kernel_size[1], name.endswith("shortcut")
    if init == "brock":
        return (1 if shortcut or name == "conv1" else 2 / (1 - 1 / math.pi)) / (k2 * layer.in_channels)
    stride2 = layer.stride[0] * layer.stride[1] if init == "backward" else 1
    return (1 if shortcut else 2) * stride2 / (k2 * layer.out_channels)


@pytest.mark.parametrize("scheme", ["idshort", "convshort"])
@pytest.mark.parametrize("init", INITIALISATIONS)
def test_initial_weights_have_exactly_the_variance_asked_for(init, scheme):
    network = nfresnet(50, scheme, width=4, init=init, stem="imagenet")
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            filters = layer.weight.detach().double().flatten(1)
            parts = filters if init == "brock" else filters.flatten()[None]
            assert float(parts.mean(1).abs().amax()) < 1e-6
            assert parts.var(1, correction=0).numpy() == pytest.approx(wanted_variance(name, layer, init), rel=1e-5)
            assert not layer.bias.any()
    assert pytest.approx(2 / (1 - 1 / math.pi)) == RELU_GAIN**2


def test_standardised_filters_keep_the_variance_of_activations():
    network: NFResNet = nfresnet(50, "nf", width=8)
    assert all(isinstance(layer, StandardizedConv2d) for layer in network.modules() if isinstance(layer, nn.Conv2d))
    found = propagation.measure(trace(network.eval(), torch.randn(2, 3, 32, 32)))
    assert all(0.5 < value < 2 for value in found.training.activation)


# ---- what the paper says of it


@pytest.fixture(scope="module")
def script():
    """benchmarks/propagation.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
        yield importlib.import_module("propagation")


def curve(script, scheme: str, init: str, wanted: str):
    """Two seeds of a quarter of the width: what holds at 8 holds at 64."""
    return script.measured(script.Curve(scheme, scheme, init, wanted, width=8, seeds=2))


@pytest.mark.parametrize("scheme", ["idshort", "learnscalar", "convshort"])
def test_gradients_keep_their_variance_over_fifty_layers(script, scheme):
    row = curve(script, scheme, "backward", "flat")
    assert row.passes and max(row.spread) < 10 and abs(row.slope) < 0.05


def test_gradients_of_the_compared_initialisation_grow_more_than_a_hundredfold(script):
    row = curve(script, "idshort", "brock", "grown")
    assert row.passes and min(row.growth) > 100 and row.slope > 0.2
    assert all(0.3 < value < 3 for each in row.found for value in each.training.activation)
    assert not replace(row, curve=replace(row.curve, wanted="flat")).passes


def test_a_stride_that_is_not_counted_is_seen(script):
    row = curve(script, "idshort", "fan_out", "flat")
    assert not row.passes and min(row.spread) > 64


def test_every_row_has_a_verdict(script):
    flat = Propagation(SUM, ["a", "b"], 32, Signal([1.0, 1.0], [2.0, 1.0]))
    grown = replace(flat, training=Signal([1.0, 1.0], [200.0, 1.0]))
    rows = [script.Row(script.CURVES[0], [flat]), script.Row(script.CURVES[3], [grown, flat]), script.Row(script.BESIDE[0], [flat])]
    assert [row.passes for row in rows] == [True, False, None]
    assert rows[1].slope == pytest.approx(math.log10(101))
    found = script.document(rows, 50, "2000-01-01")
    text = script.page(rows, found)
    assert [line.split("|")[-2].strip() for line in text.splitlines() if line.startswith("| ")][1:] == ["PASS", "FAIL", ""]
    assert found["rows"][1]["growth"] == [200.0, 2.0] and str(Path.home()) not in text


def test_script_draws_and_fails_where_a_curve_does(script, tmp_path, capsys):
    with pytest.raises(SystemExit, match="a curve is not what the paper says"):  # eighteen layers do not grow a hundredfold
        script.main(["--quick", "--depth", "18", "--seeds", "1", "--width", "2", "--pictures", str(tmp_path / "new")])
    assert sorted(each.name for each in (tmp_path / "new").iterdir()) == ["propagation.png", "propagation_folded.png"]
    assert "| IdShort, Brock's initialisation |" in capsys.readouterr().out

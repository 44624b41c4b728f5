"""Convolutions in bands of rows: the same sums, whatever the geometry, and columns of one band at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from foldexport import bands
from foldexport.interpret import outputs
from foldexport.trace import trace


@st.composite
def geometries(draw):
    """(input, weight, bias, arguments of conv2d)."""
    numbers = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))  # noqa: E731
    groups, kernel, dilation, stride = draw(st.sampled_from([1, 2])), numbers(1, 3), numbers(1, 2), numbers(1, 3)
    padding = numbers(0, 3) if max(stride) > 1 else draw(st.sampled_from([(0, 0), (1, 2), (3, 1), "same", "valid"]))
    channels = (draw(st.integers(1, 2)) * groups, draw(st.integers(1, 2)) * groups)
    sizes = numbers(5, 11)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    bias = random(channels[1]) if draw(st.booleans()) else None
    arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return random(2, channels[0], *sizes), random(channels[1], channels[0] // groups, *kernel), bias, arguments


@settings(max_examples=120, deadline=None)
@given(geometries(), st.integers(1, 4000))
def test_equals_one_convolution(case, column_bytes):
    value, weight, bias, arguments = case
    before, bands.COLUMN_BYTES = bands.COLUMN_BYTES, column_bytes
    try:
        found = bands.conv2d(value, weight, bias, **arguments)
    finally:
        bands.COLUMN_BYTES = before
    wanted = F.conv2d(value, weight, bias, **arguments)
    if found is not None:
        assert found.shape == wanted.shape
        assert float((found - wanted).abs().max()) <= 1e-13 * float(wanted.abs().max().clamp_min(1.0))


@pytest.mark.parametrize("padding", [1, "same"], ids=str)
def test_both_networks_run_in_bands(padding, monkeypatch):
    """Operators of the training graph, and the folded network's layers: no call sees more than a band."""
    rows = []
    plain = F.conv2d

    def seen(value, *rest):
        rows.append(value.shape[2])
        return plain(value, *rest)

    module = nn.Conv2d(3, 4, 3, padding=padding).double().eval()
    value = torch.randn(2, 3, 32, 16, dtype=torch.float64)
    graph, wanted = trace(module, value), module(value)
    monkeypatch.setattr(bands, "COLUMN_BYTES", 4 * 2 * 27 * 16 * 8)  # of four rows
    monkeypatch.setattr(bands.F, "conv2d", seen)
    (found,) = outputs(graph, value)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-13) and rows == [6] * 8
    assert torch.equal(bands.layer(module, value), found) and rows == [6] * 16


def test_what_bands_are_not_for():
    module, value = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    assert bands.layer(module, value) is None  # float32 has kernels of its own
    assert bands.layer(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect").double(), value.double()) is None
    assert bands.layer(nn.ReLU(), value.double()) is None

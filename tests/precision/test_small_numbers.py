"""Numbers that float16 does not hold, and sums inside of operators: kept in float32, with those that read them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import foldexport
from foldexport.api import in_precision
from foldexport.precision import prepare as prepared
from foldexport.precision import ranges

QUOTIENTS = {
    "normalize": lambda y: F.normalize(y, dim=1),
    "sum": lambda y: y / (y.abs().sum(1, keepdim=True) + 1e-8),
    "clamp": lambda y: y / y.abs().amax(1, keepdim=True).clamp(min=1e-10),
    "root": lambda y: y / torch.sqrt(y.pow(2).mean(1, keepdim=True) + 1e-16),
    "logarithm": lambda y: torch.log(y.abs() + 1e-8),
    "constant": lambda y: y / torch.maximum(y.abs().sum(1, keepdim=True), torch.tensor(1e-9)),
}


class Between(nn.Module):
    """A convolution without bias, ``inside``, and another one."""

    def __init__(self, inside, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.last, self.inside = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 1), inside
        with torch.no_grad():
            self.first.weight.mul_(scale)

    def forward(self, x):
        return self.last(self.inside(self.first(x))).mean((2, 3))


def made(inside, scale: float = 1.0):
    torch.manual_seed(0)
    return foldexport.fold(Between(inside, scale).eval(), torch.randn(2, 3, 12, 12))


@pytest.mark.parametrize("name", QUOTIENTS)
def test_a_black_border_is_finite(name, monkeypatch):
    found, x = made(QUOTIENTS[name]), torch.randn(2, 3, 12, 12)
    x[:, :, :5] = 0
    held = in_precision(found, "fp16")
    assert held.report.single and held.report.layers == (2, 2) and any("constant" in each for each in held.report.single.values())
    with torch.no_grad():
        wanted, y = found.module(x), held.module(x)
        assert float((y - wanted).abs().max() / wanted.abs().max()) < 0.01
        monkeypatch.setattr(ranges, "_numbers", lambda *_: [])  # planted: numbers are not looked at
        monkeypatch.setattr(prepared, "_single", lambda module, found, real: {})
        assert not in_precision(found, "fp16").module(x).isfinite().all()


def test_numbers_that_the_type_holds_are_left():
    held = in_precision(made(lambda y: (y.relu() + 1.5).clamp(0.25, 1e30) * 2 - 1e-3), "fp16")
    assert not held.report.single


def test_a_factor_that_the_type_does_not_hold_stays_in_float32():
    held = in_precision(made(lambda y: F.silu(F.softplus(y) * 3e-7), scale=1e3), "fp16")
    assert any("vanishes" in each for each in held.report.single.values()), held.report.single


@pytest.mark.parametrize(("scale", "problem"), [(600.0, "overflows"), (1e-3, "vanishes")])
def test_the_sum_inside_of_a_norm(scale, problem):
    """Planted in the network: values that fit, and whose squares do not."""
    held = in_precision(made(lambda y: y / (torch.linalg.vector_norm(y, dim=(2, 3), keepdim=True) + 0.5), scale), "fp16")
    (name,) = [name for name, why in held.report.single.items() if f"sum of squares {problem}" in why]
    assert "norm" in name and held.report.layers == (2, 2)
    plain = in_precision(made(lambda y: y / (torch.linalg.vector_norm(y, dim=(2, 3), keepdim=True) + 0.5)), "fp16")
    assert not plain.report.single

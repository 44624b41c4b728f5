"""Without samples ranges hold for pixels from 0 to 255 too where nothing says what is read, or it is said that they do not."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import foldexport
from foldexport.api import in_precision
from foldexport.precision.prepare import prepare
from foldexport.precision.types import HALF
from foldexport.report import precision


class Pixels(nn.Module):
    """Normal numbers give hundreds, pixels hundreds of thousands; ``pinned``: behind a softplus, whose scale is not free."""

    def __init__(self, *, pinned: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.between = F.softplus if pinned else F.relu
        with torch.no_grad():
            self.second.weight.mul_(3000)
            self.last.weight.mul_(1e-2)

    def forward(self, x):
        return self.last(self.between(self.second(self.between(self.first(x))))).mean((2, 3))


def fold(**options):
    torch.manual_seed(0)
    return foldexport.fold(Pixels(**options).eval(), torch.randn(2, 3, 8, 8))


def on_pixels(held) -> bool:
    with torch.no_grad():
        return bool(held.module(torch.rand(4, 3, 8, 8) * 255).isfinite().all())


def test_free_scales_hold_pixels_too():
    found = fold()
    held = in_precision(found, "fp16")
    assert on_pixels(held) and held.report.rescaled and not held.report.single and not held.report.notes
    assert held.report.measured_on == ["normal numbers", "pixels from 0 to 255"] and held.report.headroom > 4
    assert any("ranges measured on normal numbers and pixels" in each for each in precision.said(held.to_dict()).parts)
    narrow = prepare(found.graph, found.refold(), HALF["fp16"], known_range=True)  # planted: it is said that images are normalised
    assert not on_pixels(narrow) and narrow.report.measured_on == ["normal numbers"]


def test_what_cannot_be_held_is_said():
    held = in_precision(fold(pinned=True), "fp16")
    assert not held.report.single and "pass --data" in held.report.notes[0] and "'second'" in held.report.notes[0]
    assert precision.said(held.to_dict()).notes == held.report.notes
    data = [torch.rand(8, 3, 8, 8).numpy() * 255]
    given = in_precision(fold(pinned=True), "fp16", data=data)
    assert "second" in given.report.single and on_pixels(given) and given.report.measured_on == ["your data"]


def test_weights_that_mostly_stay_in_float32_are_said():
    found = foldexport.fold(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 64, 3)).eval(), torch.randn(1, 3, 8, 8))
    held = in_precision(found, "fp16", keep_fp32=["2"])
    assert "only 1% of the weights are in float16, 1 of 2 layers" in held.report.notes[0]
    assert not in_precision(found, "fp16", keep_fp32=["0"]).report.notes

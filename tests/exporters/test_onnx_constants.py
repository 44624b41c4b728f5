"""Numbers near 0 and 1 are in the ONNX file."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import foldexport
from foldexport.errors import EquivalenceError
from foldexport.exporters.onnx import constants as onnx_constants


class Small(nn.Module):
    """``x / (Σ|x| + ε)`` times a number near 1, without a bias: 0 where the image is black."""

    def __init__(self, near_one: float = 1.0) -> None:
        super().__init__()
        self.first, self.last, self.near_one = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 1), near_one

    def forward(self, x):
        y = self.first(x)
        return self.last(y.relu() / (y.abs().sum(1, keepdim=True) + 1e-8) * self.near_one).mean((2, 3))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_black_image_is_no_quotient_of_zeros(precision, tmp_path, monkeypatch):
    torch.manual_seed(0)
    found = foldexport.fold(Small().eval(), torch.randn(2, 3, 8, 8))
    made = foldexport.export(found, "onnx", tmp_path / "net.onnx", precision=precision)
    assert made.comparison.ok and "Add" in [node.op_type for node in onnx.load(str(made.path)).graph.node]
    monkeypatch.setattr(onnx_constants, "kept", lambda module, example: module)  # planted: the optimiser as it is
    with pytest.raises(EquivalenceError, match="error inf"):
        foldexport.export(found, "onnx", tmp_path / "other.onnx", precision=precision)


def test_what_is_exact_stays_as_it_is():
    module = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    assert onnx_constants.kept(module, (torch.zeros(1, 3, 4, 4),)) is module
    near = torch.fx.symbolic_trace(Small(1.0 + 2e-6))
    changed, x = onnx_constants.kept(near, (torch.ones(1, 3, 4, 4),)), torch.randn(2, 3, 6, 6)
    assert sorted(len(each) for name, each in changed.named_buffers()) == [1, 1]
    with torch.no_grad():
        np.testing.assert_array_equal(changed(x).numpy(), near(x).numpy())

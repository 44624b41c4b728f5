"""In-place code against eager: the functional graph computes the same bits, at batch 1 and 3 from one trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foldexport import interpret
from foldexport.errors import TraceError
from foldexport.trace import packet_name, trace
from tests import inplace
from tests.eager import Function, assert_functional, assert_same_as_eager, operators
from tests.statistics import randomise


@pytest.mark.parametrize("function", inplace.CASES, ids=lambda f: f.__name__)
def test_functional_form_equals_eager(function):
    assert_same_as_eager(Function(function).eval(), torch.randn(2, 4, 4, 4))


# ---- networks


class BorderPad(nn.Module):
    """Batch norm, then padding with what the batch norm makes of zero, written into the border (DiverseBranchBlock)."""

    def __init__(self, channels: int, pad: int):
        super().__init__()
        self.conv, self.bn, self.pad = nn.Conv2d(3, channels, 1, bias=False), nn.BatchNorm2d(channels), pad

    def forward(self, x):
        out = self.bn(self.conv(x))
        bn, pad = self.bn, self.pad
        values = bn.bias.detach() - bn.running_mean * bn.weight.detach() / torch.sqrt(bn.running_var + bn.eps)
        out = F.pad(out, [pad] * 4)
        values = values.view(1, -1, 1, 1)
        out[:, :, 0:pad, :] = values
        out[:, :, -pad:, :] = values
        out[:, :, :, 0:pad] = values
        out[:, :, :, -pad:] = values
        return out


def test_border_padding_is_four_slice_scatters():
    graph = assert_same_as_eager(randomise(BorderPad(5, 1), 0), torch.randn(2, 3, 6, 6))
    count = operators(graph)
    assert count["slice_scatter"] == 4 and count["slice"] == 0 and count["copy"] == 0


def test_sliced_product_reads_and_writes_its_slice_once():
    count = operators(trace(Function(inplace.sliced_product).eval(), torch.randn(2, 4, 4, 4)))
    assert count["slice"] == 1 and count["mul"] == 1 and count["slice_scatter"] == 1


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("scale", torch.ones(1, 4, 1, 1), persistent=False)
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        self.calls += 1
        self.scale.mul_(2)
        return self.conv(x) * self.scale


def test_written_buffers_keep_their_values():
    module = Counting().eval()
    x = torch.randn(2, 4, 3, 3)
    graph = trace(module, x)
    assert_functional(graph)
    found = interpret.outputs(graph, x, None)[0]
    assert module.calls.item() == 0 and torch.equal(module.scale, torch.ones(1, 4, 1, 1))
    assert "calls" not in graph.tensors and torch.equal(graph.tensors["scale"], module.scale)
    assert torch.equal(found, module(x))


# ---- what has no form of ours


def out_argument(x):
    y = torch.empty_like(x)
    torch.add(x, 1, out=y)
    return y


def test_out_argument_takes_the_last_resort():
    assert_same_as_eager(Function(out_argument).eval(), torch.randn(2, 4, 4, 4))


def unfolded_write(x):
    y = x + 0
    y.unfold(1, 2, 2).mul_(2)
    return y, y.sum(1)


def test_a_view_without_inverse_is_refused_with_its_line():
    # PyTorch's own functionalization writes the traced batch into the graph: wrong at any other.
    with pytest.raises(TraceError, match=r"eager.py:\d+ in forward: a write through 'unfold'"):
        trace(Function(unfolded_write).eval(), torch.randn(2, 4, 4, 4))


def random_fill(x):
    return x + torch.empty_like(x).normal_() + torch.zeros_like(x).uniform_()


def test_random_fills_are_functional_and_listed():
    graph = trace(Function(random_fill).eval(), torch.randn(2, 4))
    assert_functional(graph)
    assert [packet_name(n.target) for n in interpret.random_nodes(graph)] == ["normal_functional", "uniform"]


def under_autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ x
        y[:, 0] = 1
    return y


def test_autocast_region_takes_the_last_resort():
    assert_same_as_eager(Function(under_autocast).eval(), torch.randn(2, 4, 4))


def branching(x):
    return torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,))


def test_control_flow_is_refused_with_its_line():
    with pytest.raises(TraceError, match=r"in forward: the control-flow operator 'cond' cannot be folded"):
        trace(Function(branching).eval(), torch.randn(2, 4))

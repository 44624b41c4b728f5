"""What is known of values before anything runs: sound for every operator, and sharp where a proof of sign rests on it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from foldexport.fold.chain.intervals import Intervals, convolved
from foldexport.fold.conv import Conv
from foldexport.fold.passes import fold_graph
from foldexport.interpret import steps
from foldexport.trace import trace
from tests.fold import skip_blocks
from tests.fold.layers import Apply, Cat, Sum, chain, conv, conv_bn
from tests.statistics import randomise


def draw(generator: torch.Generator, low: Tensor, high: Tensor) -> Tensor:
    """``[64, C, 6, 6]`` inside the intervals, their ends among the values."""
    unit = torch.rand(64, len(low), 6, 6, generator=generator, dtype=torch.float64)
    unit = torch.where(unit < 0.3, 0.0, torch.where(unit > 0.7, 1.0, unit))
    low, high = low.clamp_min(-5.0).reshape(1, -1, 1, 1), high.clamp_max(5.0).reshape(1, -1, 1, 1)
    return low + unit * (high - low)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_stays_inside(groups: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 4 // groups, 3, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(6, generator=generator, dtype=torch.float64)
    layer = Conv(weight, bias, padding=((seed % 2, 1), (0, seed % 2)), groups=groups)
    low = torch.randn(4, generator=generator, dtype=torch.float64)
    high = low + torch.rand(4, generator=generator, dtype=torch.float64)
    lower, upper = convolved(layer, (low, high))
    values = layer(draw(generator, low, high)).transpose(0, 1).flatten(1)
    assert bool((values.amin(1) >= lower - 1e-12).all()) and bool((values.amax(1) <= upper + 1e-12).all())


def test_a_convolution_of_the_ends_is_sharp():
    weight = torch.tensor([[1.0, -2.0], [0.0, 0.0], [3.0, 0.0]], dtype=torch.float64).reshape(3, 2, 1, 1)
    low, high = torch.tensor([0.0, -1.0]).double(), torch.tensor([math.inf, 4.0]).double()
    lower, upper = convolved(Conv(weight, torch.tensor([0.0, 7.0, 1.0]).double()), (low, high))
    assert lower.tolist() == [-8.0, 7.0, 1.0] and upper.tolist() == [math.inf, 7.0, math.inf]


@pytest.mark.parametrize("seed", range(12))
def test_no_value_of_a_network_leaves_its_interval(seed: int):
    """Every stored tensor that is a value of the training graph, on inputs larger than any that are likely."""
    network = skip_blocks.network(seed).double()
    graph = trace(network, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    with torch.no_grad():
        folded = fold_graph(graph)
        values = dict(steps(graph, 5 * torch.randn(8, 3, 8, 8, dtype=torch.float64)))
    intervals, sided = Intervals(), 0
    for node, stored, affine, usable in folded.values:
        if usable is not None or bool((affine.scale == 0).any()) or stored.rank != 4:
            continue
        found = ((values[node] - affine.shift) / affine.scale).transpose(0, 1).flatten(1)
        lower, upper = intervals.of(stored)
        slack = 1e-9 * (1 + found.abs().amax(1))
        assert bool((found.amin(1) >= lower - slack).all()) and bool((found.amax(1) <= upper + slack).all()), stored.name
        sided += int((lower.isfinite() | upper.isfinite()).sum())
    assert sided


def sided(module: nn.Module) -> tuple[Tensor, Tensor]:
    """The interval of a network's output."""
    example = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        folded = fold_graph(trace(randomise(module, 0, signs=False), example))
    return Intervals().of(folded.outputs[0])


@pytest.mark.parametrize(("build", "known"), [
    (lambda: nn.ReLU(), True),
    (lambda: chain(relu=nn.ReLU(), pool=nn.MaxPool2d(3, 2, 1), average=nn.AvgPool2d(3, 1, 1)), True),
    (lambda: chain(relu=nn.ReLU(), up=nn.Upsample(scale_factor=2, mode="bilinear")), True),
    (lambda: chain(relu=nn.ReLU(), up=nn.Upsample(scale_factor=2, mode="bicubic")), False),
    (lambda: Sum(a=nn.ReLU(), b=chain(conv=conv_bn(4, 4), relu=nn.ReLU())), True),
    (lambda: Sum(a=nn.ReLU(), b=conv(4, 4)), False),
    (lambda: Cat(a=nn.ReLU(), b=nn.ReLU6()), True),
    (lambda: chain(relu=nn.ReLU(), slope=nn.LeakyReLU(0.2)), True),
    (lambda: nn.LeakyReLU(0.2), False),
    (lambda: chain(relu=nn.ReLU(), pad=nn.ConstantPad2d(1, -0.5)), False),
    (lambda: chain(relu=nn.ReLU(), pad=nn.ZeroPad2d(1)), True),
    (lambda: chain(relu=nn.ReLU(), cut=Apply(lambda x: x[:, 1:, ::2])), True),
    (lambda: conv_bn(4, 4), False),
    (lambda: nn.Sigmoid(), False),
], ids=range(14))  # fmt: skip
def test_what_is_proved_not_to_be_negative(build, known: bool):
    lower, _ = sided(build())
    assert bool((lower >= 0).all()) == known

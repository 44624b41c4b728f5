"""Networks whose channels are not on axis one, constants that meet another axis, other dtypes and ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import foldexport
from tests.fold.checks import assert_same, fold64, inputs, operators, relative_error
from tests.fold.layers import Apply, chain, conv, conv_bn
from tests.statistics import randomise


def check(module: nn.Module, shape: tuple[int, ...], **expected: int):
    randomise(module, 0).double()
    folded = fold64(module, shape)
    assert operators(folded.counts_after) == expected
    assert_same(folded, module, shape)
    return folded


def permute(*order: int) -> Apply:
    return Apply(lambda x: x.permute(order))


def test_channels_last_layer_norm_and_linear():
    module = chain(conv=conv(3, 8), last=permute(0, 2, 3, 1), norm=nn.LayerNorm(8), fc=nn.Linear(8, 4))
    check(module, (3, 6, 7), conv=1, permute=1, layer_norm=1, linear=1)


def test_batch_norm_behind_a_linear_layer_with_channels_last():
    module = chain(fc=nn.Linear(6, 8), first=permute(0, 2, 1), bn=nn.BatchNorm1d(8))
    check(module, (5, 6), linear=1, permute=1)


def test_batch_norm_before_a_linear_layer_with_channels_last():
    module = chain(bn=nn.BatchNorm2d(6), last=permute(0, 2, 3, 1), fc=nn.Linear(6, 4))
    check(module, (6, 5, 5), permute=1, linear=1)


def test_a_linear_layer_on_the_last_axis_absorbs_a_scale_of_that_axis():
    scale = torch.linspace(-1, 2, 6, dtype=torch.float64)
    check(chain(scale=Apply(lambda x: x * scale + 0.5), fc=nn.Linear(6, 4)), (3, 5, 6), linear=1)


def test_a_per_channel_scale_does_not_enter_a_linear_layer_on_the_last_axis():
    module = chain(bn=nn.BatchNorm1d(5), fc=nn.Linear(6, 4))
    folded = fold64(randomise(module, 0).double(), (5, 6))
    counts = operators(folded.counts_after)
    assert counts["linear"] == 1 and sum(counts.values()) == 2
    assert_same(folded, module, (5, 6))


def test_a_vector_of_channel_length_that_meets_the_width():
    """``[C]`` broadcasts against NCHW along W; with C = W nothing but the axis tells the two apart."""
    scale = torch.linspace(-1, 2, 8, dtype=torch.float64)
    module = chain(unit=conv_bn(8, 8), scale=Apply(lambda x: x * scale), next=conv(8, 4, padding=0))
    check(module, (8, 8, 8), conv=2, mul=1)


def test_a_shift_along_the_width():
    shift = torch.linspace(-1, 2, 8, dtype=torch.float64)
    module = chain(unit=conv_bn(8, 8), shift=Apply(lambda x: x + shift), relu=nn.ReLU())
    folded = fold64(randomise(module, 0).double(), (8, 8, 8))
    counts = operators(folded.counts_after)
    # The shift stays as one operator, in front of the ReLU or, as bounds of a clamp, behind it.
    assert counts["conv"] == counts["add"] == 1 and sum(counts.values()) == 3
    assert_same(folded, module, (8, 8, 8))


def test_a_constant_that_enlarges_the_value_is_an_operator():
    grid = torch.arange(1.0, 4.0, dtype=torch.float64).view(3, 1, 1)
    module = chain(unit=conv_bn(8, 1), spread=Apply(lambda x: x * grid), next=conv(3, 4))
    folded = fold64(randomise(module, 0).double(), (8, 8, 8))
    assert "batch_norm" not in operators(folded.counts_after)
    assert_same(folded, module, (8, 8, 8))


def test_a_grouped_flatten_repeats_the_channel():
    module = chain(conv=conv(3, 4), bn=nn.BatchNorm2d(4), pool=nn.MaxPool2d(2), flat=nn.Flatten(), fc=nn.Linear(36, 5))
    check(module, (3, 6, 6), conv=1, max_pool=1, linear=1)


@pytest.mark.parametrize("cast", [lambda x: x.float(), lambda x: x.to(torch.float32), lambda x: x.type_as(x)])
def test_a_cast_between_float_types_is_passed(cast):
    module = randomise(chain(unit=conv_bn(3, 8), cast=Apply(cast), relu=nn.ReLU(), next=conv_bn(8, 4)), 0)
    (example,) = inputs([(3, 8, 8)], batch=2, dtype=torch.float32)
    folded = foldexport.fold(module, example)
    assert folded.certificate.ok
    assert operators(folded.counts_after) == {"conv": 2, "relu": 1}
    assert relative_error(folded.module(example), module(example)) < 1e-5


def test_batch_norm_of_vectors():
    check(chain(fc1=nn.Linear(6, 8), bn=nn.BatchNorm1d(8), relu=nn.ReLU(), fc2=nn.Linear(8, 3)), (6,), linear=2, relu=1)


def test_a_network_whose_batch_is_fixed_folds_at_that_batch():
    module = randomise(chain(unit=conv_bn(3, 8), flat=Apply(lambda x: x.reshape(2, -1)), fc=nn.Linear(128, 4)), 0)
    (example,) = inputs([(3, 4, 4)], batch=2)
    folded = foldexport.fold(module.double(), example)
    assert folded.certificate.ok
    assert relative_error(folded.module(example), module(example)) < 1e-10

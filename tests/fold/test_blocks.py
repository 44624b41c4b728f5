"""Each block of the table folds to its operators, computes the same, and says what it kept and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foldexport.fold.rebuild import in_dtype
from tests.fold.blocks import BLOCKS
from tests.fold.checks import assert_kept, assert_same, fold64, operators
from tests.fold.layers import conv, conv_bn
from tests.fold.rows import Block
from tests.statistics import randomise


def built(row: Block, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(row.build(), seed, zero=row.zero, signs=row.signs).double()


def leaves(module: nn.Module) -> list[str]:
    """Class names of the layers, in order."""
    return [type(layer).__name__ for layer in module.modules() if not list(layer.children())]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", list(BLOCKS))
def test_folds_to_the_operators_of_the_table(name: str, seed: int):
    row = BLOCKS[name]
    module = built(row, seed)
    folded = fold64(module, row.shape)
    assert operators(folded.counts_after) == row.operators
    assert_same(folded, module, row.shape)
    if row.kept:
        assert_kept(folded, row.kept)


def test_every_block_of_the_table_costs_no_more_operators_than_before():
    for name in ("repvgg", "bn_conv_padded", "gate", "dense"):
        row = BLOCKS[name]
        folded = fold64(built(row, 2), row.shape)
        assert sum(operators(folded.counts_after).values()) <= sum(operators(folded.counts_before).values())


def test_a_pointwise_convolution_goes_behind_the_average_pool():
    row = BLOCKS["pointwise_avgpool"]
    assert leaves(fold64(built(row, 0), row.shape).module) == ["AvgPool2d", "Conv2d"]


def test_a_pointwise_convolution_goes_before_the_upsampling():
    row = BLOCKS["upsample_pointwise"]
    assert leaves(fold64(built(row, 0), row.shape).module)[0] == "Conv2d"


class Returned(nn.Module):
    """A convolution and its batch norm, both of them outputs, the second behind ``tail``."""

    def __init__(self, tail: nn.Module):
        super().__init__()
        self.unit = conv_bn(8, 8)
        self.tail = tail

    def forward(self, x):
        value = self.unit.conv(x)
        return value, self.tail(self.unit.bn(value))


@pytest.mark.parametrize("tail, expected", [
    (nn.Identity(), {"conv": 1, "batch_norm": 1}),
    (nn.ReLU(), {"conv": 1, "batch_norm": 1, "relu": 1}),
])
def test_a_batch_norm_stays_behind_a_convolution_that_is_returned(tail: nn.Module, expected: dict[str, int]):
    module = randomise(Returned(tail), 0).double()
    folded = fold64(module, (8, 8, 8))
    assert operators(folded.counts_after) == expected
    assert_same(folded, module, (8, 8, 8))
    assert_kept(folded, "unit.bn")


@pytest.mark.parametrize("tail, expected", [
    (nn.Identity(), {"conv": 2}),
    (nn.ReLU(), {"conv": 2, "clamp": 1}),
])
def test_a_returned_convolution_still_folds_into_what_reads_it(tail: nn.Module, expected: dict[str, int]):
    module = randomise(Returned(nn.Sequential(tail, conv(8, 4, padding=0))), 0).double()
    folded = fold64(module, (8, 8, 8))
    assert operators(folded.counts_after) == expected
    assert_same(folded, module, (8, 8, 8))


class ReadElsewhere(nn.Module):
    """A convolution that a sigmoid reads as well as its batch norm."""

    def __init__(self):
        super().__init__()
        self.unit = conv_bn(8, 8)

    def forward(self, x):
        value = self.unit.conv(x)
        return self.unit.bn(value).relu(), value.sigmoid()


def test_a_batch_norm_stays_behind_a_convolution_that_a_sigmoid_reads():
    module = randomise(ReadElsewhere(), 0).double()
    folded = fold64(module, (8, 8, 8))
    assert operators(folded.counts_after) == {"conv": 1, "batch_norm": 1, "relu": 1, "sigmoid": 1}
    assert_same(folded, module, (8, 8, 8))
    assert_kept(folded, "unit.bn")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_norm_that_stays_divides_by_one_exactly_and_trains(dtype):
    folded = fold64(randomise(ReadElsewhere(), 0).double(), (8, 8, 8))
    module = in_dtype(folded.module, dtype)
    (norm,) = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norm.eps > 0 and torch.equal(norm.running_var + norm.eps, torch.ones(8, dtype=dtype))
    before = norm.running_mean.clone()
    sum(value.sum() for value in module.train()(torch.randn(4, 8, 8, 8, dtype=dtype))).backward()
    assert norm.weight.grad is not None and not torch.equal(norm.running_mean, before)

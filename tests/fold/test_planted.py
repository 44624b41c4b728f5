"""A fold with a mistake in it does not pass: each mistake, planted, is an `EquivalenceError`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

import foldexport
from foldexport import api
from foldexport.errors import EquivalenceError
from foldexport.fold import conv as algebra
from foldexport.fold import pending
from foldexport.fold.affine import Affine
from foldexport.fold.stored import push_down as push_down_rightly
from foldexport.fold.transfer import TRANSFER
from tests import networks
from tests.fold.branches import RepVGGBlock
from tests.fold.layers import Cat, Sum, chain, conv, conv_bn
from tests.fold.residuals import PreactivationBlock, ScaledBlock
from tests.statistics import randomise

EXAMPLE = torch.linspace(-2, 2, 2 * 8 * 64).reshape(2, 8, 8, 8)


def refused(module: nn.Module, example: torch.Tensor = EXAMPLE) -> str:
    """The message of the error that folding the module ends in."""
    with pytest.raises(EquivalenceError) as caught:
        foldexport.fold(module, example)
    assert caught.value.exit_code == 4
    return str(caught.value)


def rule_with(change: Callable[[Affine], Affine]) -> Callable:
    """The rule of batch norm with its affine changed."""
    right = pending.RULES["batch_norm"]

    def wrong(args, constants, rank):
        source, affine = right(args, constants, rank)
        return source, change(affine)

    return wrong


@pytest.mark.parametrize("change", [
    lambda affine: Affine(affine.scale, torch.zeros_like(affine.shift)),
    lambda affine: Affine(affine.scale.abs(), affine.shift),
    lambda affine: Affine(affine.scale, affine.shift * (1 + 1e-6)),
    lambda affine: Affine(affine.scale * (1 + 1e-6), affine.shift),
], ids=["no shift", "sign lost", "shift off by 1e-6", "scale off by 1e-6"])
@pytest.mark.parametrize("build", [
    lambda: chain(unit=conv_bn(8, 8), relu=nn.ReLU(), next=conv(8, 8)),
    lambda: chain(bn=nn.BatchNorm2d(8), conv=conv(8, 8, padding=0)),
    lambda: chain(stem=conv(8, 8), block=PreactivationBlock(8), last=conv_bn(8, 8, 1), relu=nn.ReLU()),
], ids=["behind a convolution", "before a convolution", "in a trunk"])
def test_a_wrong_batch_norm(monkeypatch: pytest.MonkeyPatch, build: Callable[[], nn.Module], change: Callable):
    module = randomise(build(), 0)
    assert foldexport.fold(module, EXAMPLE).certificate.ok
    monkeypatch.setitem(pending.RULES, "batch_norm", rule_with(change))
    refused(module)


class Gated(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


OPERATORS: dict[str, Callable[[], nn.Module]] = {
    "conv2d": lambda: chain(unit=conv_bn(8, 8), relu=nn.ReLU(), next=conv(8, 8)),
    "relu": lambda: chain(relu=nn.ReLU(), bn=nn.BatchNorm2d(8), conv=conv(8, 8, padding=0)),
    "prelu": lambda: chain(conv=conv(8, 8), act=nn.PReLU(8), next=conv(8, 8, padding=0)),
    "max_pool2d": lambda: chain(unit=conv_bn(8, 8), pool=nn.MaxPool2d(2), next=conv(8, 8, padding=0)),
    "avg_pool2d": lambda: chain(relu=nn.ReLU(), pool=nn.AvgPool2d(2), next=conv(8, 8, padding=0)),
    "upsample_nearest2d": lambda: chain(relu=nn.ReLU(), up=nn.Upsample(scale_factor=2), next=conv(8, 8, padding=0)),
    "cat": lambda: chain(cat=Cat(a=conv(8, 8), b=conv(8, 8, 1)), next=conv(16, 8, padding=0)),
    "add": lambda: chain(sum=Sum(a=conv(8, 8), b=nn.ReLU()), next=conv(8, 8, padding=0)),
    "mul": lambda: chain(gate=Gated(), next=conv(8, 8, padding=0)),
    "layer_norm": lambda: chain(norm=nn.LayerNorm(8), fc=nn.Linear(8, 4)),
}


@pytest.mark.parametrize("name", list(OPERATORS))
def test_a_transfer_function_whose_affine_is_off(monkeypatch: pytest.MonkeyPatch, name: str):
    module = randomise(OPERATORS[name](), 0)
    assert foldexport.fold(module, EXAMPLE).certificate.ok
    right = TRANSFER[name]

    def wrong(fold, node):
        done = right(fold, node)
        value = fold.values[node]
        off = Affine.of(value.affine.scale, value.affine.shift + 1e-6, value.affine.scale.dim())
        fold.values[node] = dataclasses.replace(value, affine=off)
        return done

    monkeypatch.setitem(TRANSFER, name, wrong)
    refused(module)


def test_a_sum_of_convolutions_that_drops_a_branch(monkeypatch: pytest.MonkeyPatch):
    module = randomise(chain(block=RepVGGBlock(8, 8), next=conv(8, 8)), 0)
    assert foldexport.fold(module, EXAMPLE).certificate.ok
    monkeypatch.setattr(algebra, "add", lambda first, *others: first)
    assert "block" in refused(module)


def test_a_sum_of_convolutions_whose_taps_are_mirrored(monkeypatch: pytest.MonkeyPatch):
    module = randomise(Sum(a=conv(8, 8), b=conv(8, 8, 1)), 0)
    right = algebra.add

    def wrong(*branches):
        merged = right(*branches)
        return dataclasses.replace(merged, weight=merged.weight.flip(-1))

    monkeypatch.setattr(algebra, "add", wrong)
    refused(module)


def test_a_composition_that_forgets_the_first_bias(monkeypatch: pytest.MonkeyPatch):
    module = randomise(chain(wide=nn.Conv2d(8, 32, 1), narrow=nn.Conv2d(32, 8, 3)), 0)
    assert foldexport.fold(module, EXAMPLE).certificate.ok
    right = algebra.compose

    def wrong(first, second):
        return right(dataclasses.replace(first, bias=None), second)

    monkeypatch.setattr(algebra, "compose", wrong)
    refused(module)


def test_retargets_that_never_reach_the_weights(monkeypatch: pytest.MonkeyPatch):
    module = randomise(chain(stem=conv(8, 8), block=ScaledBlock(8, 8, project=True)), 0)
    assert foldexport.fold(module, EXAMPLE).certificate.ok

    def forget_one(order):
        first = next(stored for stored in order if stored.maps)
        first.maps.clear()
        push_down_rightly(order)

    monkeypatch.setattr("foldexport.fold.passes.push_down", forget_one)
    refused(module)


def rebuilt_with_an_error_of(size: float) -> Callable:
    """`rebuild`, the bias of the first convolution of its result raised by ``size``."""
    right = api.rebuild

    def wrong(folded):
        result = right(folded)
        first = next(layer for layer in result.program.module.modules() if isinstance(layer, nn.Conv2d))
        with torch.no_grad():
            first.bias += size
        return result

    return wrong


def test_an_error_in_the_first_of_sixty_layers(monkeypatch: pytest.MonkeyPatch):
    """A millionth in the first bias, of which next to nothing arrives at the output."""
    example = torch.linspace(-2, 2, 2 * 3 * 64).reshape(2, 3, 8, 8)
    module = randomise(networks.plain(60), 0)
    right = foldexport.fold(module, example)
    monkeypatch.setattr(api, "rebuild", rebuilt_with_an_error_of(1e-6))
    wrong = foldexport.fold(module.double(), example.double(), certify=False)
    with torch.no_grad():
        exact = module(example.double())
        seen = (wrong.module(example.double()) - exact).abs().max() / exact.abs().max()
    assert right.certificate.ok
    assert seen < 1e-9
    assert "0.0" in refused(module.float(), example)


def test_an_error_in_the_last_layer(monkeypatch: pytest.MonkeyPatch):
    module = randomise(chain(unit=conv_bn(8, 8), relu=nn.ReLU()), 0)
    monkeypatch.setattr(api, "rebuild", rebuilt_with_an_error_of(1e-9))
    assert "unit" in refused(module)

"""Memory shared by views: random programs of views and writes, the cost of a write, and planted mistakes."""

from __future__ import annotations

import random
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foldexport import trace as tracing
from foldexport.trace import views
from foldexport.trace.aliases import Aliases
from tests.eager import Function, assert_same_as_eager, operators
from tests.statistics import randomise
from tests.versions import FREE_BATCHES

VIEWS = [
    lambda t, r: t[:, : max(1, t.shape[1] // 2)],
    lambda t, r: t[:, t.shape[1] // 2 :],
    lambda t, r: t[:, ::2],
    lambda t, r: t.select(t.ndim - 1, r.randrange(t.shape[-1])) if t.ndim > 2 else t,
    lambda t, r: t.transpose(1, t.ndim - 1),
    lambda t, r: t.permute(0, *range(t.ndim - 1, 0, -1)),
    lambda t, r: t.unsqueeze(1),
    lambda t, r: t.squeeze(1),
    lambda t, r: t.chunk(2, 1)[-1],
    lambda t, r: t.split([1, t.shape[1] - 1], 1)[r.randrange(2)] if t.shape[1] > 1 else t,
    lambda t, r: t.unbind(1)[0] if t.ndim > 2 else t,
    lambda t, r: t.narrow(t.ndim - 1, 0, 1),
    lambda t, r: t.flatten(1) if t.ndim > 2 else t,
    lambda t, r: t.reshape(t.shape[0], -1),
    lambda t, r: t.detach(),
    lambda t, r: F.dropout(t, 0.5, training=False),
    lambda t, r: t.view_as(t) if t.is_contiguous() else t,
    lambda t, r: t.expand_as(t),
]
WRITES = [
    lambda t, o, r: t.relu_(),
    lambda t, o, r: t.mul_(-1.5),
    lambda t, o, r: t.add_(o * 0.5),
    lambda t, o, r: t.copy_(o.sin()),
    lambda t, o, r: t.copy_(torch.arange(float(t.shape[-1]))),
    lambda t, o, r: t.fill_(r.random()),
    lambda t, o, r: t.zero_(),
    lambda t, o, r: t.masked_fill_(o > 0.3, 0.25),
    lambda t, o, r: t.clamp_(-1, 1),
    lambda t, o, r: t.index_put_((o > 0.5,), torch.tensor(0.125)),
]


class Program(nn.Module):
    """A random mix of views, writes and reads; the same on every call, since it sees no batch size and no values.

    Without ``contiguous``: whether that copies depends on the batch, where the batch is one.
    """

    def __init__(self, seed: int, length: int = 14):
        super().__init__()
        self.seed, self.length = seed, length

    def forward(self, x):
        r = random.Random(self.seed)
        tensors = [x, x + 0]
        for _ in range(self.length):
            t = r.choice(tensors)
            kind = r.random()
            if kind < 0.45:
                tensors.append(r.choice(VIEWS)(t, r))
            elif kind < 0.85:
                r.choice(WRITES)(t, t.detach().clone(), r)
            else:
                tensors.append(t * 0.75)
        return tensors


@FREE_BATCHES
@pytest.mark.parametrize("seed", range(40))
def test_random_program_equals_eager(seed):
    assert_same_as_eager(Program(seed).eval(), torch.randn(2, 6, 4, 5))


# ---- cost and proof


class ResidualNetwork(nn.Module):
    """Blocks with in-place ReLU and addition on the trunk."""

    def __init__(self, depth: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(depth))

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms):
            y = F.relu(norm(conv(x)), inplace=True)
            y += x
            x = F.relu_(y)
        return x


def test_residual_network_is_functional_without_extra_operators():
    graph = assert_same_as_eager(randomise(ResidualNetwork(4), 0), torch.randn(2, 2, 3, 3))
    assert operators(graph) == Counter(conv2d=4, batch_norm=4, relu=8, add=4)


def count_calls(function) -> int:
    calls = 0

    def profile(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def chain_of_writes(depth: int):
    def forward(x):
        x = x + 0
        for _ in range(depth):
            x[:, :1].add_(1)
            x = x.view(x.shape).relu_()
        return x

    return Function(forward).eval()


@pytest.mark.parametrize("make", [ResidualNetwork, chain_of_writes], ids=["residual", "views"])
def test_work_is_linear_in_depth(make, monkeypatch):
    calls = {}
    original = tracing.functionalize
    for depth in (20, 200):
        def counted(*arguments, depth=depth):
            calls[depth] = count_calls(lambda: original(*arguments))
            return original(*arguments)

        monkeypatch.setattr(tracing, "functionalize", counted)
        tracing.trace(make(depth).eval(), torch.randn(2, 2, 3, 3))
    assert calls[200] < 11 * calls[20]


def write_then_read(x):
    x = x + 0
    x[:, 0].add_(1)
    return x


def read_after_write(x):
    x = x + 0
    y = x.view(x.shape[0], -1)
    x.relu_()
    return y


def test_a_forgotten_flush_is_caught(monkeypatch):
    monkeypatch.setattr(views, "write_back", lambda emit, view, args, parent, child: parent)
    with pytest.raises(AssertionError):
        assert_same_as_eager(Function(write_then_read).eval(), torch.randn(2, 4, 4, 4))


def test_a_forgotten_replay_is_caught(monkeypatch):
    monkeypatch.setattr(Aliases, "read", lambda self, alias: alias.value)
    with pytest.raises(AssertionError):
        assert_same_as_eager(Function(read_after_write).eval(), torch.randn(2, 4, 4, 4))

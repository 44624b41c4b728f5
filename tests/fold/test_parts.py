"""Parts of a split: the layer in front takes what each part needs, as q, k and v of an attention do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foldexport
from foldexport.errors import EquivalenceError
from foldexport.fold.affine import Affine
from foldexport.fold.transfer import views
from tests.fold.checks import assert_same, fold64, operators
from tests.fold.layers import conv, conv_bn
from tests.statistics import randomise

SHAPE = (8, 6, 6)


class Heads(nn.Module):
    """One convolution and batch norm, split in three: attention with its factor on q, as EfficientViT and LeViT write it."""

    def __init__(self, scale_keys: bool = False):
        super().__init__()
        self.qkv, self.scale_keys = conv_bn(8, 16, 1), scale_keys

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.flatten(2) for part in self.qkv(x).split([4, 4, 8], dim=1))
        attention = (q * 0.5).transpose(1, 2) @ (k * 3 - 1 if self.scale_keys else k)
        return (v @ attention.softmax(-1).transpose(1, 2)).view(x.shape)


class Unbound(nn.Module):
    """A linear layer for q, k and v, taken apart by ``unbind`` behind a permutation, as vision transformers write it."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(-1, 36, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1) @ (v * 2 + 1)


class Chunks(nn.Module):
    """Halves with readers of different kinds: one is an output, one goes through a padded convolution and twice elsewhere."""

    def __init__(self, shared: bool = False):
        super().__init__()
        self.unit, self.next, self.shared = conv_bn(8, 16), conv(8, 8), shared

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        whole = self.unit(x)
        left, right = whole.chunk(2, dim=1)
        extra = (torch.sigmoid(whole),) if self.shared else ()
        return left, self.next(right) * torch.sigmoid(right), *extra


class Unread(nn.Module):
    """One part is never read."""

    def __init__(self):
        super().__init__()
        self.unit = conv_bn(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        left, _ = self.unit(x).chunk(2, dim=1)
        return torch.softmax(left, 1)


BUILDS = {
    "split": Heads, "split, keys scaled": lambda: Heads(scale_keys=True), "unbind": Unbound, "chunk": Chunks,
    "chunk of a tensor with another reader": lambda: Chunks(shared=True), "a part that is not read": Unread,
}  # fmt: skip


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_what_parts_need_goes_into_the_layer_in_front(build):
    module = randomise(build(), 0).double()
    folded = fold64(module, SHAPE)
    counts = operators(folded.counts_after)
    gates = 1 if isinstance(module, Chunks) else 0
    assert (counts["batch_norm"], counts["mul"] - gates, counts["add"]) == (0, 0, 0)
    assert_same(folded, module, SHAPE)


class PreActivation(nn.Module):
    """The whole is a sum, which may not take the changes of all its parts together: they stay where they stand."""

    def __init__(self):
        super().__init__()
        self.one, self.other = conv(8, 8), conv_bn(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        left, right = (self.one(x).relu() + self.other(x)).chunk(2, dim=1)
        return torch.softmax(left * 3, 1) + torch.sigmoid(right - 2)


def test_parts_of_a_sum():
    module = randomise(PreActivation(), 0).double()
    folded = fold64(module, SHAPE)
    assert sum(operators(folded.counts_after).values()) <= sum(operators(folded.counts_before).values())
    assert_same(folded, module, SHAPE)


class Windows(nn.Module):
    """Channels last, padded along both axes of space, as windowed attention does."""

    def __init__(self):
        super().__init__()
        self.unit, self.last = conv_bn(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.pad(self.unit(x).permute(0, 2, 3, 1), (0, 0, 0, 1, 0, 1)))


def test_a_pad_beside_the_axis_of_the_channels():
    module = randomise(Windows(), 0).double()
    folded = fold64(module, SHAPE)
    assert operators(folded.counts_after)["batch_norm"] == 0
    assert_same(folded, module, SHAPE)


def test_a_change_that_lands_on_the_wrong_part_is_found(monkeypatch: pytest.MonkeyPatch):
    module = randomise(Heads(), 0).double()
    right = views._beside_others

    def wrong(axis: int, start: int, length: int, size: int, unbound: bool):
        return right(axis, (start + length) % size if length == 4 else start, length, size, unbound)

    monkeypatch.setattr(views, "_beside_others", wrong)
    with pytest.raises(EquivalenceError):
        foldexport.fold(module, torch.randn(2, *SHAPE, dtype=torch.float64))


def test_the_change_of_a_part_leaves_the_others_alone():
    change = Affine.of_vectors(torch.tensor([2.0, 3.0]), torch.tensor([1.0, -1.0]), 1, 3)
    whole = views._beside_others(1, 1, 2, 4, False)(change)
    scale, shift = whole.vector(1, 4)
    assert scale.tolist() == [1, 2, 3, 1]
    assert shift.tolist() == [0, 1, -1, 0]


class LinearNorm(nn.Module):
    """A linear layer on tokens whose batch norm sees them in one row, as LeViT writes it."""

    def __init__(self, after: nn.Module):
        super().__init__()
        self.linear, self.bn, self.after = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), after

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.after(self.bn(x.flatten(0, 1)).reshape_as(x))


@pytest.mark.parametrize("after", [nn.Identity(), nn.Hardswish(), nn.Linear(8, 4)], ids=lambda layer: type(layer).__name__)
def test_a_reshape_that_is_taken_back_around_a_batch_norm(after: nn.Module):
    module = randomise(LinearNorm(after), 0).double()
    folded = fold64(module, (8, 6, 6)[1:])
    counts = operators(folded.counts_after)
    assert (counts["batch_norm"], counts["linear"], sum(counts.values())) == (0, 1, 1 if not isinstance(after, nn.Hardswish) else 2)
    assert folded.counts_after.get("view", 0) == 0
    assert_same(folded, module, (6, 6))

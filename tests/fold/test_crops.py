"""Slices that cut the sides off a feature map: where they merge like padding, and where they stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import foldexport
from foldexport.fold.crops import cropped_sides
from foldexport.trace import trace
from tests.fold.checks import assert_same, fold64, operators
from tests.statistics import randomise

SHAPE = (8, 16, 15)


class Cut(nn.Module):
    """``behind(cut(front(x))) + beside(x)``."""

    def __init__(self, cut: Callable[[Tensor], Tensor], front: nn.Module, behind: nn.Module, beside: nn.Module | None = None):
        super().__init__()
        self.cut, self.front, self.behind, self.beside = cut, front, behind, beside

    def forward(self, x: Tensor) -> Tensor:
        y = self.behind(self.cut(self.front(x)))
        return y if self.beside is None else y + self.beside(x)


def sides(x: Tensor) -> Tensor:
    return x[:, :, 2:-2, 2:-2]


def uneven(x: Tensor) -> Tensor:
    return x[:, :, 1:-3, 4:]


MERGED = {
    "a branch of a sum": (Cut(sides, nn.Identity(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 5)), {"conv": 1}),
    "the tensor itself in a sum": (Cut(sides, nn.Identity(), nn.Identity(), nn.Conv2d(8, 8, 5)), {"conv": 1}),
    "uneven sides": (Cut(uneven, nn.Identity(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 5)), {"conv": 1}),
    "between a 1x1 and a 3x3": (Cut(sides, nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 3)), {"pad": 1, "conv": 1}),
    "as a negative pad": (
        Cut(lambda x: F.pad(x, (-2, -2, -2, -2)), nn.Identity(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 5)), {"conv": 1}
    ),
}  # fmt: skip
KEPT = {
    "zeros behind the cut": (Cut(sides, nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 3, padding=1)), {"conv": 2, "slice": 2}),
    "zeros behind a negative pad": (
        Cut(lambda x: F.pad(x, (-2, -2, -2, -2)), nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 3, padding=1)), {"conv": 2, "pad": 1}
    ),
    "every second row": (
        Cut(lambda x: x[:, :, ::2, ::2], nn.Identity(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, stride=2)),
        {"conv": 2, "slice": 2, "add": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("module, counts", [*MERGED.values(), *KEPT.values()], ids=[*MERGED, *KEPT])
def test_what_is_left(module: Cut, counts: dict[str, int]):
    module = randomise(module, 3)
    folded = fold64(module, SHAPE)
    assert operators(folded.counts_after) == counts
    assert_same(folded, module, SHAPE)


def test_they_merge_where_other_sizes_must_work():
    module = randomise(MERGED["a branch of a sum"][0], 3).float()
    folded = foldexport.fold(module, torch.randn(2, *SHAPE), free=("height", "width"))
    assert operators(folded.counts_after) == {"conv": 1}
    x = torch.randn(1, 8, 21, 30)
    with torch.no_grad():
        assert torch.allclose(folded.module(x), module(x), rtol=1e-4, atol=1e-4)


def slices(cut: Callable[[Tensor], Tensor]) -> list[fx.Node]:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return cut(x).relu()

    graph = trace(Module().eval(), torch.randn(2, *SHAPE))
    return [node for node in graph.fx.nodes if "slice" in str(node.target)]


SIDES = {
    "from both sides": (lambda x: x[:, :, 2:-3], ((-2, -3), (0, 0))),
    "to a fixed column": (lambda x: x[:, :, :, 1:9], None),
    "from the back": (lambda x: x[:, :, -4:], None),
    "all of it but the first": (lambda x: x[..., 1:], ((0, 0), (-1, 0))),
    "channels": (lambda x: x[:, 1:-1], None),
    "every second": (lambda x: x[:, :, 1:-1:2], None),
}


@pytest.mark.parametrize("cut, expected", SIDES.values(), ids=SIDES)
def test_the_sides_that_a_slice_cuts(cut, expected):
    """Only distances from their own side hold at every size."""
    (node,) = slices(cut)
    assert cropped_sides(node) == expected

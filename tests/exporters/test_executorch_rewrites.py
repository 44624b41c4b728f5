"""Splits and clamps in the form that ExecuTorch runs better: the same values, every batch, a mistake caught."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import foldexport
from foldexport.errors import EquivalenceError
from foldexport.exporters.executorch import rewrites
from tests.exporters.installed import need
from tests.exporters.test_mobile_weights import Signs
from tests.statistics import randomise

X = (torch.zeros(1, 3, 8, 8),)
SPLITS = {
    "split": lambda x: x.split(4, 1),
    "sizes": lambda x: x.split([2, 3, 5], 1),
    "chunk": lambda x: x.chunk(4, 1),
    "unbind": lambda x: x.reshape(x.shape[0], 2, 5, 8, 8).unbind(1),
}


class Parts(nn.Module):
    """Ten channels taken apart in one way, and put together the other way round."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.stem, self.head = kind, nn.Conv2d(3, 10, 1), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = SPLITS[self.kind](torch.sin(self.stem(x)))
        return self.head(torch.cat([torch.sin(part) for part in reversed(parts)], 1))


def _folded(network: nn.Module) -> foldexport.Folded:
    return foldexport.fold(randomise(network, 3), X, certify=False)


@pytest.mark.parametrize("kind", sorted(SPLITS))
def test_splits_are_slices_of_the_same_values(kind):
    module = _folded(Parts(kind)).module
    better, x = rewrites.rewritten(module, apart=True), torch.randn(3, 3, 8, 8)
    assert better is not module and rewrites.rewritten(better, apart=True) is better
    assert torch.equal(better(x), module(x))


def test_nothing_to_rewrite_is_the_module_itself():
    module = _folded(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())).module
    assert rewrites.rewritten(module, apart=True) is module


def test_a_split_takes_every_batch(tmp_path):
    need("executorch")
    made = foldexport.export(_folded(Parts("sizes")), "executorch", tmp_path / "net.pte")
    assert made.comparison.ok and made.notes["batch"] == [1, 8] and "fixed" not in made.notes


def test_a_clamp_of_each_channel_is_taken_by_xnnpack(tmp_path):
    need("executorch")
    made = foldexport.export(_folded(Signs()), "executorch", tmp_path / "net.pte")
    assert made.comparison.ok and made.comparison.weights_identical == (4, 4)
    assert not any("clamp" in each for each in made.notes["outside_of_delegates"])


def test_a_slice_at_a_wrong_place_is_caught(tmp_path, monkeypatch):
    need("executorch")
    wrong = {torch.ops.aten.split.Tensor: lambda at, x, size, axis=0: (rewrites.ATEN.slice.Tensor, (x, axis, 0, size))}
    monkeypatch.setattr(rewrites, "PARTS", wrong)
    monkeypatch.setitem(SPLITS, "split", lambda x: x.split(5, 1))
    with pytest.raises(EquivalenceError, match="float32 noise"):
        foldexport.export(_folded(Parts("split")), "executorch", tmp_path / "net.pte")
    assert not list(tmp_path.iterdir())

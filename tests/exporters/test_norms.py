"""Norms taken apart for ExecuTorch: the same function, with float32's usual rounding, and a mistake in it is caught."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import foldexport
from foldexport.errors import EquivalenceError
from foldexport.exporters.executorch import exporter as executorch
from foldexport.exporters.executorch import norms
from tests.exporters.installed import need
from tests.statistics import randomise

X = (torch.zeros(1, 3, 34, 34),)
NORMS = {
    "group": lambda: nn.GroupNorm(2, 8),
    "group without weights": lambda: nn.GroupNorm(4, 8, affine=False),
    "layer": lambda: nn.LayerNorm([8, 32, 32]),
    "instance": lambda: nn.InstanceNorm2d(8, affine=True),
}


class Network(nn.Module):
    """Values far from zero in front of a norm: their mean is five times their deviation."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sin(self.norm(torch.sin(self.stem(x)) + 4)))


def _folded(kind: str) -> foldexport.Folded:
    torch.manual_seed(0)
    return foldexport.fold(randomise(Network(NORMS[kind]()), 3), X, certify=False)


@pytest.mark.parametrize("kind", sorted(NORMS))
def test_the_same_function(kind):
    for module in (randomise(Network(NORMS[kind]()), 3), _folded(kind).module):
        apart = norms.separated(module)
        assert apart is not module and norms.separated(apart) is apart
        assert set(apart.state_dict()) == set(module.state_dict())
        module, apart, x = module.double(), apart.double(), 3 * torch.randn(2, 3, 34, 34, dtype=torch.float64) + 1
        with torch.no_grad():
            assert torch.allclose(apart(x), module(x), rtol=0, atol=1e-13)


def test_other_ranks_and_lengths():
    for shape, norm in (((2, 6), nn.GroupNorm(3, 6)), ((2, 6, 97), nn.GroupNorm(2, 6)), ((3, 4, 5, 7, 3), nn.GroupNorm(1, 4))):
        x = torch.randn(shape, dtype=torch.float64)
        norm = randomise(nn.Sequential(norm), 5).double()
        assert torch.allclose(norms.separated(norm)(x), norm(x), rtol=0, atol=1e-13)
    assert norms.separated(plain := nn.Sequential(nn.LayerNorm(8), nn.Conv2d(1, 1, 1))) is plain


def test_parts_are_of_equal_length_and_near_the_square_root():
    assert [norms._parts(length) for length in (1, 64, 65, 128, 25088, 1009)] == [1, 1, 5, 8, 128, 1]


@pytest.mark.parametrize("kind", ("group", "instance"))
def test_a_norm_far_from_zero_has_its_digits(kind, tmp_path):
    need("executorch")
    made = foldexport.export(_folded(kind), "executorch", tmp_path / "net.pte")
    assert made.comparison.ok and len(set(made.comparison.weights_identical)) == 1
    assert not any("norm" in each for each in made.notes["outside_of_delegates"])


def test_the_kernel_of_executorch_has_not(tmp_path, monkeypatch):
    """Why it is done."""
    need("executorch")
    monkeypatch.setattr(norms, "separated", lambda module: module)
    with pytest.raises(EquivalenceError, match="float32 noise"):
        foldexport.export(_folded("group"), "executorch", tmp_path / "net.pte")


def test_a_graph_that_cannot_be_divided_keeps_its_norm(tmp_path, monkeypatch):
    need("executorch")
    honest = executorch._program

    def refusing(module, example, free):
        if any(isinstance(each, norms._Separated) for each in module.modules()):
            raise RuntimeError("it cannot be divided")
        return honest(module, example, free)

    monkeypatch.setattr(executorch, "_program", refusing)
    small = foldexport.fold(randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.GroupNorm(2, 8)), 3), (X[0][..., :8, :8],))
    made = foldexport.export(small, "executorch", tmp_path / "net.pte")
    assert made.comparison.ok and "aten::native_group_norm.out" in made.notes["outside_of_delegates"]


def test_a_wrong_mean_is_caught(tmp_path, monkeypatch):
    """Planted: the last part is left out."""
    need("executorch")
    monkeypatch.setattr(norms, "_mean", lambda x: x[:, :, : x.shape[2] - 1].mean(2, keepdim=True))
    with pytest.raises(EquivalenceError, match="float32 noise"):
        foldexport.export(_folded("group"), "executorch", tmp_path / "net.pte")
    assert not list(tmp_path.iterdir())

"""Pads whose border is one constant per channel that is not what the operator in front makes of zero."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fold.checks import assert_kept, assert_same, fold64, operators
from tests.fold.layers import chain
from tests.statistics import randomise


class Framed(nn.Module):
    """Zero padding by one whose border is then overwritten with ``level``, ``[C]`` or ``[1]``."""

    def __init__(self, level: Tensor):
        super().__init__()
        self.level = nn.Parameter(level)

    def forward(self, x: Tensor) -> Tensor:
        x, level = F.pad(x, (1, 1, 1, 1)), self.level.view(1, -1, 1, 1)
        x[:, :, :1] = level
        x[:, :, -1:] = level
        x[:, :, :, :1] = level
        x[:, :, :, -1:] = level
        return x


LEVELS = {"one for each channel": torch.tensor([0.5, -1.0, 0.0, 2.0]), "the same for all": torch.full((4,), 0.25),
          "one number": torch.tensor([0.25]), "zero": torch.zeros(4)}  # fmt: skip


@pytest.mark.parametrize("zero", [0.0, 0.3], ids=["", "dead channels"])
@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_behind_a_batch_norm_the_convolution_in_front_takes_the_difference(level: Tensor, zero: float):
    module = chain(first=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4), frame=Framed(level), last=nn.Conv2d(4, 4, 3))
    module = randomise(module, 2, zero=zero)
    folded = fold64(module, (4, 9, 8))
    assert operators(folded.counts_after) == ({"conv": 2, "pad": 1} if level.any() else {"conv": 2})
    assert_same(folded, module, (4, 9, 8))


def test_on_the_input_one_addition_is_left_and_the_ledger_says_why():
    module = randomise(chain(bn=nn.BatchNorm2d(4), frame=Framed(LEVELS["one for each channel"]), last=nn.Conv2d(4, 4, 3)), 2)
    folded = fold64(module, (4, 9, 8))
    assert operators(folded.counts_after) == {"add": 1, "pad": 1, "conv": 1}
    assert_same(folded, module, (4, 9, 8))
    assert_kept(folded, "bn")

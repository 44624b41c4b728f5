"""Which of the user's operators a refusal is about."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import foldexport
from foldexport.exporters import places


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.topk(torch.sin(x), 2, 1)[0] * torch.erf(x[:, :2])


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 4, 1), Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.stem(x)))


X = (torch.zeros(2, 3, 4, 4),)


@pytest.fixture(scope="module")
def module():
    return foldexport.fold(Network().eval(), X, certify=False).module


def never(alone: nn.Module, inputs: tuple) -> bool:
    raise AssertionError("what is said is enough")


def test_an_operator_that_is_named_is_not_looked_for(module):
    for said in ("Lowering not found: aten.erf.default", "Operator torch._ops.aten.erf.default is not", "no aten::erf here"):
        assert places.culprit(module, X, said, never) == "`inner` (erf)"


def test_words_that_happen_to_be_operators_say_nothing(module):
    assert places.culprit(module, X, "due to the sin of a topk, in a sentence", lambda alone, inputs: False) == ""


def test_the_first_operator_that_fails_by_itself(module):
    tried = []

    def fails(alone: nn.Module, inputs: tuple) -> bool:
        found = alone(*inputs)
        tried.append(len(found) if isinstance(found, tuple) else 0)
        return isinstance(found, tuple)

    assert places.culprit(module, X, "no reason given", fails) == "`inner` (topk)"
    assert tried[-1] == 1 and len(tried) >= 2  # of two results the one that is read


def test_a_search_that_breaks_says_nothing(module):
    assert places.culprit(module, X, "", never) == "" == places.culprit(Network(), X, "aten.erf", never)


def test_operators_in_a_runtime_s_own_spelling(module):
    assert places.named(module, ["torch.topk", "aten::erf", "F.unfold"]) == "torch.topk (`inner`), aten::erf (`inner`), F.unfold"

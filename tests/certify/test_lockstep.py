"""What the proof costs: passes and memory, counted."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foldexport import probes as probing
from foldexport.certify import certify
from tests.hand_folds import fold_chain, plain, run


class Cost(TorchDispatchMode):
    """Multiply-adds of convolutions, those in float32 at half, and the values of a size alive at each convolution."""

    def __init__(self, elements: int = 0) -> None:
        super().__init__()
        self.work, self.live, self._elements = 0.0, 0, elements
        self._values: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == self._elements:
            self._values.append(weakref.ref(result))
        if func is torch.ops.aten.convolution.default:
            self.work += (1.0 if result.dtype == torch.float64 else 0.5) * result.numel() * args[1][0].numel()
            alive = [value for value in (ref() for ref in self._values) if value is not None]
            self.live = max(self.live, len({value.untyped_storage().data_ptr() for value in alive}))
        return result


def test_the_proof_is_worth_at_most_60_passes():
    graph, program = fold_chain(plain(2, 4), torch.zeros(2, 3, 64, 64))
    with Cost() as whole:
        run(graph, program, noise_probes=probing.noise_probes(graph))
    with Cost() as single, torch.no_grad():
        program.module(torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    assert 20 < whole.work / single.work <= 45


@pytest.mark.parametrize("depth", [4, 16])
def test_memory_does_not_grow_with_depth(depth):
    graph, program = fold_chain(plain(depth, 4), torch.zeros(2, 3, 16, 16))
    with Cost(4 * 16 * 16) as cost:
        certify(graph, program, probing.make(graph)[1:2])
    assert 2 <= cost.live <= 9

"""Networks that are refused: values decide, or each call gives something else, or they do not run. The tests know the lines."""

from __future__ import annotations

import ctypes
import random
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn

from tests.trace.odd_networks import Base


class BranchOnValues(Base):
    def forward(self, x):
        x = self.conv(x)
        if x.sum() > 0:  # here
            return x
        return x + 1


class LoopOnValues(Base):
    def forward(self, x):
        while x.abs().max() > 0.1:  # here
            x = x / 2
        return x


class ConditionOverLines(nn.Module):
    def forward(self, x):
        return helper(x)


def helper(x):
    if (
        x.mean() > 0  # here
        and x.max() > 1
    ):
        return x * 2
    return x


class BranchDeepInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(), ConditionOverLines())

    def forward(self, x):
        return self.layers(x)


def choosing(module, inputs, output):
    return output * 2 if output.max() > 3 else None  # here


class BranchInAHook(Base):
    def __init__(self):
        super().__init__()
        self.conv.register_forward_hook(choosing)

    def forward(self, x):
        return self.conv(x)


class NumberForASlice(Base):
    def forward(self, x):
        return self.conv(x)[:, : int(x.abs().max())]  # here


class IndexIntoAList(Base):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x):
        y = self.conv(x)
        return self.experts[y.mean().long() % 3](y)  # here


class BufferOfTheInput(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        part = self.mean[:2]
        self.mean[0] = x.mean()
        return x if part[0] > 0 else self.conv(x)  # here


class MaskedIndex(Base):
    def forward(self, x):
        x = self.conv(x)
        x[x < 0] *= 0.1  # here
        return x


class Nonzero(Base):
    def forward(self, x):
        return self.conv(x).nonzero()  # here


class AssertionWithTwoSides(Base):
    def forward(self, x):
        assert (x == x).all() and not x.isinf().any()  # here
        return self.conv(x)


class CaughtCheck(Base):
    def forward(self, x):
        try:
            if x.mean() > 0:  # here
                raise ValueError("positive")
        except ValueError:
            return x
        return self.conv(x)


class ObjectOutput(Base):
    def forward(self, x):
        return types.SimpleNamespace(out=self.conv(x))


class GeneratorOutput(Base):
    def forward(self, x):
        yield self.conv(x)


class Threaded(Base):
    def forward(self, x):
        with ThreadPoolExecutor(2) as pool:
            return sum(pool.map(self.conv, [x, x * 2]))


class CompiledKernel(Base):
    def forward(self, x):
        y = self.conv(x)
        ctypes.memset(y.data_ptr(), 0, 4)  # here
        return y


torch.library.define("foldexport_tests::shapeless", "(Tensor x) -> Tensor")
torch.library.impl("foldexport_tests::shapeless", "cpu", lambda x: x * 2)


class ShapelessOperator(Base):
    def forward(self, x):
        return torch.ops.foldexport_tests.shapeless(self.conv(x))  # here


class SparseWeight(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.eye(4).to_sparse())

    def forward(self, x):
        return torch.sparse.mm(self.matrix, self.conv(x).flatten(2)[0])  # here


class SeededGenerator(Base):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x):
        return self.conv(x) + torch.randn(4, 1, 1, generator=self.generator)  # here


class DataOfAnotherShape(Base):
    def forward(self, x):
        y = self.conv(x)
        y.data = y.data[:, :2]  # here
        return y


# ---- another result at each call


class PythonRandom(Base):
    def forward(self, x):
        return self.conv(x) * (1 + random.random())  # here


class NumPyRandom(Base):
    def forward(self, x):
        scale = np.random.rand()  # here
        return self.conv(x) * scale


class Clock(Base):
    def forward(self, x):
        phase = time.time() % 60  # here
        return self.conv(x) * phase


class CallsCount(Base):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.conv(x) * self.calls


class WeightsGrow(Base):
    def forward(self, x):
        self.conv.weight = nn.Parameter(self.conv.weight * 2)
        return self.conv(x)


class HidesModules(Base):
    def __init__(self):
        super().__init__()
        self.modules = 3

    def forward(self, x):
        return self.conv(x) * self.modules


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.LazyConv2d(4, 1)

    def forward(self, x):
        return self.first(x)


# ---- do not run as they stand


class NeedsGpu(Base):
    def forward(self, x):
        return self.conv(x.cuda())  # here


class TakesADict(Base):
    def forward(self, batch):
        return self.conv(batch["image"]) * batch["mask"]  # here


class LacksAPart(Base):
    def forward(self, x):
        return self.head(self.conv(x))  # here


class NeedsAPackage(Base):
    def forward(self, x):
        import surely_not_installed  # here

        return surely_not_installed.run(x)


class NoForward(Base):
    pass


class OtherTypes(Base):
    def forward(self, x):
        return self.conv(x.double())  # here


class ShapeChecked(Base):
    def forward(self, x):
        assert x.shape[2] % 16 == 0  # here
        return self.conv(x)

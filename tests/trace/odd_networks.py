"""Networks as users write them, that trace all the same: each computes what it computed, at every batch that it allows."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import logging
import random
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CACHE: dict[int, Tensor] = {}


class Base(nn.Module):
    """A convolution of three channels to four."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)


# ---- Python that looks at shapes, and state that does not matter


class BranchOnShape(Base):
    def forward(self, x):
        x = self.conv(x)
        return x if x.shape[2] > 4 else x + 1


class BatchInView(Base):
    def forward(self, x):
        assert x.shape[1] == 3 and x.dim() == 4, "RGB"
        return self.conv(x).view(x.shape[0], -1)


class Einsum(Base):
    def forward(self, x):
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 2, 2, w // 2, 2)
        return torch.einsum("bchpwq->bpqchw", x).reshape(b * 4, c, h // 2, w // 2)


class Interpolated(Base):
    def forward(self, x):
        y = F.avg_pool2d(self.conv(x), 2)
        return torch.where(x > 0, F.interpolate(y, size=x.shape[2:], mode="bilinear")[:, :3], x)


class Counter(Base):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.features = []
        self.seen = {}
        self.conv.register_forward_hook(lambda m, i, o: self.seen.update(conv=o))

    def forward(self, x):
        self.calls += 1
        self.features.append(self.conv(x))
        return self.seen["conv"] + 1


class Cached(Base):
    grid = None

    @functools.lru_cache(None)  # noqa: B019
    def row(self, length):
        return torch.arange(length).float()

    def forward(self, x):
        if self.grid is None:
            self.grid = torch.linspace(0, 1, x.shape[3])
        if x.shape[3] not in CACHE:
            CACHE[x.shape[3]] = torch.ones(x.shape[3])
        return self.conv(x) + self.grid + self.row(x.shape[3]) + CACHE[x.shape[3]]


class Timed(Base):
    def forward(self, x):
        began = time.time()
        y = self.conv(x)
        self.took = time.time() - began
        return y


class Talkative(Base):
    def forward(self, x):
        print("shape", x.shape, "mean", x.mean(), f"{x.max().item():.3f}")
        logging.getLogger("net").warning("mean %s", x.mean())
        return self.conv(x)


class DrawsInTraining(Base):
    def forward(self, x):
        skip = random.random() < 0.5
        return x if self.training and skip else self.conv(x)


# ---- modules in odd places


class Reused(Base):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.ReLU()])
        self.also, self.never = self.body, nn.Conv2d(9, 9, 1)
        self.plain = [nn.Conv2d(4, 4, 1).eval()]
        self.act = functools.partial(F.leaky_relu, negative_slope=0.1)
        self.gate = lambda t: t * torch.sigmoid(t)

    def forward(self, x):
        x = self.conv(x)
        for layer in [*self.also, *self.body, *self.plain]:
            x = layer(x)
        return self.gate(self.act(x))


class Hooked(Base):
    def __init__(self):
        super().__init__()
        self.conv.register_forward_hook(lambda m, i, o: o * 2)
        self.conv.register_forward_pre_hook(lambda m, i: (i[0] + 1,))
        self.register_forward_hook(lambda m, i, o: o - 3)

    def forward(self, x):
        return self.conv(x)


class Deployed(Base):
    def __init__(self):
        super().__init__()
        self.forward = self.forward_deploy

    def forward_deploy(self, x):
        return self.conv(x) * 3

    def forward(self, x):
        return self.conv(x)


class MakesLayer(Base):
    def forward(self, x):
        return nn.BatchNorm2d(4).eval()(copy.deepcopy(self.conv)(copy.deepcopy(x)))


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Wrapped(Base):
    """Autograd functions, checkpointing, no_grad, autocast that is off, a profiler's range."""

    def forward(self, x):
        with torch.no_grad(), torch.profiler.record_function("conv"):
            x = checkpoint(self.conv, x, use_reentrant=False)
        with torch.autocast("cpu", enabled=False):
            return Swish.apply(x.float().to(self.conv.weight.device)).half().float()


class Vmapped(Base):
    def forward(self, x):
        return torch.vmap(lambda t: t * 2)(self.conv(x))


class Complex(Base):
    def forward(self, x):
        return self.conv(torch.fft.ifft2(torch.fft.fft2(x)).real)


class NumPyConstants(Base):
    def __init__(self):
        super().__init__()
        self.mean = np.array([0.1, 0.2, 0.3], np.float32)

    def forward(self, x):
        mean = torch.tensor(self.mean).view(1, 3, 1, 1) + torch.tensor([0.4, 0.5, 0.6])[:, None, None]
        return self.conv((x - mean) / torch.tensor(x.shape[2] + 1.0)) * np.float32(2.0) + np.pi


# ---- writes that tracing does not see by itself


class DataWrites(Base):
    def forward(self, x):
        self.conv.weight.data.clamp_(-0.1, 0.1)
        x = self.conv(x)
        x[:, :2] += 1
        x.data.add_(1)
        x.data = x.data * 2
        return x.data + self.conv.weight.data.sum()


class MaskedWrite(Base):
    def forward(self, x):
        x = self.conv(x)
        x[x < 0] = 0
        return x


# ---- what Python reads from weights


class Settings(Base):
    """Values of weights decide: a truth, a number, a list, an index, a loop, NumPy."""

    def __init__(self):
        super().__init__()
        self.register_buffer("on", torch.tensor(True))
        self.register_buffer("widths", torch.tensor([1, 3]))
        self.register_buffer("times", torch.tensor(3))
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.heads = nn.ModuleList([nn.Conv2d(4, 2, 1), nn.Conv2d(4, 5, 1)])

    def forward(self, x):
        if not self.on or self.conv.weight.abs().max() > 9:
            return x
        x = self.conv(x) * float(self.alpha) * (1 + self.alpha.detach().numpy().item())
        for _ in range(self.times):
            x = F.relu(x + 1)
        parts = x.split(self.widths.tolist(), 1)
        return self.heads[self.on.long()](torch.cat(parts, 1))


class Inferring(Base):
    """Reads a weight where PyTorch counts no writes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("on", torch.tensor(True))

    @torch.inference_mode()
    def forward(self, x):
        self.seen.copy_(x.mean())
        return self.conv(x) + self.seen if self.on else x


class Selected(Base):
    """Channels that masks among the weights select, as in pruned networks."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.indexes = nn.Parameter(torch.tensor([1.0, 0.0, 1.0]))
        self.last = nn.Conv2d(2, 5, 1)

    def forward(self, x):
        x = self.conv(x)[:, self.mask]
        places = np.squeeze(np.argwhere(self.indexes.data.cpu().numpy()))
        kept = self.mask[:2].nonzero().squeeze(1)
        return self.last(x[:, places, :, :]) + x.index_select(1, kept)


class CountsInABuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.conv(x) if self.calls > 0 else x


class Checked(Base):
    """Conditions on values that guard an error or a message."""

    def forward(self, x):
        assert not torch.isnan(x).any() and not torch.isinf(x).any(), "not finite"
        assert x.max().item() < 1e6
        assert torch.allclose(x, x)
        if not torch.isfinite(x).all():
            raise ValueError("not finite")
        if x.isnan().any():
            print("not a number")
        return self.conv(x)


# ---- outputs and inputs


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


@dataclasses.dataclass
class Result:
    out: Tensor
    aux: Tensor | None = None


class ManyOutputs(Base):
    def forward(self, x, mask=None):
        y = self.conv(x) if mask is None else self.conv(x) * mask
        return {"a": [y, x * 2], "b": Pair(y + 1, None), "c": collections.OrderedDict(d=(y, None)), "name": "seg"}


class DataclassOutput(Base):
    def forward(self, x):
        return {"nested": [Result(self.conv(x), x)]}


class Arguments(Base):
    def forward(self, *args, **kwargs):
        return self.run(*args, **kwargs)

    def run(self, x, scale=2):
        return self.conv(x) * scale


class Deep(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.inner = Deep(depth - 1) if depth else None

    def forward(self, x):
        x = self.conv(x)
        return x if self.inner is None else self.inner(x)

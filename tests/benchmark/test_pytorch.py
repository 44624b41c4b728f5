"""PyTorch's runtimes: modules on their way to another process, and what they compute there."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import foldexport
from foldexport.arch import load_arch
from foldexport.benchmark import transport
from foldexport.benchmark.runtimes import get
from foldexport.benchmark.runtimes import pytorch as runtimes

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).relu()
"""


class Local(nn.Module):
    def forward(self, x):
        return x * 2


def ran(name, path, x):
    ready = get(name).load(path, [x.numpy()], 1, "cpu")
    return ready.outputs(ready.run())[0]


@pytest.fixture
def threads():
    """The number of threads is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_users_own_module_is_built_again_from_its_file(tmp_path, threads):
    (tmp_path / "mine.py").write_text(NET)
    module, x = load_arch(f"{tmp_path / 'mine.py'}:Net").eval(), torch.randn(2, 3, 6, 6)
    path, why = transport.save(module, (x,), tmp_path / "net.torch", free_batch=True)
    assert not why and path.suffix == ".torch"
    assert np.array_equal(ran("eager", path, x), module(x).detach().numpy())


def test_what_no_process_can_build_again_goes_as_a_program(tmp_path, threads):
    class Inner(nn.Module):
        def forward(self, x):
            return x + 1

    x = torch.randn(2, 3)
    for module in (Inner().eval(), nn.Sequential(weight_norm(nn.Linear(3, 4))).eval()):
        path, why = transport.save(module, (x,), tmp_path / type(module).__name__, free_batch=True)
        assert why and path.suffix == ".pt2"
        more = torch.randn(5, 3)
        assert np.allclose(ran("eager", path, more), module(more).detach().numpy(), atol=1e-6)


def test_a_folded_network_goes_as_itself(tmp_path, threads):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 6, 6)
    folded = foldexport.fold(module, x)
    path, why = transport.save(folded.module, (x,), tmp_path / "net", free_batch=True)
    assert not why and np.allclose(ran("eager", path, x), module(x).detach().numpy(), atol=1e-5)


def test_an_archive_is_frozen_and_computes_the_same(tmp_path, threads):
    module, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(1, 3, 6, 6)
    torch.jit.save(torch.jit.trace(module, x), tmp_path / "net.pt")
    assert np.allclose(ran("torchscript", tmp_path / "net.pt", x), module(x).detach().numpy(), atol=1e-6)


def test_comparing_numbers_leaves_tf32_off(tmp_path, threads):
    path, _ = transport.save(Local().eval(), (torch.ones(2),), tmp_path / "net", free_batch=False)
    get("eager").load(path, [np.ones(2, np.float32)], 1, "cpu")
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


class Makes(nn.Module):
    """Makes a tensor for every batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x).mean((2, 3))
        return torch.cat([y, torch.zeros(x.shape[0], 1, device=x.device) + y[:, :1]], 1)


def test_what_a_graph_makes_itself_is_made_on_the_device_too(tmp_path):
    """The device of the trace stands in the graph, where Module.to does not reach."""
    x = torch.randn(2, 3, 6, 6)
    folded = foldexport.fold(Makes().eval(), x)
    path, why = transport.save(folded.module, (x,), tmp_path / "net", free_batch=True)
    assert not why and path.suffix == ".torch"  # the module itself, whose calls cost what the unfolded one's do
    moved = runtimes._module(path, "meta")
    assert moved(torch.zeros(5, 3, 6, 6, device="meta")).device.type == "meta"


def test_a_cuda_graph_keeps_what_it_reads(tmp_path, threads, monkeypatch):
    """The capture itself needs a GPU (tests/gpu); that weights and inputs outlive it does not."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": nullcontext, "graph": nullcontext,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None), "synchronize": lambda: None,
    }  # fmt: skip
    for name, each in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, each)
    path, _ = transport.save(nn.Linear(3, 2), (torch.ones(2, 3),), tmp_path / "net", free_batch=True)
    held: list[weakref.ref] = []
    load, prepare = runtimes._module, runtimes._prepare

    def module(*given):
        found = load(*given)
        held.append(weakref.ref(found))
        return found

    def inputs(*given):
        found = prepare(*given)
        held.extend(map(weakref.ref, found))
        return found

    monkeypatch.setattr(runtimes, "_module", module)
    monkeypatch.setattr(runtimes, "_prepare", inputs)
    ready = runtimes.cuda_graph(path, [np.ones((2, 3), np.float32)], 1, "cpu")
    gc.collect()
    assert len(held) == 2 and all(each() is not None for each in held) and ready.run() is not None
    del ready
    gc.collect()
    assert all(each() is None for each in held)

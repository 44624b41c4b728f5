"""What is taken from a good checkpoint file, and what is said about it."""

from __future__ import annotations

import argparse
import collections
import hashlib
import pathlib
import pickle
import subprocess
import sys
import types

import numpy as np
import torch
from torch import nn

from foldexport import checkpoint
from tests.checkpoint_files import Network, layouts, refused, rewrite_zip, same, save, state


@layouts
def test_plain_state_dict(tmp_path, layout):
    path = save(state(), tmp_path / "net.pth", layout)
    read = checkpoint.read(path)
    same(read.tensors, state())
    assert (read.format, read.taken, read.prefix, read.ema, read.notes, read.module) == (
        layout,
        "",
        "",
        False,
        [],
        None,
    )
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_read_accepts_text_paths_and_any_suffix(tmp_path):
    same(checkpoint.read(str(save(state(), tmp_path / "model_best.pth.tar"))).tensors, state())


@layouts
def test_harmless_classes_beside_the_weights(tmp_path, layout):
    options = argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("runs/1"), widths=(64, 128))
    content = {
        "state_dict": state(),
        "args": options,
        "simple": types.SimpleNamespace(depth=18),
        "best": np.float64(0.75),
        "step": np.int64(12),
        "flag": np.bool_(True),
        "history": collections.defaultdict(list, {"top1": [1, 2]}),
        "mean": np.array([0.5, 0.25]),
        "torch": torch.__version__,
    }
    read = checkpoint.read(save(content, tmp_path / "a.pth", layout))
    same(read.tensors, state())
    assert read.metadata["args"] == {"lr": 0.1, "out": "runs/1", "widths": [64, 128]}
    assert read.metadata["simple"] == {"depth": 18} and read.metadata["history"] == {"top1": [1, 2]}
    assert (read.metadata["best"], read.metadata["step"], read.metadata["flag"]) == (0.75, 12, True)
    assert read.metadata["torch"] == str(torch.__version__)


@layouts
def test_numpy_arrays_as_weights(tmp_path, layout):
    arrays = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "half": np.ones(2, np.float16),
    }
    read = checkpoint.read(save({"model": arrays}, tmp_path / "a.pth", layout))
    for key, array in arrays.items():
        assert np.array_equal(read.tensors[key].numpy(), array)


class Pickled:
    """Pickles as a call, the way that an older PyTorch pickled its own classes."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce_ex__(self, protocol):
        return self.reduced


def test_parameters_and_variables_of_torch_0_3(tmp_path):
    """torch/autograd/variable.py of 0.3 reduces to (type, (data,), (requires_grad, volatile, hooks))."""

    def old_tensor(tensor):
        storage = torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)
        return Pickled(torch._utils._rebuild_tensor, (storage, 0, tuple(tensor.shape), tensor.stride()))

    def old_variable(kind, tensor, requires_grad):
        return Pickled(kind, (old_tensor(tensor),), (requires_grad, False, collections.OrderedDict()))

    weight, mean, eye = torch.randn(2, 3), torch.randn(3), torch.eye(3)
    content = {
        "params": {
            "conv": old_variable(nn.Parameter, weight, True),
            "alpha": old_variable(torch.autograd.Variable, mean, True),
        },
        "stats": {"eye": old_tensor(eye)},
    }
    read = checkpoint.read(save(content, tmp_path / "a.pth", "torch legacy"))
    same(read.tensors, {"conv": weight, "alpha": mean, "eye": eye})


@layouts
def test_tensors_saved_on_a_gpu(tmp_path, layout):
    path = save({"w": torch.arange(4.0)}, tmp_path / "a.pth", layout)
    swap = {b"X\x03\x00\x00\x00cpu": b"X\x06\x00\x00\x00cuda:0", b"ctorch\nFloatStorage": b"ctorch.cuda\nFloatStorage"}

    def on_cuda(data):
        for old, new in swap.items():
            assert old in data
            data = data.replace(old, new)
        return data

    if layout == "torch legacy":
        path.write_bytes(on_cuda(path.read_bytes()))
    else:
        rewrite_zip(path, {"a/data.pkl": on_cuda})
    same(checkpoint.read(path).tensors, {"w": torch.arange(4.0)})


def test_strides_parameters_and_half_precision(tmp_path):
    content = {
        "t": torch.arange(6.0).reshape(2, 3).t(),
        "view": torch.arange(10.0)[::2],
        "cl": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "p": nn.Parameter(torch.ones(2)),
        "half": torch.ones(2, dtype=torch.float16),
        "bf": torch.ones(2, dtype=torch.bfloat16),
        "complex": torch.tensor([1 + 2j]).conj(),
    }
    read = checkpoint.read(save(content, tmp_path / "a.pth"))
    same(read.tensors, {key: value.detach() for key, value in content.items()})
    assert read.notes == [
        "half precision: 1 of 6 float tensors are float16",
        "half precision: 1 of 6 float tensors are bfloat16",
    ]


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "model.bin"
    save_file({f"module.{key}": value for key, value in state().items()}, path, metadata={"arch": "resnet"})
    read = checkpoint.read(path)
    assert {key: value.tolist() for key, value in read.tensors.items()} == {k: v.tolist() for k, v in state().items()}
    assert (read.format, read.prefix, read.metadata) == ("safetensors", "module.", {"arch": "resnet"})


def test_torchscript(tmp_path):
    network = Network().eval()
    torch.jit.script(network).save(str(tmp_path / "net.pt"))
    read = checkpoint.read(tmp_path / "net.pt")
    assert read.format == "torchscript"
    same(read.tensors, dict(network.state_dict()))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(read.module(x), network(x))


def test_pt2_weights_without_trust_and_program_with(tmp_path):
    network = Network().eval()
    x = torch.randn(2, 3, 8, 8)
    torch.export.save(torch.export.export(network, (x,)), tmp_path / "net.pt2")
    read = checkpoint.read(tmp_path / "net.pt2")
    assert read.format == "pt2" and read.module is None and "only its weights" in read.notes[0]
    same(read.tensors, dict(network.state_dict()))
    trusted = checkpoint.read(tmp_path / "net.pt2", trust_pickle=True)
    same(trusted.tensors, dict(network.state_dict()))
    assert torch.equal(trusted.module(x), network(x))


@layouts
def test_pickled_module_needs_trust(tmp_path, layout):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    path = save({"model": nn.DataParallel(network), "epoch": 2}, tmp_path / "net.pth", layout)
    refused(path, "wants to run `torch.nn.", "whole pickled network", "nothing was run", "--trust-pickle")
    read = checkpoint.read(path, trust_pickle=True)
    assert read.format == "pickled module" and read.metadata == {"epoch": 2} and "opened with trust" in read.notes[0]
    same(read.tensors, dict(network.state_dict()))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(read.module(x), network(x))


def test_trust_changes_nothing_for_a_file_without_code(tmp_path):
    read = checkpoint.read(save({"model": state()}, tmp_path / "a.pth"), trust_pickle=True)
    assert read.notes == ["took the weights under `model`"]


def test_pickled_class_that_is_not_here(tmp_path):
    script = "import torch, sys; from torch import nn\nclass Net(nn.Linear): pass\ntorch.save(Net(2, 2), sys.argv[1])"
    path = tmp_path / "net.pth"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    refused(path, "`__main__.Net`")
    refused(path, "not importable here", "Net", trust_pickle=True)


def test_plain_pickle(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"model": {"w": np.ones(3, np.float32)}, "author": "x"}))
    refused(path, "pickle", "--trust-pickle")
    read = checkpoint.read(path, trust_pickle=True)
    same(read.tensors, {"w": torch.ones(3)})
    assert read.metadata == {"author": "x"} and read.format == "pickle"

"""Code in a checkpoint file: it must not run, and the plants are live."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from foldexport import checkpoint
from tests.checkpoint_files import Network, layouts, plants, refused, rewrite_zip, same, save, state


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "io.open", "subprocess.Popen"])
@layouts
def test_planted_code_does_not_run(tmp_path, layout, name):
    marker = tmp_path / "marker"
    path = save({"state_dict": state(), "extra": plants(marker)[name]}, tmp_path / "evil.pth", layout)
    named = f"{io.open.__module__}.open" if name == "io.open" else name  # which Python 3.13 calls _io.open
    refused(path, f"the file wants to run `{named}`", "nothing was run", "--trust-pickle")
    assert not marker.exists()


@layouts
def test_the_plant_is_live(tmp_path, layout):
    """The proof above means something only if the planted code does run where the file is trusted."""
    marker = tmp_path / "marker"
    path = save({"state_dict": state(), "extra": plants(marker)["os.system"]}, tmp_path / "evil.pth", layout)
    read = checkpoint.read(path, trust_pickle=True)
    assert marker.exists()
    assert "opened with trust: code in the file may have run (`os.system`)" in read.notes


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_planted_code_in_a_plain_pickle_does_not_run(tmp_path, protocol):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(plants(marker)["os.system"], protocol=protocol))
    refused(path, "`os.system`" if protocol != 1 else "")
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [4, 5])
def test_newer_pickle_protocols(tmp_path, protocol):
    marker = tmp_path / "marker"
    refused(save(state(), tmp_path / "a.pth", pickle_protocol=protocol), f"pickle protocol {protocol}", "Save it again")
    same(checkpoint.read(tmp_path / "a.pth", trust_pickle=True).tensors, state())
    evil = save({"a": plants(marker)["os.system"]}, tmp_path / "b.pth", pickle_protocol=protocol)
    refused(evil, "`os.system`")
    assert not marker.exists()


def test_numpy_objects_are_not_rebuilt(tmp_path):
    path = save({"state_dict": state(), "names": np.array([None, {}], dtype=object)}, tmp_path / "a.pth")
    refused(path, "NumPy", "cannot be read safely")
    same(checkpoint.read(path, trust_pickle=True).tensors, state())


class Acting(nn.Module):
    def __init__(self, marker: str):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.marker = marker

    def forward(self, x):
        return x * self.weight

    @torch.jit.export
    def __getstate__(self):
        return (self.weight, self.marker, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
        self.weight, self.marker, self.training = state[0], state[1], state[2]
        torch.save(state[0], state[1])


def test_torchscript_that_acts_on_loading(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    torch.jit.script(Acting(str(marker))).save(str(path))
    marker.unlink(missing_ok=True)
    refused(path, "TorchScript archive wants to run `__setstate__`", "nothing was run", "--trust-pickle")
    assert not marker.exists()
    checkpoint.read(path, trust_pickle=True)
    assert marker.exists()


def test_torchscript_code_under_names_of_another_case(tmp_path):
    """PyTorch's zip reader finds code/x.py under CODE/X.PY, so a search by name alone would miss it."""
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    torch.jit.script(Acting(str(marker))).save(str(path))
    marker.unlink(missing_ok=True)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name.replace("/code/", "/CODE/"), data)
    refused(path, "wants to run `__setstate__`")
    assert not marker.exists()
    checkpoint.read(path, trust_pickle=True)
    assert marker.exists()


def test_pt2_with_code_in_it(tmp_path):
    """torch.export.load evaluates shape expressions; the weights are read without it."""
    marker, path = tmp_path / "marker", tmp_path / "net.pt2"
    network, batch = Network().eval(), torch.export.Dim("batch")
    program = torch.export.export(network, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    evil = f"__import__('pathlib').Path({str(marker)!r}).touch()"

    def plant(data):
        content = json.loads(data)
        stack, planted = [content], 0
        while stack:
            item = stack.pop()
            if isinstance(item, dict) and "expr_str" in item:
                item["expr_str"], planted = evil, planted + 1
            stack.extend(item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        assert planted
        return json.dumps(content).encode()

    rewrite_zip(path, {"net/models/model.json": plant})
    same(checkpoint.read(path).tensors, dict(network.state_dict()))
    assert not marker.exists()
    refused(path, "does not load", trust_pickle=True)
    assert marker.exists()


def test_pt2_weights_that_are_pickled(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "net.pt2"
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.randn(2, 2),)), path)

    def pickled_entry(data):
        content = json.loads(data)
        content["config"]["weight"]["use_pickle"] = True
        return json.dumps(content).encode()

    with io.BytesIO() as buffer:
        torch.save(plants(marker)["os.system"], buffer)
        evil = buffer.getvalue()
    rewrite_zip(
        path, {"net/data/weights/model_weights_config.json": pickled_entry, "net/data/weights/weight_0": lambda _: evil}
    )
    refused(path, "cannot be read safely", "os.system" if os.name == "nt" else "posix.system")
    assert not marker.exists()

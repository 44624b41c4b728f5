"""TorchScript archives: no trace of the machine or the process, every free axis free, every weight in place."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from foldexport.errors import EquivalenceError, UsageError
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.torchscript.exporter import TorchScriptExporter
from foldexport.exporters.weights import expected_weights, match_weights
from tests.exporters import networks
from tests.exporters.networks import IMAGE
from tests.exporters.test_onnx import EXPORT_SCRIPT

EXPORTER = TorchScriptExporter()
EXAMPLE = (torch.zeros(1, *IMAGE),)


def weights(module: nn.Module, path: Path):
    return match_weights(expected_weights(module), EXPORTER.weights(path))


def traced(module: nn.Module) -> nn.Module:
    return torch.fx.symbolic_trace(module)


@pytest.mark.parametrize(
    "network",
    [networks.chain, lambda: traced(networks.chain()), networks.Views, lambda: traced(networks.Views().eval())],
    ids=["chain", "chain as graph", "views", "views as graph"],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_batch_one_and_three_whatever_the_example(network, batch, tmp_path):
    module, path = network().eval(), tmp_path / "net.torchscript.pt"
    notes = EXPORTER.export(module, (torch.zeros(batch, *IMAGE),), path)
    assert notes == {"inputs": ["input"], "outputs": ["output"]}
    found = networks.proof(EXPORTER, module, networks.probes(IMAGE), path, weights(module, path))
    assert found.ok and not found.message and found.batches == (1, 3), found
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_other_heights_and_widths(tmp_path):
    module, path = networks.Views().eval(), tmp_path / "net.pt"
    EXPORTER.export(module, EXAMPLE, path, ExportOptions(dynamic=("batch", "height", "width")))
    assert networks.proof(EXPORTER, module, networks.probes((3, 24, 20)), path).ok


def test_several_inputs_and_outputs(tmp_path):
    module, path = networks.TwoByThree().eval(), tmp_path / "net.pt"
    notes = EXPORTER.export(
        module, (torch.zeros(1, *IMAGE), torch.zeros(1, 5)), path, ExportOptions(input_names=("image", "vector"))
    )
    assert notes == {"inputs": ["image", "vector"], "outputs": ["output_0", "output_1", "output_2"]}
    assert networks.proof(EXPORTER, module, networks.probes(IMAGE, (5,)), path).ok


def test_a_dictionary_of_outputs(tmp_path):
    class Heads(nn.Module):
        def forward(self, x):
            return {"b": x + 1, "a": x * 2}

    notes = EXPORTER.export(Heads().eval(), EXAMPLE, tmp_path / "net.pt")
    assert notes["outputs"] == ["output_0", "output_1"]
    added, doubled = EXPORTER.load(tmp_path / "net.pt")(np.ones((2, *IMAGE), np.float32))
    assert (added == 2).all() and (doubled == 2).all()


def test_tied_weights_and_a_buffer_outside_of_the_state(tmp_path):
    module, path = networks.Tied().eval(), tmp_path / "net.pt"
    EXPORTER.export(module, (torch.zeros(1, 4, 8, 8),), path)
    assert weights(module, path).ok and weights(module, path).total == 7
    assert networks.proof(EXPORTER, module, networks.probes((4, 8, 8)), path).ok


def test_no_path_no_date_no_name_inside(tmp_path):
    path = tmp_path / "a telling name.pt"
    EXPORTER.export(networks.chain(), EXAMPLE, path)
    assert networks.local_traces(path) == [] and b"telling" not in path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        assert {record.date_time for record in records} == {(1980, 1, 1, 0, 0, 0)}
        assert {record.filename.split("/")[0] for record in records} == {"archive"}
        assert not [record.filename for record in records if "debug" in record.filename or "traced" in record.filename]
        content = path.read_bytes()
        for record in records:
            if "/data/" in record.filename:
                assert content.index(archive.read(record), record.header_offset) % 64 == 0


def test_same_bytes_from_another_process_folder_and_history(tmp_path):
    path, other = tmp_path / "net.pt", tmp_path / "other name.pt"
    for _ in range(3):  # what was traced before numbers the classes of a process
        EXPORTER.export(networks.chain(), EXAMPLE, path)
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "elsewhere").mkdir()
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", EXPORT_SCRIPT, "torchscript", str(other)]
    subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, check=True, capture_output=True)
    assert other.read_bytes() == path.read_bytes()


def test_switches_of_the_process_stay_out(tmp_path):
    EXPORTER.export(networks.chain(), EXAMPLE, tmp_path / "a.pt")
    with torch.backends.cudnn.flags(enabled=False, benchmark=True, deterministic=True, allow_tf32=True):
        EXPORTER.export(networks.chain(), EXAMPLE, tmp_path / "b.pt")
        assert torch.backends.cudnn.benchmark and torch.backends.cudnn.deterministic
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_two_classes_of_one_file_keep_apart(tmp_path):
    """``Conv2d`` and ``ConvTranspose2d`` share a Python file, hence a code file in some processes only."""
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 2, 1), nn.Flatten(2)).eval()
    path = tmp_path / "net.pt"
    EXPORTER.export(flat, EXAMPLE, path)
    assert networks.proof(EXPORTER, flat, networks.probes(IMAGE), path, weights(flat, path)).ok
    with zipfile.ZipFile(path) as archive:
        code = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")]
    assert all(text.count("class ") == 1 for text in code) and len(code) == 5


def test_nothing_is_printed(tmp_path, capfd, recwarn):
    EXPORTER.export(networks.chain(4), EXAMPLE, tmp_path / "net.pt")
    EXPORTER.load(tmp_path / "net.pt")
    assert capfd.readouterr() == ("", "") and not list(recwarn)


def test_sizes_baked_into_the_trace_are_found(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(2, 3, 256)

    module, path = Fixed().eval(), tmp_path / "net.pt"
    EXPORTER.export(module, (torch.zeros(2, *IMAGE),), path)
    (probe,) = networks.probes(IMAGE, batches=(3,))
    found = networks.compare(
        [[probe[0].double().view(3, 3, 256)]],
        EXPORTER.load(path),
        [probe],
        networks.N32,
        format="torchscript",
        label="torch.jit",
    )
    assert not found.ok and "does not run on an input of 3x3x16x16" in found.message


def test_what_cannot_be_traced(tmp_path):
    with pytest.raises(UsageError, match="input 1 is a int; a trace takes tensors only"):
        EXPORTER.export(networks.chain(4), (*EXAMPLE, 3), tmp_path / "net.pt")

    class Refuses(nn.Module):
        def forward(self, x):
            raise ValueError("no such thing")

    with pytest.raises(UsageError, match="torch.jit cannot trace this network: no such thing"):
        EXPORTER.export(Refuses().eval(), EXAMPLE, tmp_path / "net.pt")
    assert not list(tmp_path.iterdir())


def test_file_that_torch_refuses(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"no archive at all")
    with pytest.raises(EquivalenceError, match="torch.jit .* refuses the file"):
        EXPORTER.load(tmp_path / "net.pt")

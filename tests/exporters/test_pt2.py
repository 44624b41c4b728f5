"""Programs of torch.export: no trace of the machine or the file's name, the batch free from one on, every weight in place."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from foldexport.errors import EquivalenceError, UsageError
from foldexport.exporters import get
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.pt2 import ProgramExporter
from tests.exporters import formats, networks
from tests.exporters.formats import EXAMPLE
from tests.exporters.networks import IMAGE

EXPORTER = ProgramExporter()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    module, path = formats.folded(), tmp_path_factory.mktemp("pt2") / "a telling name.pt2"
    return module, path, EXPORTER.export(module, EXAMPLE, path)


def test_batches_one_and_three_with_every_weight(made):
    module, path, notes = made
    found = formats.found(EXPORTER, module, path)
    assert found.ok and not found.message and found.batches == (1, 3), found
    assert found.weights_identical == (8, 8) and notes == {"inputs": ["input"], "outputs": ["output"], "operators": 11}
    assert EXPORTER.precision_of(path) == {"float32": 4} and [each.name for each in path.parent.iterdir()] == [path.name]


def test_other_heights_and_widths(tmp_path):
    module = formats.folded()
    EXPORTER.export(module, EXAMPLE, tmp_path / "net.pt2", ExportOptions(dynamic=("batch", "height", "width")))
    assert formats.found(EXPORTER, module, tmp_path / "net.pt2", (3, 24, 20)).ok


@pytest.mark.parametrize("network", [networks.Views, networks.Tied], ids=["views", "tied"])
def test_views_and_tied_weights(network, tmp_path):
    module = network().eval()
    shape = (4, 8, 8) if network is networks.Tied else IMAGE
    EXPORTER.export(module, (torch.zeros(1, *shape),), tmp_path / "net.pt2")
    assert formats.found(EXPORTER, module, tmp_path / "net.pt2", shape).ok


def test_several_inputs_and_outputs(tmp_path):
    module, options = networks.TwoByThree().eval(), ExportOptions(input_names=("image", "vector"))
    notes = EXPORTER.export(module, (torch.zeros(1, *IMAGE), torch.zeros(1, 5)), tmp_path / "net.pt2", options)
    assert notes["inputs"] == ["image", "vector"] and notes["outputs"] == ["output_0", "output_1", "output_2"]
    assert networks.proof(EXPORTER, module, networks.probes(IMAGE, (5,)), tmp_path / "net.pt2").ok


def test_no_path_no_date_no_name_no_example_inside(made, tmp_path):
    module, path, _ = made
    assert networks.local_traces(path) == [] and b"telling" not in path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert len({each.date_time for each in archive.infolist()}) == 1
        assert {each.filename.split("/")[0] for each in archive.infolist()} == {"program"}
    EXPORTER.export(module, (torch.randn(2, *IMAGE),), tmp_path / "net.pt2")
    assert (tmp_path / "net.pt2").read_bytes() == path.read_bytes()


def test_same_bytes_from_another_process_folder_and_history(tmp_path):
    for _ in range(2):
        EXPORTER.export(networks.chain(), EXAMPLE, tmp_path / "net.pt2")
    (other,) = formats.from_another_process(get("pt2"), tmp_path)
    assert other.read_bytes() == (tmp_path / "net.pt2").read_bytes()


def test_a_wrong_weight_in_the_file_is_caught(tmp_path):
    module, path = formats.folded(), tmp_path / "net.pt2"
    EXPORTER.export(module, EXAMPLE, path)
    right = module.get_parameter("body.3.weight").detach().numpy()
    wrong = right.copy()
    wrong.flat[5] *= np.float32(1 + 2**-20)
    formats.rewrite_zip(path, right.tobytes(), wrong.tobytes())
    found = formats.found(EXPORTER, module, path)
    assert not found.ok and "1 of 8 weights differ from the module's in their bits: body.3.weight" in found.message


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_types_are_read_back(precision, dtype, tmp_path):
    module, path = formats.folded().to(dtype), tmp_path / "net.pt2"
    EXPORTER.export(module, (EXAMPLE[0].to(dtype),), path, ExportOptions(precision=precision))
    assert EXPORTER.precision_of(path) == {str(dtype).removeprefix("torch."): 4}
    assert {str(each.dtype) for each in EXPORTER.weights(path).values()} == {str(dtype).removeprefix("torch.")}


def test_what_torch_export_cannot_take(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(2, -1)

    with pytest.raises(UsageError, match="pt2: the network fixes its batch at the example's size: leave it out of --dynamic"):
        EXPORTER.export(Fixed().eval(), (torch.zeros(2, 4, 3),), tmp_path / "net.pt2")
    with pytest.raises(UsageError, match="input 1 is a int; a program is written for tensors only"):
        EXPORTER.export(networks.chain(4), (*EXAMPLE, 3), tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_a_file_that_torch_refuses(tmp_path):
    (tmp_path / "net.pt2").write_bytes(b"no archive at all")
    with pytest.raises(EquivalenceError, match="pt2: torch.export .* refuses the file"):
        EXPORTER.load(tmp_path / "net.pt2")


def test_nothing_is_printed(tmp_path, capfd, recwarn):
    EXPORTER.export(networks.chain(4), EXAMPLE, tmp_path / "net.pt2")
    EXPORTER.load(tmp_path / "net.pt2")(np.zeros((1, *IMAGE), np.float32))
    assert capfd.readouterr() == ("", "") and not list(recwarn)

"""onnxruntime's own format: portable operators, the same bytes everywhere, every weight in place."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from foldexport.errors import EquivalenceError, PrecisionError
from foldexport.exporters import get
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.ort import file as ort_file
from foldexport.exporters.ort.exporter import OrtExporter
from tests.exporters import formats, networks
from tests.exporters.formats import EXAMPLE
from tests.exporters.networks import IMAGE

EXPORTER = OrtExporter()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    module, path = formats.folded(), tmp_path_factory.mktemp("ort") / "a telling name.ort"
    return module, path, EXPORTER.export(module, EXAMPLE, path)


def test_batches_one_and_three_with_every_weight(made):
    module, path, notes = made
    found = formats.found(EXPORTER, module, path)
    assert found.ok and not found.message and found.batches == (1, 3) and found.weights_identical == (8, 8), found
    assert (notes["inputs"], notes["outputs"], notes["level"]) == (["input"], ["output"], "extended")
    assert EXPORTER.precision_of(path) == {"float32": 4} and [each.name for each in path.parent.iterdir()] == [path.name]


def test_no_operator_of_one_processor_only(made):
    kinds = {kind for kind, _ in ort_file.read(made[1]).nodes}
    assert "FusedConv" in kinds and "ReorderInput" not in kinds, kinds


def test_other_sizes_names_and_an_older_opset(tmp_path):
    options = ExportOptions(("image",), ("scores",), opset=17, dynamic=("batch", "height", "width"))
    module = formats.folded()
    assert EXPORTER.export(module, EXAMPLE, tmp_path / "net.ort", options)["opset"] == 17
    assert formats.found(EXPORTER, module, tmp_path / "net.ort", (3, 24, 20)).ok


def test_several_inputs_and_outputs(tmp_path):
    module = networks.TwoByThree().eval()
    EXPORTER.export(module, (torch.zeros(1, *IMAGE), torch.zeros(1, 5)), tmp_path / "net.ort")
    assert networks.proof(EXPORTER, module, networks.probes(IMAGE, (5,)), tmp_path / "net.ort").ok


def test_same_bytes_from_another_process_folder_and_history(tmp_path):
    """onnxruntime itself writes part of the file in the order of a hash table, which differs from one call to the next."""
    for _ in range(2):
        EXPORTER.export(networks.chain(), EXAMPLE, tmp_path / "net.ort")
    (other,) = formats.from_another_process(get("ort"), tmp_path)
    assert other.read_bytes() == (tmp_path / "net.ort").read_bytes()
    assert ort_file.canonical(other.read_bytes()) == other.read_bytes()


def test_no_path_and_no_name_inside(made):
    assert networks.local_traces(made[1]) == [] and b"telling" not in made[1].read_bytes()


def test_a_wrong_weight_in_the_file_is_caught(tmp_path):
    module, path = formats.folded(), tmp_path / "net.ort"
    EXPORTER.export(module, EXAMPLE, path)
    right = module.get_parameter("body.3.weight").detach().numpy()
    wrong = right.copy()
    wrong.flat[5] *= np.float32(1 + 2**-20)
    formats.replace(path, right.tobytes(), wrong.tobytes())
    found = formats.found(EXPORTER, module, path)
    assert not found.ok and "1 of 8 weights differ from the module's in their bits: body.3.weight" in found.message


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_types_are_refused(precision, tmp_path):
    with pytest.raises(PrecisionError, match=f"ort is written in fp32, not {precision}"):
        EXPORTER.export(networks.chain(4), EXAMPLE, tmp_path / "net.ort", ExportOptions(precision=precision))
    assert not list(tmp_path.iterdir())


def test_files_of_other_formats(tmp_path):
    (tmp_path / "net.ort").write_bytes(b"no flat buffer at all")
    with pytest.raises(EquivalenceError, match="ort: onnxruntime .* refuses the file"):
        EXPORTER.load(tmp_path / "net.ort")
    with pytest.raises(EquivalenceError, match="net.ort is not in onnxruntime's format"):
        EXPORTER.weights(tmp_path / "net.ort")


def test_reading_leaves_the_path_as_it_was(made):
    before = list(sys.path)
    EXPORTER.weights(made[1])
    assert sys.path == before


def test_nothing_is_printed(tmp_path, capfd, recwarn):
    EXPORTER.export(networks.chain(4), EXAMPLE, tmp_path / "net.ort")
    assert EXPORTER.load(tmp_path / "net.ort", optimise=False, threads=1)(np.zeros((1, *IMAGE), np.float32))[0].shape == (1, 10)
    assert capfd.readouterr() == ("", "") and not list(recwarn)

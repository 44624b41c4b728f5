"""OpenVINO IR: float32 throughout, no telemetry, the same bytes everywhere, every weight in place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from foldexport.errors import EquivalenceError, PrecisionError, UsageError
from foldexport.exporters import get
from foldexport.exporters.openvino.exporter import OpenVinoExporter
from foldexport.exporters.openvino.importing import openvino as ov
from foldexport.exporters.options import ExportOptions
from tests.exporters import formats, networks
from tests.exporters.formats import EXAMPLE
from tests.exporters.networks import IMAGE

EXPORTER = OpenVinoExporter()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    module, path = formats.folded(), tmp_path_factory.mktemp("ir") / "a telling name.xml"
    return module, path, EXPORTER.export(module, EXAMPLE, path)


def test_batches_one_and_three_with_every_weight(made):
    module, path, notes = made
    found = formats.found(EXPORTER, module, path)
    assert found.ok and not found.message and found.batches == (1, 3), found
    assert found.weights_identical == (8, 8) and found.noise_multiple < 2
    assert (notes["inputs"], notes["outputs"]) == (["input"], ["output"])
    assert sorted(each.name for each in path.parent.iterdir()) == [path.with_suffix(".bin").name, path.name]


def test_it_is_float32_where_the_processor_would_rather_have_bfloat16(made):
    """What the hint is for: without it, a processor with bfloat16 is off by 1e-3."""
    module, path, _ = made
    assert EXPORTER.precision_of(path) == {"float32": 4}
    model = ov.Core().read_model(str(path))
    network = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert network.get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32
    (probe,) = networks.probes(IMAGE, batches=(2,))
    assert np.array_equal(network([probe[0].numpy()])[0], EXPORTER.load(path)(probe[0].numpy())[0])


def test_names_and_free_axes(tmp_path):
    options = ExportOptions(input_names=("image",), output_names=("scores",), dynamic=("batch", "height", "width"))
    module = formats.folded()
    EXPORTER.export(module, EXAMPLE, tmp_path / "net.xml", options)
    model = ov.Core().read_model(str(tmp_path / "net.xml"))
    assert (model.input(0).any_name, model.output(0).any_name) == ("image", "scores")
    assert str(model.input(0).get_partial_shape()) == "[?,3,?,?]"
    assert formats.found(EXPORTER, module, tmp_path / "net.xml", (3, 24, 20)).ok


def test_several_inputs_and_outputs(tmp_path):
    module = networks.TwoByThree().eval()
    EXPORTER.export(module, (torch.zeros(1, *IMAGE), torch.zeros(1, 5)), tmp_path / "net.xml")
    assert networks.proof(EXPORTER, module, networks.probes(IMAGE, (5,)), tmp_path / "net.xml").ok


def test_same_bytes_from_another_process_folder_and_history(tmp_path):
    path = tmp_path / "net.xml"
    for _ in range(2):  # OpenVINO numbers the operators of a process
        EXPORTER.export(networks.chain(), EXAMPLE, path)
    graph, weights = formats.from_another_process(get("openvino"), tmp_path)
    assert graph.read_bytes() == path.read_bytes() and weights.read_bytes() == path.with_suffix(".bin").read_bytes()


def test_no_path_and_no_name_inside(made):
    _, path, _ = made
    for each in (path, path.with_suffix(".bin")):
        assert networks.local_traces(each) == [] and b"telling" not in each.read_bytes()


def test_a_wrong_weight_in_the_file_is_caught(tmp_path):
    module, path = formats.folded(), tmp_path / "net.xml"
    EXPORTER.export(module, EXAMPLE, path)
    right = module.get_parameter("body.3.weight").detach().numpy()
    wrong = right.copy()
    wrong.flat[5] *= np.float32(1 + 2**-20)
    formats.replace(path.with_suffix(".bin"), right.tobytes(), wrong.tobytes())
    found = formats.found(EXPORTER, module, path)
    assert not found.ok and "1 of 8 weights differ from the module's in their bits: body.3.weight" in found.message


def test_importing_sends_nothing(tmp_path):
    """`import openvino` by itself counts and reports its use; by way of this package it does not."""
    code = (
        "from foldexport.exporters.openvino import exporter; import sys; from openvino.tools.ovc import telemetry;"
        "print(type(telemetry).__module__, 'openvino_telemetry' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["openvino.tools.ovc.telemetry_stub", "False"]


def test_nothing_is_printed(tmp_path, capfd, recwarn):
    EXPORTER.export(networks.chain(4), EXAMPLE, tmp_path / "net.xml")
    EXPORTER.load(tmp_path / "net.xml")
    assert capfd.readouterr() == ("", "") and not list(recwarn)


@pytest.mark.parametrize("half_io", [False, True])
def test_fp16_is_read_back(tmp_path, half_io):
    path, (probe,) = tmp_path / "net.xml", networks.probes(IMAGE, batches=(3,))
    half = Cast(formats.folded(), torch.float16, half_io)
    example = (EXAMPLE[0].half() if half_io else EXAMPLE[0],)
    notes = EXPORTER.export(half, example, path, ExportOptions(precision="fp16", half_io=half_io))
    assert EXPORTER.precision_of(path) == {"float16": 4} and 'HINT "f16"' in notes["run"]
    assert {str(each.dtype) for each in EXPORTER.weights(path).values() if each.dtype.kind == "f"} <= {"float16", "float32"}
    found = EXPORTER.load(path)(probe[0].half().numpy() if half_io else probe[0].numpy())[0]
    wanted = half.network.float()(probe[0]).detach().numpy()
    assert found.dtype == (np.float16 if half_io else np.float32)
    assert np.abs(found - wanted).max() < 1e-2 * np.abs(wanted).max()


def test_bf16_is_read_back(tmp_path):
    path = tmp_path / "net.xml"
    EXPORTER.export(Cast(formats.folded(), torch.bfloat16, False), EXAMPLE, path, ExportOptions(precision="bf16"))
    assert EXPORTER.precision_of(path) == {"bfloat16": 4}
    kinds = [each.dtype for each in EXPORTER.weights(path).values() if each.size > 64]
    assert kinds and all(kind == ml_dtypes.bfloat16 for kind in kinds)
    (probe,) = networks.probes(IMAGE, batches=(3,))
    wanted = formats.folded()(probe[0]).detach().numpy()
    assert np.abs(EXPORTER.load(path)(probe[0].numpy())[0] - wanted).max() < 5e-2 * np.abs(wanted).max()


class Cast(torch.nn.Module):
    """A network in a half type between float32 ends, or with ends of that type."""

    def __init__(self, network, dtype, half_io):
        super().__init__()
        self.network, self.dtype, self.half_io = network.to(dtype), dtype, half_io
        self.eval()

    def forward(self, x):
        y = self.network(x.to(self.dtype))
        return y if self.half_io else y.float()


def test_int8_is_refused(tmp_path):
    with pytest.raises(PrecisionError, match="openvino is written in fp32 or fp16 or bf16, not int8"):
        EXPORTER.export(networks.chain(4), EXAMPLE, tmp_path / "net.xml", ExportOptions(precision="int8"))
    assert not list(tmp_path.iterdir())


def test_files_that_openvino_refuses(tmp_path):
    (tmp_path / "net.xml").write_text("<net>no network at all</net>")
    with pytest.raises(EquivalenceError, match="openvino: OpenVINO .* refuses the file"):
        EXPORTER.load(tmp_path / "net.xml")


def test_an_axis_that_the_network_fixes(tmp_path):
    with pytest.raises(UsageError, match="leave it out of --dynamic|ask for --dynamic batch"):
        flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4)).eval()
        EXPORTER.export(flat, EXAMPLE, tmp_path / "net.xml", ExportOptions(dynamic=("batch", "height")))
    assert not list(Path(tmp_path).iterdir())

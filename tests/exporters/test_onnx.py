"""ONNX files: valid, minimal, named as asked, the same bytes everywhere, and right in onnxruntime."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foldexport import artifact
from foldexport.errors import EquivalenceError, PrecisionError, UsageError
from foldexport.exporters.onnx import exporter as exporter_module
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.weights import expected_weights, match_weights
from tests.exporters import networks
from tests.exporters.networks import IMAGE

EXPORTER = OnnxExporter()
EXAMPLE = (torch.zeros(1, *IMAGE),)
SPATIAL = ExportOptions(dynamic=("batch", "height", "width"))


def dims(path: Path) -> dict[str, list]:
    graph = onnx.load(str(path), load_external_data=False).graph
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


@pytest.fixture(scope="module")
def chain_file(tmp_path_factory) -> tuple[nn.Module, Path, dict]:
    module, path = networks.chain(), tmp_path_factory.mktemp("chain") / "net.onnx"
    return module, path, EXPORTER.export(module, EXAMPLE, path)


def test_a_chain_holds_plain_operators_only(chain_file):
    _, path, notes = chain_file
    model = onnx.load(str(path))
    operators = [node.op_type for node in model.graph.node]
    assert operators == ["Conv", "Relu", "MaxPool", "Conv", "Clip", "Conv", "Relu", "ReduceMean", "Reshape", "Gemm"]
    assert dims(path) == {"input": ["batch", *IMAGE], "output": ["batch", 10]}
    assert (notes["inputs"], notes["outputs"], notes["opset"]) == (["input"], ["output"], model.opset_import[0].version)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def test_a_chain_runs_at_batch_one_and_three_with_every_weight(chain_file):
    module, path, _ = chain_file
    weights = match_weights(expected_weights(module), EXPORTER.weights(path))
    found = networks.proof(EXPORTER, module, networks.probes(IMAGE), path, weights)
    assert found.ok and found.batches == (1, 3) and not found.message, found
    assert found.weights_identical == (7, 7) and found.top1.counted + len(found.top1.near_ties) == 4


def test_without_runtime_optimisations(chain_file):
    module, path, _ = chain_file
    (probe,) = networks.probes(IMAGE, batches=(3,))
    plain = EXPORTER.load(path, optimise=False, threads=1)(probe[0].numpy())[0]
    assert np.abs(plain - module(probe[0]).detach().numpy()).max() < 1e-6


def test_no_path_and_no_metadata_inside(chain_file):
    _, path, _ = chain_file
    assert networks.local_traces(path) == []
    model = onnx.load(str(path))
    everything = [
        model,
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.initializer,
    ]
    assert not any(each.doc_string or each.metadata_props for each in everything)


def test_metadata_is_removed_from_functions_and_subgraphs():
    helper = onnx.helper
    inner = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"], doc_string="here")], "inner", [], [], doc_string="here"
    )
    outer = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)], "outer", [], []
    )
    outer.value_info.append(helper.make_tensor_value_info("v", 1, [1], doc_string="here"))
    outer.initializer.append(helper.make_tensor("w", 1, [1], [1.0]))
    outer.initializer[0].doc_string = "here"
    function = helper.make_function(
        "d", "f", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"], doc_string="here")], []
    )
    model = helper.make_model(outer, functions=[function], doc_string="here")
    model.graph.node[0].attribute[0].g.node[0].metadata_props.add(key="stack_trace", value="here")
    model.functions[0].node[0].metadata_props.add(key="stack_trace", value="here")
    exporter_module.onnx_model.strip(model)
    assert b"here" not in model.SerializeToString() and model.graph.initializer[0].float_data == [1.0]


EXPORT_SCRIPT = """
import sys, torch
from pathlib import Path
from tests.exporters import networks
from foldexport import exporters
exporter = exporters.exporter(exporters.get(sys.argv[1]))
exporter.export(networks.chain(), (torch.zeros(1, 3, 16, 16),), Path(sys.argv[2]))
"""


def test_same_bytes_from_another_process_and_folder(chain_file, tmp_path):
    _, path, _ = chain_file
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "elsewhere").mkdir()
    other = tmp_path / "another name.onnx"
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", EXPORT_SCRIPT, "onnx", str(other)]
    subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, check=True, capture_output=True)
    assert other.read_bytes() == path.read_bytes()


def test_nothing_is_printed(tmp_path, capfd):
    EXPORTER.export(networks.chain(4), EXAMPLE, tmp_path / "net.onnx", ExportOptions(opset=17))
    assert capfd.readouterr() == ("", "")


def test_external_data_above_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(exporter_module, "EXTERNAL_DATA_ABOVE_BYTES", 4096)
    module, target = networks.chain(16), tmp_path / "net.onnx"
    written = artifact.write(
        EXPORTER,
        module,
        EXAMPLE,
        target,
        ExportOptions(),
        prove=lambda path: networks.proof(EXPORTER, module, networks.probes(IMAGE), path),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"] == sorted(written.sha256)
    assert written.size_bytes["net.onnx"] < 8192 < written.size_bytes["net.onnx.data"]
    assert match_weights(expected_weights(module), EXPORTER.weights(target)).ok
    assert networks.local_traces(target) == [] and written.comparison.ok
    assert EXPORTER.load(target)(np.zeros((2, *IMAGE), np.float32))[0].shape == (2, 10)
    again = tmp_path / "again"
    again.mkdir()
    EXPORTER.export(networks.chain(16), EXAMPLE, again / "net.onnx")
    assert all((again / name).read_bytes() == (tmp_path / name).read_bytes() for name in written.sha256)


@pytest.mark.parametrize("opset", [13, 17, 21])
def test_opset_is_honoured(opset, tmp_path):
    module, path = networks.Views().eval(), tmp_path / "net.onnx"
    notes = EXPORTER.export(module, EXAMPLE, path, ExportOptions(opset=opset))
    assert notes["opset"] == opset == onnx.load(str(path)).opset_import[0].version
    assert networks.proof(EXPORTER, module, networks.probes(IMAGE), path).ok


class Sampled(nn.Module):
    def forward(self, x):
        return F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False)


@pytest.mark.parametrize(
    ("opset", "message"),
    [
        (9, "opset 9: onnx .* can write 13 to"),
        (99, "opset 99: onnx .* can write"),
        (15, "cannot be written at opset 15 .*GridSample"),
    ],
)
def test_opset_that_cannot_be_honoured(opset, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        EXPORTER.export(Sampled().eval(), EXAMPLE, tmp_path / "net.onnx", ExportOptions(opset=opset))


def test_opset_that_onnxruntime_does_not_run(tmp_path):
    newest = onnx.defs.onnx_opset_version()
    with pytest.raises(UsageError, match=f"opset {newest}: onnxruntime .* does not run it"):
        EXPORTER.export(networks.chain(4), EXAMPLE, tmp_path / "net.onnx", ExportOptions(opset=newest))


def test_free_height_and_width(tmp_path):
    module, path = networks.Views().eval(), tmp_path / "net.onnx"
    EXPORTER.export(module, EXAMPLE, path, SPATIAL)
    assert dims(path)["input"] == ["batch", 3, "height", "width"]
    inputs = networks.probes(IMAGE) + networks.probes((3, 24, 20))
    assert networks.proof(EXPORTER, module, inputs, path).ok


def test_fixed_sizes(tmp_path):
    path = tmp_path / "net.onnx"
    EXPORTER.export(networks.chain(4), EXAMPLE, path, ExportOptions(dynamic=()))
    assert dims(path) == {"input": [1, *IMAGE], "output": [1, 10]}


def test_free_axes_that_the_network_refuses(tmp_path):
    fixed = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 14 * 14, 4)).eval()
    with pytest.raises(
        UsageError, match="--dynamic height: the network refuses an input of 1x3x48x16 .*ask for --dynamic batch"
    ):
        EXPORTER.export(fixed, EXAMPLE, tmp_path / "net.onnx", SPATIAL)
    with pytest.raises(UsageError, match="no input of this network has a height"):
        EXPORTER.export(nn.Linear(4, 2).eval(), (torch.zeros(1, 4),), tmp_path / "net.onnx", SPATIAL)


class Bound(nn.Module):
    """Adds a constant of two samples: no other batch is possible."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.randn(2, *IMAGE))

    def forward(self, x):
        return x + self.offset


def test_batch_that_the_network_fixes(tmp_path):
    example, path = (torch.zeros(2, *IMAGE),), tmp_path / "net.onnx"
    with pytest.raises(
        UsageError, match="the network fixes its batch at the example's size: leave it out of --dynamic"
    ):
        EXPORTER.export(Bound().eval(), example, path)
    assert not list(tmp_path.iterdir())
    EXPORTER.export(Bound().eval(), example, path, ExportOptions(dynamic=()))
    assert dims(path)["input"] == [2, *IMAGE]


@pytest.mark.parametrize(
    "options",
    [ExportOptions(), ExportOptions(input_names=("output_0", "add"), output_names=("conv2d", "input_0", "image"))],
    ids=["default", "names of inner values"],
)
def test_several_inputs_and_outputs(options, tmp_path):
    module, path = networks.TwoByThree().eval(), tmp_path / "net.onnx"
    notes = EXPORTER.export(module, (torch.zeros(1, *IMAGE), torch.zeros(1, 5)), path, options)
    assert list(dims(path)) == notes["inputs"] + notes["outputs"]
    assert notes["inputs"] == list(options.input_names or ("input_0", "input_1"))
    assert notes["outputs"] == list(options.output_names or ("output_0", "output_1", "output_2"))
    found = networks.proof(EXPORTER, module, networks.probes(IMAGE, (5,)), path)
    assert found.ok, found


def test_wrong_number_of_names(tmp_path):
    with pytest.raises(UsageError, match="2 output names given"):
        EXPORTER.export(networks.chain(4), EXAMPLE, tmp_path / "net.onnx", ExportOptions(output_names=("a", "b")))


@pytest.mark.parametrize("module", [networks.Tied, networks.Views], ids=lambda each: each.__name__)
def test_weights_are_found_under_other_names_and_orders(module, tmp_path):
    network, path = module().eval(), tmp_path / "net.onnx"
    channels = 4 if module is networks.Tied else 3
    EXPORTER.export(network, (torch.zeros(1, channels, 8, 8),), path)
    expected = expected_weights(network)
    assert match_weights(expected, EXPORTER.weights(path)).ok
    for name, value in expected.items():
        changed = value.clone()
        changed.view(-1)[-1] = torch.nextafter(changed.view(-1)[-1], torch.tensor(9.0))
        assert not match_weights(expected | {name: changed}, EXPORTER.weights(path)).ok, name


def test_onnxsim_is_kept_only_where_it_removes_something_and_is_accepted(chain_file, tmp_path):
    assert chain_file[2]["onnxsim"] == "nothing to remove"
    module, judged = networks.Views().eval(), []
    plain = EXPORTER.export(
        module, EXAMPLE, tmp_path / "plain.onnx", SPATIAL, accept=lambda path: bool(judged.append(path))
    )
    simple = EXPORTER.export(module, EXAMPLE, tmp_path / "simple.onnx", SPATIAL)
    assert judged and plain["onnxsim"].startswith("refused: without ") and simple["onnxsim"].startswith("removed ")
    assert simple["nodes"] < plain["nodes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.onnx", "simple.onnx"]
    for name in ("plain.onnx", "simple.onnx"):
        assert networks.proof(EXPORTER, module, networks.probes(IMAGE), tmp_path / name).ok


def test_other_precision_is_refused(tmp_path):
    with pytest.raises(PrecisionError, match="not int4"):
        EXPORTER.export(networks.chain(4), EXAMPLE, tmp_path / "net.onnx", ExportOptions(precision="int4"))


def test_operator_that_torch_onnx_does_not_know(tmp_path):
    class Unknown(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvalsh(x)

    with pytest.raises(UsageError, match="torch.onnx cannot write this network: .*_linalg_eigh"):
        EXPORTER.export(Unknown().eval(), EXAMPLE, tmp_path / "net.onnx")


def test_file_that_onnxruntime_refuses(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"no model at all")
    with pytest.raises(EquivalenceError, match="onnxruntime .* refuses the file"):
        EXPORTER.load(tmp_path / "net.onnx")

"""Where a file's runtime runs, and that it is told wherever that is not where it was asked for."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from foldexport import exporters
from foldexport.errors import MissingDependencyError
from foldexport.exporters.onnx import devices as onnx_devices
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.placing import place, why_not
from tests.exporters import networks
from tests.exporters.networks import IMAGE

EXAMPLE = (torch.zeros(1, *IMAGE),)
HERE = "cpu:0"  # the CPU, by a name that is not the default: what is asked for takes the same way as on a GPU


class Plain:
    """A runtime that knows nothing of devices."""

    name = "plain"

    def load(self, path):
        return lambda *arrays: ["on the CPU"]

    def runtime(self):
        return "plain 1.0"


class Several(Plain):
    """One that can use a GPU, if it has what it needs."""

    devices = ("cpu", "cuda")

    def __init__(self, missing: str = "", remark: str = "") -> None:
        self.missing, self.remark = missing, remark

    def load(self, path, *, device="cpu"):
        def run(*arrays):
            return [f"on {device}"]

        run.remark = self.remark if device != "cpu" else ""
        return run

    def lacks(self, device):
        return self.missing if device != "cpu" else ""


class Own(Plain):
    """One that runs on a GPU only, as engines do."""

    devices = ("cuda",)


def test_by_default_labels_are_as_they_were():
    for exporter in (Plain(), Several("nothing to see")):
        found = place(exporter, None)
        assert (found.device, found.label) == ("cpu", "plain 1.0")
    assert place(Own(), None).device == "cuda" and place(Own(), None).label == "plain 1.0"


def test_a_runtime_that_can_runs_there():
    found = place(Several(), None, HERE)
    assert (found.device, found.label, found.run()) == (HERE, f"plain 1.0 on {HERE}", [f"on {HERE}"])
    assert place(Plain(), None, HERE).label == f"plain 1.0 on {HERE}"


def test_a_runtime_that_cannot_says_why():
    assert place(Plain(), None, "cuda").label == "plain 1.0 on cpu: it does not use cuda"
    found = place(Several("no provider (pip install one)"), None, "cuda")
    assert (found.device, found.label) == ("cpu", "plain 1.0 on cpu: no provider (pip install one)")
    assert found.run() == ["on cpu"] and why_not(Several(), "cuda") == ""


def test_what_stays_on_the_cpu_is_told():
    assert place(Several(remark="on the CPU 2 Mod"), None, HERE).label == f"plain 1.0 on {HERE}: on the CPU 2 Mod"


# ---- onnxruntime


def test_the_cuda_provider_computes_without_tf32():
    provider, last = onnx_devices.providers("cuda:1")
    wanted = {"device_id": "1", "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    assert provider == ("CUDAExecutionProvider", wanted) and last == "CPUExecutionProvider"
    assert onnx_devices.providers("cpu") == onnx_devices.providers(HERE) == ["CPUExecutionProvider"]


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA in it")
def test_an_onnxruntime_without_cuda_says_so(tmp_path):
    said = "this onnxruntime has no CUDA in it (pip install onnxruntime-gpu in place of onnxruntime)"
    assert OnnxExporter().lacks("cuda") == said
    OnnxExporter().export(networks.chain(), EXAMPLE, tmp_path / "net.onnx")
    found = place(OnnxExporter(), tmp_path / "net.onnx", "cuda")
    assert found.device == "cpu" and "on cpu: this onnxruntime has no CUDA in it" in found.label
    assert np.isfinite(found.run(np.zeros((2, *IMAGE), np.float32))[0]).all()


def session(*providers: str) -> SimpleNamespace:
    parts = [SimpleNamespace(ep_name=name, get_nodes=lambda: [SimpleNamespace(op_type=kind) for kind in ("Conv", "Shape")])
             for name in providers]  # fmt: skip
    return SimpleNamespace(get_providers=lambda: list(providers), get_provider_graph_assignment_info=lambda: parts)


def test_a_provider_that_did_not_load_is_no_gpu():
    onnx_devices.require(session("CUDAExecutionProvider", "CPUExecutionProvider"), "cuda")
    with pytest.raises(MissingDependencyError, match="does not load"):
        onnx_devices.require(session("CPUExecutionProvider"), "cuda")


def test_operators_left_on_the_cpu_are_counted_but_for_sizes():
    assert onnx_devices.remark(session("CUDAExecutionProvider", "CPUExecutionProvider")) == "on the CPU 1 Conv"
    assert onnx_devices.remark(session("CPUExecutionProvider")) == ""


def test_onnxruntime_remembers_where_it_put_each_operator():
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    nodes = [helper.make_node("Sin", ["x"], ["a"]), helper.make_node("Cos", ["a"], ["y"])]
    graph = helper.make_graph(nodes, "two", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()
    told, plain = onnxruntime.SessionOptions(), onnxruntime.SessionOptions()
    onnx_devices.record_places(told, "cuda"), onnx_devices.record_places(plain, "cpu")
    made = [onnxruntime.InferenceSession(model, each, providers=["CPUExecutionProvider"]) for each in (told, plain)]
    assert [onnx_devices.left_on_cpu(each) for each in made] == [Counter(Sin=1, Cos=1), Counter()]


# ---- every format


@pytest.mark.parametrize("name", ["onnx", "torchscript", "pytorch"])
def test_a_file_computes_the_same_there(name, tmp_path):
    row = exporters.get(name)
    exporter, path = exporters.exporter(row), tmp_path / f"net{row.suffix}"
    exporter.export(networks.chain(), EXAMPLE, path)
    x = torch.randn(3, *IMAGE, generator=torch.Generator().manual_seed(0)).numpy()
    plain, there = place(exporter, path), place(exporter, path, HERE)
    assert there.device == HERE and there.label.endswith(f" on {HERE}")
    assert np.array_equal(plain.run(x)[0], there.run(x)[0])


@pytest.mark.parametrize("row", exporters.FORMATS.values(), ids=lambda row: row.name)
def test_every_exporter_that_names_several_devices_takes_one(row):
    import importlib
    import inspect

    module, _, name = row.target.partition(":")
    if row.missing():
        pytest.skip(f"not installed: {', '.join(row.missing())}")
    exporter = getattr(importlib.import_module(module), name)
    if len(getattr(exporter, "devices", ("cpu",))) > 1:
        assert "device" in inspect.signature(exporter.load).parameters

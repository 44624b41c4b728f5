"""The parts of the TensorRT exporter that need neither the library nor a GPU."""

from __future__ import annotations

import os
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from foldexport.errors import MissingDependencyError, UsageError
from foldexport.exporters.tensorrt import driver, layers, messages, timing
from foldexport.exporters.tensorrt.batches import fitted
from foldexport.exporters.tensorrt.driver import Gpu
from foldexport.exporters.tensorrt.modules import NodeModules, onnx_nodes
from foldexport.exporters.tensorrt.options import TensorRTOptions, compute_capabilities, size_bytes, size_text
from foldexport.exporters.tensorrt.profile import Profile


def _logged(name: str, kind: str, inputs: str, constants: str, outputs: str, metadata: str) -> str:
    """A line of the builder's report; tensors as "name dimensions type" with semicolons."""
    parts = []
    for title, tensors in (("Inputs", inputs), ("Constants", constants), ("Outputs", outputs)):
        described = [each.split() for each in tensors.split(";") if each]
        shown = ", ".join(f"{{ Name: {n}, Dimensions: [{d}], Datatype: {t}, Format: (Linear) }}" for n, d, t in described)
        parts.append(f"{title}: [ {shown} ]" if shown else f"{title}: []")
    return f"Name: {name}, LayerType: {kind}, {', '.join(parts)}, TacticName: t, StreamId: 0, Metadata: {metadata}"


BOTH = "[ONNX Layer: conv]\x1f[ONNX Layer: relu]"
LOG = "\n".join([
    "Layers:",
    _logged("move", "kgen", "input 1,3,8,8 Float", "", "a 1,4,8,8 Half", "[ONNX Layer: cast]"),
    _logged("conv", "correlation", "a 1,4,8,8 Half", "w 8,4,3,3 Half;one 1 Float", "b 1,8,8,8 Half", BOTH),
    _logged("fc", "gemm", "b 1,8 Half", "f 8,5 Float", "out 1,5 Float", "[ONNX Layer: fc]"),
    "", "I/O Tensors:", " Name: input, IOMode: Input, DataType: Float, Dimensions: [1,3,8,8]",
])  # fmt: skip
INSPECTED = """{"Layers": [{"Name": "conv + relu", "LayerType": "CaskConvolution",
 "Inputs": [{"Name": "input", "Dimensions": [1, 3, 8, 8], "Format/Datatype": "Row major linear FP32"}],
 "Outputs": [{"Name": "b", "Dimensions": [1, 8, 8, 8], "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
 "Weights": {"Type": "Half", "Count": 288}, "Metadata": "[ONNX Layer: conv]\\u001e[ONNX Layer: relu]"}, "a name only"]}"""


def _modules() -> NodeModules:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "out")]
    nodes = [
        helper.make_node("Conv", ["x", "stem.conv.weight"], ["y"], name="conv"),
        helper.make_node("Relu", ["y"], ["z"], name="relu"),
        helper.make_node("Gemm", ["z", "fc.weight"], ["out"], name="fc"),
    ]
    names = ("stem.conv.weight", "fc.weight")
    weights = [helper.make_tensor(name, TensorProto.FLOAT, [1], [1.0]) for name in names]
    return NodeModules(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)))


def test_nodes_in_the_users_names():
    modules = _modules()
    assert modules.of("conv") == "stem.conv" and modules.of("relu") == "" and modules.behind("relu") == "stem.conv"
    assert modules.named("Cannot compile 'fc' for it: 'relu'") == "Cannot compile 'fc' (`fc`) for it: 'relu'"
    assert onnx_nodes("[ONNX Layer: conv]\x1e[ONNX Layer: relu][ONNX Layer: conv]") == ["conv", "relu"]
    assert NodeModules(onnx.ModelProto()).behind("conv") == ""


def test_layers_of_the_build_log():
    """A cast fused into a layer does not make it a float32 layer; a float32 classifier in a half network shows."""
    found = layers.from_log([("VERBOSE", "Layers:\nold"), ("VERBOSE", LOG), ("INFO", "done")], _modules())
    assert [(each["name"], each["type"], each["modules"]) for each in found] == [
        ("move", "float16", []), ("conv", "float16", ["stem.conv"]), ("fc", "float32", ["fc"]),
    ]  # fmt: skip
    assert layers.types(found) == {"float16": 2, "float32": 1}
    assert layers.products(found, _modules()) == {"float16": 1, "float32": 1}


def test_layers_of_the_inspector():
    (found,) = layers.from_inspector(INSPECTED, _modules())
    assert found["type"] == "float16" and found["modules"] == ["stem.conv"] and found["inputs"] == ["float32"]
    assert layers.from_inspector("", _modules()) == layers.from_inspector("no JSON", _modules()) == []


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2**31), ("512 MiB", 2**29), ("1.5GB", 1_500_000_000), ("64k", 64_000), ("100b", 100)]
)
def test_sizes(text, size):
    assert size_bytes(text) == size


@pytest.mark.parametrize("text", ["2", "GiB", "2 pints", "-1GiB", ""])
def test_sizes_without_a_unit_or_a_number(text):
    with pytest.raises(ValueError, match="wanted a number with its unit"):
        size_bytes(text)


def test_sizes_are_said_as_they_are_typed():
    assert [size_text(size_bytes(each)) for each in ("2GiB", "1KiB", "512MiB", "1000B")] == ["2GiB", "1KiB", "512MiB", "1000B"]


@pytest.mark.parametrize(
    ("typed", "said"), [("8,6", "8,6: wanted 8.6, with a point"), ("8.x,8.6", "8.x,8.6: wanted a version"), (",", ",: wanted")]
)
def test_a_wrong_capability_is_quoted_as_typed(typed, said):
    with pytest.raises(UsageError) as caught:
        compute_capabilities(typed)
    assert f"--compute-capability {said}" in str(caught.value)


def test_compute_capabilities():
    assert compute_capabilities("8.6, 8.9,sm_120,86,8.6") == ("8.6", "8.9", "12.0")
    with pytest.raises(UsageError, match="--compute-capability ampere: wanted a version such as 8.6"):
        TensorRTOptions(compute_capabilities=compute_capabilities("ampere"))


def test_free_axes_of_a_profile():
    assert Profile(((1, 3, 8, 8),), ((2, 3, 8, 8),), ((2, 3, 8, 16),)).free_axes() == ("batch", "width")
    assert Profile(((1, 7),), ((1, 7),), ((1, 7),)).free_axes() == ()
    with pytest.raises(UsageError, match="axis 1 varies"):
        Profile(((1, 7),), ((1, 7),), ((1, 9),)).free_axes()


def _network(*arrays: np.ndarray) -> list[np.ndarray]:
    """``[N, 2] → [N], [2·N, 1]``; notes the batch of each run."""
    _network.batches.append(len(arrays[0]))
    return [arrays[0].sum(1), arrays[0].reshape(-1, 1)]


@pytest.mark.parametrize(
    ("lowest", "highest", "count", "runs"),
    [(1, 1, 3, [1, 1, 1]), (2, 4, 3, [3]), (4, 8, 1, [4]), (2, 2, 5, [2, 2, 2]), (1, 8, 8, [8]), (3, 4, 9, [4, 4, 3])],
)
def test_any_batch_through_a_fixed_one(lowest, highest, count, runs):
    _network.batches = []
    rows = np.arange(2.0 * count).reshape(count, 2)
    sums, flat = fitted(_network, lowest, highest)(rows)
    assert _network.batches == runs
    np.testing.assert_array_equal(sums, rows.sum(1))
    np.testing.assert_array_equal(flat, rows.reshape(-1, 1))


def test_an_output_without_a_batch_cannot_go_in_parts():
    with pytest.raises(ValueError, match="has no batch axis"):
        fitted(lambda rows: [rows.sum()], 1, 1)(np.ones((2, 3)))


def test_errors_without_the_librarys_own_places():
    said = (
        "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:337: check] Cannot compile operation 'fc'. "
        "In compileGraph at /_src/optimizer/codeGenerator.cpp:2012)"
    )
    lines = [("ERROR", said), ("ERROR", said), ("WARNING", "slow"), ("ERROR", "[checkMacros.cpp::catchCudaError::250] Error")]
    assert messages.errors(lines) == ["Cannot compile operation 'fc'."]
    assert messages.kept([("VERBOSE", "x"), ("INFO", "Input filename:   /tmp/a"), ("INFO", "kept")]) == ["INFO: kept"]


def test_a_talkative_builder_does_not_drown_its_error(monkeypatch):
    monkeypatch.setattr(messages, "MOST_LINES", 3)
    library = ModuleType("library")
    library.ILogger = object
    collector = messages.logger(library)
    for place in range(9):
        collector.log("Severity.VERBOSE", f"Tactic {place}")
    collector.log("Severity.ERROR", "out of memory")
    assert len(collector.lines) == 4 and messages.errors(collector.lines) == ["out of memory"]


def test_a_library_that_does_not_start_says_why():
    """What pybind11 makes of a null pointer, which Builder and Runtime are where CUDA cannot be used."""
    log = SimpleNamespace(lines=[("ERROR", "of an earlier build")])

    def null(given):
        given.lines += [("INFO", "[MemUsageChange] Init CUDA"), ("WARNING", "CUDA initialization failure with error: 35.")]
        raise TypeError("pybind11::init(): factory function returned nullptr")

    with pytest.raises(MissingDependencyError, match="does not start on this machine: CUDA initialization failure with error: 35"):
        messages.made(null, log)
    log.lines.clear()
    assert messages.made(lambda given: given, log) is log


class Cache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"+"


class Config:
    """The three calls that a builder's configuration has for timing caches; this one refuses what it did not write."""

    def __init__(self) -> None:
        self.cache: Cache | None = None

    def create_timing_cache(self, content: bytes) -> Cache | None:
        return None if content.startswith(b"bad") else Cache(content)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache | None:
        return self.cache


def test_timing_cache_is_kept_per_gpu_and_version(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = timing.file("11.4.0.106", Gpu("NVIDIA H200", "9.0", "13.0"))
    assert path == tmp_path / "foldexport" / "tensorrt" / "11.4.0.106-NVIDIA_H200-9.0-driver13.0.cache"
    config = Config()
    assert timing.install(config, path) == "empty"
    timing.save(config, path)
    assert path.read_bytes() == b"+" and os.listdir(path.parent) == [path.name]
    assert timing.install(config, path) == "1 bytes used"
    path.write_bytes(b"bad file of another version")
    assert timing.install(config, path) == "did not fit, begun again"


def test_timing_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    config = Config()
    assert timing.install(config, tmp_path / "file" / "below.cache") == "empty"
    timing.save(config, tmp_path / "file" / "below.cache")


def test_the_driver_gives_its_reason(monkeypatch):
    monkeypatch.setattr(driver, "LIBRARY", "libsurely-not-there.so")
    assert driver.why_none() == "cuInit: libsurely-not-there.so is not there, no NVIDIA driver"

"""int8 from the library: samples in memory or in a file, judged and read back as the command does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import foldexport
from foldexport.errors import EquivalenceError, UsageError
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.precision import int8
from tests.command import files
from tests.precision.networks import Trunk, folded
from tests.statistics import randomise

COUNT = 96


def images(seed: int = 0) -> np.ndarray:
    return torch.randn(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).numpy()


@pytest.fixture(scope="module")
def trunk():
    return folded(Trunk)


def classes(found, array: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return found.module(torch.from_numpy(array)).argmax(1).numpy()


@pytest.mark.parametrize("given", [lambda a: a, lambda a: [torch.from_numpy(a)]], ids=["array", "tensors"])
def test_samples_in_memory(trunk, given, tmp_path):
    array = images()
    made = foldexport.export(
        trunk, "onnx", tmp_path / "net.onnx", precision="int8", data=given(array), labels=classes(trunk, array), max_drop=10.0
    )
    assert made.comparison.ok and made.comparison.unit == "int8" and made.notes["precision"]["layers"] == {"int8": 6}
    quality = made.notes["int8"]
    assert quality["accuracy_before"] == 1.0 and quality["accuracy_after"] >= 0.9 and quality["calibration_samples"] == COUNT // 2
    assert int8.require_int8(OnnxExporter(), made.path).share("int8") > 0.5
    assert files(tmp_path) == ["net.onnx"] and made.files == (tmp_path / "net.onnx",) and "net.onnx" in made.sha256


def test_samples_in_a_file(trunk, tmp_path):
    array = images()
    np.savez(tmp_path / "data.npz", x=array, labels=classes(trunk, array))
    made = foldexport.export(
        trunk, "onnx", tmp_path / "net.onnx", precision="int8", data=tmp_path / "data.npz", max_drop=10.0, device="cpu:0"
    )
    assert made.notes["int8"]["accuracy_before"] == 1.0 and made.comparison.ok
    assert [each.unit for each in made.on_device] == ["float32", "float32"] and made.comparison.device == "cpu:0"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "needs --data with samples"),
        ({"data": images(), "labels": [1, 2]}, r"labels: are int64 \[2\]; wanted one class number for each of the 96"),
        ({"data": images(), "labels": [-1] * COUNT}, "labels: hold -1; wanted class numbers from 0"),
        ({"data": np.stack([*images()[:95], np.full((3, 8, 8), np.nan)])}, r"array 0 has 192 .*first at index \(95, 0, 0, 0\)"),
        ({"data": [images(), images()[:5]]}, "has 5, 96 samples for different inputs"),
        ({"data": np.array(["a"])}, "data: holds a <U1 array"),
        ({"data": images(), "half_io": True}, "half_io: is about half types"),
        ({"data": images(), "keep_fp32": ["fc"]}, "keep_fp32: is about half types"),
    ],
    ids=["no data", "few labels", "negative labels", "not finite", "unequal", "no numbers", "half_io", "keep_fp32"],
)
def test_refusals(trunk, more, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        foldexport.export(trunk, "onnx", tmp_path / "net.onnx", precision="int8", **more)
    assert files(tmp_path) == []


def test_other_formats_and_types_are_refused(trunk, tmp_path):
    with pytest.raises(UsageError, match="int8.*written as onnx only, not torchscript"):
        foldexport.export(trunk, "ts", tmp_path / "net.pt", precision="int8", data=images())
    for name, value in (("labels", [0] * COUNT), ("max_drop", 2.0)):
        with pytest.raises(UsageError, match=f"{name}: is about int8, not fp32"):
            foldexport.export(trunk, "onnx", tmp_path / "net.onnx", data=images(), **{name: value})
    with pytest.raises(UsageError, match="precision 'int7': wanted 'fp32', 'fp16', 'bf16', 'int8'"):
        foldexport.export(trunk, "onnx", tmp_path / "net.onnx", precision="int7")


def test_accuracy_that_falls_leaves_no_file(trunk, tmp_path, monkeypatch):
    """Planted: a quantised network that is right half as often."""
    array = images()
    monkeypatch.setattr(int8, "judge", _worse(int8.judge))
    with pytest.raises(EquivalenceError, match="accuracy falls by"):
        foldexport.export(trunk, "onnx", tmp_path / "net.onnx", precision="int8", data=array, labels=classes(trunk, array))
    assert files(tmp_path) == []


def _worse(judge):
    import dataclasses

    def changed(*given):
        found = judge(*given)
        return dataclasses.replace(found, accuracy_after=(found.accuracy_before or 0.0) - 0.5, lost=found.samples // 2, gained=0)

    return changed


def test_a_module_trained_further_is_not_silently_replaced(tmp_path):
    found = foldexport.fold(randomise(Trunk(), 1), torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        next(found.module.parameters()).add_(1.0)
    with pytest.raises(UsageError, match="fold again to export it in int8"):
        foldexport.export(found, "onnx", tmp_path / "net.onnx", precision="int8", data=images())


def test_data_of_a_float_file_is_compared_too(trunk, tmp_path):
    plain = foldexport.export(trunk, "ts", tmp_path / "a.pt")
    more = foldexport.export(trunk, "ts", tmp_path / "b.pt", data=images()[:19])
    assert more.comparison.probes == plain.comparison.probes + 3 and more.comparison.batches.count(8) == 2
    half = foldexport.export(trunk, "ts", tmp_path / "c.pt", data=[images()[:19]], precision="fp16")
    assert half.comparison.ok and half.comparison.batches.count(8) == 2

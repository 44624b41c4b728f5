"""``foldexport bench``: what it prints, how it ends. How long anything takes is not a test's business."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from foldexport.benchmark import environment, library, runtimes
from foldexport.exporters.onnx.exporter import OnnxExporter
from tests.command import foldexport, save_dirac, save_plain

QUICK = ("--threads", 1, "--rounds", 2, "--processes", 2, "--seconds", 0.02)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_dirac(tmp_path_factory.mktemp("bench") / "small.pth")


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """A folder with a network and another one."""
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
        OnnxExporter().export(module, (torch.randn(2, 3, 8, 8),), folder / f"{name}.onnx")
    return folder


def test_a_checkpoint_is_timed_folded_against_unfolded(checkpoint, tmp_path):
    picture = tmp_path / "new" / "bench.png"
    done = foldexport("bench", checkpoint, "--runtimes", "ort", "--batch", "1,2", "--json", "--plot", picture, *QUICK)
    assert done.code == 0, done.err
    first, second = done.document["measurements"]
    assert (first["batch"], second["batch"], first["runtime"]) == (1, 2, "onnxruntime")
    assert [each["name"] for each in first["variants"]] == ["unfolded", "folded"] and first["processes"] == 2
    assert all(each["check"].startswith("✓") for each in first["variants"]) and done.document["plot"] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG") and "unfolded" in done.err and "DiracNet" in done.err


def test_a_users_network_at_two_sizes_and_another_baseline(tmp_path):
    checkpoint, arch = save_plain(tmp_path)
    sizes = ("--input-shape", "1x3x8x8", "--input-shape", "2x3x8x8")
    done = foldexport("bench", checkpoint, "--arch", arch, *sizes, "--runtimes", "ort", "--baseline", "folded", "--json", *QUICK)
    assert done.code == 0, done.err
    assert [each["input_shapes"] for each in done.document["measurements"]] == [[[1, 3, 8, 8]], [[2, 3, 8, 8]]]
    assert done.document["measurements"][0]["baseline"] == "folded" and not done.document["notes"]


def test_sizes_that_differ_in_the_batch_only_are_one_network():
    small, large = ((1, 3, 8, 8),), ((1, 3, 9, 9),)
    assert library._at_one_batch([small, ((4, 3, 8, 8),), large]) == [(small, (1, 4)), (large, (1,))]


def test_files_are_timed_against_the_first(networks):
    one = networks / "one.onnx"
    done = foldexport("bench", one, one, *QUICK)
    assert done.code == 0, done.err
    assert "one.onnx (2)" in done.out and "checked against one.onnx before" in done.out


def test_a_file_that_computes_something_else_is_not_timed(networks):
    done = foldexport("bench", networks / "one.onnx", networks / "two.onnx", *QUICK)
    assert done.code == 4 and "does not compute what one.onnx computes, so it was not timed" in done.message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["one.onnx", "none.onnx"], "none.onnx: no such file"),
        (["one.onnx", "two.onnx", "--runtimes", "torchscript"], "torchscript does not read it; it is read by onnxruntime"),
        (["one.onnx", "two.onnx", "--input-shape", "1x3x9x9", "--runtimes", "onnxruntime,nothing"], "unknown runtime 'nothing'"),
        (["one.onnx", "two.onnx", "--input-shape", "1x4x9x9"], "takes ?x3x8x8, not 1x4x9x9"),
        (["one.onnx", "two.onnx", "--chain"], "--chain: is for a checkpoint"),
        (["one.onnx", "two.onnx", "--processes", "1"], "--processes 1: wanted 2 or more"),
        (["one.onnx", "two.onnx", "--seconds", "0"], "--seconds 0.0: wanted more than 0"),
        (["one.onnx", "two.onnx", "--level", "1.5"], "--level 1.5: wanted"),
        (["one.onnx", "two.onnx", "--rtol", "-1"], "--rtol -1.0: wanted"),
        (["one.onnx", "two.onnx", "--batch", "1,x"], "wanted batch sizes such as 1,8,32"),
        (["one.onnx", "two.onnx", "--baseline", "three.onnx"], "--baseline three.onnx: is none of one.onnx, two.onnx"),
        (["one.onnx", "two.onnx", "--overwrite"], "--overwrite: is for --plot"),
        (["one.onnx", "two.onnx", "--plot", "a.jpg"], "wanted a name that ends with .png"),
        ([], "CHECKPOINT | ARTIFACT"),
    ],
    ids=lambda value: value.split(":")[0].replace(" ", "_") if isinstance(value, str) else None,
)
def test_usage_errors(networks, monkeypatch, words, said):
    monkeypatch.chdir(networks)
    done = foldexport("bench", *words)
    assert done.code == 2 and said in done.message


def test_what_is_missing_is_exit_5_with_its_install(checkpoint, monkeypatch):
    monkeypatch.setattr(environment, "no_gpu", lambda: "the NVIDIA driver says: no device (cuInit returned 100)")
    for words in (["--device", "cuda"], ["--runtimes", "cudagraphs"]):
        done = foldexport("bench", checkpoint, *words)
        assert done.code == 5 and "cuInit returned 100" in done.message
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    done = foldexport("bench", checkpoint, "--runtimes", "openvino")
    assert done.code == 5 and "pip install 'foldexport[openvino]'" in done.message


def test_help_says_it_all():
    shown = foldexport("bench", "--help").out
    for word in ("--runtimes", "--batch", "--input-shape", "--threads", "--device", "--rounds", "--seconds", "--json", "--plot",
                 "--baseline", "onnxruntime-plain", "cudagraphs"):  # fmt: skip
        assert word in shown
    assert "bench" in foldexport("--help").out

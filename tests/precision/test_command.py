"""``--precision`` on the command line: the files, the manifest, the console, and what is refused."""

from __future__ import annotations

import json

import pytest

from tests.command import files, foldexport, save_dirac, save_plain

LARGE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.large, self.after = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.act, self.soft = nn.SiLU(), nn.Softplus()

    def forward(self, x):
        return self.after(self.act(self.soft(self.large(self.act(self.inside(x))) * 2.0**20) * 2.0**-20))
"""


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_checkpoint_in_half(precision, tmp_path):
    checkpoint = save_dirac(tmp_path / "dirac.pth")
    done = foldexport(checkpoint, "--to", "onnx,ts", "-o", tmp_path / "out", "--precision", precision)
    assert done.code == 0, done.err
    label = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    assert f"layers in {label}" in done.out and f"{precision} noise" in done.out and f"read back: weights 100 % {label}" in done.out
    record = json.loads((tmp_path / "out" / "dirac.manifest.json").read_text())
    assert record["precision"]["precision"] == precision and record["precision"]["float32_layers"] == {}
    assert record["precision"]["rounding"]["dtype"] == label
    for each in record["artifacts"]:
        assert set(each["notes"]["precision"]["weight_bytes"]) == {label} and set(each["notes"]["precision"]["layers"]) == {label}
        assert each["comparison"]["unit"] == precision and each["comparison"]["ok"]
    checked = foldexport("verify", tmp_path / "out" / "dirac.manifest.json")
    assert checked.code == 0 and f"{precision} noise" in checked.out


def test_a_layer_that_stays_in_float32_is_named(tmp_path):
    checkpoint, arch = save_plain(tmp_path, LARGE)
    network = ("--arch", arch, "--input-shape", "1x3x8x8")
    done = foldexport(checkpoint, "--to", "onnx", *network, "-o", tmp_path / "out", "--precision", "fp16")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "out" / "net.manifest.json").read_text())["precision"]
    assert "large" in record["float32_layers"] and record["layers_in_type"] < record["layers"]
    assert any(each["problem"] == "overflows" for each in record["misfits_before"])
    assert "large" in done.out and "overflows" in done.out


def test_half_inputs(tmp_path):
    checkpoint = save_dirac(tmp_path / "dirac.pth")
    done = foldexport(checkpoint, "--to", "onnx", "-o", tmp_path / "out", "--precision", "fp16", "--half-io")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "out" / "dirac.manifest.json").read_text())
    assert record["inputs"][0]["type"] == record["outputs"][0]["type"] == "float16"
    assert foldexport("verify", tmp_path / "out" / "dirac.manifest.json").code == 0


def test_unfolded_in_half(tmp_path):
    checkpoint = save_dirac(tmp_path / "dirac.pth")
    done = foldexport(checkpoint, "--to", "ts", "-o", tmp_path / "out", "--precision", "fp16", "--no-fold")
    assert done.code == 0, done.err
    assert "read back: weights 100 % float16" in done.out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--precision", "fp8"], 2, "wanted fp32, fp16, bf16, int8"),
        (["--precision", "fp32", "--half-io"], 2, "--half-io: inputs and outputs can be in fp16 only"),
        (["--precision", "bf16", "--opset", "17"], 2, "from opset 22"),
    ],
)
def test_refusals(words, code, said, tmp_path):
    checkpoint = save_dirac(tmp_path / "dirac.pth")
    done = foldexport(checkpoint, "--to", "onnx", "-o", tmp_path / "out", *words)
    assert done.code == code and said in done.message
    assert files(tmp_path) == ["dirac.pth"]

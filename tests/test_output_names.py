"""Outputs are called by the keys of the dict that forward returns, in files, manifests and the library."""

from __future__ import annotations

import collections
import json

import pytest
import torch
from torch import nn

import foldexport as library
from foldexport.exporters.options import ExportOptions
from foldexport.trace import trace
from foldexport.trace.outputs import output_names
from tests.command import foldexport, save_plain

Pair = collections.namedtuple("Pair", "mask score")


class Returning(nn.Module):
    """What ``shape`` makes of three tensors."""

    def __init__(self, shape) -> None:
        super().__init__()
        self.conv, self.shape = nn.Conv2d(3, 2, 1), shape

    def forward(self, x):
        y = self.conv(x)
        return self.shape(y, y + 1, y + 2)


STRUCTURES = {
    "dict": (lambda a, b, c: {"seg": a, "aux": b, "edge": c}, ("seg", "aux", "edge")),
    "dict of one": (lambda a, b, c: {"out": a}, ("out",)),
    "nested": (lambda a, b, c: {"seg": {"low": a, "high": b}, "aux": [c]}, ("seg_low", "seg_high", "aux_0")),
    "in a tuple": (lambda a, b, c: (a, {"aux": b}), ("output_0", "output_1_aux")),
    "named tuple": (lambda a, b, c: Pair(a, b), ("mask", "score")),
    "odd keys": (lambda a, b, c: {"größe": a, "1x": b, "input": c}, ("gr_e", "output_1x", "output_input")),
    "same after cleaning": (lambda a, b, c: {"a b": a, "a-b": b, "a_b_2": c}, ("a_b", "a_b_3", "a_b_2")),
    "with a number": (lambda a, b, c: {"seg": a, "stride": 4, "aux": b}, ("seg", "aux")),
    "tuple": (lambda a, b, c: (a, b), None),
    "tensor": (lambda a, b, c: a, None),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_names_are_the_keys(kind):
    shape, wanted = STRUCTURES[kind]
    assert output_names(trace(Returning(shape).eval(), torch.randn(2, 3, 4, 4))) == wanted


def test_the_users_names_win_and_inputs_keep_theirs():
    own = ("seg", "aux")
    assert ExportOptions(own_outputs=own).names("output", 2) == ["seg", "aux"]
    assert ExportOptions(output_names=("a", "b"), own_outputs=own).names("output", 2) == ["a", "b"]
    assert ExportOptions(input_names=("seg",), own_outputs=own).names("output", 2) == ["seg_", "aux"]
    assert ExportOptions(own_outputs=own).names("output", 3) == ["output_0", "output_1", "output_2"]


SOURCE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.seg, self.aux = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        y = self.b(self.a(x)).relu()
        return {"seg": self.seg(y), "aux": self.aux(y)}
"""


def test_files_and_manifest_have_the_keys(tmp_path):
    import onnxruntime

    checkpoint, arch = save_plain(tmp_path, SOURCE)
    found = foldexport(
        checkpoint, "--to", "onnx,torchscript,pt2", "--arch", arch, "--input-shape", "1x3x8x8", "-o", f"{tmp_path}/out/", "--json"
    )
    assert found.code == 0, found.err
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "net.onnx"))
    assert [each.name for each in session.get_outputs()] == ["seg", "aux"]
    record = json.loads((tmp_path / "out" / "net.manifest.json").read_text())
    assert [each["name"] for each in record["outputs"]] == ["seg", "aux"]
    assert [each["notes"]["outputs"] for each in record["artifacts"]] == [["seg", "aux"]] * 3
    assert record["golden"]["output_names"] == ["seg", "aux"]


def test_library_export_has_the_keys(tmp_path):
    torch.manual_seed(0)
    folded = library.fold(Returning(STRUCTURES["dict"][0]).eval(), torch.randn(1, 3, 4, 4))
    assert folded.output_names == ["seg", "aux", "edge"]
    made = library.export(folded, "onnx", tmp_path / "net.onnx")
    assert made.notes["outputs"] == ["seg", "aux", "edge"]

"""Layers that the user wants in float32: by name, by the name of what they are in, and by the name that a failure prints."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import Tensor, nn

import foldexport
from foldexport.errors import UsageError
from foldexport.exporters.torchscript.exporter import TorchScriptExporter
from foldexport.precision import kept
from foldexport.precision.prepare import prepare
from foldexport.precision.types import HALF
from foldexport.verify import divergence
from foldexport.verify.divergence import Judged, Place
from tests.command import files, save_dirac
from tests.command import foldexport as command
from tests.precision.networks import Trunk, folded
from tests.statistics import randomise

FP16 = HALF["fp16"]
INPUT = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(Block(), Block())
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(self.stem(x).relu()).sigmoid().mean((2, 3)) * 2.5)


@pytest.fixture(scope="module")
def blocks():
    torch.manual_seed(0)
    return foldexport.fold(randomise(Blocks(), 1), INPUT)


def held(found, *keep: str, kind=FP16):
    return prepare(found.graph, found.refold(), kind, keep=keep)


def types(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: each.weight.dtype for name, each in module.named_modules() if hasattr(each, "weight")}


@pytest.mark.parametrize("kind", HALF.values(), ids=list(HALF))
def test_one_layer(blocks, kind):
    made = held(blocks, "layer1.0.conv2", kind=kind)
    assert [name for name, dtype in types(made.module).items() if dtype == torch.float32] == ["layer1.0.conv2"]
    assert made.report.layers == (6, 5) and made.report.asked == ["layer1.0.conv2"]
    assert made.report.single == {"layer1.0.conv2": "as asked (--keep-fp32 layer1.0.conv2)"}
    assert made.to_dict()["kept_as_asked"] == ["layer1.0.conv2"]
    exact = blocks.refold().module.get_submodule("layer1.0.conv2").weight
    assert torch.equal(made.module.get_submodule("layer1.0.conv2").weight, exact.float())
    assert made.module(INPUT).dtype == torch.float32 and made.rounding.multiples["folded"].multiple < 2


def test_everything_below_a_name_and_nothing_beside_it(blocks):
    made = held(blocks, "layer1.1")
    wanted = {"layer1.1.conv1", "layer1.1.conv2"}
    assert {name for name, dtype in types(made.module).items() if dtype == torch.float32} == wanted
    works = {node.meta.get("works_in") for node in made.module.graph.nodes if "layer1.1" in (node.meta.get("module") or "")}
    assert works == {torch.float32}  # its ReLU and its addition too
    assert held(blocks, "layer1").report.layers == (6, 2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("layer1.0.conv3", "no module of that name; did you mean layer1.0.conv"),
        ("layer2", "did you mean layer1"),
        ("layer1.0.conv", "did you mean layer1.0.conv"),
        ("layer1.0.bn1", "it is folded into layer1.0.conv1; name that"),
        ("zzzz", "it has stem"),
    ],
)
def test_an_unknown_name_gives_the_nearest(blocks, name, said):
    with pytest.raises(UsageError, match=re.escape(f"--keep-fp32 {name}: ")) as caught:
        held(blocks, name)
    assert said in str(caught.value)


def test_all_of_it_is_no_half_type(blocks):
    with pytest.raises(UsageError, match="--keep-fp32 stem,layer1,fc: no layer is left for fp16"):
        held(blocks, "stem", "layer1", "fc")


def printed(module, node, mine) -> str:
    """The name that a failure at this operator prints: that of `divergence.locate`."""
    place = Place(layer=divergence.layer_of(node, mine), operator="", judged=Judged(1.0, peak=1.0), reduced=True)
    return divergence.described(place, FP16).rpartition("--keep-fp32 ")[2]


@pytest.mark.parametrize("network", [Blocks, Trunk])
def test_what_a_failure_prints_can_be_pasted(network, blocks):
    """Whichever operator differs first, its printed name keeps it in float32."""
    found = blocks if network is Blocks else folded(Trunk)
    module = held(found).module
    operators = {each.output: each for each in divergence.module_operators(module).operators}
    nodes = [node for node in module.graph.nodes if node.name in operators and "works_in" in node.meta]
    assert len(nodes) >= 8
    for node in nodes:
        name = printed(module, node, operators[node.name])
        assert node.name in kept.kept_as_asked(found.graph, found.refold(), [name]), (node.name, name)


def test_the_library(blocks, tmp_path):
    made = foldexport.export(blocks, "ts", tmp_path / "net.pt", precision="fp16", keep_fp32=["layer1.0"])
    assert made.comparison.ok and TorchScriptExporter().precision_of(made.path) == {"float16": 4, "float32": 2}
    with pytest.raises(UsageError, match=r"wanted a list of module names, \['layer1'\]"):
        foldexport.export(blocks, "ts", tmp_path / "other.pt", precision="fp16", keep_fp32="layer1")
    with pytest.raises(UsageError, match="keep_fp32: is about fp16 and bf16, not fp32"):
        foldexport.export(blocks, "ts", tmp_path / "other.pt", keep_fp32=["layer1"])


def test_the_command(tmp_path):
    checkpoint = save_dirac(tmp_path / "dirac.pth")
    asked = ("--keep-fp32", "features.group0,features.conv", "--keep-fp32", "fc")
    done = command(checkpoint, "--to", "ts", "--precision", "bf16", "-o", tmp_path / "out", *asked)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "out" / "dirac.manifest.json").read_text())
    assert record["precision"]["kept_as_asked"] == ["features.group0", "features.conv", "fc"]
    assert record["precision"]["layers_in_type"] == record["precision"]["layers"] - 4
    assert record["artifacts"][0]["notes"]["precision"]["layers"] == {"bfloat16": 4, "float32": 4}
    assert "as asked (--keep-fp32 features.group0)" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--keep-fp32", "fc"], "--keep-fp32: is about fp16 and bf16, not fp32; pass --precision fp16"),
        (["--keep-fp32", "fc", "--precision", "fp16", "--no-fold"], "leave out --no-fold"),
        (["--keep-fp32", "features.grup0", "--precision", "fp16"], "did you mean features.group0"),
        (["--keep-fp32", "fc,", "--precision", "fp16"], "an empty name"),
    ],
)
def test_refusals(words, said, tmp_path):
    checkpoint = save_dirac(tmp_path / "dirac.pth")
    done = command(checkpoint, "--to", "ts", "-o", tmp_path / "out", *words)
    assert done.code == 2 and said in done.message
    assert files(tmp_path) == ["dirac.pth"]

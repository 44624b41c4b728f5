"""What a user's forward does beside computing, through the command: prints, writes into its input, checks, wrappers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.command import foldexport
from tests.fold.test_ten_users import made
from tests.statistics import randomise

SOURCE = """
import torch
from torch import nn

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

class Talks(Base):
    def forward(self, x):
        print("input", tuple(x.shape))
        x.sub_(0.45).div_(0.22)
        assert torch.isfinite(x).all()
        return torch.relu(self.bn(self.conv(x)))

def wrapped():
    return nn.DataParallel(Talks())

class ByName(Base):
    def forward(self, x, *, mask):
        print("masked")
        return self.bn(self.conv(x)) * mask
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(SOURCE)
    space: dict = {"__name__": "nets"}
    exec(SOURCE, space)
    for name in ("Talks", "ByName"):
        torch.save(randomise(space[name](), 0).state_dict(), tmp_path / f"{name}.pth")
    return tmp_path


@pytest.mark.parametrize(("checkpoint", "arch"), [("Talks", "Talks"), ("Talks", "wrapped")])
@pytest.mark.parametrize("fold", [(), ("--no-fold",)], ids=["folded", "plain"])
def test_stdout_is_the_commands_own_and_notes_are_told(files, checkpoint, arch, fold):
    spec = f"{files / 'nets.py'}:{arch}"
    result = foldexport(files / f"{checkpoint}.pth", "--arch", spec, "--input-shape", "1x3x8x8", "--to", "ts", "--json", *fold)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert any("torch.isfinite(x).all()" in note and "not part of the graph" in note for note in found["architecture"]["notes"])
    assert fold or found["certificate"]["ok"]


def test_inputs_by_keyword(files):
    spec = f"{files / 'nets.py'}:ByName"
    shapes = ("--input-shape", "1x3x8x8", "--input-shape", "1x6x6x6")
    for fold in ((), ("--no-fold",)):
        result = foldexport(files / "ByName.pth", "--arch", spec, *shapes, "--to", "onnx", "--json", "--overwrite", *fold)
        assert result.code == 0, result.err
        assert [each["name"] for each in json.loads(result.out)["inputs"]] == ["input_0", "input_1"]


def test_what_forward_prints_is_not_shown(files):
    spec = f"{files / 'nets.py'}:Talks"
    result = foldexport("inspect", files / "Talks.pth", "--arch", spec, "--input-shape", "1x3x8x8")
    assert result.code == 0 and "input (" not in result.out and "not part of the graph" in " ".join(result.out.split())


def test_a_made_network_has_gammas_of_both_signs():
    from tests.fold.user_networks import AliasedLists

    gamma = made(AliasedLists).bn1.weight
    assert bool((gamma > 0).any()) and bool((gamma < 0).any())

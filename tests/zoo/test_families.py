"""All families together: each network is recognised by its own and by no other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from foldexport import zoo

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from zoo_networks import entries

ARCHES = {
    "DiracNet": "diracnet", "Residual networks without batch norm": "nfresnet", "Pre-activation residual networks": "preresnet",
    "Residual networks": "resnet", "Wide residual networks": "wideresnet", "VGG": "vgg", "RepVGG": "repvgg",
    "MobileOne": "mobileone", "ACNet": "acnet", "Diverse branch block": "dbb",
}  # fmt: skip
LARGEST = 20e6  # parameters: larger networks of a family have the same keys
# Their keys and shapes are those of a ResNet, which is what files of such names are.
TAKEN_FOR_RESNET = tuple(f"110, {order}, padded" for order in ("original", "bn_after", "relu_before", "relu_only"))


@pytest.mark.parametrize("family", ARCHES)
def test_every_network_is_recognised_by_its_own_family_alone(family):
    asked = 0
    for title, entry in entries()[family].items():
        with torch.device("meta"):
            network = entry.build()
        if sum(p.numel() for p in network.parameters()) > LARGEST:
            continue
        state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in network.state_dict().items()}
        found = [each.arch for each in zoo.FAMILIES if each.recognises(state)]
        assert found == ["resnet" if title in TAKEN_FOR_RESNET else ARCHES[family]], title
        asked += 1
    assert asked


def test_every_family_is_in_the_table_and_named_once():
    assert sorted(ARCHES.values()) == sorted(zoo.arch_names())
    assert len({family.name for family in zoo.FAMILIES}) == len(zoo.FAMILIES)

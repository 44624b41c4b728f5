"""Diverse branch blocks: the six transforms, the authors' networks and names, recognition, folding to the deployed form."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import foldexport
from foldexport.errors import CheckpointError, EquivalenceError, UsageError
from foldexport.fold import borders
from foldexport.fold import conv as algebra
from foldexport.zoo.acnet_files import FAMILY as ACNET
from foldexport.zoo.dbb import BNAndPad, DiverseBranchBlock, IdentityConv1x1, dbb, dbb_mobilenet, dbb_resnet
from foldexport.zoo.dbb_files import FAMILY
from tests.fold.checks import assert_same, fold64, operators
from tests.statistics import randomise
from tests.zoo import acnet_networks
from tests.zoo.dbb_networks import IMAGES, SMALL, evaluate, merged, merged_block, network, normed

OPERATORS = {
    "resnet": {"conv": 12, "relu": 9, "add": 4, "max_pool": 1, "avg_pool": 1, "linear": 1},
    "bottlenecks": {"conv": 20, "relu": 16, "add": 5, "max_pool": 1, "avg_pool": 1, "linear": 1},
    "asymmetric blocks": {"conv": 14, "relu": 11, "add": 5, "max_pool": 1, "avg_pool": 1, "linear": 1},
    "mobilenet": {"conv": 27, "relu": 27, "avg_pool": 1, "linear": 1},
}


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    return {name: network(**arguments).state_dict() for name, arguments in SMALL.items()}


def load(state: dict[str, Tensor], arguments: dict | None = None):
    """What the family makes of a file of these tensors, after the question whether it is one of its own."""
    assert FAMILY.recognises(state) and not ACNET.recognises(state)
    return FAMILY.load(dict(state), arguments or {}, "net.pth")


# ── the block ───────────────────────────────────────────────────────────────────────────────────────────────────────

GEOMETRIES = {
    "3x3": {"reads": 4, "writes": 6},
    "3x3 strided": {"reads": 4, "writes": 4, "stride": 2},
    "5x5": {"reads": 4, "writes": 6, "kernel": 5},
    "wide inside": {"reads": 4, "writes": 6, "internal": 8},
    "grouped": {"reads": 6, "writes": 9, "groups": 3},
    "grouped, wide inside": {"reads": 6, "writes": 6, "groups": 3, "internal": 12},
    "depthwise": {"reads": 6, "writes": 6, "groups": 6, "stride": 2},
    "depthwise, identity inside": {"reads": 6, "writes": 6, "groups": 6, "internal": 6},
}


@pytest.mark.parametrize("sizes", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_block_is_the_convolution_of_the_six_transforms_and_folds_to_it(sizes):
    block = randomise(DiverseBranchBlock(**sizes), seed=0).double()
    stride, groups, shape = sizes.get("stride", 1), sizes.get("groups", 1), (sizes["reads"], 11, 12)
    weight, bias = merged_block(block.state_dict(), "", groups)
    x = torch.randn(2, *shape, dtype=torch.float64)
    with torch.no_grad():
        expected = F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)
        assert torch.allclose(block(x), expected, rtol=0, atol=1e-12)
    folded = fold64(block, shape)
    assert operators(folded.counts_after) == {"conv": 1}
    (conv,) = (layer for layer in folded.module.modules() if isinstance(layer, nn.Conv2d))
    assert conv.groups == groups and conv.padding == (weight.shape[-1] // 2,) * 2
    assert torch.allclose(conv.weight, weight, rtol=0, atol=1e-12) and torch.allclose(conv.bias, bias, rtol=0, atol=1e-12)
    assert_same(folded, block, shape)


def test_the_border_is_what_the_norm_makes_of_zero():
    norm = randomise(BNAndPad(3, 2), seed=1)
    x = torch.randn(2, 3, 4, 5)
    with torch.no_grad():
        assert torch.allclose(norm(x), norm.bn(F.pad(x, (2, 2, 2, 2))), rtol=0, atol=1e-6)
        assert norm.train()(x).shape == (2, 3, 8, 9)


def test_a_new_identity_convolution_is_the_identity():
    for groups in (1, 2, 6):
        x = torch.randn(2, 6, 3, 3)
        assert torch.equal(IdentityConv1x1(6, groups)(x), x)


NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def test_a_block_has_the_published_names():
    dense = {
        "dbb_origin.conv.weight", "dbb_1x1.conv.weight", "dbb_avg.conv.weight",
        "dbb_1x1_kxk.idconv1.weight", "dbb_1x1_kxk.conv2.weight",
        *(f"{norm}.{t}" for t in NORM for norm in
          ("dbb_origin.bn", "dbb_1x1.bn", "dbb_avg.bn.bn", "dbb_avg.avgbn", "dbb_1x1_kxk.bn1.bn", "dbb_1x1_kxk.bn2")),
    }  # fmt: skip
    assert DiverseBranchBlock(4, 6).state_dict().keys() == dense
    depthwise = {
        "dbb_origin.conv.weight", "dbb_1x1_kxk.conv1.weight", "dbb_1x1_kxk.conv2.weight",
        *(f"{norm}.{t}" for t in NORM for norm in ("dbb_origin.bn", "dbb_avg.avgbn", "dbb_1x1_kxk.bn1.bn", "dbb_1x1_kxk.bn2")),
    }  # fmt: skip
    assert DiverseBranchBlock(4, 4, groups=4).state_dict().keys() == depthwise
    assert DiverseBranchBlock(4, 4, groups=4).dbb_1x1_kxk.conv1.weight.shape == (8, 1, 1, 1)
    assert DiverseBranchBlock(4, 6, deploy=True).state_dict().keys() == {"dbb_reparam.weight", "dbb_reparam.bias"}
    with pytest.raises(ValueError, match="odd"):
        DiverseBranchBlock(4, 4, 2)


# ── the networks ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [name for name in SMALL if "asymmetric" not in name])
def test_both_forms_compute_the_authors_network(states, name):
    x, plain = IMAGES.double(), merged(states[name])
    trained, deployed = load(states[name]).module.double(), load(plain).module
    with torch.no_grad():
        expected = evaluate(plain, x)
        assert torch.allclose(deployed(x), expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
        assert torch.allclose(trained(x), expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [name for name in SMALL if "asymmetric" in name])
def test_asymmetric_blocks_compute_the_same_network(states, name):
    """Their sums, merged as ACNet's paper does, in the place of the other blocks."""
    x, plain = IMAGES.double(), acnet_networks.merged(states[name])
    plain = {key.replace("fused_conv", "dbb_reparam"): tensor for key, tensor in plain.items()}
    for key in [key for key in plain if key.endswith(".bn.weight")]:
        unit = key.removesuffix("bn.weight")
        plain[f"{unit}conv.weight"], plain[f"{unit}conv.bias"] = normed(plain, f"{unit}bn", plain[f"{unit}conv.weight"])
    with torch.no_grad():
        expected, found = evaluate(plain, x), load(states[name]).module.double()(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


NAMES = {
    "resnet": "stage0.conv1.conv.weight stage0.conv1.bn.bias stage1.0.conv1.dbb_origin.conv.weight "
    "stage1.0.conv2.dbb_avg.bn.bn.weight stage2.0.shortcut.conv.weight stage2.0.shortcut.bn.running_var "
    "stage4.0.conv2.dbb_1x1_kxk.idconv1.weight linear.bias",
    "bottlenecks": "stage1.0.conv1.conv.weight stage1.0.conv2.dbb_1x1.bn.weight stage2.1.conv3.bn.running_mean",
    "asymmetric blocks": "stage0.conv1.conv.weight stage1.1.conv1.square_conv.weight stage1.1.conv2.hor_bn.running_mean",
    "mobilenet": "conv1.dbb_1x1_kxk.idconv1.weight stem.0.depthwise.dbb_1x1_kxk.conv1.weight stem.12.depthwise.dbb_avg.avgbn.bias "
    "stem.12.pointwise.conv.weight stem.12.pointwise.bn.weight linear.weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_names_are_the_authors(states, name):
    assert set(NAMES[name].split()) <= states[name].keys()
    assert FAMILY.fitting(states[name]) == len(states[name])
    if "asymmetric" not in name:
        assert FAMILY.fitting(merged(states[name])) == len(merged(states[name]))


# Parameters of torchvision's ResNets less their gammas: a deployed network has a bias for each beta. MobileNet v1 has 4.2
# million (Howard et al. 2017, table 4).
PUBLISHED = {18: 11_689_512 - 4_800, 34: 21_797_672 - 8_512, 50: 25_557_032 - 26_560, 101: 44_549_160 - 52_672}


@pytest.mark.parametrize("depth, count", PUBLISHED.items())
def test_published_parameter_counts(depth, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in dbb_resnet(depth, deploy=True).parameters()) == count


def test_published_parameter_count_of_mobilenet():
    with torch.device("meta"):
        assert sum(p.numel() for p in dbb_mobilenet(deploy=True).parameters()) / 1e6 == pytest.approx(4.2, abs=0.05)


# ── recognition ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name, deploy", [(n, d) for n in SMALL for d in (False, True) if not (d and "asymmetric" in n)])
def test_every_form_is_recognised_with_the_reason(states, name, deploy):
    state = merged(states[name]) if deploy else states[name]
    found, arguments = load(state), SMALL[name]
    assert not found.module.training
    assert all(torch.equal(tensor, state[key]) for key, tensor in found.module.state_dict().items() if "batches" not in key)
    assert found.name == "DBB" and arguments["network"] in found.reason
    assert f"{arguments['width']} channels first; linear has 5 rows" in found.reason
    assert ("dbb_reparam" in found.reason) == deploy == ("deployed" in found.description)
    assert ("asymmetric convolution blocks" in found.description) == ("asymmetric" in name)
    assert ("1x internal" in found.description) == ("one internal" in name and not deploy)
    assert found.num_classes == 5 and found.input_shape == (1, 3, 224, 224) and found.preprocessing["crop_pct"] == 0.875


def test_the_published_networks_are_recognised_by_depth():
    for depth in (18, 50):
        found = load(dbb_resnet(depth, width=4).state_dict())
        assert found.description.startswith(f"ResNet-{depth} of diverse branch blocks")
    assert "ResNet (1-2-1-1 blocks)" in load(dbb(**SMALL["bottlenecks"]).state_dict()).description


def flat(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the code saved it before April 2021, when the batch norm that pads was one itself."""
    return {re.sub(r"(dbb_avg\.bn|dbb_1x1_kxk\.bn1)\.bn\.", r"\1.", key): tensor for key, tensor in state.items()}


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_files_of_the_first_code_are_recognised(states, name):
    state = flat(states[name])
    assert not any(".bn.bn." in key for key in state) and FAMILY.fitting(state) == len(state)
    with torch.no_grad():
        assert torch.equal(load(state).module(IMAGES), load(states[name]).module(IMAGES))


@pytest.mark.parametrize("old", [False, True], ids=["nested", "flat"])
def test_damage_is_listed_under_the_names_of_the_file(states, old):
    state = flat(states["resnet"]) if old else dict(states["resnet"])
    lost = "stage1.0.conv1.dbb_1x1_kxk.bn1.weight" if old else "stage1.0.conv1.dbb_1x1_kxk.bn1.bn.weight"
    del state[lost]
    state["stage2.0.conv1.dbb_max.weight"] = torch.ones(2)
    state["stage2.0.conv2.dbb_avg.conv.weight"] = torch.ones(3, 3, 1, 1)
    with pytest.raises(CheckpointError) as refused:
        load(state)
    assert f"1 missing ({lost})" in str(refused.value)
    assert "1 surplus (stage2.0.conv1.dbb_max.weight)" in str(refused.value)
    assert "stage2.0.conv2.dbb_avg.conv.weight is [3, 3, 1, 1], wanted [16, 16, 1, 1]" in str(refused.value)


@pytest.mark.parametrize("lost", ["linear", "stage0.conv1.conv", "stage1.0"])
def test_a_file_without_a_whole_layer_is_reported_and_not_misread(states, lost):
    state = {key: tensor for key, tensor in states["resnet"].items() if not key.startswith(f"{lost}.")}
    with pytest.raises(CheckpointError, match=rf"missing \({lost}\."):
        load(state)


def test_other_networks_are_not_recognised(states):
    assert not FAMILY.recognises(acnet_networks.network("mobilenet").state_dict())
    assert not FAMILY.recognises({f"backbone.{key}": tensor for key, tensor in states["resnet"].items()})
    assert not FAMILY.recognises({key: t for key, t in states["resnet"].items() if ".dbb_" not in key})


def test_arguments_overrule_and_are_checked(states):
    assert load(states["mobilenet"], {"width": 4}).description.startswith("MobileNet")
    with pytest.raises(CheckpointError, match="missing"):
        load(states["bottlenecks"], {"blocks": (2, 2, 1, 1)})
    with pytest.raises(UsageError, match="takes no stem"):
        load(states["resnet"], {"stem": "cifar"})
    for wrong, message in (
        ({"network": "alexnet"}, "networks are resnet"), ({"depth": 20}, "depth 20"), ({"block": "base"}, "blocks are dbb, acb"),
        ({"width": 0}, "width 0"), ({"block": "acb", "deploy": True}, "deploys dbb blocks only"), ({"internal": 2}, "internal 2"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            load(states["resnet"], wrong)


# ── folding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SMALL)
def test_every_block_folds_to_one_convolution_as_deployed(states, name):
    folded = foldexport.fold(load(states[name]).module, IMAGES)
    assert folded.certificate.ok
    assert operators(folded.counts_after) == OPERATORS["mobilenet" if "mobilenet" in name else name]
    assert not any(entry.status == "kept" for entry in folded.ledger)
    if "asymmetric" not in name:
        deployed = load({key: tensor.float() for key, tensor in merged(states[name]).items()}).module
        assert foldexport.fold(deployed, IMAGES).counts_after == folded.counts_after


def _without_bias(conv: algebra.Conv) -> algebra.Conv:
    return dataclasses.replace(conv, bias=None)


PLANTED = {
    "a branch lost": (algebra, "add", lambda right: lambda first, *others: first),
    "the border forgotten": (algebra, "compose", lambda right: lambda first, second: right(_without_bias(first), second)),
    "the border off by 1e-6": (borders, "_level", lambda right: lambda *given: None if (b := right(*given)) is None else b + 1e-6),
}


@pytest.mark.parametrize("place, name, mistake", PLANTED.values(), ids=PLANTED)
def test_a_wrong_merge_is_caught(monkeypatch: pytest.MonkeyPatch, place, name, mistake):
    module = randomise(DiverseBranchBlock(4, 4), seed=0)
    example = torch.randn(2, 4, 9, 9)
    assert foldexport.fold(module, example).certificate.ok
    monkeypatch.setattr(place, name, mistake(getattr(place, name)))
    with pytest.raises(EquivalenceError):
        foldexport.fold(module, example)

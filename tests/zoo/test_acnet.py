"""ACNets: the blocks' equation and their merge, the authors' networks and names, recognition, folding to the deployed form."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import foldexport
from foldexport.errors import CheckpointError, EquivalenceError, UsageError
from foldexport.fold import conv as algebra
from foldexport.zoo.acnet import NETWORKS, acnet
from foldexport.zoo.acnet_blocks import ACBlock
from foldexport.zoo.acnet_files import FAMILY
from foldexport.zoo.dbb_files import FAMILY as DBB
from tests.fold.checks import assert_same, fold64
from tests.statistics import randomise
from tests.zoo.acnet_networks import SMALL, evaluate, images, merged, network

# What is left of them: the operators of the deployed form, whose batch norms beside 1x1 and 7x7 kernels fold as well.
OPERATORS = {
    "resnet": {"conv": 14, "relu": 11, "add": 5, "max_pool": 1, "avg_pool": 1, "linear": 1},
    "resnet of 2019": {"conv": 17, "relu": 13, "add": 4, "max_pool": 1, "avg_pool": 1, "linear": 1},
    "stagewise": {"conv": 20, "relu": 16, "add": 5, "max_pool": 1, "avg_pool": 1, "linear": 1},
    "mobilenet": {"conv": 27, "relu": 27, "avg_pool": 1, "linear": 1},
    "cifar-quick": {"conv": 3, "relu": 4, "max_pool": 1, "avg_pool": 2, "linear": 2},
    "cifar-quick of 2019": {"conv": 3, "relu": 4, "max_pool": 1, "avg_pool": 2, "linear": 2},
    "vgg": {"conv": 13, "relu": 14, "max_pool": 5, "linear": 2},
    "wrn": {"conv": 16, "relu": 10, "clamp": 5, "add": 6, "avg_pool": 1, "linear": 1},
    "cifar-stagewise": {"conv": 15, "relu": 13, "add": 6, "avg_pool": 1, "linear": 1},
    "cifar-resnet": {"conv": 9, "relu": 7, "add": 3, "avg_pool": 1, "linear": 1},
}


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    return {name: network(name).state_dict() for name in SMALL}


def load(state: dict[str, Tensor], arguments: dict | None = None):
    """What the family makes of a file of these tensors, after the question whether it is one of its own."""
    assert FAMILY.recognises(state) and not DBB.recognises(state)
    return FAMILY.load(dict(state), arguments or {}, "net.pth")


# ── the block ───────────────────────────────────────────────────────────────────────────────────────────────────────

GEOMETRIES = {
    "3x3": {"kernel": 3, "padding": 1},
    "3x3 strided": {"kernel": 3, "padding": 1, "stride": 2},
    "grouped": {"kernel": 3, "padding": 1, "groups": 2},
    "dilated": {"kernel": 3, "padding": 2, "dilation": 2},
    "5x5": {"kernel": 5, "padding": 2},
    "wide padding": {"kernel": 5, "padding": 3},
    "narrow padding": {"kernel": 5, "padding": 1},
    "unpadded": {"kernel": 5, "padding": 0},
    "short strips": {"kernel": 5, "padding": 2, "strip": 3},
    "short strips, unpadded": {"kernel": 7, "padding": 0, "strip": 3},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_block_is_the_convolution_of_the_sum_and_folds_to_it(geometry):
    block = randomise(ACBlock(4, 6, **geometry), seed=0).double()
    x = torch.randn(2, 4, 15, 14, dtype=torch.float64)
    plain = merged(block.state_dict())
    passed = {name: geometry.get(name, 1) for name in ("stride", "dilation", "groups")}
    expected = F.conv2d(x, plain["fused_conv.weight"], plain["fused_conv.bias"], padding=geometry["padding"], **passed)
    with torch.no_grad():
        assert torch.allclose(block(x), expected, rtol=0, atol=1e-12)
    folded = fold64(block, (4, 15, 14))
    assert folded.counts_after == {"conv": 1}
    (conv,) = (layer for layer in folded.module.modules() if isinstance(layer, nn.Conv2d))
    assert torch.allclose(conv.weight, plain["fused_conv.weight"], rtol=0, atol=1e-12)
    assert torch.allclose(conv.bias, plain["fused_conv.bias"], rtol=0, atol=1e-12)
    assert_same(folded, block, (4, 15, 14))


def test_a_block_has_the_published_names():
    names = {
        "square_conv.weight": (6, 4, 5, 5), "ver_conv.weight": (6, 4, 5, 1), "hor_conv.weight": (6, 4, 1, 5),
        **{f"{b}_bn.{t}": (6,) for b in ("square", "ver", "hor") for t in ("weight", "bias", "running_mean", "running_var")},
        **{f"{b}_bn.num_batches_tracked": () for b in ("square", "ver", "hor")},
    }  # fmt: skip
    assert {key: tuple(t.shape) for key, t in ACBlock(4, 6, 5).state_dict().items()} == names
    deployed = ACBlock(4, 6, 5, deploy=True).state_dict()
    assert {key: tuple(t.shape) for key, t in deployed.items()} == {"fused_conv.weight": (6, 4, 5, 5), "fused_conv.bias": (6,)}


@pytest.mark.parametrize("sizes", [{"kernel": 4}, {"kernel": 5, "strip": 2}, {"kernel": 3, "strip": 5}])
def test_kernels_without_a_centre_are_refused(sizes):
    with pytest.raises(ValueError, match="odd size"):
        ACBlock(4, 4, **sizes)


# ── the networks ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SMALL)
def test_both_forms_compute_the_authors_network(states, name):
    x, plain = images(name, 1).double(), merged(states[name])
    trained, deployed = load(states[name]).module.double(), load(plain).module
    with torch.no_grad():
        expected = evaluate(name, plain, x)
        assert torch.allclose(deployed(x), expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
        assert torch.allclose(trained(x), expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


# Names in the authors' files, trained and deployed.
NAMES = {
    "resnet": (
        "conv1.conv.weight conv1.bn.running_var stage1.0.conv1.acb.square_conv.weight stage1.0.conv2.ver_bn.bias "
        "stage2.0.shortcut.conv.weight stage2.0.shortcut.bn.weight linear.weight",
        "conv1.bn.weight stage1.0.conv1.acb.fused_conv.bias stage1.0.conv2.fused_conv.weight stage2.0.shortcut.bn.bias",
    ),
    "resnet of 2019": (
        "conv1.acb.hor_conv.weight stage1.0.conv1.conv.weight stage1.0.conv2.acb.hor_bn.weight stage1.0.conv3.bn.bias",
        "conv1.acb.fused_conv.weight stage4.0.conv2.acb.fused_conv.bias",
    ),
    "stagewise": (
        "conv1.conv.weight stage1.projection.bn.weight stage1.block0.conv1.conv.weight stage1.block1.conv2.acb.ver_conv.weight "
        "stage4.block0.conv3.bn.running_mean fc.bias",
        "stage1.block1.conv2.acb.fused_conv.weight stage1.projection.conv.weight",
    ),
    "mobilenet": (
        "conv1.acb.square_bn.weight stem.12.depthwise.acb.ver_conv.weight stem.0.pointwise.conv.weight linear.weight",
        "conv1.acb.fused_conv.bias stem.12.depthwise.acb.fused_conv.weight stem.0.pointwise.bn.weight",
    ),
    "cifar-quick": (
        "conv1.acb.square_conv.weight conv3.acb.hor_bn.running_mean fc1.weight fc2.bias",
        "conv2.acb.fused_conv.weight",
    ),
    "vgg": (
        "stem.conv1.acb.square_conv.weight stem.conv13.acb.ver_conv.weight linear1.weight linear2.bias",
        "stem.conv13.acb.fused_conv.bias",
    ),
    "wrn": (
        "conv1.square_conv.weight stage1.block1.proj.bn.weight stage1.block1.proj.conv.weight stage3.block2.conv1.bn.weight "
        "stage3.block2.conv2.acb.hor_bn.bias last_bn.running_var linear.bias",
        "conv1.fused_conv.weight stage3.block2.conv2.bn.bias stage3.block2.conv2.acb.fused_conv.weight",
    ),
    "cifar-stagewise": (
        "stage1.conv1.square_conv.weight stage1.block0.conv1.acb.ver_bn.weight stage1.block1.conv2.hor_conv.weight "
        "stage2.projection.conv.weight stage3.projection.bn.bias linear.weight",
        "stage1.conv1.fused_conv.bias stage1.block1.conv2.fused_conv.weight",
    ),
    "cifar-resnet": (
        "conv1.acb.square_conv.weight stage1.0.conv1.acb.ver_conv.weight stage2.0.conv2.hor_bn.bias stage3.0.shortcut.bn.weight",
        "conv1.acb.fused_conv.weight stage3.0.shortcut.conv.weight",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_names_are_the_authors(states, name):
    trained, deployed = NAMES[name]
    assert set(trained.split()) <= states[name].keys()
    assert set(deployed.split()) <= merged(states[name]).keys()
    assert FAMILY.fitting(states[name]) == len(states[name]) and FAMILY.fitting(merged(states[name])) == len(merged(states[name]))


# Millions of parameters without the strips: ResNet-18 and 50 (torchvision), MobileNet v1 (Howard et al. 2017, table 4), ResNet-56
# and 110 (He et al. 2016, table 6), WRN-16-8 (Zagoruyko & Komodakis 2016, table 4).
PUBLISHED = {
    ("resnet", 18): 11.69, ("resnet", 34): 21.80, ("stagewise", 50): 25.56, ("mobilenet", None): 4.2,
    ("cifar-resnet", 56): 0.85, ("cifar-resnet", 110): 1.7, ("cifar-stagewise", 56): 0.85, ("wrn", 16): 11.0,
}  # fmt: skip


@pytest.mark.parametrize("which, millions", PUBLISHED.items(), ids=str)
def test_published_parameter_counts(which, millions):
    """As deployed: a bias for each gamma and beta, so within the rounding of the published number and half the norms."""
    with torch.device("meta"):
        module = acnet(*which, deploy=True)
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


# ── recognition ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("deploy", [False, True], ids=["trained", "deployed"])
@pytest.mark.parametrize("name", SMALL)
def test_both_forms_are_recognised_with_the_reason(states, name, deploy):
    state = {key: t.float() for key, t in merged(states[name]).items()} if deploy else states[name]
    found = load(state)
    assert not found.module.training
    assert all(torch.equal(tensor, state[key]) for key, tensor in found.module.state_dict().items() if "batches" not in key)
    arguments = SMALL[name]
    assert found.name == "ACNet" and arguments["network"] in found.reason
    assert f"width {arguments['width']}" in found.description and ("deployed" in found.description) == deploy
    assert ("fused_conv" in found.reason) == deploy
    assert found.num_classes == arguments.get("num_classes", 10)
    short_strips = "of 2019" in name and not (deploy and "quick" in name)
    assert ("the code of 2019" in found.reason) == short_strips == ("release 2019" in found.description)


def test_blocks_are_counted(states):
    assert "1-2-1-1 blocks" in load(states["resnet"]).reason
    assert "resnet (1-2-1-1 blocks)" in load(states["resnet"]).description
    assert "cifar-stagewise-14" in load(states["cifar-stagewise"]).description
    assert "wrn-16" in load(states["wrn"]).description


def test_preprocessing_is_the_authors(states):
    cifar, imagenet = load(states["vgg"]), load(states["stagewise"])
    assert cifar.input_shape == (1, 3, 32, 32) and cifar.preprocessing["mean"] == cifar.preprocessing["std"] == (0.5, 0.5, 0.5)
    assert cifar.preprocessing["label_names"][0] == "airplane" and "label_names" not in load(states["wrn"]).preprocessing
    assert imagenet.input_shape == (1, 3, 224, 224) and imagenet.preprocessing["crop_pct"] == 0.875


def test_no_two_networks_share_keys_and_shapes_but_those_that_are_the_same():
    """Why a file is never ambiguous: releases differ in shapes, but where all kernels are 3x3 or deployed."""
    seen = defaultdict(set)
    for name, standard in NETWORKS.items():
        for release in (2020, 2019):
            for deploy in (False, True):
                with torch.device("meta"):
                    module = acnet(name, release=release, deploy=deploy)
                seen[frozenset((key, tuple(t.shape)) for key, t in module.state_dict().items())].add((name, release, deploy))
        assert standard.names
    shared = {frozenset(which) for which in seen.values() if len(which) > 1}
    same = {frozenset({(name, 2020, deploy), (name, 2019, deploy)}) for name in NETWORKS for deploy in (False, True)}
    larger = {(name, deploy) for name in ("resnet", "stagewise") for deploy in (False, True)} | {("cifar-quick", False)}
    assert shared == {pair for pair in same if (*[next(iter(pair))[i] for i in (0, 2)],) not in larger}


def test_other_networks_are_not_recognised(states):
    plain = {key: tensor for key, tensor in states["resnet"].items() if ".ver_" not in key and ".hor_" not in key}
    renamed = {key.replace("square_", ""): tensor for key, tensor in plain.items()}
    assert not FAMILY.recognises(renamed)
    assert not FAMILY.recognises({f"backbone.{key}": tensor for key, tensor in states["vgg"].items()})


@pytest.mark.parametrize("deploy", [False, True])
def test_damage_is_listed_under_the_names_of_the_file(states, deploy):
    state = dict(merged(states["vgg"]) if deploy else states["vgg"])
    first, second = ("fused_conv.weight", "fused_conv.bias") if deploy else ("square_conv.weight", "hor_bn.bias")
    del state[f"stem.conv1.acb.{first}"]
    state["stem.conv2.acb.gain"] = torch.ones(2)
    state[f"stem.conv3.acb.{second}"] = torch.ones(3)
    state["linear2.weight"] = torch.ones(10, 512, dtype=torch.int64)
    with pytest.raises(CheckpointError) as refused:
        load(state)
    assert f"1 missing (stem.conv1.acb.{first})" in str(refused.value)
    assert "1 surplus (stem.conv2.acb.gain)" in str(refused.value)
    assert f"stem.conv3.acb.{second} is [3], wanted [8]" in str(refused.value)
    assert "1 not floating point (linear2.weight is int64)" in str(refused.value)


@pytest.mark.parametrize("lost", ["linear", "conv1"])
def test_a_file_without_a_whole_layer_is_reported_and_not_misread(states, lost):
    state = {key: tensor for key, tensor in states["resnet"].items() if not key.startswith(f"{lost}.")}
    with pytest.raises(CheckpointError, match=rf"missing \({lost}\."):
        load(state)


def test_arguments_overrule_and_are_checked(states):
    assert load(states["wrn"], {"width": 8}).description.startswith("ACNet, wrn-16")
    with pytest.raises(CheckpointError, match="missing"):
        load(states["wrn"], {"depth": 22})
    with pytest.raises(UsageError, match="takes no stem"):
        load(states["wrn"], {"stem": "cifar"})
    for wrong, message in (
        ({"network": "alexnet"}, "networks are resnet"), ({"depth": 20}, "6n \\+ 4"), ({"release": 2021}, "releases are 2020"),
        ({"network": "vgg"}, "a vgg has no depth"), ({"width": 0}, "width 0"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            load(states["wrn"], wrong)


# ── folding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SMALL)
def test_every_block_folds_to_one_convolution_as_deployed(states, name):
    folded = foldexport.fold(load(states[name]).module, images(name))
    assert folded.certificate.ok
    assert {kind: number for kind, number in folded.counts_after.items() if kind != "flatten"} == OPERATORS[name]
    assert not any(entry.status == "kept" for entry in folded.ledger)
    deployed = load({key: tensor.float() for key, tensor in merged(states[name]).items()}).module
    assert foldexport.fold(deployed, images(name)).counts_after == folded.counts_after


PLANTED = {
    "a branch lost": lambda right: lambda first, *others: first,
    "a strip off its centre": lambda right: (
        lambda a, b: right(a, dataclasses.replace(b, padding=tuple((lo + 1, hi - 1) for lo, hi in b.padding)))
    ),
    "taps mirrored": lambda right: lambda a, b: _mirrored(right(a, b)),
}


def _mirrored(conv: algebra.Conv) -> algebra.Conv:
    return dataclasses.replace(conv, weight=conv.weight.flip(-1))


@pytest.mark.parametrize("mistake", PLANTED.values(), ids=PLANTED)
def test_a_wrong_merge_is_caught(monkeypatch: pytest.MonkeyPatch, mistake):
    module = randomise(nn.Sequential(ACBlock(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1)), seed=0)
    example = torch.randn(2, 4, 9, 9)
    assert foldexport.fold(module, example).certificate.ok
    monkeypatch.setattr(algebra, "add", mistake(algebra.add))
    with pytest.raises(EquivalenceError):
        foldexport.fold(module, example)

"""MobileOne: published sizes, equations, recognition in every layout, folding to the deployed network."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import foldexport
from foldexport.errors import CheckpointError, EquivalenceError, UsageError
from foldexport.fold import conv as algebra
from foldexport.zoo import FAMILIES, identify
from foldexport.zoo.mobileone import VARIANTS, mobileone
from foldexport.zoo.mobileone_files import FAMILY
from tests.statistics import randomise
from tests.zoo import test_repvgg
from tests.zoo.states import batch_norm
from tests.zoo.test_repvgg import IMAGE, relative

# Millions of parameters as deployed: Vasu et al. 2023, table 9, and OpenMMLab's table (mmpretrain, configs/mobileone); and
# the parameters that the authors' own training and deployed graphs have.
PUBLISHED = {
    "S0": (2.1, 2.08, 5_293_272, 2_078_504), "S1": (4.8, 4.76, 4_825_192, 4_764_840), "S2": (7.8, 7.81, 7_884_648, 7_808_168),
    "S3": (10.1, 10.08, 10_170_600, 10_078_312), "S4": (14.8, 14.84, 14_951_248, 14_838_352),
}  # fmt: skip
# Small networks of every kind of block.
SMALL = {
    "plain": {"blocks": (2, 1), "widths": (16, 24), "branches": 1},
    "branched": {"blocks": (1, 2), "widths": (16, 24), "branches": 3},
    "gated": {"blocks": (1, 3, 1), "widths": (16, 16, 32), "branches": 2, "se": (0, 2, 1)},
    "wide stem": {"blocks": (1, 1), "widths": (80, 24), "branches": 1},
}
TIMM = {"rbr_conv": "conv_kxk", "rbr_scale": "conv_scale", "rbr_skip": "identity", "reduce": "fc1", "expand": "fc2", "se": "attn"}


def network(kind: str, **arguments) -> nn.Module:
    net = mobileone(**{"num_classes": 7} | SMALL[kind] | arguments)
    return randomise(net, seed=3, example=torch.randn(16, 3, 64, 64))


def block_names(state: dict[str, Tensor]) -> list[str]:
    return list(dict.fromkeys(key.partition(".rbr_")[0] for key in state if ".rbr_" in key))


def evaluate(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network of the paper (figure 3, table 2) straight from the trained tensors; x ``[N, 3, H, W]``."""
    for name in block_names(state):
        branches = dict.fromkeys(
            key.removeprefix(f"{name}.").rpartition(".conv.weight")[0]
            for key in state
            if key.startswith(f"{name}.rbr_") and key.endswith(".conv.weight")
        )
        kernel = state[f"{name}.rbr_conv.0.conv.weight"].shape[-1]
        stride = 2 if name == "stage0" or (name.endswith(".0") and kernel == 3) else 1
        y = 0
        for branch in branches:
            weight = state[f"{name}.{branch}.conv.weight"]
            groups = x.shape[1] // weight.shape[1]
            convolved = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups)
            y = y + batch_norm(convolved, state, f"{name}.{branch}.bn")
        if f"{name}.rbr_skip.weight" in state:
            y = y + batch_norm(x, state, f"{name}.rbr_skip")
        if f"{name}.se.expand.weight" in state:
            reduce, expand = (
                (state[f"{name}.se.{layer}.weight"], state[f"{name}.se.{layer}.bias"]) for layer in ("reduce", "expand")
            )
            y = y * F.conv2d(F.conv2d(F.avg_pool2d(y, y.shape[-1]), *reduce).relu(), *expand).sigmoid()
        x = y.relu()
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' conversion, in float64: ``W = Σ γ/√(σ² + ε)·W_b`` and ``b = Σ β − γ·μ/√(σ² + ε)`` over a block's branches."""
    state = {key: value.double() for key, value in state.items()}
    deployed = {key: value for key, value in state.items() if ".rbr_" not in key}
    for name in block_names(state):
        shape = state[f"{name}.rbr_conv.0.conv.weight"].shape
        weight, bias = torch.zeros(shape, dtype=torch.float64), 0
        for norm in [key.removesuffix(".running_var") for key in state if key.startswith(f"{name}.rbr_") and "running_var" in key]:
            gamma, beta, mean, var = (state[f"{norm}.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var"))
            if norm.endswith("rbr_skip"):
                kernel = torch.zeros(shape, dtype=torch.float64)
                for channel in range(shape[0]):
                    kernel[channel, channel % shape[1], shape[2] // 2, shape[3] // 2] = 1
            else:
                kernel = state[f"{norm.removesuffix('.bn')}.conv.weight"]
                kernel = F.pad(kernel, [(shape[-1] - kernel.shape[-1]) // 2] * 4)
            scale = gamma / (var + 1e-5).sqrt()
            weight, bias = weight + scale.reshape(-1, 1, 1, 1) * kernel, bias + beta - scale * mean
        deployed[f"{name}.reparam_conv.weight"], deployed[f"{name}.reparam_conv.bias"] = weight, bias
    return deployed


def timm_named(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return test_repvgg.timm_named(state, TIMM)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_the_published_ones(name):
    with torch.device("meta"):
        trained, deployed = (sum(p.numel() for p in mobileone(name, deploy=deploy).parameters()) for deploy in (False, True))
    paper, listed, *counts = PUBLISHED[name]
    assert [trained, deployed] == counts
    assert (round(deployed / 1e6, 1), round(deployed / 1e6, 2)) == (paper, listed)


@pytest.mark.parametrize("kind", SMALL)
def test_it_computes_the_papers_equations(kind):
    net = network(kind).double()
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        found, state = net(x), net.state_dict()
        assert relative(found, evaluate(state, x)) < 1e-12
        deployed = mobileone(**{"num_classes": 7} | SMALL[kind], deploy=True).double()
        deployed.load_state_dict(merged(state))
        assert relative(found, deployed(x)) < 1e-11


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_recognised(name, deploy):
    with torch.device("meta"):
        state = mobileone(name, deploy=deploy, num_classes=37).state_dict()
    for layout in (state, timm_named(state)):
        assert [family.arch for family in FAMILIES if family.recognises(layout)] == ["mobileone"]
        assert FAMILY.fitting(layout) == len(layout)
        found = FAMILY.load(layout, {}, "net.pth")
        assert found.description == f"MobileOne-{name}, {'deployed' if deploy else 'training graph'}, 37 classes"
        assert f"MobileOne-{name}; the linear layer has 37 rows" in found.reason
        assert ("squeeze-and-excitation in the last 0-0-5-1" in found.reason) == (name == "S4")
        assert found.notes == ["stem with stride 2, as published: no key says it"]
        assert found.input_shape == (1, 3, 224, 224)
        assert found.preprocessing["crop_pct"] == (0.875 if name == "S0" else 0.9)


@pytest.mark.parametrize("layout", ["published", "timm"])
@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("kind", SMALL)
def test_networks_that_were_not_published(kind, deploy, layout):
    net = network(kind, deploy=deploy)
    found = identify(net.state_dict() if layout == "published" else timm_named(net.state_dict()))
    sizes = SMALL[kind]
    branches = "" if deploy else f", {sizes['branches']} branches"
    assert found.description.startswith(
        f"MobileOne, {'-'.join(map(str, sizes['blocks']))} blocks, channels {'-'.join(map(str, sizes['widths']))}{branches}, "
    )
    assert ("squeeze-and-excitation 0-2-1" in found.description) == (kind == "gated")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found.module(x), net(x))


@pytest.mark.parametrize("deploy", [False, True])
def test_damage_is_reported_by_key(deploy):
    state = mobileone("S0", deploy=deploy).state_dict()
    layer = "reparam_conv" if deploy else "rbr_conv.2.conv"
    missing = "stage3.9.reparam_conv.bias" if deploy else "stage3.9.rbr_conv.3.bn.running_var"
    del state[missing]
    state[f"stage2.5.{layer}.weight"] = state[f"stage2.5.{layer}.weight"][:-1]
    state["aux.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as raised:
        identify(state, source="net.pth")
    assert f"net.pth, as MobileOne-S0, {'deployed' if deploy else 'training graph'}" in str(raised.value)
    assert f"1 missing ({missing}); 1 surplus (aux.weight)" in str(raised.value)
    assert f"stage2.5.{layer}.weight is [127, 128, 1, 1], wanted [128, 128, 1, 1]" in str(raised.value)


@pytest.mark.parametrize("arguments", [
    {"name": "S9"}, {"blocks": (1, 2, 1)}, {"se": (0, 3)}, {"branches": 0}, {"colour": 1}, {"blocks": 3},
    {"blocks": (1,), "widths": (8,), "se": (1,)},
])  # fmt: skip
def test_what_makes_no_network_is_a_usage_error(arguments):
    with pytest.raises(UsageError, match="--arch mobileone"):
        identify(network("plain").state_dict(), arch="mobileone", arch_args=arguments)


def same_as_deployed(folded: nn.Module, net: nn.Module, arguments: dict) -> None:
    """Its tensors are those of the authors' conversion, in name but for the block's, and in value; and so are its outputs.

    In float64: float32's own noise in such deep networks would hide a small mistake.
    """
    wanted = merged(net.state_dict())
    found = {key.replace("rbr_conv.0.conv", "reparam_conv"): tensor for key, tensor in folded.state_dict().items()}
    assert found.keys() == wanted.keys()
    assert all(relative(found[key], wanted[key]) < 1e-13 for key in wanted)
    deployed = mobileone(**arguments, deploy=True).eval().double()
    deployed.load_state_dict(found)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative(folded(x), deployed(x)) < 1e-12
        assert relative(folded(x), net(x)) < 1e-11


@pytest.mark.parametrize("kind", [kind for kind in SMALL if kind != "gated"])
def test_every_block_folds_to_a_convolution_and_a_relu(kind):
    net = network(kind).double()
    folded = foldexport.fold(net, IMAGE.double())
    blocks = 1 + 2 * sum(SMALL[kind]["blocks"])
    assert folded.certificate.ok
    assert folded.counts_before["batch_norm"] > blocks
    assert folded.counts_after == {"conv": blocks, "relu": blocks, "avg_pool": 1, "flatten": 1, "linear": 1}
    assert isinstance(folded.module, nn.Sequential)
    assert not [entry for entry in folded.ledger if entry.status == "kept"]
    same_as_deployed(folded.module, net, {"num_classes": 7} | SMALL[kind])


def test_channels_that_batch_norm_switches_off():
    """Some gammas are exactly 0 and some 1e-8: their branches' shares vanish, and nothing is divided by them."""
    kind = "branched"
    net = randomise(mobileone(num_classes=7, **SMALL[kind]), seed=4, zero=0.2, tiny=0.2).double()
    folded = foldexport.fold(net, IMAGE.double())
    assert folded.certificate.ok and "batch_norm" not in folded.counts_after
    same_as_deployed(folded.module, net, {"num_classes": 7} | SMALL[kind])


def test_a_published_variant_folds_and_its_folded_file_is_recognised():
    net = randomise(mobileone("S0"), seed=5, example=torch.randn(16, 3, 64, 64)).double()
    folded = foldexport.fold(net, IMAGE.double())
    assert folded.certificate.ok
    assert folded.counts_after == {"conv": 43, "relu": 43, "avg_pool": 1, "flatten": 1, "linear": 1}
    assert sum(parameter.numel() for parameter in folded.module.parameters()) == 2_078_504
    same_as_deployed(folded.module, net, {"name": "S0"})
    found = identify(folded.module.state_dict())
    assert found.description == "MobileOne-S0, deployed, 1000 classes"


@pytest.mark.parametrize("deploy", [False, True])
def test_gates_stay_with_their_reason(deploy):
    net = network("gated", deploy=deploy).double()
    folded = foldexport.fold(net, IMAGE.double())
    assert folded.certificate.ok
    assert folded.counts_after == {
        "conv": 11 + 2 * 6, "relu": 11 + 6, "sigmoid": 6, "mul": 6, "avg_pool": 7, "flatten": 1, "linear": 1
    }  # fmt: skip
    kept = [(entry.module, entry.rule, entry.reason) for entry in folded.ledger if entry.status == "kept"]
    assert kept == [
        (f"{block}.se", "gate", "both factors depend on the network's input")
        for block in ("stage2.2", "stage2.3", "stage2.4", "stage2.5", "stage3.0", "stage3.1")
    ]
    if not deploy:
        same_as_deployed(folded.module, net, {"num_classes": 7} | SMALL["gated"])


def test_a_depthwise_merge_into_the_wrong_channels_is_refused(monkeypatch: pytest.MonkeyPatch):
    net = network("branched")
    right = algebra.add

    def wrong(a, b):
        both = right(a, b)
        return dataclasses.replace(both, weight=both.weight.roll(1, 0)) if both.groups > 1 else both

    assert foldexport.fold(net, IMAGE).certificate.ok
    monkeypatch.setattr(algebra, "add", wrong)
    with pytest.raises(EquivalenceError, match="stage"):
        foldexport.fold(net, IMAGE)


def test_the_comparison_with_the_deployed_network_sees_a_forgotten_skip():
    net = network("plain").double()
    folded = foldexport.fold(net, IMAGE.double(), certify=False)
    with torch.no_grad():
        net.stage1[2].rbr_skip.weight[3] += 1e-9
    with pytest.raises(AssertionError):
        same_as_deployed(folded.module, net, {"num_classes": 7} | SMALL["plain"])

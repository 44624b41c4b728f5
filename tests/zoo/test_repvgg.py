"""RepVGG: published sizes, equations, recognition in every layout, folding to the deployed network."""

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
from foldexport.zoo.repvgg import VARIANTS, repvgg
from foldexport.zoo.repvgg_files import FAMILY
from tests.statistics import randomise
from tests.zoo.states import batch_norm

# Millions of parameters while training and as deployed, from OpenMMLab's table of the published weights (mmpretrain,
# configs/repvgg), which has no B2g2 and B3g2. Ding et al. 2021, table 4, cuts the deployed ones off where this one rounds.
PUBLISHED = {
    "A0": (9.11, 8.31), "A1": (14.09, 12.79), "A2": (28.21, 25.5), "B0": (15.82, 14.34), "B1": (57.42, 51.83),
    "B1g2": (45.78, 41.36), "B1g4": (39.97, 36.13), "B2": (89.02, 80.32), "B2g4": (61.76, 55.78),
    "B3": (123.09, 110.96), "B3g4": (83.83, 75.63), "D2se": (133.33, 120.39),
}  # fmt: skip
# Small networks of every kind of block.
SMALL = {
    "plain": {"blocks": (2, 3, 1), "widths": (16, 24, 40)},
    "grouped": {"blocks": (2, 4, 1), "widths": (16, 16, 32), "groups": 4},
    "groups of each": {"blocks": (1, 3), "widths": (16, 32), "groups": (2, 1, 8, 4)},
    "gated": {"blocks": (2, 1), "widths": (32, 48), "se": True},
    "wide stem": {"blocks": (2, 2), "widths": (80, 24)},
    "cifar": {"blocks": (2, 2, 1), "widths": (16, 24, 40), "stem": "cifar", "num_classes": 10},
}
TIMM = {"rbr_dense": "conv_kxk", "rbr_1x1": "conv_1x1", "rbr_identity": "identity", "rbr_reparam": "reparam_conv",
        "down": "fc1", "up": "fc2", "se": "attn"}  # fmt: skip

IMAGE = torch.linspace(-2, 2, 3 * 64 * 64).reshape(1, 3, 64, 64)


def network(kind: str, **arguments) -> nn.Module:
    return randomise(repvgg(**{"num_classes": 7} | SMALL[kind] | arguments), seed=3, example=torch.randn(4, 3, 64, 64))


def evaluate(state: dict[str, Tensor], x: Tensor, stem_stride: int) -> Tensor:
    """The network of the paper (figure 2, section 3.3) straight from the trained tensors; x ``[N, 3, H, W]``."""
    blocks = list(dict.fromkeys(key.partition(".rbr_")[0] for key in state if ".rbr_" in key))
    for name in blocks:
        stride = stem_stride if name == "stage0" else 2 if name.endswith(".0") else 1
        y = 0
        for branch in ("dense", "1x1"):
            weight = state[f"{name}.rbr_{branch}.conv.weight"]
            groups = x.shape[1] // weight.shape[1]
            convolved = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups)
            y = y + batch_norm(convolved, state, f"{name}.rbr_{branch}.bn")
        if f"{name}.rbr_identity.weight" in state:
            y = y + batch_norm(x, state, f"{name}.rbr_identity")
        if f"{name}.se.up.weight" in state:
            down, up = ((state[f"{name}.se.{layer}.weight"], state[f"{name}.se.{layer}.bias"]) for layer in ("down", "up"))
            y = y * F.conv2d(F.conv2d(F.avg_pool2d(y, y.shape[-1]), *down).relu(), *up).sigmoid()
        x = y.relu()
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' conversion, in float64: ``W = Σ γ/√(σ² + ε)·W_b`` and ``b = Σ β − γ·μ/√(σ² + ε)`` over a block's branches."""
    state = {key: value.double() for key, value in state.items()}
    deployed = {key: value for key, value in state.items() if ".rbr_" not in key}
    for name in dict.fromkeys(key.partition(".rbr_")[0] for key in state if ".rbr_" in key):
        dense = state[f"{name}.rbr_dense.conv.weight"]
        dirac = torch.zeros_like(dense)
        for channel in range(len(dense)):
            dirac[channel, channel % dense.shape[1], 1, 1] = 1
        branches = {"rbr_dense.bn": dense, "rbr_1x1.bn": F.pad(state[f"{name}.rbr_1x1.conv.weight"], (1, 1, 1, 1))}
        if f"{name}.rbr_identity.weight" in state:
            branches["rbr_identity"] = dirac
        weight, bias = torch.zeros_like(dense), 0
        for branch, kernel in branches.items():
            gamma, beta, mean, var = (
                state[f"{name}.{branch}.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gamma / (var + 1e-5).sqrt()
            weight, bias = weight + scale.reshape(-1, 1, 1, 1) * kernel, bias + beta - scale * mean
        deployed[f"{name}.rbr_reparam.weight"], deployed[f"{name}.rbr_reparam.bias"] = weight, bias
    return deployed


def timm_named(state: dict[str, Tensor], names: dict[str, str] = TIMM) -> dict[str, Tensor]:
    """The same tensors under timm's names; ``names``: its names by the authors', of the parts of a block."""
    renamed = {}
    for key, tensor in state.items():
        stage, *rest = key.split(".")
        if stage == "linear":
            renamed[f"head.fc.{rest[0]}"] = tensor
            continue
        place = ["stem"] if stage == "stage0" else ["stages", str(int(stage[5:]) - 1)]
        renamed[".".join(place + [names.get(part, part) for part in rest])] = tensor
    return renamed


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    for deploy, millions in zip((False, True), PUBLISHED[name]):
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in repvgg(name, deploy=deploy).parameters())
        assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize("kind", SMALL)
def test_it_computes_the_papers_equations(kind):
    net = network(kind).double()
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        found, state = net(x), net.state_dict()
        assert relative(found, evaluate(state, x, 1 if kind == "cifar" else 2)) < 1e-12
        deployed = repvgg(**{"num_classes": 7} | SMALL[kind], deploy=True).double()
        deployed.load_state_dict(merged(state))
        assert relative(found, deployed(x)) < 1e-11


def test_a_stem_is_halved_or_not():
    arguments = {"blocks": (1,), "widths": (16,), "num_classes": 2}
    x = torch.randn(1, 3, 32, 32)
    assert repvgg(**arguments).stage0(x).shape[-1] == 16
    assert repvgg(**arguments, stem="cifar").stage0(x).shape[-1] == 32
    assert repvgg(**arguments, stem="cifar").state_dict()["stem_stride"] == 1


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_recognised(name, deploy):
    with torch.device("meta"):
        state = repvgg(name, deploy=deploy).state_dict()
    for layout in (state, timm_named(state)):
        assert [family.arch for family in FAMILIES if family.recognises(layout)] == ["repvgg"]
        assert FAMILY.fitting(layout) == len(layout)
        found = FAMILY.load(layout, {}, "net.pth")
        kind = "deployed" if deploy else "training graph"
        assert found.description == f"RepVGG-{name}, {kind}, ImageNet stem, 1000 classes"
        assert f"RepVGG-{name}; the linear layer has 1000 rows" in found.reason
        assert ("squeeze-and-excitation" in found.reason) == (name == "D2se")
        assert ("every second layer in 4 groups" in found.reason) == name.endswith("g4")
        assert found.notes == ["stem with stride 2, as published: no key says it"]
        assert found.input_shape == ((1, 3, 320, 320) if name == "D2se" else (1, 3, 224, 224))


@pytest.mark.parametrize("layout", ["published", "timm"])
@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in SMALL if kind != "cifar"])
def test_networks_that_were_not_published(kind, deploy, layout):
    net = network(kind, deploy=deploy)
    if layout == "published":
        with pytest.raises(CheckpointError, match=r"those of 2 networks \(stem imagenet, cifar\)") as raised:
            identify(net.state_dict(), source="net.pth")
        assert "--arch repvgg --arch-arg stem=imagenet" in str(raised.value)
        found = identify(net.state_dict(), arch="repvgg", arch_args={"stem": "imagenet"})
    else:
        found = identify(timm_named(net.state_dict()))
    sizes = SMALL[kind]
    assert found.description.startswith(
        f"RepVGG, {'-'.join(map(str, sizes['blocks']))} blocks, channels {'-'.join(map(str, sizes['widths']))}"
    )
    assert ("groups 4" in found.description, "groups 2-1-8-4" in found.description) == (kind == "grouped", "each" in kind)
    assert ("squeeze-and-excitation" in found.description) == (kind == "gated")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found.module(x), net(x))


@pytest.mark.parametrize("deploy", [False, True])
def test_a_cifar_stem_is_read_from_the_file(deploy):
    net = network("cifar", deploy=deploy)
    found = identify(net.state_dict())
    assert "stem_stride is 1" in found.reason and not found.notes
    assert found.description.endswith("CIFAR stem, 10 classes")
    assert found.input_shape == (1, 3, 32, 32) and found.preprocessing["label_names"][3] == "cat"
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found.module(x), net(x))


def test_a_cifar_stem_that_the_file_does_not_tell_is_asked_for():
    net = network("cifar")
    state = {key: value for key, value in net.state_dict().items() if key != "stem_stride"}
    with pytest.raises(CheckpointError, match="Say which"):
        identify(state)
    found = identify(state, arch="repvgg", arch_args={"stem": "cifar"})
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found.module(x), net(x))


def test_a_published_variant_with_another_head_may_have_either_stem():
    with torch.device("meta"):
        state = repvgg("A1", num_classes=10).state_dict()
    with pytest.raises(CheckpointError, match=r"\(stem imagenet, cifar\)"):
        FAMILY.load(state, {}, "net.pth")
    assert FAMILY.load(state, {"stem": "cifar"}, "net.pth").description == "RepVGG-A1, training graph, CIFAR stem, 10 classes"


def test_another_stride_of_the_stem_is_refused():
    state = network("cifar").state_dict() | {"stem_stride": torch.tensor(4)}
    with pytest.raises(CheckpointError, match=r"surplus \(stem_stride\)"):
        identify(state)


@pytest.mark.parametrize("deploy", [False, True])
def test_damage_is_reported_by_key(deploy):
    state = timm_named(repvgg("A0", deploy=deploy).state_dict())
    layer = "reparam_conv" if deploy else "conv_kxk.conv"
    missing = "stages.2.4.reparam_conv.bias" if deploy else "stages.2.4.conv_1x1.bn.running_var"
    del state[missing]
    state[f"stages.1.1.{layer}.weight"] = state[f"stages.1.1.{layer}.weight"][:-1]
    state["aux.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as raised:
        identify(state, source="net.pth")
    assert f"net.pth, as RepVGG-A0, {'deployed' if deploy else 'training graph'}" in str(raised.value)
    assert f"1 missing ({missing}); 1 surplus (aux.weight)" in str(raised.value)
    assert f"stages.1.1.{layer}.weight is [95, 96, 3, 3], wanted [96, 96, 3, 3]" in str(raised.value)


@pytest.mark.parametrize("arguments", [
    {"name": "A9"}, {"stem": "mnist"}, {"blocks": (1, 2)}, {"groups": (1, 2)}, {"groups": 5}, {"colour": 1},
    {"blocks": (1,), "widths": (8,), "se": True}, {"blocks": (1,), "widths": (0,)}, {"blocks": 3},
])  # fmt: skip
def test_what_makes_no_network_is_a_usage_error(arguments):
    with pytest.raises(UsageError, match="--arch repvgg"):
        identify(network("plain").state_dict(), arch="repvgg", arch_args=arguments)


def test_repvggplus_is_not_taken_for_it():
    """Its blocks have one name more: ``stage1.blocks.0.rbr_dense``."""
    state = repvgg(blocks=(2,), widths=(16,)).state_dict()
    assert not FAMILY.recognises({key.replace("stage1.", "stage1.blocks."): value for key, value in state.items()})


@pytest.mark.parametrize("kind", [kind for kind in SMALL if kind != "gated"])
def test_every_block_folds_to_a_convolution_and_a_relu(kind):
    net = network(kind).double()
    folded = foldexport.fold(net, IMAGE.double())
    blocks = 1 + sum(SMALL[kind]["blocks"])
    assert folded.certificate.ok
    assert folded.counts_before["batch_norm"] > 2 * blocks
    assert folded.counts_after == {"conv": blocks, "relu": blocks, "avg_pool": 1, "flatten": 1, "linear": 1}
    assert isinstance(folded.module, nn.Sequential)
    assert not [entry for entry in folded.ledger if entry.status == "kept"]
    same_as_deployed(folded.module, net, {"num_classes": 7} | SMALL[kind])


def same_as_deployed(folded: nn.Module, net: nn.Module, arguments: dict) -> None:
    """Its tensors are those of the authors' conversion, in name but for the block's, and in value; and so are its outputs.

    In float64: float32's own noise in such deep networks would hide a small mistake.
    """
    wanted = merged(net.state_dict())
    wanted.pop("stem_stride", None)
    found = {key.replace("rbr_dense.conv", "rbr_reparam"): tensor for key, tensor in folded.state_dict().items()}
    assert found.keys() == wanted.keys()
    assert all(relative(found[key], wanted[key]) < 1e-13 for key in wanted)
    deployed = repvgg(**arguments, deploy=True).eval().double()
    deployed.load_state_dict(found, strict="stem" not in arguments)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative(folded(x), deployed(x)) < 1e-12
        assert relative(folded(x), net(x)) < 1e-11


def test_channels_that_batch_norm_switches_off():
    """Some gammas are exactly 0 and some 1e-8: their branches' shares vanish, and nothing is divided by them."""
    kind = "grouped"
    net = randomise(repvgg(num_classes=7, **SMALL[kind]), seed=4, zero=0.2, tiny=0.2).double()
    folded = foldexport.fold(net, IMAGE.double())
    assert folded.certificate.ok and "batch_norm" not in folded.counts_after
    same_as_deployed(folded.module, net, {"num_classes": 7} | SMALL[kind])


def test_a_published_variant_folds_and_its_folded_file_is_recognised():
    net = randomise(repvgg("A0"), seed=5, example=torch.randn(4, 3, 64, 64)).double()
    folded = foldexport.fold(net, IMAGE.double())
    assert folded.certificate.ok
    assert folded.counts_after == {"conv": 22, "relu": 22, "avg_pool": 1, "flatten": 1, "linear": 1}
    assert sum(parameter.numel() for parameter in folded.module.parameters()) == 8_309_384
    same_as_deployed(folded.module, net, {"name": "A0"})
    found = identify(folded.module.state_dict())
    assert found.description == "RepVGG-A0, deployed, ImageNet stem, 1000 classes"
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative(found.module(x), folded.module(x)) < 1e-12


@pytest.mark.parametrize("deploy", [False, True])
def test_gates_stay_with_their_reason(deploy):
    net = network("gated", deploy=deploy).double()
    folded = foldexport.fold(net, IMAGE.double())
    assert folded.certificate.ok
    blocks = 1 + sum(SMALL["gated"]["blocks"])
    assert folded.counts_after == {
        "conv": 3 * blocks, "relu": 2 * blocks, "sigmoid": blocks, "mul": blocks, "avg_pool": blocks + 1, "flatten": 1, "linear": 1
    }
    kept = [(entry.module, entry.rule, entry.reason) for entry in folded.ledger if entry.status == "kept"]
    assert kept == [
        (f"{block}.se", "gate", "both factors depend on the network's input")
        for block in ("stage0", "stage1.0", "stage1.1", "stage2.0")
    ]
    if not deploy:
        same_as_deployed(folded.module, net, {"num_classes": 7} | SMALL["gated"])


@pytest.mark.parametrize("mistake", ["a 1x1 kernel off the middle", "an identity without its groups"])
def test_a_mistake_in_the_merge_is_refused(monkeypatch: pytest.MonkeyPatch, mistake):
    net = network("grouped")
    right = algebra.add

    def shifted(a, b):
        both = right(a, b)
        return dataclasses.replace(both, weight=both.weight.roll(1, -1)) if b.kernel_size == (1, 1) else both

    def ungrouped(a, b):
        both = right(a, b)
        return dataclasses.replace(both, weight=both.weight.roll(1, 1)) if both.groups > 1 else both

    assert foldexport.fold(net, IMAGE).certificate.ok
    monkeypatch.setattr(algebra, "add", shifted if "middle" in mistake else ungrouped)
    with pytest.raises(EquivalenceError, match="stage"):
        foldexport.fold(net, IMAGE)


def test_the_comparison_with_the_deployed_network_sees_a_forgotten_identity():
    net = network("plain").double()
    folded = foldexport.fold(net, IMAGE.double(), certify=False)
    with torch.no_grad():
        net.stage2[1].rbr_identity.weight[3] += 1e-9
    with pytest.raises(AssertionError):
        same_as_deployed(folded.module, net, {"num_classes": 7} | SMALL["plain"])

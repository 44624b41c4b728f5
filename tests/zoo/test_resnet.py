"""Post-activation residual networks: the equations, published sizes, every layout on disk, what cannot be told apart."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import foldexport
from foldexport.errors import CheckpointError, UsageError
from foldexport.zoo.nfresnet import nfresnet
from foldexport.zoo.nfresnet_files import FAMILY as NFRESNET
from foldexport.zoo.preresnet import preresnet
from foldexport.zoo.preresnet_files import FAMILY as PRERESNET
from foldexport.zoo.resnet import resnet
from foldexport.zoo.resnet_files import FAMILY
from foldexport.zoo.wideresnet import wideresnet
from foldexport.zoo.wideresnet_files import FAMILY as WIDERESNET
from tests.statistics import randomise

BASIC = {"depth": 8, "stem": "cifar", "width": 4}
GROUPED = {"blocks": (1, 2, 1), "bottleneck": True, "stem": "cifar", "width": 8, "groups": 4, "width_per_group": 32}
FOLDED = {"batch_norm": False, "bias": True}
OPTION_A = {"stem": "cifar", "shortcut": "pad_both"}


def network(**arguments) -> nn.Module:
    return randomise(resnet(**arguments), seed=1)


def load(state, arguments=None):
    """What the family makes of a file of these tensors, after the question whether it is one of its own."""
    assert FAMILY.recognises(state)
    return FAMILY.load(dict(state), arguments or {}, "net.pth")


def evaluate(p: dict[str, Tensor], x: Tensor, *, imagenet: bool, strided: int, groups: int, shortcut: str) -> Tensor:
    """The paper's network straight from tensors under torchvision's names; x ``[N, 3, H, W]``."""

    def convolved(x, conv, norm, stride=1, padding=0, g=1):
        y = F.conv2d(x, p[f"{conv}.weight"], p.get(f"{conv}.bias"), stride, padding, 1, g)
        if f"{norm}.weight" not in p:
            return y
        k = p[f"{norm}.weight"] / torch.sqrt(p[f"{norm}.running_var"] + 1e-5)
        return (y - p[f"{norm}.running_mean"].view(-1, 1, 1)) * k.view(-1, 1, 1) + p[f"{norm}.bias"].view(-1, 1, 1)

    x = F.relu(convolved(x, "conv1", "bn1", 2 if imagenet else 1, 3 if imagenet else 1))
    x = F.max_pool2d(x, 3, 2, 1) if imagenet else x
    for key in [k for k in p if re.fullmatch(r"layer\d\.\d+\.conv1\.weight", k)]:
        block = key.removesuffix(".conv1.weight")
        stride = 2 if re.fullmatch(r"layer[2-9]\.0", block) else 1
        last, y = 3 if f"{block}.conv3.weight" in p else 2, x
        for i in range(1, last + 1):
            kernel = p[f"{block}.conv{i}.weight"].shape[-1]
            step, g = stride if i == strided else 1, groups if (last, i) == (3, 2) else 1
            y = convolved(y, f"{block}.conv{i}", f"{block}.bn{i}", step, kernel // 2, g)
            y = F.relu(y) if i < last else y
        if f"{block}.downsample.0.weight" in p:
            x = convolved(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
        elif y.shape != x.shape:
            padded, new = torch.zeros_like(y), y.shape[1] - x.shape[1]
            front = new // 2 if shortcut == "pad_both" else 0
            padded[:, front : front + x.shape[1]] = x[:, :, ::stride, ::stride]
            x = padded
        x = F.relu(x + y)
    return x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]


EQUATIONS = {
    "basic blocks, option B": BASIC,
    "option A, zeros on both sides": {**BASIC, "shortcut": "pad_both"},
    "option A, zeros behind": {**BASIC, "shortcut": "pad_behind"},
    "grouped bottlenecks": GROUPED,
    "stride in the 1x1": {**GROUPED, "stride_in_1x1": True},
    "ImageNet's stem": {"depth": 18, "width": 4, "num_classes": 5},
    "batch norms folded": {**GROUPED, **FOLDED},
}


@pytest.mark.parametrize("arguments", EQUATIONS.values(), ids=EQUATIONS)
def test_the_network_computes_the_paper_s_equations(arguments):
    module = network(**arguments).double()
    imagenet = arguments.get("stem") != "cifar"
    x = torch.randn(2, 3, 64 if imagenet else 16, 64 if imagenet else 16, dtype=torch.float64)
    strided = 2 if arguments.get("bottleneck") and not arguments.get("stride_in_1x1") else 1
    expected = evaluate(
        module.state_dict(), x, imagenet=imagenet, strided=strided, groups=arguments.get("groups", 1),
        shortcut=arguments.get("shortcut", ""),
    )  # fmt: skip
    with torch.inference_mode():
        assert torch.allclose(module(x), expected, rtol=1e-10, atol=1e-10)


PUBLISHED_SIZES = {  # torchvision's, and for CIFAR the paper's table 6 in exact numbers
    11_689_512: {"depth": 18}, 21_797_672: {"depth": 34}, 25_557_032: {"depth": 50}, 44_549_160: {"depth": 101},
    60_192_808: {"depth": 152}, 25_028_904: {"depth": 50, "groups": 32, "width_per_group": 4},
    88_791_336: {"depth": 101, "groups": 32, "width_per_group": 8}, 83_455_272: {"depth": 101, "groups": 64, "width_per_group": 4},
    68_883_240: {"depth": 50, "width_per_group": 128}, 126_886_696: {"depth": 101, "width_per_group": 128},
    68_849_128: {"depth": 50, "width_per_group": 128, **FOLDED},
    11_173_962: {"depth": 18, "stem": "cifar"}, 272_474: {"depth": 20, "stem": "cifar"},
    269_722: {"depth": 20, **OPTION_A}, 464_154: {"depth": 32, **OPTION_A}, 658_586: {"depth": 44, **OPTION_A},
    853_018: {"depth": 56, **OPTION_A}, 1_727_962: {"depth": 110, **OPTION_A}, 19_421_274: {"depth": 1202, **OPTION_A},
}  # fmt: skip


@pytest.mark.parametrize(("parameters", "arguments"), PUBLISHED_SIZES.items())
def test_published_sizes_and_their_recognition(parameters, arguments):
    with torch.device("meta"):
        module = resnet(**arguments, head="linear" if "shortcut" in arguments else "fc")
        assert sum(p.numel() for p in module.parameters()) == parameters
        found = load(module.state_dict())
    assert f"-{arguments['depth']}" in found.description
    assert f"depth {arguments['depth']};" in found.reason and "blocks of" in found.reason
    assert ("CIFAR" if arguments.get("stem") == "cifar" else "ImageNet") in found.description
    assert found.num_classes == (10 if arguments.get("stem") == "cifar" else 1000)
    assert found.input_shape == ((1, 3, 32, 32) if arguments.get("stem") == "cifar" else (1, 3, 224, 224))


def test_relatives_are_called_by_their_names():
    with torch.device("meta"):
        grouped, wide = resnet(50, groups=32, width_per_group=4), resnet(50, width_per_group=128)
        assert load(grouped.state_dict()).description == "ResNeXt-50 32x4d, ImageNet, 1000 classes"
        assert load(wide.state_dict()).description == "wide ResNet-50-2, ImageNet, 1000 classes"


# ---- layouts


def torchvision(state):
    return dict(state)


def shortcut(state):
    """Blocks as in torchvision, projection and last layer renamed."""
    return {re.sub(r"^fc\.", "linear.", k).replace(".downsample.", ".shortcut."): v for k, v in state.items()}


def linear(state):
    return {re.sub(r"^fc\.", "linear.", k): v for k, v in state.items()}


def unnamed_sequences(state):
    """``layer1.0.bn2.weight`` is ``conv2_x.0.residual_function.4.weight``."""

    def name(key):
        if match := re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn)(\d)\.(\w+)", key):
            stage, block, kind, number, leaf = match.groups()
            place = 3 * (int(number) - 1) + (kind == "bn")
            return f"conv{int(stage) + 1}_x.{block}.residual_function.{place}.{leaf}"
        if match := re.fullmatch(r"layer(\d)\.(\d+)\.downsample\.(.+)", key):
            return f"conv{int(match[1]) + 1}_x.{match[2]}.shortcut.{match[3]}"
        return re.sub(r"^bn1\.", "conv1.1.", re.sub(r"^conv1\.", "conv1.0.", key))

    return {name(key): tensor for key, tensor in state.items()}


def groups_of_blocks(state):
    """``layer1.0.conv1.bias`` is ``group0.block0.conv0.bias``."""

    def name(key):
        if match := re.fullmatch(r"layer(\d)\.(\d+)\.(conv(\d)|downsample\.0)\.(\w+)", key):
            which = "_dim" if match[4] is None else int(match[4]) - 1
            return f"group{int(match[1]) - 1}.block{match[2]}.conv{which}.{match[5]}"
        return re.sub(r"^conv1\.", "conv0.", key)

    return {name(key): tensor for key, tensor in state.items()}


SMALL = {"depth": 18, "stem": "cifar", "width": 4, "num_classes": 7}
LAYOUTS = {
    "torchvision": (torchvision, {"depth": 18, "width": 4, "num_classes": 7}),
    "torchvision, bottlenecks": (torchvision, {"depth": 50, "width": 4, "groups": 2, "width_per_group": 32}),
    "torchvision's names, three stages": (torchvision, {**BASIC, "num_classes": 3}),
    "shortcut": (shortcut, {**SMALL, "head": "linear"}),
    "shortcut, biased convolutions": (shortcut, {**SMALL, "bias": True, "head": "linear"}),
    "linear, option A": (linear, {**BASIC, "shortcut": "pad_both", "head": "linear"}),
    "unnamed sequences": (unnamed_sequences, {**SMALL, "num_classes": 100}),
    "unnamed sequences, bottlenecks": (unnamed_sequences, {"depth": 50, "stem": "cifar", "width": 4, "num_classes": 100}),
    "groups of blocks, folded": (groups_of_blocks, {"depth": 50, "width": 4, "width_per_group": 128, **FOLDED}),
    "groups of blocks, folded, bare projections": (groups_of_blocks, {"depth": 18, "width": 4, **FOLDED, "projection_bias": False}),
    "torchvision's names, folded": (torchvision, {"depth": 18, "width": 4, **FOLDED}),
    "26 layers": (torchvision, {"blocks": (2, 2, 2, 2), "bottleneck": True, "width": 4}),
}


@pytest.mark.parametrize(("rename", "arguments"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_is_recognised_and_gives_the_same_network(rename, arguments):
    module = network(**arguments)
    state = module.state_dict()
    if arguments.get("head") == "linear":
        state = {re.sub(r"^linear\.", "fc.", key): tensor for key, tensor in state.items()}
    file = rename(state)
    found = load(file)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(found.module(x), module(x))
    assert found.num_classes == arguments.get("num_classes", found.num_classes)
    others = [family.name for family in (PRERESNET, WIDERESNET) if family.recognises(file)]
    assert not others, "another family takes it for its own"
    without = {key: tensor for key, tensor in file.items() if not key.endswith("num_batches_tracked")}
    with torch.inference_mode():
        assert torch.equal(load(without).module(x), module(x))


def test_published_names_word_for_word():
    with torch.device("meta"):
        state = resnet(50, stem="cifar").state_dict()
    assert {"conv1.0.weight", "conv1.1.running_mean", "conv2_x.0.residual_function.0.weight", "conv2_x.0.residual_function.1.bias",
            "conv2_x.0.residual_function.6.weight", "conv2_x.0.residual_function.7.running_var", "conv2_x.0.shortcut.0.weight",
            "conv5_x.2.residual_function.3.weight", "conv3_x.0.shortcut.1.weight", "fc.bias",
            } <= unnamed_sequences(state).keys()  # fmt: skip
    with torch.device("meta"):
        state = resnet(50, width_per_group=128, **FOLDED).state_dict()
    assert {"conv0.weight", "conv0.bias", "group0.block0.conv2.bias", "group0.block0.conv_dim.weight", "group2.block5.conv1.weight",
            "group3.block0.conv_dim.bias", "fc.weight"} <= groups_of_blocks(state).keys()  # fmt: skip
    assert FAMILY.fitting(groups_of_blocks(state)) == len(state)


def test_option_a_is_asked_for_where_no_name_settles_it():
    state = network(**BASIC, shortcut="pad_behind").state_dict()
    with pytest.raises(CheckpointError, match="shortcut pad_both, pad_behind") as caught:
        load(state)
    assert "--arch resnet --arch-arg shortcut=" in str(caught.value)
    x = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        behind = load(state, {"shortcut": "pad_behind"}).module(x)
        assert torch.equal(behind, network(**BASIC, shortcut="pad_behind")(x))
        assert not torch.allclose(behind, load(state, {"shortcut": "pad_both"}).module(x))
    found = load(linear(state))
    assert "zeros on both sides" in found.description and any("pad_behind" in note for note in found.notes)
    assert "zeros behind" in load(linear(state), {"shortcut": "pad_behind"}).description


def test_what_no_key_shows_of_a_bottleneck_is_said_and_can_be_asked_for():
    state = network(**GROUPED, stride_in_1x1=True).state_dict()
    found, asked = load(state), load(state, {"stride_in_1x1": True})
    assert any("stride_in_1x1=true" in note for note in found.notes)
    assert "strides in the 1x1" in asked.description and "asked for" in asked.reason
    x = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(asked.module(x), network(**GROUPED, stride_in_1x1=True)(x))
        assert not torch.allclose(found.module(x), asked.module(x))
    assert not any("stride" in note for note in load(network(**BASIC).state_dict()).notes)


def test_a_file_without_a_last_layer_gives_the_pooled_features():
    module = network(**{**BASIC, "num_classes": 0})
    found = load(module.state_dict())
    assert found.module(torch.randn(2, 3, 16, 16)).shape == (2, 16)
    assert found.num_classes == 0 and "no last layer" in found.description
    assert any("pooled features" in note for note in found.notes)


def without(state, *keys):
    return {key: tensor for key, tensor in state.items() if key not in keys}


MISFITS = {
    "missing": (lambda s: without(s, "layer2.0.conv2.weight"), ["1 missing (layer2.0.conv2.weight)"]),
    "missing stem": (lambda s: without(s, "conv1.weight"), ["missing (conv1.weight"]),
    "surplus": (lambda s: {**s, "layer1.0.se.weight": torch.ones(2)}, ["1 surplus (layer1.0.se.weight)"]),
    "another last layer": (lambda s: {**s, "linear.weight": torch.ones(10, 16)}, ["1 surplus (linear.weight)"]),
    "misshapen": (
        lambda s: {**s, "layer3.0.conv1.weight": torch.ones(16, 8, 5, 5)},
        ["layer3.0.conv1.weight is [16, 8, 5, 5], wanted [16, 8, 3, 3]"],
    ),
    "misshapen stem": (lambda s: {**s, "conv1.weight": torch.ones(4, 1, 3, 3)}, ["is [4, 1, 3, 3], wanted [4, 3, 3, 3]"]),
    "a block number that no file has": (lambda s: {**s, "layer1.9999.conv1.weight": torch.ones(4, 4, 3, 3)}, ["those of none"]),
}


@pytest.mark.parametrize(("damage", "words"), MISFITS.values(), ids=MISFITS)
def test_damage_is_reported(damage, words):
    state = damage(network(**{**BASIC, "depth": 14}).state_dict())
    with pytest.raises(CheckpointError) as caught:
        load(state)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_damage_is_reported_in_the_names_of_the_file():
    file = unnamed_sequences(network(**SMALL).state_dict())
    lost = "conv3_x.1.residual_function.4.running_mean"
    with pytest.raises(CheckpointError, match=re.escape(f"1 missing ({lost})")):
        load(without(file, lost))
    file = shortcut(network(**SMALL).state_dict())
    with pytest.raises(CheckpointError, match=r"1 missing \(layer2\.0\.shortcut\.1\.bias\)"):
        load(without(file, "layer2.0.shortcut.1.bias"))
    both = {**file, "layer2.0.downsample.0.weight": file["layer2.0.shortcut.0.weight"]}
    with pytest.raises(CheckpointError, match="surplus"):
        load(both)


def test_networks_of_other_families_are_left_to_them():
    with torch.device("meta"):
        others = [preresnet(20), preresnet(20, projection="pad"), preresnet(20, order="original"), nfresnet(18), wideresnet(10, 1)]
        plain = resnet(18).state_dict()
    assert not any(FAMILY.recognises(module.state_dict()) for module in others)
    blocks = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    gated = plain | {f"{block}.se.fc{i}.{leaf}": torch.ones(1) for block in blocks for i in (1, 2) for leaf in ("weight", "bias")}
    pooled = {re.sub(r"downsample\.(\d)", lambda m: f"downsample.{int(m[1]) + 1}", key): tensor for key, tensor in plain.items()}
    assert not FAMILY.recognises(gated) and not FAMILY.recognises(pooled)
    assert not NFRESNET.recognises(resnet(**BASIC).state_dict())


@pytest.mark.parametrize(("arguments", "message"), [
    ({"depth": 19}, "depth 19: it is one of 18, 34"), ({"depth": 21, "stem": "cifar"}, "6n \\+ 2"),
    ({"stem": "mnist"}, "cifar, imagenet"), ({"shortcut": "pad"}, "pad_both"), ({"depth": 18, "groups": 2}, "only bottlenecks"),
    ({"head": "last"}, "fc, linear"),
    ({"depth": 18, "width": -1}, "at least 1"),
])  # fmt: skip
def test_arguments_that_make_no_network(arguments, message):
    with pytest.raises(ValueError, match=message):
        resnet(**arguments)
    with pytest.raises(UsageError, match=message):
        FAMILY.load({"x": torch.ones(1)}, dict(arguments), "net.pth")
    with pytest.raises(UsageError, match="takes no deep"):
        FAMILY.load({"x": torch.ones(1)}, {"deep": 1}, "net.pth")


@pytest.mark.parametrize("arguments", [
    BASIC, {**BASIC, "shortcut": "pad_both"}, {**BASIC, "shortcut": "pad_behind"}, GROUPED, {"blocks": (1, 1, 1, 1), "width": 4},
])  # fmt: skip
def test_folds_to_plain_convolutions(arguments):
    module = network(**arguments)
    size = 16 if arguments.get("stem") == "cifar" else 64
    folded = foldexport.fold(module, torch.randn(2, 3, size, size))
    assert not any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in folded.module.modules())
    assert folded.certificate.ok and not [entry for entry in folded.ledger if entry.status == "kept"]

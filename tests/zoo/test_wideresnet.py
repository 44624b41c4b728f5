"""Wide residual networks: the equations, published sizes, every layout on disk, folding."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import foldexport
from foldexport import checkpoint
from foldexport.errors import CheckpointError, UsageError
from foldexport.zoo.diracnet_files import FAMILY as DIRACNET
from foldexport.zoo.resnet_files import FAMILY as RESNET
from foldexport.zoo.wideresnet import wideresnet
from foldexport.zoo.wideresnet_files import FAMILY
from tests.statistics import randomise

SMALL = {"depth": 16, "width": 0.25, "num_classes": 7}
TRUNK = {"projection": "trunk", "bias": True}


def network(**arguments) -> nn.Module:
    return randomise(wideresnet(**arguments), seed=1)


def load(state, arguments=None):
    assert FAMILY.recognises(state)
    return FAMILY.load(dict(state), arguments or {}, "net.pth")


def without(state, *keys):
    return {key: tensor for key, tensor in state.items() if key not in keys}


def evaluate(p: dict[str, Tensor], x: Tensor, blocks: int, projection: str, strided: int) -> Tensor:
    """The network straight from tensors under the names of the paper's code; x ``[N, 3, H, W]``."""

    def activated(x, key):
        mean, var, gamma, beta = (p[f"{key}.{k}"].view(-1, 1, 1) for k in ("running_mean", "running_var", "weight", "bias"))
        return F.relu((x - mean) / torch.sqrt(var + 1e-5) * gamma + beta)

    def conv(x, key, stride=1, padding=1):
        return F.conv2d(x, p[key], p.get(f"{key}.bias"), stride, padding)

    x = conv(x, "conv0")
    for g in range(3):
        for b in range(blocks):
            key, stride = f"group{g}.block{b}", 2 if g > 0 and b == 0 else 1
            first = activated(x, f"{key}.bn0")
            y = activated(conv(first, f"{key}.conv0", stride if strided == 1 else 1), f"{key}.bn1")
            y = conv(y, f"{key}.conv1", stride if strided == 2 else 1)
            if f"{key}.convdim" in p:
                x = conv(first if projection == "activation" else x, f"{key}.convdim", stride, 0)
            x = x + y
    return activated(x, "bn").mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]


# ---- layouts


def bare(state):
    """The paper's code: ``group0.block0.conv0`` is the weight itself. (Biases keep a name: no such file is published.)"""
    return {
        re.sub(r"(conv[01]|convdim)\.weight$", r"\1", key): tensor
        for key, tensor in state.items() if not key.endswith("num_batches_tracked")
    }  # fmt: skip


STEPS = {"bn0": "bn1", "conv0": "conv1", "bn1": "bn2", "conv1": "conv2"}


def renamed(state, block: str, steps: dict[str, str], tops: dict[str, str], first: int = 1):
    """``block`` with the group, counted from ``first``, and the block; the names of what is in a block and beside the groups."""

    def name(key):
        if match := re.fullmatch(r"(sub_)?group(\d)\.block(\d+)\.(\w+)\.(\w+)", key):
            sub, group, number, step, leaf = match.groups()
            return f"{sub or ''}{block.format(int(group) + first, number)}.{steps[step]}.{leaf}"
        top, _, leaf = key.partition(".")
        return f"{tops.get(top, top)}.{leaf}"

    return {name(key): tensor for key, tensor in state.items()}


def modules(state):
    return renamed(state, "block{}.layer.{}", {**STEPS, "convdim": "convShortcut"}, {"conv0": "conv1", "bn": "bn1"})


def layers(state):
    return renamed(state, "layer{}.{}", {**STEPS, "convdim": "shortcut.0"}, {"conv0": "conv1", "bn": "bn1", "fc": "linear"})


def unnamed_sequences(state):
    steps = {"bn0": "residual.0", "conv0": "residual.2", "bn1": "residual.3", "conv1": "residual.6", "convdim": "shortcut.0"}
    return renamed(state, "conv{}.{}", steps, {"conv0": "init_conv", "fc": "linear"}, first=2)


LAYOUTS = {
    "the paper's code": (bare, SMALL),
    "width 1, no projection in the first group": (bare, {**SMALL, "depth": 10, "width": 1}),
    "modules block and layer": (modules, SMALL),
    "a group that is never called": (modules, {**SMALL, "sub_group": True}),
    "modules layer, biases": (layers, {**SMALL, **TRUNK, "strided": 2}),
    "unnamed sequences, biases": (unnamed_sequences, {**SMALL, **TRUNK, "strided": 1}),
}


@pytest.mark.parametrize(("rename", "arguments"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_is_recognised_and_computes_the_equations(rename, arguments):
    module = network(**arguments).double()
    state = module.state_dict()
    file = rename(state)
    assert len(file) == len(bare(state) if rename is bare else state) and FAMILY.fitting(file) == len(file)
    found = load(file)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    projection, strided = arguments.get("projection", "activation"), arguments.get("strided", 1)
    expected = evaluate(bare(state), x, (arguments["depth"] - 4) // 6, projection, strided)
    with torch.inference_mode():
        assert torch.allclose(found.module(x), expected, rtol=1e-10, atol=1e-10)
    assert f"WRN-{arguments['depth']}-{arguments['width']:g}, CIFAR" in found.description
    assert found.num_classes == 7 and found.input_shape == (1, 3, 32, 32)
    assert f"depth {arguments['depth']};" in found.reason and "in front of the convolutions" in found.reason
    assert not RESNET.recognises(file) and not DIRACNET.recognises(file)
    assert bool(arguments.get("bias")) == any("projection=" in note for note in found.notes)
    assert bool(arguments.get("sub_group")) == any("never calls" in note for note in found.notes)


@pytest.mark.parametrize("split", [True, False])
def test_the_files_of_the_paper_s_code(tmp_path, split):
    """``{"params", "stats"}`` at first, later all in ``{"params"}``."""
    module = network(**SMALL)
    whole = bare(module.state_dict())
    statistics = {key for key in whole if "running" in key} if split else set()
    content = {"params": without(whole, *statistics), "epoch": 200, "optimizer": {"state": {}}}
    if split:
        content["stats"] = {key: whole[key] for key in statistics}
    torch.save(content, tmp_path / "model.pt7")
    found = load(checkpoint.read(tmp_path / "model.pt7").tensors)
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(found.module(x), module(x))


def test_published_names_word_for_word():
    with torch.device("meta"):
        plain, biased = wideresnet(16, 4).state_dict(), wideresnet(16, 4, **TRUNK).state_dict()
    assert {"conv0", "group0.block0.bn0.weight", "group0.block0.bn1.running_var", "group0.block0.conv0", "group0.block0.conv1",
            "group0.block0.convdim", "group2.block1.conv1", "bn.running_mean", "fc.weight"} <= bare(plain).keys()  # fmt: skip
    assert {"conv1.weight", "block1.layer.0.bn1.weight", "block1.layer.0.convShortcut.weight", "block3.layer.1.conv2.weight",
            "bn1.running_mean", "fc.bias"} <= modules(plain).keys()  # fmt: skip
    assert {"conv1.bias", "layer1.0.bn1.weight", "layer1.0.shortcut.0.bias", "layer3.1.conv2.weight", "bn1.weight",
            "linear.weight"} <= layers(biased).keys()  # fmt: skip
    assert {"init_conv.bias", "conv2.0.residual.0.weight", "conv2.0.residual.2.bias", "conv4.1.residual.3.running_mean",
            "conv4.1.residual.6.weight", "conv3.0.shortcut.0.bias", "bn.weight", "linear.bias",
            } <= unnamed_sequences(biased).keys()  # fmt: skip


PUBLISHED_SIZES = {  # tables 2 and 4 of the paper, millions; two in exact numbers
    (40, 1): 0.6, (40, 2): 2.2, (40, 4): 8.9, (40, 8): 35.7, (28, 10): 36.5, (28, 12): 52.5, (22, 8): 17.2, (22, 10): 26.8,
    (16, 8): 11.0, (16, 10): 17.1, (16, 4): 2.7,
}  # fmt: skip


@pytest.mark.parametrize(("form", "millions"), PUBLISHED_SIZES.items())
def test_published_sizes_and_their_recognition(form, millions):
    with torch.device("meta"):
        module = wideresnet(*form)
        parameters = sum(p.numel() for p in module.parameters())
        assert abs(parameters / 1e6 - millions) < 0.1
        assert parameters == {(28, 10): 36_479_194}.get(form, parameters)
        assert load(bare(module.state_dict())).description == f"WRN-{form[0]}-{form[1]}, CIFAR, 10 classes"
        assert load(modules(wideresnet(*form, 100).state_dict())).num_classes == 100


def test_biases_under_names_that_settle_nothing_are_asked_for():
    state = network(**SMALL, **TRUNK, strided=2).state_dict()
    with pytest.raises(CheckpointError, match="3 networks .*projection trunk, activation; strided 2, 1"):
        load(state)
    asked = load(state, {"projection": "trunk", "strided": 2})
    x = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(asked.module(x), network(**SMALL, **TRUNK, strided=2)(x))
        overruled = load(layers(state), {"projection": "activation", "strided": 1}).module(x)
    assert not torch.allclose(overruled, asked.module(x))


MISFITS = {
    "missing": (lambda s: without(s, "group1.block0.conv0"), "1 missing (group1.block0.conv0)"),
    "missing stem": (lambda s: without(s, "conv0"), "1 missing (conv0)"),
    "missing statistics": (lambda s: without(s, "bn.running_var"), "1 missing (bn.running_var)"),
    "missing head": (lambda s: without(s, "fc.weight"), "1 missing (fc.weight)"),
    "surplus": (lambda s: {**s, "group0.block0.alpha": torch.ones(4)}, "1 surplus (group0.block0.alpha)"),
    "misshapen": (lambda s: {**s, "group1.block0.convdim": torch.ones(8, 4, 3, 3)},
                  "group1.block0.convdim is [8, 4, 3, 3], wanted [8, 4, 1, 1]"),
    "two names for one": (lambda s: {**s, "conv0.weight": s["conv0"]}, "1 surplus (conv0)"),
    "no third group": (lambda s: {k: v for k, v in s.items() if not k.startswith("group2")}, "three groups"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), MISFITS.values(), ids=MISFITS)
def test_damage_is_reported_in_the_names_of_the_file(damage, words):
    with pytest.raises(CheckpointError) as caught:
        load(damage(bare(network(**SMALL).state_dict())))
    assert words in str(caught.value)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"depth": 29}, "6n \\+ 4"), ({"projection": "pad"}, "activation, trunk"), ({"strided": 3}, "convolution 1 or 2"),
    ({"width": 0.01}, "at least 1"), ({"blocks": (1, 1)}, "three groups"),
])  # fmt: skip
def test_arguments_that_make_no_network(arguments, message):
    with pytest.raises(ValueError, match=message):
        wideresnet(**arguments)
    with pytest.raises(UsageError, match=message):
        FAMILY.load({"x": torch.ones(1)}, dict(arguments), "net.pth")


@pytest.mark.parametrize("arguments", [
    SMALL, {"depth": 10, "width": 0.25, **TRUNK, "strided": 2}, {**SMALL, "depth": 10, "sub_group": True},
])  # fmt: skip
def test_folds_to_plain_convolutions(arguments):
    folded = foldexport.fold(network(**arguments), torch.randn(2, 3, 16, 16))
    assert not any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in folded.module.modules())
    assert folded.certificate.ok

"""Pre-activation residual networks: every order and shortcut of the paper, recognition, folding."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import foldexport
from foldexport.errors import CheckpointError, UsageError
from foldexport.zoo import identify
from foldexport.zoo.preresnet import ORDERS, PROJECTIONS, SHORTCUTS, preresnet
from tests.statistics import randomise

GATES = ("exclusive_gating", "shortcut_gating")


def network(order: str = "full", shortcut: str = "identity", projection: str = "activation", **arguments) -> nn.Module:
    arguments = {"depth": 14, "width": 6} | arguments
    return randomise(preresnet(order=order, shortcut=shortcut, projection=projection, **arguments), seed=1)


def block(state, prefix: str, x, order: str, shortcut: str, projection: str, stride: int):
    """One basic block, written down from figures 2 and 4 of the paper."""
    def bn(i, y):
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(y, *(state[f"{prefix}.bn{i}.{key}"] for key in keys))

    def conv(i, y):
        return F.conv2d(y, state[f"{prefix}.conv{i}.weight"], None, stride if i == 1 else 1, 1)

    relu = F.relu
    first, f = {
        "original": lambda: (x, bn(2, conv(2, relu(bn(1, conv(1, x)))))),
        "bn_after": lambda: (x, conv(2, relu(bn(1, conv(1, x))))),
        "relu_before": lambda: (x, relu(bn(2, conv(2, relu(bn(1, conv(1, x))))))),
        "relu_only": lambda: (relu(x), bn(2, conv(2, relu(bn(1, conv(1, relu(x))))))),
        "full": lambda: (relu(bn(1, x)), conv(2, relu(bn(2, conv(1, relu(bn(1, x))))))),
    }[order]()
    if stride > 1 and projection == "pad":
        total = torch.cat([x[:, :, ::stride, ::stride], torch.zeros_like(f)[:, x.shape[1] :]], dim=1) + f
    elif stride > 1:
        name, read = ("shortcut", first) if projection == "activation" else ("downsample", x)
        total = F.conv2d(read, state[f"{prefix}.{name}.0.weight"], None, stride) + f
    elif shortcut in GATES:
        g = torch.sigmoid(F.conv2d(x, state[f"{prefix}.gate.weight"], state[f"{prefix}.gate.bias"]))
        total = (1 - g) * x + (g * f if shortcut == "exclusive_gating" else f)
    elif shortcut == "scaling":
        total = 0.5 * x + 0.5 * f
    else:
        total = (F.conv2d(x, state[f"{prefix}.conv_shortcut.weight"]) if shortcut == "conv" else x) + f
    return {"original": relu, "bn_after": lambda y: relu(bn(2, y))}.get(order, lambda y: y)(total)


@pytest.mark.parametrize(("order", "shortcut", "projection"), [
    *itertools.product(ORDERS, SHORTCUTS, ("activation",)), *itertools.product(ORDERS, ("identity",), ("trunk", "pad")),
])  # fmt: skip
def test_blocks_compute_their_equations(order, shortcut, projection):
    module = network(order, shortcut, projection)
    x = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(3))
    for prefix, stride in (("layer1.1", 1), ("layer2.0", 2)):
        with torch.inference_mode():
            found = module.get_submodule(prefix)(x)
        assert torch.allclose(found, block(module.state_dict(), prefix, x, order, shortcut, projection, stride), atol=1e-5)


@pytest.mark.parametrize(("depth", "parameters"), [(110, 1_730_522), (164, 1_703_258), (1001, 10_327_706)])
def test_parameter_counts(depth, parameters):
    """The paper's networks (its table 4 gives 1.7 M and 10.2 M; the projections of the first blocks are ours to count)."""
    with torch.device("meta"):
        assert sum(p.numel() for p in preresnet(depth).parameters()) == parameters


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("shortcut", ["identity", "scaling", "conv", "dropout"])
def test_full_pre_activation_is_recognised(shortcut, projection):
    found = identify(network("full", shortcut, projection, depth=20, num_classes=7).state_dict())
    kind = SHORTCUTS["identity" if shortcut == "dropout" else shortcut]
    assert found.description == (
        f"pre-activation ResNet-20, order full ({ORDERS['full']}), shortcut {kind}, CIFAR, 6 channels in the first stage, 7 classes"
    )
    assert "batch norms have as many channels as what stands in front of the convolutions" in found.reason


@pytest.mark.parametrize(("arguments", "size"), [
    ({"depth": 29, "bottleneck": True}, "ResNet-29, "), ({"depth": 50, "stem": "imagenet"}, "ResNet-50, "),
    ({"blocks": (1, 2), "depth": 20}, "ResNet-8 (1-2 blocks), "), ({"stem_width": 3}, "ResNet-14, "),
])  # fmt: skip
def test_sizes_are_read_off(arguments, size):
    module = network(**arguments)
    found = identify(module.state_dict())
    assert size in found.description
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(found.module(x), module(x))


def test_a_linear_layer_of_that_name_without_a_last_norm():
    module = network(last_norm=False, blocks=(1, 1, 1, 1))
    state = {key.replace("fc.", "linear."): value for key, value in module.state_dict().items()}
    found = identify(state)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(found.module(x), module(x))


@pytest.mark.parametrize("order", ["original", "bn_after", "relu_before", "relu_only"])
def test_orders_that_share_their_keys_are_asked_for(order):
    module = network(order)
    with pytest.raises(CheckpointError) as raised:
        identify(module.state_dict(), source="net.pth")
    assert "those of 4 networks (order original, bn_after, relu_before, relu_only)" in str(raised.value)
    assert "--arch preresnet --arch-arg order=original" in str(raised.value)
    found = identify(module.state_dict(), arch="preresnet", arch_args={"order": order})
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(found.module(x), module(x))


@pytest.mark.parametrize("shortcut", GATES)
def test_gates_that_share_their_keys_are_asked_for(shortcut):
    state = network("full", shortcut).state_dict()
    with pytest.raises(CheckpointError, match=r"shortcut exclusive_gating, shortcut_gating"):
        identify(state)
    assert identify(state, arch="preresnet", arch_args={"shortcut": shortcut}).module.layer1[0].kind == shortcut


@pytest.mark.parametrize("arguments", [{"order": "none"}, {"depth": 15}, {"depth": "x"}, {"projection": "b"}, {"colour": 1}])
def test_what_makes_no_network_is_a_usage_error(arguments):
    with pytest.raises(UsageError, match="--arch preresnet"):
        identify(network().state_dict(), arch="preresnet", arch_args=arguments)


def test_damage_is_reported_by_key():
    state = network().state_dict()
    del state["layer2.1.bn1.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing \(layer2\.1\.bn1\.weight\)"):
        identify(state)


@pytest.mark.parametrize(("order", "shortcut", "projection"), [
    *itertools.product(ORDERS, SHORTCUTS, ("activation",)), *itertools.product(ORDERS, ("identity",), ("trunk", "pad")),
])  # fmt: skip
def test_nothing_but_gates_is_left(order, shortcut, projection):
    folded = foldexport.fold(network(order, shortcut, projection), torch.randn(1, 3, 16, 16))
    kept = [entry for entry in folded.ledger if entry.status == "kept"]
    if shortcut in GATES:
        assert {"gate"} <= {entry.rule for entry in kept}
        assert all(entry.reason for entry in kept)
        return
    assert not kept
    assert set(folded.counts_after) <= {"conv", "relu", "clamp", "add", "slice", "pad", "avg_pool", "flatten", "linear"}
    assert folded.counts_after["conv"] == folded.counts_before["conv"]
    assert folded.counts_after["add"] == folded.counts_before["add"]

"""Residual networks without batch norm: published sizes, equations, recognition, folding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import foldexport
from foldexport.errors import CheckpointError, UsageError
from foldexport.zoo import identify
from foldexport.zoo.nfresnet import RELU_GAIN, SCHEMES, nfresnet
from tests.statistics import randomise

# Civitelli et al. 2021, tables 1 and 2: millions of parameters and GFLOPs with ten classes on 32x32 inputs, and the values
# that ours have unrounded: parameters without convolution biases and batch norms, multiply-adds.
PUBLISHED = {
    (18, "idshort"): (11.16, 1.12, 11_164_362, 555_422_720),
    (18, "learnscalar"): (11.16, 1.12, 11_164_367, 555_422_720),
    (18, "convshort"): (11.52, 1.16, 11_516_618, 576_394_240),
    (18, "batchnorm"): (11.52, 1.16, 11_516_618, 576_394_240),
    (50, "idshort"): (23.47, 2.6, 23_467_722, 1_297_829_888),
    (50, "learnscalar"): (23.47, 2.6, 23_467_734, 1_297_829_888),
    (50, "convshort"): (38.02, 4.2, 38_016_714, 2_103_136_256),
    (50, "batchnorm"): (38.02, 4.2, 38_016_714, 2_103_136_256),
    (101, "idshort"): (42.41, 5.02, 42_407_626, 2_509_983_744),
    (101, "learnscalar"): (42.41, 5.02, 42_407_655, 2_509_983_744),
    (101, "convshort"): (74.78, 8.92, 74_782_410, 4_456_140_800),
    (101, "batchnorm"): (74.78, 8.92, 74_782_410, 4_456_140_800),
}


def sizes(network: nn.Module) -> tuple[int, int]:
    """Parameters without convolution biases and batch norms; multiply-adds of convolutions and the linear layer at 32x32."""
    parameters = sum(p.numel() for p in network.parameters())
    multiply_adds = 0

    def count(module, inputs, output):
        nonlocal multiply_adds
        positions = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        multiply_adds += module.weight.numel() * positions

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            parameters -= 0 if module.bias is None else module.bias.numel()
        if isinstance(module, nn.BatchNorm2d):
            parameters -= sum(p.numel() for p in module.parameters())
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    network(torch.empty(1, 3, 32, 32, device="meta"))
    return parameters, multiply_adds


@pytest.mark.parametrize(("depth", "scheme"), PUBLISHED)
def test_parameters_and_gflops_are_those_of_the_paper(depth, scheme):
    millions, gflops, parameters, multiply_adds = PUBLISHED[depth, scheme]
    with torch.device("meta"):
        found = sizes(nfresnet(depth, scheme))
    assert found == (parameters, multiply_adds)
    assert round(found[0] / 1e6, 2) == millions
    assert 2 * round(found[1] / 1e9, 2) == pytest.approx(gflops, abs=1e-9)


def state_of(scheme: str, depth: int = 18, **arguments) -> dict:
    network = randomise(nfresnet(depth, scheme, width=4, **arguments), seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in network.named_parameters():
        if name.endswith("_scale"):
            parameter.data = 0.5 + torch.rand((), generator=generator)
    return network.state_dict()


def block(state, prefix: str, x, scheme: str, stride: int):
    """One residual sum, from the equations."""
    def weight(name):
        w = state[f"{prefix}.{name}.weight"]
        if scheme != "nf":
            return w
        centred = w - w.mean(dim=(1, 2, 3), keepdim=True)
        return centred / torch.sqrt((centred**2).sum(dim=(1, 2, 3), keepdim=True)) * state[f"{prefix}.{name}.gain"]

    def conv(name, y, stride=1):
        return F.conv2d(y, weight(name), state.get(f"{prefix}.{name}.bias"), stride, weight(name).shape[-1] // 2)

    def norm(name, y):
        if scheme != "batchnorm":
            return y
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(y, *(state[f"{prefix}.{name}.{key}"] for key in keys))

    gain = RELU_GAIN if scheme == "nf" else 1.0
    first = gain * F.relu(norm("norm1", x / state[f"{prefix}.input_std"] if scheme == "nf" else x))
    f = conv("conv2", gain * F.relu(norm("norm2", conv("conv1", first, stride))))
    h = x
    if f"{prefix}.shortcut.weight" in state:
        h = conv("shortcut", first if scheme == "nf" else x, stride)
    h = h * state.get(f"{prefix}.skip_scale", torch.tensor(1.0))
    f = f * state.get(f"{prefix}.residual_scale", torch.tensor(1.0))
    return (h + f) * state.get(f"{prefix}.sum_scale", torch.tensor(1.0))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_compute_their_equations(scheme):
    state = state_of(scheme)
    network = identify(state).module
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for prefix, stride in (("layer1.1", 1), ("layer2.0", 2)):
        with torch.inference_mode():
            found = network.get_submodule(prefix)(x)
        assert torch.allclose(found, block(state, prefix, x, scheme, stride), atol=1e-5)


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_recognised_from_keys_and_shapes(scheme, depth):
    stem = "imagenet" if depth == 34 else "cifar"
    state = nfresnet(depth, scheme, width=2, num_classes=7, stem=stem).state_dict()
    found = identify(state)
    assert found.description.startswith(f"ResNet-{depth} ")
    assert f"{scheme}: " in found.description and "7 classes" in found.description
    assert found.input_shape == ((1, 3, 224, 224) if stem == "imagenet" else (1, 3, 32, 32))
    assert "blocks of" in found.reason


def test_any_constant_of_the_sum_is_read_from_the_file():
    found = identify(state_of("idshort", c=0.6))
    assert "c = 0.6" in found.description and not found.notes
    assert torch.equal(found.module.layer1[0].sum_scale, torch.tensor(0.6))


def test_a_missing_constant_is_the_papers_and_said():
    state = {key: value for key, value in state_of("convshort").items() if not key.endswith("sum_scale")}
    found = identify(state)
    assert found.notes == ["c = √½, the paper's: the file does not hold it; --arch-arg c=… takes another"]
    assert found.module.layer4[1].sum_scale == pytest.approx(math.sqrt(0.5))
    asked = identify(state, arch="nfresnet", arch_args={"c": 0.9})
    assert asked.module.layer4[1].sum_scale == pytest.approx(0.9)


def test_blocks_that_are_not_the_papers():
    found = identify(state_of("idshort", blocks=(1, 2, 1)))
    assert found.description.startswith("ResNet (1-2-1 blocks)")


def test_damage_is_reported_by_key():
    state = state_of("learnscalar")
    del state["layer2.1.conv2.bias"]
    state["layer3.1.conv1.weight"] = state["layer3.1.conv1.weight"][:, :-1]
    state["head.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as raised:
        identify(state, source="net.pth")
    assert "1 missing (layer2.1.conv2.bias); 1 surplus (head.weight)" in str(raised.value)
    assert "layer3.1.conv1.weight is [16, 15, 3, 3], wanted [16, 16, 3, 3]" in str(raised.value)


@pytest.mark.parametrize("arguments", [{"scheme": "shortid"}, {"depth": 19}, {"stem": "mnist"}, {"colour": 1}])
def test_what_makes_no_network_is_a_usage_error(arguments):
    with pytest.raises(UsageError, match="--arch nfresnet"):
        identify(state_of("idshort"), arch="nfresnet", arch_args=arguments)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_folds_to_convolutions_and_sums(scheme):
    network = identify(state_of(scheme)).module
    folded = foldexport.fold(network, torch.randn(1, 3, 32, 32))
    after = folded.counts_after
    assert after.pop("relu") + after.pop("clamp", 0) == 17
    convolutions = 25 if scheme in ("convshort", "batchnorm") else 20
    assert after == {"conv": convolutions, "add": 8, "avg_pool": 1, "flatten": 1, "linear": 1}
    assert not [entry for entry in folded.ledger if entry.status == "kept"]


def test_rezero_at_initialisation_folds_to_a_line():
    """Residual scalars start at 0: the branches are deleted, and what is left is linear up to the last ReLU."""
    folded = foldexport.fold(nfresnet(18, "skipinit", width=4).eval(), torch.randn(1, 3, 32, 32))
    assert folded.counts_after == {"conv": 1, "relu": 1, "avg_pool": 1, "flatten": 1, "linear": 1}

"""VGG: published sizes, the classifiers of ImageNet and CIFAR, recognition, folding."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import foldexport
from foldexport.errors import CheckpointError, UsageError
from foldexport.zoo.vgg import vgg
from foldexport.zoo.vgg_files import FAMILY
from tests.statistics import randomise

LAYERS = (4, "M", 6, 5, "M", 8, "M")
SMALL = {"layers": LAYERS, "batch_norm": True, "num_classes": 7, "classifier": (), "pooled": 1}
FORMS = {
    "one linear layer": SMALL,
    "no batch norm": {**SMALL, "batch_norm": False},
    "no biases": {**SMALL, "bias": False},
    "one in a sequence": {**SMALL, "classifier": (1,)},
    "three linear layers": {**SMALL, "classifier": (0, 3, 6), "hidden": (9, 11), "pooled": 2},
    "dropout in front": {**SMALL, "classifier": (1, 4, 6), "hidden": (9, 11), "batch_norm": False},
    "averaged to 7x7": {**SMALL, "classifier": (0, 3, 6), "hidden": (5, 5), "pooled": 7},
}


def network(**arguments) -> nn.Module:
    return randomise(vgg(**arguments), seed=1)


def load(state, arguments=None):
    assert FAMILY.recognises(state)
    return FAMILY.load(dict(state), arguments or {}, "net.pth")


def evaluate(p: dict[str, Tensor], layers: tuple, x: Tensor) -> Tensor:
    """Convolution, batch norm, ReLU, …, pools as ``layers`` has them, then the linear layers; straight from the tensors."""
    convolutions = iter([int(k.split(".")[1]) for k in p if re.fullmatch(r"features\.\d+\.weight", k) and p[k].dim() == 4])
    for layer in layers:
        if layer == "M":
            x = F.max_pool2d(x, 2)
            continue
        place = next(convolutions)
        x = F.conv2d(x, p[f"features.{place}.weight"], p.get(f"features.{place}.bias"), padding=1)
        if f"features.{place + 1}.running_mean" in p:
            leaves = ("running_mean", "running_var", "weight", "bias")
            mean, var, gamma, beta = (p[f"features.{place + 1}.{leaf}"].view(-1, 1, 1) for leaf in leaves)
            x = (x - mean) / torch.sqrt(var + 1e-5) * gamma + beta
        x = F.relu(x)
    linears = [k.removesuffix(".weight") for k in p if k.startswith("classifier") and k.endswith(".weight")]
    reads = p[f"{linears[0]}.weight"].shape[1]
    x = F.adaptive_avg_pool2d(x, 7) if reads == 49 * x.shape[1] else x
    x = x.flatten(1)
    for i, name in enumerate(linears):
        x = (F.relu(x) if i else x) @ p[f"{name}.weight"].T + p[f"{name}.bias"]
    return x


@pytest.mark.parametrize("arguments", FORMS.values(), ids=FORMS)
def test_forms_compute_their_equations_and_are_recognised(arguments):
    module = network(**arguments).double()
    size = 8 * arguments["pooled"]
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.inference_mode():
        expected = module(x)
    assert torch.allclose(expected, evaluate(module.state_dict(), LAYERS, x), rtol=1e-10, atol=1e-10)
    found = load(module.state_dict())
    with torch.inference_mode():
        assert torch.equal(found.module(x), expected)
    assert found.input_shape == (1, 3, size, size) and found.num_classes == 7
    assert "4 convolutions features.N" in found.reason and "2 places between them left for pools" in found.reason
    assert "4-M-6-5-M-8-M" in found.description and ("no batch norm" in found.description) != arguments["batch_norm"]


PUBLISHED_SIZES = {  # torchvision's
    132_863_336: (11, False), 132_868_840: (11, True), 133_047_848: (13, False), 133_053_736: (13, True),
    138_357_544: (16, False), 138_365_992: (16, True), 143_667_240: (19, False), 143_678_248: (19, True),
}  # fmt: skip


@pytest.mark.parametrize(("parameters", "form"), PUBLISHED_SIZES.items())
def test_published_sizes_and_their_recognition(parameters, form):
    depth, batch_norm = form
    with torch.device("meta"):
        module = vgg(depth, batch_norm)
        assert sum(p.numel() for p in module.parameters()) == parameters
        found = load(module.state_dict())
    assert found.description == f"VGG-{depth}, {'' if batch_norm else 'no '}batch norm, 224 pixels, 1000 classes"
    assert f"depth {depth};" in found.reason and "224 pixels" in found.reason
    assert found.preprocessing["crop_pct"] == 0.875


def test_published_names_word_for_word():
    with torch.device("meta"):
        plain, normed = vgg(16).state_dict().keys(), vgg(16, batch_norm=True).state_dict().keys()
    assert [int(key.split(".")[1]) for key in plain if key.endswith("weight") and key.startswith("features")] == [
        0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28,
    ]  # fmt: skip
    assert {"features.0.weight", "features.1.running_mean", "features.40.bias", "features.41.running_var", "classifier.0.weight",
            "classifier.3.bias", "classifier.6.weight"} <= normed  # fmt: skip


CIFAR = {
    "one linear layer": ({"classifier": ()}, {"classifier.weight", "classifier.bias"}),
    "as wide as the features": ({"hidden": (512, 512)}, {"classifier.0.weight", "classifier.6.bias"}),
    "4096 wide": ({"hidden": (4096, 4096)}, {"classifier.3.weight"}),
    "dropout in front": ({"classifier": (1, 4, 6), "hidden": (512, 512)}, {"classifier.1.weight", "classifier.4.weight"}),
}


@pytest.mark.parametrize("depth", [11, 19])
@pytest.mark.parametrize(("arguments", "keys"), CIFAR.values(), ids=CIFAR)
def test_cifar_s_classifiers_are_recognised(depth, arguments, keys):
    with torch.device("meta"):
        state = vgg(depth, True, 10, pooled=1, **arguments).state_dict()
        assert keys <= state.keys()
        found = load(state)
    assert found.description == f"VGG-{depth}, batch norm, 32 pixels, 10 classes"
    assert found.input_shape == (1, 3, 32, 32) and found.preprocessing["label_names"][0] == "airplane"


def test_a_last_layer_called_linear():
    module = network(**SMALL)
    file = {key.replace("classifier.", "linear."): tensor for key, tensor in module.state_dict().items()}
    x = torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(load(file).module(x), module(x))
    del file["linear.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing \(linear\.bias\)"):
        load(file)


def without(state, *keys):
    return {key: tensor for key, tensor in state.items() if key not in keys}


MISFITS = {
    "missing": (lambda s: without(s, "features.4.weight"), "1 missing (features.4.weight)"),
    "missing statistics": (lambda s: without(s, "features.5.running_mean"), "1 missing (features.5.running_mean)"),
    "missing classifier": (lambda s: without(s, "classifier.weight"), "1 missing (classifier.weight)"),
    "surplus": (lambda s: {**s, "scale": torch.ones(1)}, "1 surplus (scale)"),
    "misshapen": (lambda s: {**s, "features.7.weight": torch.ones(5, 6, 1, 1)},
                  "features.7.weight is [5, 6, 1, 1], wanted [5, 6, 3, 3]"),
    "wider": (lambda s: {**s, "features.7.weight": torch.ones(9, 6, 3, 3)},
              "features.7.weight is [9, 6, 3, 3], wanted [5, 6, 3, 3]"),
    "a module between": (lambda s: {re.sub(r"^features\.11\.", "features.13.", re.sub(r"^features\.12\.", "features.14.", k)): v
                                    for k, v in s.items()}, "those of none"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), MISFITS.values(), ids=MISFITS)
def test_damage_is_reported(damage, words):
    with pytest.raises(CheckpointError) as caught:
        load(damage(network(**SMALL).state_dict()))
    assert words in str(caught.value)


def test_networks_of_other_families_are_left_to_them():
    def state(*shapes, **more):
        return {f"features.{i}.weight": torch.ones(shape) for i, shape in shapes} | {k: torch.ones(1) for k in more}

    eleven = [(0, (64, 3, 11, 11)), (3, (192, 64, 5, 5)), (6, (384, 192, 3, 3)), (8, (256, 384, 3, 3)), (10, (256, 256, 3, 3))]
    assert not FAMILY.recognises({**state(*eleven), "classifier.1.weight": torch.ones(1)})
    assert not FAMILY.recognises({**state((0, (64, 3, 3, 3))), "classifier.1.weight": torch.ones(1)})
    assert not FAMILY.recognises(without(network(**SMALL).state_dict(), "classifier.weight", "classifier.bias"))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"depth": 12}, "depth 12: such networks have depth 11"), ({"classifier": (0, 2)}, "or one alone"),
    ({"hidden": (5,)}, "2 hidden layers"), ({"pooled": 0}, "at least 1"),
])  # fmt: skip
def test_arguments_that_make_no_network(arguments, message):
    with pytest.raises(ValueError, match=message):
        vgg(**arguments)
    with pytest.raises(UsageError, match=message):
        FAMILY.load({"x": torch.ones(1)}, dict(arguments), "net.pth")


@pytest.mark.parametrize("form", ["one linear layer", "no biases", "three linear layers"])
def test_folds_to_plain_convolutions(form):
    size = 8 * FORMS[form]["pooled"]
    folded = foldexport.fold(network(**FORMS[form]), torch.randn(2, 3, size, size))
    assert not any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in folded.module.modules())
    assert folded.certificate.ok and not [entry for entry in folded.ledger if entry.status == "kept"]

from __future__ import annotations

import pytest
import torch

from foldexport.zoo.diracnet import DiracNet, FoldedDiracNet, diracnet, make_plan
from foldexport.zoo.diracnet_layouts import to_published
from tests.zoo.states import evaluate, published, random_network

SMALL = [
    {"dataset": "CIFAR", "depth": 10, "width": 0.5},
    {"dataset": "CIFAR", "depth": 16, "width": 0.5, "num_classes": 100},
    {"dataset": "ImageNet", "depth": 18, "width": 0.125, "num_classes": 7},
    {"dataset": "ImageNet", "depth": 34, "width": 0.125},
    {"dataset": "CIFAR", "depth": 10, "width": 0.5, "version": 1},
    {"dataset": "ImageNet", "depth": 18, "width": 0.125, "version": 1},
]
ids = [" ".join(map(str, variant.values())) for variant in SMALL]


@pytest.mark.parametrize("variant", SMALL, ids=ids)
def test_output_equals_the_paper_s_equations(variant):
    plan = make_plan(**variant)
    network = random_network(plan)
    x = torch.randn(2, 3, *(2 * [32 if plan.dataset == "CIFAR" else 96]))
    with torch.no_grad():
        found, expected = network(x), evaluate(published(network), plan, x)
    assert found.shape == (2, plan.num_classes)
    if plan.dataset == "CIFAR":
        assert torch.equal(found, expected)
    else:
        # The adaptive pool sums in another order than a 3x3 window does.
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def test_a_dropped_term_would_be_seen():
    plan = make_plan(depth=10, width=0.5)
    network = random_network(plan)
    tensors, x = published(network), torch.randn(2, 3, 32, 32)
    tensors["group2.block1.alpha"] = torch.zeros_like(tensors["group2.block1.alpha"])
    with torch.no_grad():
        assert not torch.allclose(network(x), evaluate(tensors, plan, x), rtol=1e-3)


@pytest.mark.parametrize("depth, parameters", [(18, 11_523_368), (34, 21_638_952)])
def test_published_imagenet_sizes(depth, parameters):
    with torch.device("meta"):
        network = diracnet("ImageNet", depth)
    state = {key: torch.empty(tensor.shape) for key, tensor in network.state_dict().items()}
    params, _ = to_published(state)
    assert sum(tensor.numel() for tensor in params.values()) == parameters


@pytest.mark.parametrize(
    "depth, blocks", [(18, (4, 4, 4, 4)), (34, (6, 8, 12, 6))],
)  # fmt: skip
def test_execution_order_is_the_published_one(depth, blocks):
    with torch.device("meta"):
        network = FoldedDiracNet(make_plan("ImageNet", depth))
    order = ["features.conv", "features.max_pool0"]
    for g, count in enumerate(blocks):
        for b in range(count):
            order += [f"features.group{g}.block{b}.relu", f"features.group{g}.block{b}.conv"]
        order += [f"features.max_pool{g + 1}"] if g < 3 else ["features.last_relu", "features.avg_pool"]
    order += ["flatten", "fc"]
    assert leaves(network) == order
    convolutions = [name for name in order if name.endswith("conv")] + ["fc"]
    assert list(network.state_dict()) == [f"{name}.{leaf}" for name in convolutions for leaf in ("weight", "bias")]


def test_training_graph_has_the_folded_names_and_its_batch_norms():
    plan = make_plan(depth=10)
    folded, training = leaves(FoldedDiracNet(plan)), leaves(DiracNet(plan))
    assert folded[:3] == ["features.conv", "features.relu", "features.group0.block0.relu"]
    assert [name for name in training if not name.endswith("bn")] == folded


def test_version_1_reads_twice_the_channels_and_has_no_last_relu():
    network = diracnet("CIFAR", 10, version=1)
    assert network.features.group1.block0.conv.weight.shape == (32, 32, 3, 3)
    assert network.features.group1.block1.conv.weight.shape == (32, 64, 3, 3)
    assert network.features.group1.block1.conv.alpha.shape == (1,)
    assert not hasattr(network.features, "last_relu")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"depth": 18}, "depth 6n \\+ 4"),
        ({"depth": 4}, "depth 6n \\+ 4"),
        ({"dataset": "ImageNet", "depth": 50}, "18 or 34"),
        ({"dataset": "SVHN"}, "SVHN"),
        ({"version": 3}, "version 3"),
        ({"width": 0.01}, "without channels"),
    ],
)
def test_what_the_paper_does_not_define_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(**arguments)


@pytest.mark.parametrize("width", [0.5, 1, 1.3, 2, 10])
def test_plan_knows_its_depth_and_width(width):
    for depth in (10, 16, 40):
        assert (make_plan(depth=depth, width=width).depth, make_plan(depth=depth, width=width).width) == (depth, width)
    assert make_plan("ImageNet", 34, width).width == width


def leaves(network: torch.nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if not list(module.children())]

"""Skip connections taken out: what a residual network becomes, that it is the same function, and what stays and why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foldexport
from foldexport import costs
from foldexport.zoo.nfresnet import nfresnet
from foldexport.zoo.preresnet import ORDERS, PROJECTIONS, preresnet
from tests.fold import skip_blocks
from tests.fold.checks import assert_same
from tests.fold.layers import Apply, Gate, chain, conv, conv_bn
from tests.networks import Head, Residual
from tests.statistics import randomise

SHAPE = (3, 16, 16)
EXAMPLE = torch.linspace(-2, 2, 2 * 3 * 256, dtype=torch.float64).sin().reshape(2, *SHAPE)
PLAIN = {"conv", "relu", "max_pool", "avg_pool", "flatten", "linear"}
RULE = "skip connection"


def resnet(blocks: tuple[int, ...], *, bottleneck: bool, preactivation: bool, width: int = 4) -> nn.Sequential:
    """A ResNet as `tests.networks.ResNet` has them, narrower: projections with batch norm where it is post-activation."""
    layers: list[nn.Module] = [conv_bn(3, width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels = width
    for stage, count in enumerate(blocks):
        for index in range(count):
            inner = width * 2**stage
            stride = 2 if stage > 0 and index == 0 else 1
            layers.append(Residual(channels, inner, stride, bottleneck=bottleneck, preactivation=preactivation))
            channels = 4 * inner if bottleneck else inner
    last = [nn.BatchNorm2d(channels), nn.ReLU()] if preactivation else []
    return nn.Sequential(*layers, *last, Head(channels, 5))


def headed(*blocks: nn.Module, stem: int = 8, out: int = 8, activation: Callable = nn.ReLU) -> nn.Sequential:
    """A stem that ends in an activation, the blocks, a pooled head."""
    return nn.Sequential(conv_bn(3, stem), activation(), *blocks, Head(out, 5))


def turned(module: nn.Module, shape: tuple[int, ...] = SHAPE, seed: int = 0, **statistics):
    """The chained fold of a network with random statistics, proved, and the same function at batches of one and three."""
    example = torch.randn((2, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    randomise(module.double(), seed, example=example, **statistics)
    folded = foldexport.fold(module, example, chain=True)
    assert folded.certificate.ok and folded.certificate.end_to_end.error < 1e-9
    assert_same(folded, module, shape)
    return folded


def entries(folded, status: str) -> list:
    return [entry for entry in folded.ledger if entry.rule == RULE and entry.status == status]


def assert_chain(folded, skips: int) -> None:
    """Nothing but plain layers one behind the other, every skip connection told."""
    assert type(folded.module) is nn.Sequential
    assert {kind for kind, number in folded.counts_after.items() if number} <= PLAIN
    assert len(entries(folded, "folded")) == skips and not entries(folded, "kept")
    assert all(entry.into for entry in entries(folded, "folded"))


# ---- networks


@pytest.mark.parametrize("preactivation", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("bottleneck", [False, True], ids=["basic", "bottleneck"])
def test_a_residual_network_becomes_a_chain(bottleneck: bool, preactivation: bool):
    folded = turned(resnet((2, 2), bottleneck=bottleneck, preactivation=preactivation))
    assert_chain(folded, 4)
    assert folded.certificate.folded32 < 4


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_activation(order: str, projection: str):
    network = preresnet(8, order=order, projection=projection, width=4, blocks=(1, 2), bottleneck=projection == "pad")
    assert_chain(turned(network), 3)


@pytest.mark.parametrize("scheme", ["idshort", "learnscalar", "convshort", "rescale", "nf", "batchnorm"])
def test_residual_scalars(scheme: str):
    assert_chain(turned(nfresnet(18, scheme, width=4, blocks=(1, 2))), 3)


@pytest.mark.parametrize("order", ORDERS)
def test_dead_and_tiny_channels(order: str):
    network = preresnet(8, order=order, projection="trunk", width=8, blocks=(2, 1))
    assert_chain(turned(network, zero=0.15, tiny=0.13), 3)


def test_odd_sizes():
    assert_chain(turned(resnet((1, 1, 1), bottleneck=True, preactivation=False), (3, 19, 15)), 3)


def test_free_sizes():
    network = randomise(resnet((1, 1), bottleneck=False, preactivation=False), 0)
    folded = foldexport.fold(network, torch.randn(1, 3, 16, 16), chain=True, free=("height", "width"))
    assert "second size" in [name for name, _ in folded.certificate.probes]


def bend(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def skip(branch: nn.Module, shortcut: nn.Module | None = None, behind: nn.Module | None = None, **more) -> skip_blocks.Skip:
    return skip_blocks.Skip(nn.Identity(), branch, shortcut or nn.Identity(), behind or nn.Identity(), **more)


def strided(kernel: int = 3, width: int = 16) -> nn.Sequential:
    return conv_bn(8, width, kernel, stride=2)


def beside(zeros: Callable[[Tensor], Tensor]) -> nn.Module:
    """Option A as code bases without a channel pad write it."""
    return bend(nn.AvgPool2d(1, 2), Apply(lambda x: torch.cat([x, zeros(x)], 1)))


BASIC = lambda: bend(conv_bn(8, 8), nn.ReLU(), conv_bn(8, 8))  # noqa: E731 - rows of a table
DOWN = lambda: bend(strided(), nn.ReLU(), conv_bn(16, 16))  # noqa: E731
LATE = lambda: bend(conv_bn(8, 4, 1), nn.ReLU(), conv_bn(4, 4, stride=2), nn.ReLU(), conv_bn(4, 16, 1))  # noqa: E731
GROUPED = lambda: bend(conv_bn(8, 8, 1), nn.ReLU(), conv_bn(8, 8, groups=4), nn.ReLU(), conv_bn(8, 8, 1))  # noqa: E731
SPLIT = bend(nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), conv_bn(8, 16, 1))

BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "3x3 projection": (lambda: skip(DOWN(), strided(), nn.ReLU()), 16),
    "3x3 projection, stride in the middle": (lambda: skip(LATE(), strided(), nn.ReLU()), 16),
    "3x3 projection, stride at the end": (
        lambda: skip(bend(conv_bn(8, 4, 1), nn.ReLU(), conv_bn(4, 16, stride=2)), strided(), nn.ReLU()), 16),
    "two strides": (
        lambda: skip(bend(strided(width=8), nn.ReLU(), strided()), conv_bn(8, 16, 1, stride=4), nn.ReLU()), 16),
    "pooled projection": (lambda: skip(LATE(), SPLIT, nn.ReLU()), 16),
    "option A": (lambda: skip(DOWN(), skip_blocks.option_a(8), nn.ReLU()), 16),
    "option A by concatenation": (lambda: skip(DOWN(), beside(lambda x: 0 * x)), 16),
    "option A beside zeros": (lambda: skip(DOWN(), beside(torch.zeros_like)), 16),
    "subsampling by max pool": (lambda: skip(bend(strided(width=8), nn.ReLU(), conv_bn(8, 8)), nn.MaxPool2d(1, 2)), 8),
    "narrow projection": (
        lambda: skip(bend(conv_bn(8, 2, 1), nn.ReLU(), conv_bn(2, 2), nn.ReLU(), conv_bn(2, 2)), conv_bn(8, 2, 1)), 2),
    "narrow projection subtracted": (
        lambda: skip(bend(conv_bn(8, 2), nn.ReLU(), conv_bn(2, 2)), conv_bn(8, 2, 1), signs=(-1.0, 1.0)), 2),
    "subtracted branch": (lambda: skip(BASIC(), signs=(1.0, -1.0), behind=nn.ReLU()), 8),
    "groups": (lambda: skip(GROUPED(), behind=nn.ReLU()), 8),
    "depthwise": (lambda: skip(bend(conv_bn(8, 12, 1), nn.ReLU(), conv_bn(12, 12, groups=12), nn.ReLU(), conv_bn(12, 8, 1))), 8),
    "groups at the end": (lambda: skip(bend(conv_bn(8, 8, 1), nn.ReLU(), conv_bn(8, 8, groups=4)), behind=nn.ReLU()), 8),
    "convolutions in a row": (lambda: skip(bend(conv_bn(8, 4, 1), conv_bn(4, 8), nn.ReLU(), conv_bn(8, 8))), 8),
    "average pool in the branch": (lambda: skip(bend(conv_bn(8, 8), nn.ReLU(), nn.AvgPool2d(3, 1, 1), conv_bn(8, 8))), 8),
    "ReLU before the sum": (lambda: skip(bend(conv_bn(8, 8), nn.ReLU(), conv_bn(8, 8), nn.ReLU())), 8),
    "only a ReLU": (lambda: bend(conv_bn(8, 8), skip(nn.ReLU())), 8),
    "dropout": (lambda: skip(bend(*BASIC(), nn.Dropout(0.5)), nn.Dropout(0.5)), 8),
    "one inside another": (lambda: skip(bend(conv_bn(8, 8), nn.ReLU(), skip(BASIC()), nn.ReLU(), conv_bn(8, 8))), 8),
    "behind max pool": (lambda: bend(nn.MaxPool2d(3, 2, 1), skip(BASIC(), behind=nn.ReLU())), 8),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str):
    build, out = BLOCKS[name]
    folded = turned(headed(build(), out=out))
    assert_chain(folded, 2 if name == "one inside another" else 1)


def test_one_and_three_dimensions():
    line = chain(stem=nn.Conv1d(3, 4, 3), block=skip(bend(nn.Conv1d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 4, 5, padding=2))))
    assert_chain(turned(line, (3, 14)), 1)
    cube = chain(stem=nn.Conv3d(2, 4, 3), block=skip(bend(nn.ReLU(), nn.Conv3d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, 1))))
    assert_chain(turned(cube, (2, 6, 6, 6)), 1)


def test_linear_layers():
    branch = bend(nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8))
    assert_chain(turned(chain(stem=nn.Linear(6, 8), block=skip(branch), last=nn.BatchNorm1d(8)), (6,)), 1)


def test_the_input_itself():
    assert_chain(turned(skip(bend(conv(3, 8), nn.ReLU(), conv(8, 3)), signs=(1.0, -1.0))), 1)


def test_other_activations_leave_what_is_carried_alone():
    """Per-channel bounds and slopes: no ReLU, but no skip connection either."""
    network = headed(
        skip(bend(conv_bn(8, 8), nn.PReLU(8), conv_bn(8, 8)), behind=nn.PReLU(8)),
        skip(bend(conv_bn(8, 8), nn.ReLU6(), conv_bn(8, 8)), behind=nn.ReLU6()),
        skip(bend(conv_bn(8, 8), nn.ReLU6(), conv_bn(8, 8)), behind=nn.ReLU6()),
    )
    folded = turned(network)
    assert len(entries(folded, "folded")) == 3 and not entries(folded, "kept")
    assert folded.counts_after["prelu"] == 2 and "add" not in folded.counts_after
    assert folded.counts_after["relu6"] == 3 and folded.counts_after["clamp"] == 1  # the last one carries a ReLU6's own value


# ---- what it costs


def test_the_cost_of_a_basic_block():
    """C further channels in both convolutions: twice the multiply-adds; of any sign: a 1x1, then groups, then 3C → C."""
    module = chain(relu=nn.ReLU(), block=skip(bend(conv(8, 8), nn.ReLU(), conv(8, 8))))
    pixels = 16 * 16
    for network, wanted in ((module, 2 * 18 * 64), (module.block, 3 * 64 + 27 * 64 + 27 * 64)):
        if network is module.block:
            network = chain(block=skip(bend(nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8))))
        folded = turned(network, (8, 16, 16))
        assert costs.of_module(folded.module, folded.graph.example, {}).multiply_adds == wanted * pixels


def test_never_unless_asked():
    network = randomise(resnet((1,), bottleneck=False, preactivation=False), 0)
    folded = foldexport.fold(network, EXAMPLE.float())
    assert folded.counts_after["add"] == 1 and not any(entry.rule == RULE for entry in folded.ledger)


# ---- what stays


class Twice(nn.Module):
    """The inner value of the branch is an output too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.first(x).relu()
        return x + self.second(inner), inner


VALID = bend(conv(8, 8, padding=0), nn.ReLU(), conv(8, 8, padding=0))
KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gate": (lambda: skip(bend(*BASIC(), Gate(8, 2))), "a gate lies on its way: mul in `2.branch.3`"),
    "other activation": (lambda: skip(bend(conv_bn(8, 8), nn.SiLU(), conv_bn(8, 8))), "`2.branch.1` (silu) on its way"),
    "max pool in the branch": (
        lambda: skip(bend(conv_bn(8, 8), nn.MaxPool2d(3, 1, 1), conv_bn(8, 8))), "`2.branch.1` (max_pool2d) on its way"),
    "both bend": (lambda: skip(BASIC(), bend(conv_bn(8, 8), nn.ReLU())), "both of its ways bend: `2.shortcut.1` (relu)"),
    "cropped": (lambda: skip(VALID, Apply(lambda x: x[:, :, 2:-2, 2:-2])), "gives sizes (14, 14) where what is carried"),
    "read twice": (Twice, "`2` on its way is an output of the network too"),
    "groups at the front": (
        lambda: skip(bend(conv_bn(8, 8, groups=4), nn.ReLU(), conv_bn(8, 8))), "`2.branch.0.conv` has 4 groups"),
    "transposed": (
        lambda: skip(bend(strided(width=8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2))), "(conv_transpose2d) on its way"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_turned_stays_as_it_is(name: str):
    build, reason = KEPT[name]
    network = nn.Sequential(conv_bn(3, 8), nn.ReLU(), build())
    folded = turned(network)
    (entry,) = entries(folded, "kept")
    assert reason in entry.reason and not entries(folded, "folded")
    assert folded.counts_after == foldexport.fold(network, EXAMPLE).counts_after


def test_one_that_stays_does_not_keep_the_others():
    folded = turned(headed(skip(bend(*BASIC(), Gate(8, 2)), behind=nn.ReLU()), skip(BASIC(), behind=nn.ReLU())))
    assert [entry.module for entry in entries(folded, "kept")] == ["2"]
    assert [entry.module for entry in entries(folded, "folded")] == ["3"]
    assert folded.counts_after["add"] == 1


def test_a_concatenation_is_named():
    dense = Apply(lambda x: torch.cat([x, F.relu(x - 1)], 1), "dense")
    folded = turned(headed(skip(BASIC()), dense, out=16))
    (entry,) = entries(folded, "kept")
    assert entry.module == "3" and "only sums are turned" in entry.reason


# ---- at random


# Seeds above 24: a bound that drowns what lies at it, a shift that float32 would not hold, cancelled shifts, signs alone.
@pytest.mark.parametrize("seed", [*range(20), 32, 44, 56, 110, 360, 363, 382])
def test_blocks_at_random(seed: int):
    network = skip_blocks.network(seed).double()
    folded = foldexport.fold(network, torch.randn(2, 3, 8, 8, dtype=torch.float64), chain=True)
    assert folded.certificate.ok
    assert_same(folded, network, (3, 8, 8))

"""Whole networks with random statistics: nothing affine is left, the certificate holds, float32 is no worse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import foldexport
from tests import networks
from tests.fold.checks import noise_multiple, operators
from tests.statistics import randomise

Row = tuple[Callable[[], nn.Module], int, dict[str, int]]

NORMALIZER_FREE: dict[str, Row] = {
    kind: (partial(networks.normalizer_free_resnet50, kind), 16,
           {"conv": 65 if kind == "ConvShort" else 53, "relu": 49, "add": 16, "avg_pool": 1, "linear": 1})
    for kind in ("IdShort", "LearnScalar", "ConvShort")
}

# Batch norm directly behind a convolution: a plain ReLU stays a plain ReLU, whatever the sign or size of gamma.
POSTACTIVATION: dict[str, Row] = {
    "resnet18": (networks.resnet18, 64, {"conv": 20, "relu": 17, "add": 8, "max_pool": 1, "avg_pool": 1, "linear": 1}),
    "resnet50": (networks.resnet50, 64, {"conv": 53, "relu": 49, "add": 16, "max_pool": 1, "avg_pool": 1, "linear": 1}),
    "plain60": (networks.plain, 12, {"conv": 60, "relu": 60, "avg_pool": 1, "linear": 1}),
    "repvgg_a0": (networks.repvgg_a0, 64, {"conv": 22, "relu": 22, "avg_pool": 1, "linear": 1}),
    "mobilenet_v2": (networks.mobilenet_v2, 64, {"conv": 52, "relu6": 35, "add": 10, "avg_pool": 1, "linear": 1}),
}

# Batch norm of a trunk that several batch norms read: "activations" are ReLU and clamp together.
PREACTIVATION: dict[str, Row] = {
    "preactivation_resnet18": (
        networks.preactivation_resnet18, 64,
        {"conv": 20, "activations": 17, "add": 8, "max_pool": 1, "avg_pool": 1, "linear": 1},
    ),
    "preactivation_resnet50": (
        networks.preactivation_resnet50, 64,
        {"conv": 53, "activations": 49, "add": 16, "max_pool": 1, "avg_pool": 1, "linear": 1},
    ),
    "densenet121": (
        networks.densenet121, 64,
        {"conv": 120, "activations": 121, "cat": 58, "max_pool": 1, "avg_pool": 4, "linear": 1},
    ),
}


def folded_network(row: Row, **statistics):
    """The network with its statistics, its `Folded` (certificate passed), and the batch of probes."""
    build, size, _ = row
    torch.manual_seed(0)
    probes = torch.randn(8, 3, size, size)
    module = randomise(build(), 0, example=probes, **statistics)
    folded = foldexport.fold(module, probes[:2])
    assert folded.certificate.ok
    assert folded.certificate.folded32 <= 4
    return module, folded, probes


def activations(counts: Counter[str]) -> Counter[str]:
    """The counts with ReLU and clamp counted together."""
    rest = Counter({kind: number for kind, number in counts.items() if kind not in ("relu", "clamp")})
    return rest + Counter(activations=counts["relu"] + counts["clamp"])


@pytest.mark.parametrize("name", [*NORMALIZER_FREE, *POSTACTIVATION])
def test_no_batch_norm_no_scalar_and_only_plain_activations_are_left(name: str):
    row = (NORMALIZER_FREE | POSTACTIVATION)[name]
    module, folded, probes = folded_network(row, zero=0.05, tiny=0.05)
    assert operators(folded.counts_after) == row[2]
    assert noise_multiple(folded, module, probes) <= 4


@pytest.mark.parametrize("name, inner", [("preactivation_resnet50", 32), ("densenet121", 58)])
def test_no_batch_norm_and_no_scalar_is_left_before_pointwise_convolutions(name: str, inner: int):
    row = PREACTIVATION[name]
    module, folded, probes = folded_network(row, zero=0.05, tiny=0.05)
    counts = operators(folded.counts_after)
    assert activations(counts) == row[2]
    # The batch norms behind a convolution that nothing else reads leave a plain ReLU.
    assert counts["relu"] >= inner
    assert noise_multiple(folded, module, probes) <= 4


def test_tiny_gammas_before_padded_convolutions_leave_one_operator_each_at_most():
    """``relu(k x + t)`` with k = 1e-8 has a shift that zero padding must not meet: eight blocks begin so.

    An addition alone would have to add t / k, 1e8, and lose in float32 what it is added to: the batch norm stays.
    """
    row = PREACTIVATION["preactivation_resnet18"]
    module, folded, probes = folded_network(row, zero=0.05, tiny=0.05)
    counts = operators(folded.counts_after)
    assert counts["mul"] == 0
    assert activations(counts)["activations"] == 17 and counts["conv"] == 20
    assert counts["batch_norm"] + counts["add"] <= 8 + 8
    assert sum(counts.values()) <= sum(operators(folded.counts_before).values())
    assert noise_multiple(folded, module, probes) <= 4


def test_gammas_of_both_signs_before_padded_convolutions_leave_no_add():
    """Where the sign of gamma differs from the trunk's, ``min(s, 0)`` does, and the shift still goes upstream."""
    row = PREACTIVATION["preactivation_resnet18"]
    module, folded, probes = folded_network(row)
    assert activations(operators(folded.counts_after)) == row[2]
    assert noise_multiple(folded, module, probes) <= 4


@pytest.mark.parametrize("name", ["preactivation_resnet18", "preactivation_resnet50"])
def test_positive_gammas_of_a_preactivation_trunk_need_no_clamp(name: str):
    row = PREACTIVATION[name]
    module, folded, probes = folded_network(row, signs=False)
    counts = operators(folded.counts_after)
    assert counts["clamp"] == 0
    assert activations(counts) == row[2]
    assert noise_multiple(folded, module, probes) <= 4


@pytest.mark.parametrize("name", [*NORMALIZER_FREE, *PREACTIVATION, "resnet50", "repvgg_a0"])
def test_every_batch_norm_and_scalar_is_in_the_ledger_by_the_name_of_the_user(name: str):
    build, size, _ = (NORMALIZER_FREE | POSTACTIVATION | PREACTIVATION)[name]
    module = randomise(build(), 1)
    folded = foldexport.fold(module, torch.randn(2, 3, size, size), certify=False)
    found = {entry.module for entry in folded.ledger if entry.status == "folded"}
    wanted = {path for path, layer in module.named_modules()
              if isinstance(layer, (nn.BatchNorm2d, networks.NormalizerFreeBlock))}
    missing = {path for path in wanted if not any(entry == path or entry.startswith(f"{path}.") for entry in found)}
    assert not missing

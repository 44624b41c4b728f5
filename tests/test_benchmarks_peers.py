"""What the comparisons with peers count, and what they say of it."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
NOTHING = {"norms": 0, "scales": 0, "shifts": 0, "weights": 0}


@pytest.fixture
def script(monkeypatch):
    """Import one of the scripts the way that it is run: with its own folder on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def model(nodes: list, constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    """``x [2, 4, 5, 5]`` to ``y`` through nodes of ``(operator, inputs, output)``."""
    made = [helper.make_node(op, ins, [out]) for op, ins, out in nodes]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4, 5, 5]) for name in ("x", "y")]
    stored = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
    return helper.make_model(helper.make_graph(made, "g", ends[:1], ends[1:], stored))


CHANNEL, WEIGHT, NUMBER = np.ones((4, 1, 1)), np.ones((4, 4, 1, 1)), np.array(2.0)


@pytest.mark.parametrize("nodes, constants, expected", [
    ([("Conv", ["x", "w"], "c"), ("Add", ["c", "b"], "y")], {"w": WEIGHT, "b": CHANNEL}, {}),
    ([("Conv", ["x", "w", "b"], "c"), ("Add", ["c", "d"], "y")], {"w": WEIGHT, "b": np.ones(4), "d": CHANNEL}, {"shifts": 1}),
    ([("Conv", ["x", "w"], "c"), ("Mul", ["c", "k"], "m"), ("Add", ["m", "b"], "y")],
     {"w": WEIGHT, "k": CHANNEL, "b": CHANNEL}, {"scales": 1}),
    ([("Relu", ["x"], "r"), ("Mul", ["k", "r"], "y")], {"k": NUMBER}, {"scales": 1}),
    ([("Relu", ["x"], "r"), ("Mul", ["r", "x"], "y")], {}, {}),
    ([("Add", ["x", "p"], "y")], {"p": np.ones((1, 1, 5, 5))}, {}),
    ([("Div", ["k", "x"], "y")], {"k": NUMBER}, {}),
    ([("Mul", ["w", "k"], "v"), ("Conv", ["x", "v"], "y")], {"w": WEIGHT, "k": NUMBER}, {"weights": 1}),
    ([("Identity", ["w"], "v"), ("Conv", ["x", "v"], "y")], {"w": WEIGHT}, {}),
    ([("BatchNormalization", ["x", "k", "k", "k", "k"], "y")], {"k": np.ones(4)}, {"norms": 1}),
], ids=["bias", "shift behind a bias", "scale and shift", "factor", "gate", "positions", "reciprocal", "computed weights",
        "moved weights", "batch norm"])  # fmt: skip
def test_one_rule_counts_affine_operators(script, nodes, constants, expected) -> None:
    assert script("affine_count").of_onnx(model(nodes, constants)) == NOTHING | expected


def test_what_folding_leaves_of_a_residual_block_beside_its_peers(script, tmp_path) -> None:
    from tests.fold.layers import conv
    from tests.fold.residuals import PreactivationBlock
    from tests.statistics import randomise

    worker, peers, count = script("folded_share_worker"), script("peers"), script("affine_count")
    network = randomise(nn.Sequential(conv(3, 8), PreactivationBlock(8), PreactivationBlock(8), conv(8, 8)), 0)
    example = torch.randn(2, 3, 8, 8)
    program = peers.onnx_program(network, example, optimise=False)
    before = count.of_onnx(program.model_proto)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert before == NOTHING | {"norms": norms}
    assert worker.ours(network, example, str(tmp_path)) == NOTHING
    theirs = [worker.after_fx(network, example, before), worker.after_onnx(program)]
    assert all(0 < sum(left.values()) < norms for left in theirs)


def test_a_peer_that_leaves_less_is_named(script) -> None:
    share = script("folded_share")
    rows = {"timm/a": {"before": NOTHING | {"norms": 3}, "ours": NOTHING | {"norms": 2}, "OpenVINO": NOTHING | {"norms": 1},
                       "torch.fx fuse": {"reason": "fails"}, "torch.onnx + onnxsim": NOTHING | {"norms": 3}}}  # fmt: skip
    assert share.behind(rows["timm/a"]) == ["OpenVINO"]
    assert share.verdict(rows) == ["timm/a: behind OpenVINO", "in total: not ahead of OpenVINO"]
    rows["timm/a"]["ours"] = NOTHING
    assert share.verdict(rows) == []


def test_operators_left_beyond_the_networks_own_method_are_a_miss(script) -> None:
    compare = script("reparameterize")
    row = {"own": {"conv": 3, "view": 2}, "ours": {"conv": 3, "add": 1}, "own_error": 0.0, "our_error": 1e-15}
    assert compare.verdict(row) == "ours leaves 1 more"
    assert compare.difference(row["own"], row["ours"]) == "+1 add"
    assert compare.verdict(row | {"ours": {"conv": 3, "view": 9}}) == ""
    assert "something else" in compare.verdict(row | {"our_error": float("nan")})


def test_an_interval_around_one_is_no_difference(script) -> None:
    words = script("latency_peers").words
    assert words([0.99, 0.9, 1.1]).endswith("no measurable difference")
    assert words([0.8, 0.7, 0.9]).endswith("faster")
    assert words([1.2, 1.1, 1.3]).endswith("slower")

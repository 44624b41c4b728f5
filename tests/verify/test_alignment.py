"""Which value is which, where a file has one operator for several, pads by itself, or has names of its own for weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx, nn

from foldexport.exporters.graph_inner import module_operators
from foldexport.exporters.inner import Inner, Row, operators_of
from foldexport.verify.alignment import align
from foldexport.verify.judgement import forms, judgement
from foldexport.verify.naming import named


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.act = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.one(x))
        return torch.relu(x + self.two(x))


def artifact(*rows: Row, outputs: list[str], constants: dict | None = None) -> Inner:
    operators, known = operators_of(["in"], rows, passing=("Split",), sizes=())
    return Inner(operators, ["in"], [known[name] for name in outputs], lambda names, arrays: [], constants)


def found(*rows: Row, outputs: list[str], network: type[nn.Module] = Net) -> dict[str, str]:
    return align(module_operators(fx.symbolic_trace(network())), artifact(*rows, outputs=outputs))


ONE = Row("Conv", ["in", "w1"], ["a"], ["one.weight"], fused="relu")
END = Row("Add", ["a", "b"], ["c"], fused="relu")


def test_a_fused_activation_is_the_value_that_the_file_has():
    seen = found(ONE, Row("Conv", ["a", "w2"], ["b"], ["two.weight"]), END, outputs=["c"])
    assert seen == {"x": "in", "act": "a", "two": "b", "relu": "c"}  # neither `one` nor `add`


def test_another_activation_than_the_modules_is_no_value_of_its():
    half = Row("Conv", ["in", "w1"], ["h"], ["one.weight"], fused="relu6")  # of a hard sigmoid, say
    seen = found(half, Row("Mul", ["h"], ["a"]), Row("Conv", ["a", "w2"], ["b"], ["two.weight"]), END, outputs=["c"])
    assert "h" not in seen.values() and seen["act"] == "a"


def test_what_is_padded_is_the_input_of_a_layer_that_pads_by_itself():
    rows = [Row("Pad", ["a"], ["p"], pads=True), Row("Conv", ["p", "w2"], ["b"], ["two.weight"])]
    seen = found(Row("Conv", ["in", "w1"], ["z"], ["one.weight"]), Row("Relu", ["z"], ["a"]), *rows, END, outputs=["c"])
    assert seen["act"] == "a" and "p" not in seen.values()


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pad, self.one = nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.pad(torch.tanh(x)))


def test_a_padding_of_the_modules_own_is_a_value():
    rows = [Row("Tanh", ["in"], ["t"]), Row("Pad", ["t"], ["p"], pads=True), Row("Conv", ["p", "w"], ["c"], ["one.weight"])]
    assert found(*rows, outputs=["c"], network=Padded) == {"x": "in", "tanh": "t", "pad": "p", "one": "c"}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.slope = nn.LayerNorm(8), nn.PReLU(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.slope(self.norm(torch.sigmoid(x).flip(1))))


def test_layers_in_several_operators_begin_before_their_weights_and_end_after():
    rows = [
        Row("Sigmoid", ["in"], ["s"]), Row("Flip", ["s"], ["f"]), Row("Shift", ["f"], ["g"]), Row("Scale", ["f", "g"], ["n"]),
        Row("Mul", ["n", "w"], ["m"], ["norm.weight"]), Row("Add", ["m", "v"], ["o"], ["norm.bias"]),
        Row("Relu", ["o"], ["r"]), Row("Mul", ["o", "u"], ["q"], ["slope.weight"]), Row("Max", ["r", "q"], ["y"]),
        Row("Tanh", ["y"], ["t"]),
    ]  # fmt: skip
    seen = found(*rows, outputs=["t"], network=Normed)
    assert seen["norm"] == "o" and seen["tanh"] == "t"
    assert not {"n", "q"} & set(seen.values())


def test_a_weight_that_is_reshaped_keeps_its_name():
    rows = [Row("Reshape", ["w"], ["flat"], ["one.bias"]), Row("Split", ["in"], ["i", "j"]), Row("Add", ["j", "flat"], ["a"])]
    operators, known = operators_of(["in"], rows, passing=("Split",), sizes=())
    assert [(each.inputs, each.weights) for each in operators] == [(("in",), ("one.bias",))] and known["i"] == "in"


def test_weights_without_names_are_known_by_their_bits_and_a_wrong_one_by_its_place():
    network = fx.symbolic_trace(Net())
    weights = dict(network.named_parameters())
    wrong = weights["two.weight"].detach().clone()
    wrong[0] += 1.0
    constants = {
        "k1": weights["one.bias"].detach().numpy(), "k0": weights["one.weight"].detach().numpy(), "k2": wrong.numpy(),
        "k3": weights["two.bias"].detach().numpy(), "axes": np.array([1, 2]),
    }  # fmt: skip
    rows = [Row("Conv", ["in"], ["a"], ["k0", "k1"], "relu"), Row("Conv", ["a"], ["b"], ["k2", "k3", "axes"]), END]
    given = artifact(*rows, outputs=["c"], constants=constants)
    known = named(given, module_operators(network), weights)
    assert [each.weights for each in known.operators] == [
        ("one.weight", "one.bias"), ("two.weight", "two.bias", "axes"), (),
    ]  # fmt: skip


def test_values_with_their_channels_last_are_compared_as_they_are_meant():
    value = torch.randn(2, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = value.permute(0, 2, 3, 1).numpy()
    assert not judgement(forms(moved, True), value, value.float()).wrong
    assert judgement(forms(moved, False), value, value.float()).wrong
    assert judgement(forms(moved + 0.1, True), value, value.float()).wrong
    pooled = value[:, :, :1, :1]
    assert not judgement(forms(pooled.reshape(2, 3).numpy(), False), pooled, pooled.float()).wrong
    assert judgement(forms(value.numpy()[:, :2], True), value, value.float()).wrong  # of another size

"""Random networks: a program of integers is read as a graph of up to a dozen operators with random fan-out.

Every step takes one or two of the values made so far, chosen by the program, and adds a value. A step whose operator
does not fit its operand (a pool on one pixel, a concatenation that would grow too wide) becomes a ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fold.layers import Apply, Gate, Shuffle
from tests.statistics import randomise

Shape = tuple[int, int, int]
INPUT: Shape = (4, 8, 8)


class Step(NamedTuple):
    """One operator of a program: which, and the places of its operands, each taken modulo what there is."""

    operator: int
    left: int
    right: int


class Constant(nn.Module):
    """``function(x, c)`` with a random constant ``[C, 1, 1]`` of both signs, now and then with zeros."""

    def __init__(self, name: str, function: Callable[..., Tensor], channels: int, *, zeros: bool = False):
        super().__init__()
        self.name, self.function = name, function
        value = 0.5 + torch.rand(channels, 1, 1)
        value = value * (torch.randint(0, 2, value.shape) * 2 - 1)
        if zeros:
            value[torch.rand(value.shape) < 0.2] = 0.0
        self.value = nn.Parameter(value)

    def extra_repr(self) -> str:
        return f"{self.name}, {[round(v, 2) for v in self.value.flatten().tolist()]}"

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.value)


def _conv(cin: int, cout: int, kernel: int, **geometry) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, bias=bool(torch.rand(()) < 0.5), **geometry)


LAYERS: dict[str, Callable[[Shape], nn.Module]] = {
    "conv3x3": lambda s: _conv(s[0], 4, 3, padding=1),
    "conv1x1": lambda s: _conv(s[0], 4, 1),
    "conv_strided": lambda s: _conv(s[0], 6, 3, padding=1, stride=2),
    "conv_unpadded": lambda s: _conv(s[0], 4, 2),
    "conv_grouped": lambda s: _conv(s[0], s[0], 3, padding=1, groups=2),
    "conv_depthwise": lambda s: _conv(s[0], s[0], 3, padding=2, dilation=2, groups=s[0]),
    "conv_transposed": lambda s: nn.ConvTranspose2d(s[0], 4, 2, stride=2, groups=2),
    "batch_norm": lambda s: nn.BatchNorm2d(s[0]),
    "relu": lambda s: nn.ReLU(),
    "relu6": lambda s: nn.ReLU6(),
    "leaky_relu": lambda s: nn.LeakyReLU(0.2),
    "prelu": lambda s: nn.PReLU(s[0]),
    "sigmoid": lambda s: nn.Sigmoid(),
    "add_constant": lambda s: Constant("x + c", torch.add, s[0]),
    "sub_from_constant": lambda s: Constant("c - x", lambda x, c: c - x, s[0]),
    "mul_constant": lambda s: Constant("x * c", torch.mul, s[0], zeros=True),
    "div_constant": lambda s: Constant("x / c", torch.div, s[0]),
    "dropout": lambda s: nn.Dropout(0.5),
    "avg_pool": lambda s: nn.AvgPool2d(2),
    "avg_pool_padded": lambda s: nn.AvgPool2d(3, 1, 1),
    "avg_pool_clipped": lambda s: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "max_pool": lambda s: nn.MaxPool2d(2),
    "max_pool_padded": lambda s: nn.MaxPool2d(3, 2, 1),
    "nearest": lambda s: nn.Upsample(scale_factor=2),
    "bilinear": lambda s: nn.Upsample(scale_factor=2, mode="bilinear"),
    "zero_pad": lambda s: nn.ZeroPad2d((1, 0, 0, 1)),
    "constant_pad": lambda s: nn.ConstantPad2d(1, 0.4),
    "reflect_pad": lambda s: nn.ReflectionPad2d(1),
    "shuffle": lambda s: Shuffle(2),
    "excite": lambda s: Gate(s[0], 2),
    "group_norm": lambda s: nn.GroupNorm(2, s[0]),
}

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_in_place": lambda x: F.relu_(x.clone()),
    "clamp": lambda x: x.clamp(-0.5, 0.8),
    "clamp_min": lambda x: x.clamp_min(-0.3),
    "scale": lambda x: 0.7 * x,
    "negate": torch.neg,
    "double": lambda x: x + x,
    "pad_channels": lambda x: F.pad(x, (0, 0, 0, 0, 0, 2)),
    "halves_apart": lambda x: torch.cat([part * k - 1 for part, k in zip(x.chunk(2, 1), (2.0, -3.0))], 1),
    "half": lambda x: x[:, : x.shape[1] // 2],
    "channels_last_and_back": lambda x: x.permute(0, 2, 3, 1).flip(1).permute(0, 3, 1, 2),
}

BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "add_scaled": lambda x, y: x - 0.6 * y,
    "blend": lambda x, y: x + 0.3 * (y - x),
    "gate": lambda x, y: x * y.sigmoid(),
    "mul": torch.mul,
    "maximum": torch.maximum,
    "cat": lambda x, y: torch.cat([x, y], 1),
}

# What networks are made of comes up as often as all the rest.
OPERATORS = [*LAYERS, *FUNCTIONS, *BINARY, *("batch_norm", "conv3x3", "conv1x1", "relu", "add", "mul_constant") * 6]

# How far back a step reads: mostly the latest value, so that programs are deep rather than wide.
REACH = (0, 0, 0, 0, 0, 1, 1, 2, 3)


class Program(nn.Module):
    """The network of a program. Its outputs are the values that no step reads, and ``extra`` of the others."""

    def __init__(self, steps: list[Step], seed: int, *, head: bool, extra: bool):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList()
        self.operands: list[tuple[int, ...]] = []
        shapes: list[Shape] = [INPUT]
        for step in steps:
            self._grow(step, shapes)
        read = {place for operands in self.operands for place in operands}
        self.results = [place for place in range(len(shapes)) if place not in read]
        if extra and len(shapes) > 2:
            self.results.append(len(shapes) // 2)
        size = torch.Size(shapes[-1]).numel()
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(size, 3)) if head else None
        randomise(self, seed, zero=0.15)

    def _grow(self, step: Step, shapes: list[Shape]) -> None:
        name = OPERATORS[step.operator % len(OPERATORS)]
        left = max(len(shapes) - 1 - REACH[step.left % len(REACH)], 0)
        operands: tuple[int, ...] = (left,)
        if name in BINARY:
            fitting = [place for place in range(len(shapes)) if fits(name, shapes[left], shapes[place])]
            operands = (left, fitting[step.right % len(fitting)]) if fitting else (left,)
            layer = Apply(BINARY[name], name) if fitting else nn.ReLU()
        else:
            layer = LAYERS[name](shapes[left]) if name in LAYERS else Apply(FUNCTIONS[name], name)
        shape = result(layer, [shapes[place] for place in operands])
        if shape is None:
            layer, shape, operands = nn.ReLU(), shapes[left], (left,)
        self.layers.append(layer)
        self.operands.append(operands)
        shapes.append(shape)

    def forward(self, x: Tensor):
        values = [x]
        for layer, operands in zip(self.layers, self.operands):
            values.append(layer(*(values[place] for place in operands)))
        outputs = [values[place] for place in self.results]
        if self.head is not None:
            outputs.append(self.head(values[-1]))
        return tuple(outputs)


def fits(name: str, left: Shape, right: Shape) -> bool:
    """Whether a binary operator takes operands of these shapes."""
    return left[1:] == right[1:] and (name == "cat" or left == right)


def result(layer: nn.Module, shapes: list[Shape]) -> Shape | None:
    """The shape that the layer makes, None where it does not fit or grows beyond a dozen channels or 16 pixels."""
    try:
        with torch.no_grad():
            value = layer.eval()(*(torch.zeros(2, *shape) for shape in shapes))
    except RuntimeError:
        return None
    shape = tuple(value.shape[1:])
    if len(shape) != 3 or shape[0] % 2 or not 2 <= shape[0] <= 12:
        return None
    return shape if min(shape[1:]) >= 2 and max(shape[1:]) <= 16 else None

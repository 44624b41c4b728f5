"""Values with several readers, and modules with several calls, as people write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.fold.checks import assert_same, fold64, operators
from tests.fold.layers import Apply, chain, conv, conv_bn
from tests.statistics import randomise

SHAPE = (8, 8, 8)


class Network(nn.Module):
    """The given layers, and a forward that is a function of them and of the inputs."""

    def __init__(self, forward, **layers: nn.Module):
        super().__init__()
        self.body = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs):
        return self.body(self, *inputs)


def check(module: nn.Module, *shapes: tuple[int, ...], **expected: int):
    """Folds with random statistics to the expected operators and the same function; returns the `Folded`."""
    randomise(module, 0).double()
    shapes = shapes or (SHAPE,)
    folded = fold64(module, *shapes)
    assert operators(folded.counts_after) == expected
    assert_same(folded, module, *shapes)
    return folded


def test_a_value_added_to_itself_doubles_the_convolution():
    def forward(net, x):
        y = net.unit(x)
        return y + y

    check(Network(forward, unit=conv_bn(8, 8)), conv=1)


def test_an_input_added_to_itself_doubles_what_reads_it():
    check(Network(lambda net, x: net.unit(x + x), unit=conv_bn(8, 8)), conv=1)


def test_a_batch_norm_read_by_two_sums_of_unequal_scale():
    def forward(net, x):
        y = net.unit(x)
        one, two = y + net.a(x.relu()), 0.5 * y + net.b(x.sigmoid())
        return net.c(one.relu()), net.d(two.relu())

    layers = {"unit": conv_bn(8, 8), "a": conv(8, 8), "b": conv(8, 8), "c": conv(8, 4), "d": conv(8, 4)}
    check(Network(forward, **layers), conv=5, add=2, relu=3, sigmoid=1)


def test_two_sums_of_unequal_scale_and_no_operand_that_can_follow():
    def forward(net, x, u, v):
        y = net.unit(x)
        return (y + u).relu(), (0.5 * y + v).relu()

    check(Network(forward, unit=conv_bn(8, 8)), SHAPE, SHAPE, SHAPE, conv=1, add=2, relu=2, mul=1)


def test_two_batch_norms_on_one_sum():
    def forward(net, x):
        total = net.a(x) + net.b(x.relu())
        return net.c(net.bn1(total).relu()), net.d(net.bn2(total).relu())

    layers = {"a": conv(8, 8), "b": conv(8, 8), "bn1": nn.BatchNorm2d(8), "bn2": nn.BatchNorm2d(8)}
    heads = {"c": conv(8, 4, 1), "d": conv(8, 4, 1)}
    check(Network(forward, **layers, **heads), conv=4, add=1, relu=2, clamp=1)


def test_a_batch_norm_with_zero_gammas_that_two_read():
    """A channel with gamma = 0 is the constant beta; the convolution's own value is lost there, and nobody reads it."""
    def forward(net, x):
        y = net.unit(x)
        return y, net.next(y.relu()) + y

    module = randomise(Network(forward, unit=conv_bn(8, 8), next=conv(8, 8)), 0, zero=0.2).double()
    folded = fold64(module, SHAPE)
    assert operators(folded.counts_after) == {"conv": 2, "relu": 1, "add": 1}
    assert_same(folded, module, SHAPE)


def test_the_difference_of_two_values_is_one_operator():
    check(Network(lambda net, x: net.conv(x.relu() - x), conv=conv(8, 4)), relu=1, add=1, conv=1)


def test_the_input_is_an_output():
    check(Network(lambda net, x: (x, net.unit(x)), unit=conv_bn(8, 8)), conv=1)


def test_one_value_is_two_outputs():
    def forward(net, x):
        y = net.unit(x)
        return y, y

    check(Network(forward, unit=conv_bn(8, 8)), conv=1)


def test_in_place_relu_and_addition_on_shared_values():
    def forward(net, x):
        y = F.relu(net.unit1(x), inplace=True)
        z = net.unit2(y)
        z += y
        F.relu_(z)
        y.mul_(2.0)
        return z, y

    # conv(y) + y is one convolution, and it takes half of the 2 y that is returned.
    check(Network(forward, unit1=conv_bn(8, 8), unit2=conv_bn(8, 8)), conv=2, relu=2)


def test_an_in_place_operator_on_a_view():
    def forward(net, x):
        y = net.unit(x)
        y[:, :3] += 1.0
        return y.relu()

    module = randomise(Network(forward, unit=conv_bn(8, 8)), 0).double()
    folded = fold64(module, SHAPE)
    assert "batch_norm" not in operators(folded.counts_after)
    assert_same(folded, module, SHAPE)


def test_a_convolution_called_twice_with_one_batch_norm():
    module = Network(
        lambda net, x: net.bn(net.conv(net.bn(net.conv(x)).relu())).relu(), conv=conv(8, 8), bn=nn.BatchNorm2d(8)
    )
    folded = check(module, conv=2, relu=2)
    # Both calls fold to the same weights, which are then shared as they were.
    assert sum(p.numel() for p in folded.module.parameters()) == 8 * 8 * 9 + 8


def test_a_convolution_called_twice_with_its_batch_norm_behind_one_call_only():
    module = Network(lambda net, x: net.conv(net.bn(net.conv(x)).relu()), conv=conv(8, 8), bn=nn.BatchNorm2d(8))
    check(module, conv=2, relu=1)


def test_a_shared_batch_norm():
    module = Network(
        lambda net, x: net.bn(net.a(x)).relu() * net.bn(net.b(x)).sigmoid(),
        a=conv(8, 8), b=conv(8, 8, 1), bn=nn.BatchNorm2d(8),
    )
    check(module, conv=2, relu=1, sigmoid=1, mul=1)


def test_a_module_that_is_never_called():
    check(Network(lambda net, x: net.unit(x), unit=conv_bn(8, 8), unused=conv_bn(8, 8)), conv=1)


def test_several_inputs_and_a_dictionary_of_outputs():
    def forward(net, image, mask):
        features = net.unit(image)
        return {"features": features.relu(), "masked": [features * mask, net.head(mask)]}

    folded = check(
        Network(forward, unit=conv_bn(3, 8), head=conv_bn(8, 2, 1)), (3, 8, 8), (8, 8, 8), conv=2, relu=1, mul=1
    )
    output = folded.module(torch.zeros(1, 3, 8, 8).double(), torch.zeros(1, 8, 8, 8).double())
    assert list(output) == ["features", "masked"] and isinstance(output["masked"], list)


class Functional(nn.Module):
    """Parameters and functions only, no layer modules."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4, 3, 3) / 6)
        self.gamma = nn.Parameter(torch.tensor([1.0, -0.7, 0.0, 1.4, -1.1, 0.6, 0.9, -0.8]))
        self.beta = nn.Parameter(torch.randn(8))
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)

    def forward(self, x):
        value = F.conv2d(x, self.weight, None, 2, 1, 1, 2)
        return F.relu(F.batch_norm(value, self.mean, self.var, self.gamma, self.beta))


def test_functional_code():
    check(Functional(), conv=1, relu=1)


def test_a_batch_norm_written_out():
    def forward(net, x):
        bn = net.bn
        value = (net.conv(x) - bn.running_mean[:, None, None]) / torch.sqrt(bn.running_var + bn.eps)[:, None, None]
        return value * bn.weight[:, None, None] + bn.bias[:, None, None]

    check(Network(forward, conv=conv(8, 8), bn=nn.BatchNorm2d(8)), conv=1)


def test_an_asymmetric_pad_between_convolutions_keeps_the_shift_upstream():
    pad = nn.ZeroPad2d((0, 1, 0, 1))
    check(chain(unit=conv_bn(8, 8), pad=pad, conv=conv(8, 8, padding=0)), conv=2, pad=1)


def test_an_asymmetric_pad_behind_a_batch_norm_of_the_input():
    pad = nn.ZeroPad2d((0, 1, 0, 1))
    check(chain(bn=nn.BatchNorm2d(8), pad=pad, conv=conv(8, 8, padding=0)), add=1, pad=1, conv=1)


def test_prelu_behind_a_negative_gamma_of_a_value_that_is_read_twice():
    def forward(net, x):
        y = net.conv(x)
        return net.a(net.act(net.bn1(y))), net.b(net.act(net.bn2(y)))

    layers = {"conv": conv(8, 8), "bn1": nn.BatchNorm2d(8), "bn2": nn.BatchNorm2d(8), "act": nn.PReLU(8)}
    check(Network(forward, **layers, a=conv(8, 4), b=conv(8, 4)), conv=3, prelu=2, add=1)


def test_prelu_behind_a_negative_scale_alone():
    act = nn.PReLU(8)
    flipped = Apply(lambda x: x * torch.tensor([1.0, -2.0] * 4, dtype=x.dtype)[:, None, None])
    check(chain(flip=flipped, act=act, conv=conv(8, 8)), prelu=1, conv=1)


def test_an_addition_with_alpha():
    def forward(net, x):
        return torch.add(net.a(x), net.b(x.relu()), alpha=-0.6).relu()

    check(Network(forward, a=conv_bn(8, 8), b=conv_bn(8, 8)), conv=2, relu=2, add=1)

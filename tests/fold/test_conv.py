"""The weight algebra against direct evaluation, in float64, at 1e-12 of the peak."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from foldexport.fold import conv as algebra
from foldexport.fold.conv import Conv, composition, summation, value

exact = settings(deadline=None, derandomize=True, max_examples=200)
RANKS = st.integers(0, 3)
SPATIAL = st.integers(1, 3)
CHANNELS = st.sampled_from([4, 6, 12])


def tensor(draw, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def several(draw, rank, low, high):
    return tuple(draw(st.integers(low, high)) for _ in range(rank))


@st.composite
def convs(draw, rank=None, cin=None, cout=None, transposed=False, kernel=None, stride=None, padding=None, bias=None):
    """A random convolution; what is given is taken as it is."""
    rank = draw(SPATIAL) if rank is None else rank
    cin, cout = cin or draw(CHANNELS), cout or draw(CHANNELS)
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4, 6, 12) if cin % g == 0 and cout % g == 0])) if rank else 1
    kernel = several(draw, rank, 1, 4) if kernel is None else kernel
    stride = several(draw, rank, 1, 3) if stride is None else stride
    dilation = several(draw, rank, 1, 3)
    extra = ()
    if padding is None:
        padding = tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(rank))
    if transposed:
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    shape = (cin, cout // groups) if transposed else (cout, cin // groups)
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    has_bias = draw(st.booleans()) if bias is None else bias
    return Conv(
        weight=tensor(draw, *shape, *kernel, dtype=dtype),
        bias=tensor(draw, cout) if has_bias else None,
        stride=stride, dilation=dilation, padding=padding, groups=groups, transposed=transposed, output_padding=extra,
        in_scale=tensor(draw, cin) if draw(st.booleans()) else None,
        out_scale=tensor(draw, cout) if draw(st.booleans()) else None,
    )  # fmt: skip


def inputs(draw, *convs):
    """An input of at least the convolutions' reach; two positions more at least, so that padding is not everything."""
    conv = convs[0]
    sizes = [draw(st.integers(3, 6)) for _ in range(conv.spatial_rank)]
    for axis in range(conv.spatial_rank):
        reach = max((c.reach[axis] for c in convs if not c.transposed), default=0)
        crops = max(-min(0, *c.padding[axis]) for c in convs)
        sizes[axis] += sum(conv.padding[axis]) if conv.transposed else reach + 2 * crops
    return tensor(draw, 2, conv.in_channels, *sizes) if sizes else tensor(draw, 2, 3, conv.in_channels)


def on_channels(vector, conv):
    return vector.reshape(-1, *(1,) * conv.spatial_rank)


def same(actual, wanted):
    assert actual.shape == wanted.shape
    assert actual.dtype == torch.float64
    return (actual - wanted).abs().max() <= 1e-12 * max(1.0, wanted.abs().max())


# ── the reference itself ────────────────────────────────────────────────────────────────────────────────────────────


@exact
@given(data=st.data(), rank=SPATIAL, transposed=st.booleans())
def test_call_is_the_layer_of_torch(data, rank, transposed):
    pads = several(data.draw, rank, 0, 2)
    conv = data.draw(convs(rank=rank, transposed=transposed, padding=tuple((p, p) for p in pads), bias=True))
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank}d")
    more = {"output_padding": conv.output_padding} if transposed else {}
    layer = kind(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, pads,
        dilation=conv.dilation, groups=conv.groups, dtype=torch.float64, **more,
    )  # fmt: skip
    with torch.no_grad():
        layer.weight.copy_(conv.dense())
        layer.bias.copy_(conv.bias)
        x = inputs(data.draw, conv)
        if transposed:
            assume(min(conv.output_size(x.shape[2:])) > 0)
        assert same(conv(x), layer(x))
        assert conv.output_size(x.shape[2:]) == tuple(layer(x).shape[2:])


@exact
@given(data=st.data(), transposed=st.booleans())
def test_call_is_the_equation(data, transposed):
    """One spatial axis, sides padded differently, written out tap by tap."""
    conv = data.draw(convs(rank=1, cin=4, cout=6, transposed=transposed))
    x, weight = inputs(data.draw, conv), conv.dense()
    size = conv.output_size(x.shape[2:])[0]
    assume(size > 0)
    y = torch.zeros(x.shape[0], 6, size, dtype=torch.float64)
    y += on_channels(conv.bias, conv) if conv.bias is not None else 0.0
    (stride,), (dilation,), ((lo, _),), per_in, per_out = conv.stride, conv.dilation, conv.padding, 4, 6
    per_in, per_out = 4 // conv.groups, 6 // conv.groups
    for g in range(conv.groups):
        rows, columns = slice(g * per_out, (g + 1) * per_out), slice(g * per_in, (g + 1) * per_in)
        for k in range(conv.kernel_size[0]):
            for p in range(x.shape[2] if transposed else size):
                q = p * stride + k * dilation - lo
                if transposed and 0 <= q < size:
                    y[:, rows, q] += x[:, columns, p] @ weight[columns, :, k]
                elif not transposed and 0 <= q < x.shape[2]:
                    y[:, rows, p] += x[:, columns, q] @ weight[rows, :, k].T
    assert same(conv(x), y)


def test_linear_acts_on_the_last_axis():
    weight, bias = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    conv, x = Conv(weight, bias), torch.randn(2, 7, 3, dtype=torch.float64)
    assert same(conv(x), F.linear(x, weight, bias))
    assert (conv.in_channels, conv.out_channels, conv.spatial_rank, conv.kernel_size) == (3, 5, 0, ())
    assert conv.is_pointwise and not conv.pads_zeros and conv.output_size((7,)) == (7,)


def test_costs():
    conv = Conv(torch.zeros(8, 2, 3, 5), stride=(2, 1), padding=((1, 1), (2, 2)), groups=2)
    assert conv.output_size((9, 9)) == (5, 9)
    assert conv.macs((9, 9)) == 8 * 2 * 15 * 45
    assert algebra.cost(conv, (9, 9)) == (8 * 2 * 15 * 45, 4 * (8 * 2 * 15 + 4 * 81 + 8 * 45))
    upward = Conv(torch.zeros(4, 3, 2, 2), stride=(2, 2), transposed=True)
    assert upward.macs((5, 5)) == 4 * 3 * 4 * 25 and upward.output_size((5, 5)) == (10, 10)
    assert Conv(torch.zeros(10, 4)).macs(()) == 40


def test_malformed_geometry_is_refused():
    with pytest.raises(ValueError, match="stride"):
        Conv(torch.zeros(4, 4, 3, 3), stride=(1,))
    with pytest.raises(ValueError, match="linear"):
        Conv(torch.zeros(4, 2), groups=2)
    with pytest.raises(ValueError, match="negative"):
        Conv(torch.zeros(4, 4, 3), padding=((-1, 0),), transposed=True)
    with pytest.raises(ValueError, match="3 values for 4 input channels"):
        Conv(torch.zeros(4, 4)).shift_input(torch.ones(3))


# ── affines on either side ──────────────────────────────────────────────────────────────────────────────────────────


@exact
@given(data=st.data(), rank=RANKS, transposed=st.booleans())
def test_scales(data, rank, transposed):
    conv = data.draw(convs(rank=rank, transposed=transposed and rank > 0))
    x = inputs(data.draw, conv)
    assume(rank == 0 or min(conv.output_size(x.shape[2:])) > 0)
    a, p, q = (tensor(data.draw, n) for n in (conv.in_channels, conv.out_channels, conv.out_channels))
    p[0] = 0.0
    scaled = conv.scale_input(a).affine_output(p, q)
    assert scaled.weight is conv.weight
    assert same(scaled(x), on_channels(p, conv) * conv(on_channels(a, conv) * x) + on_channels(q, conv))
    assert same(conv.scale_output(p)(x), on_channels(p, conv) * conv(x))
    assert same(conv.shift_output(q)(x), conv(x) + on_channels(q, conv))


@exact
@given(data=st.data(), rank=RANKS, transposed=st.booleans(), crop=st.booleans())
def test_shift_of_the_input(data, rank, transposed, crop):
    conv = data.draw(convs(rank=rank, transposed=transposed and rank > 0))
    if conv.transposed and crop:
        conv = replace(conv, stride=(1,) * rank, output_padding=(0,) * rank, padding=tuple((r, r + 1) for r in conv.reach))
    elif crop:
        conv = replace(conv, padding=tuple((0, 0) for _ in range(rank)))
    t, a = tensor(data.draw, conv.in_channels), tensor(data.draw, conv.in_channels)
    if conv.pads_zeros:
        with pytest.raises(ValueError, match="meets zero padding"):
            conv.shift_input(t)
        assert conv.shift_input(0.0) is conv
        return
    sizes = [reach + sum(pair) + 4 for reach, pair in zip(conv.reach, conv.padding, strict=True)]
    x = tensor(data.draw, 2, conv.in_channels, *sizes) if rank else tensor(data.draw, 2, conv.in_channels)
    assert conv.shift_input(t).weight is conv.weight
    assert same(conv.shift_input(t)(x), conv(x + on_channels(t, conv)))
    assert same(conv.affine_input(a, t)(x), conv(on_channels(a, conv) * x + on_channels(t, conv)))


@exact
@given(data=st.data(), rank=SPATIAL)
def test_transposed_convolutions_that_lose_taps_are_known(data, rank):
    """``pads_zeros`` is false exactly where a constant input gives a constant output."""
    conv = data.draw(convs(rank=rank, transposed=True, bias=False))
    if data.draw(st.booleans()):
        conv = replace(conv, stride=(1,) * rank, output_padding=(0,) * rank)
    x = torch.ones(1, conv.in_channels, *(r + c[0] + max(c[1], 0) + 4 for r, c in zip(conv.reach, conv.cropped, strict=True)))
    y = conv(x.double())
    spread = (y - y.flatten(2)[..., y.flatten(2).shape[-1] // 2].reshape(1, -1, *(1,) * rank)).abs().max()
    assert conv.pads_zeros == bool(spread > 1e-9)


def test_a_shift_is_summed_in_pieces(monkeypatch):
    conv = Conv(torch.randn(12, 3, 3, 3), groups=2, in_scale=torch.randn(6).double(), out_scale=torch.randn(12).double())
    t, wanted = torch.randn(6).double(), None
    for piece in (value._CHUNK, 1, 60):
        monkeypatch.setattr(value, "_CHUNK", piece)
        bias = conv.shift_input(t).bias
        wanted = bias if wanted is None else wanted
        assert same(bias, wanted)


def test_the_axis_of_a_grouped_transposed_weight_matters():
    """Planted: scaling axis 1 of ``[Cin, Cout/G, k]`` without its groups is caught."""
    conv = Conv(torch.randn(4, 4, 3, dtype=torch.float64), groups=2, transposed=True)
    p, x = torch.randn(8).double(), torch.randn(1, 4, 5).double()
    wanted = p.reshape(-1, 1) * conv(x)
    assert same(conv.scale_output(p)(x), wanted)
    assert not same(replace(conv, weight=conv.weight * p.reshape(2, 4).repeat_interleave(2, 1).T[:4, :1, None])(x), wanted)
    assert not same(replace(conv, weight=conv.weight * p[:4].reshape(1, 4, 1))(x), wanted)


def test_weights_are_copied_only_when_scaled():
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    before = weight.clone()
    conv = Conv(weight)
    assert conv.dense().data_ptr() == weight.data_ptr()
    assert conv.scale_output(1.0).out_scale is None
    assert torch.equal(conv.scale_output(2.0).scale_input(3.0).dense(), before * 6)
    assert torch.equal(weight, before)


@exact
@given(data=st.data(), rank=SPATIAL)
def test_a_transposed_convolution_of_stride_one_is_a_convolution(data, rank):
    conv = data.draw(convs(rank=rank, transposed=True, stride=(1,) * rank))
    plain = algebra.untransposed(conv)
    if any(cut > reach for pair, reach in zip(conv.cropped, conv.reach, strict=True) for cut in pair):
        assert plain is conv
        return
    x = inputs(data.draw, conv)
    assume(min(conv.output_size(x.shape[2:])) > 0)
    assert not plain.transposed and plain.pads_zeros == conv.pads_zeros
    assert same(plain(x), conv(x))


# ── sums ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def twins(draw, conv):
    """A random convolution with the channels and geometry of ``conv``."""
    other = draw(convs(conv.spatial_rank, conv.in_channels, conv.out_channels, conv.transposed, stride=conv.stride))
    if conv.transposed:
        other = replace(other, output_padding=(0,) * conv.spatial_rank)
    padding = []
    for mine, reach in zip(conv.excess, other.reach, strict=True):
        total = reach + 1 - mine if conv.transposed else mine + reach + 1
        lo = draw(st.integers(0, max(0, total)) if conv.transposed else st.integers(-2, 6))
        assume(not conv.transposed or total >= 0)
        padding.append((lo, total - lo))
    return replace(other, padding=tuple(padding))


@exact
@given(data=st.data(), rank=RANKS, transposed=st.booleans())
def test_sum(data, rank, transposed):
    a = data.draw(convs(rank=rank, transposed=transposed and rank > 0))
    b = data.draw(twins(a))
    x = inputs(data.draw, a, b)
    assume(rank == 0 or min(a.output_size(x.shape[2:])) > 0)
    assert a.same_geometry(b)
    merged = algebra.add(a, b)
    assert same(merged(x), a(x) + b(x))
    assert merged.groups == math.gcd(a.groups, b.groups)


@pytest.mark.parametrize(
    ("kernels", "kernel", "dilation"),
    [
        ([(3, 1, 1), (1, 1, 0)], 3, 1),  # (k, dilation, lo)
        ([(3, 2, 2), (3, 2, 2)], 3, 2),
        ([(3, 2, 2), (1, 1, 0)], 3, 2),
        ([(3, 2, 2), (3, 1, 1)], 5, 1),
        ([(3, 4, 4), (3, 2, 2)], 5, 2),
        ([(3, 3, 3), (1, 1, 1)], 7, 1),
        ([(2, 1, 0), (2, 1, 1)], 3, 1),
        ([(2, 6, 0), (2, 4, 0)], 4, 2),
    ],
)
def test_the_window_of_a_sum_is_the_smallest(kernels, kernel, dilation):
    a, b = (
        Conv(torch.randn(4, 4, k).double(), dilation=(d,), padding=((lo, 12 - lo + d * (k - 1)),)) for k, d, lo in kernels
    )
    merged = algebra.add(a, b)
    assert (merged.kernel_size, merged.dilation) == ((kernel,), (dilation,))
    x = torch.randn(1, 4, 20).double()
    assert same(merged(x), a(x) + b(x))


@pytest.mark.parametrize("stride", [1, 2])
def test_branches_of_published_blocks(stride):
    """RepVGG, ACNet and DBB's pooling branch: one 3x3 convolution, dense."""
    steps, one = (stride, stride), ((1, 1), (1, 1))
    x = torch.randn(2, 6, 9, 8).double()
    branches = [
        Conv(torch.randn(6, 6, 3, 3), torch.randn(6).double(), steps, padding=one),
        Conv(torch.randn(6, 6, 1, 1), torch.randn(6).double(), steps),
        algebra.identity(6, 2, stride).affine_output(torch.randn(6), torch.randn(6)),
        Conv(torch.randn(6, 6, 3, 1), None, steps, padding=((1, 1), (0, 0))),
        Conv(torch.randn(6, 6, 1, 3), None, steps, padding=((0, 0), (1, 1))),
        algebra.average_pool(6, (3, 3), steps, one),
    ]
    merged, wanted = branches[0], branches[0](x)
    for branch in branches[1:]:
        merged, wanted = algebra.add(merged, branch), wanted + branch(x)
    assert merged.kernel_size == (3, 3) and merged.padding == one and merged.groups == 1
    assert same(merged(x), wanted)
    assert same(branches[-1](x), F.avg_pool2d(x, 3, stride, 1))
    assert torch.equal(algebra.identity(6, 2, stride)(x), x[:, :, ::stride, ::stride])


def test_depthwise_branches_stay_depthwise():
    depthwise = Conv(torch.randn(8, 1, 3, 3), padding=((1, 1), (1, 1)), groups=8)
    assert algebra.add(depthwise, algebra.identity(8, 2)).groups == 8
    assert algebra.identity(5, 0).dense().shape == (5, 5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride": (2, 2)}, "strides"),
        ({"padding": ((1, 1), (0, 1))}, "different output sizes"),
        ({"weight": torch.zeros(6, 6, 3, 3)}, "channels"),
        ({"weight": torch.zeros(6, 4, 3), "stride": (1,), "padding": ((1, 1),), "dilation": (1,)}, "kinds"),
    ],
)
def test_sums_that_are_refused(change, reason):
    a = Conv(torch.zeros(6, 4, 3, 3), padding=((1, 1), (1, 1)))
    change = {"output_padding": ()} | change
    with pytest.raises(ValueError, match=reason):
        algebra.add(a, replace(a, **change))
    assert ("channels" in reason) == a.same_geometry(replace(a, **change))


def test_a_transposed_sum_that_no_layer_can_compute_is_refused():
    """Its finer step leaves no room for the output padding that both have."""
    a = Conv(torch.ones(2, 2, 5), stride=(2,), dilation=(3,), transposed=True, output_padding=(2,))
    b = Conv(torch.ones(2, 2, 4), stride=(2,), dilation=(4,), transposed=True, output_padding=(2,))
    with pytest.raises(ValueError, match="output padding of 2"):
        algebra.add(a, b)


@pytest.mark.parametrize("planted", ["offset", "dilation"])
def test_a_misaligned_sum_is_caught(monkeypatch, planted):
    """Planted: taps put at the start of the window, or next to each other."""

    def wrong(conv, axis, first, step):
        start = 0 if planted == "offset" else (-conv.padding[axis][0] - first) // step
        stride = 1 if planted == "dilation" else max(1, conv.dilation[axis] // step)
        return slice(start, start + stride * (conv.kernel_size[axis] - 1) + 1, stride)

    a = Conv(torch.randn(4, 4, 3).double(), dilation=(2,), padding=((2, 2),))
    b = Conv(torch.randn(4, 4, 3).double(), padding=((1, 1),))
    x = torch.randn(1, 4, 9).double()
    assert same(algebra.add(a, b)(x), a(x) + b(x))
    monkeypatch.setattr(summation, "_places", wrong)
    assert not same(algebra.add(a, b)(x), a(x) + b(x))


# ── compositions ────────────────────────────────────────────────────────────────────────────────────────────────────


def check_composition(draw, first, second, groups=None):
    x = inputs(draw, first, second)
    if first.spatial_rank and not first.transposed:  # the second must fit behind the first
        need = zip(second.reach, first.reach, first.stride, strict=True)
        more = [0 if second.transposed else 1 + s * (r2 + 1) + r1 for r2, r1, s in need]
        x = tensor(draw, 2, first.in_channels, *(n + m for n, m in zip(x.shape[2:], more, strict=True)))
    inner = first.output_size(x.shape[2:]) if first.spatial_rank else ()
    assume(not inner or min(inner) > 0 and min(second.output_size(inner)) > 0)
    merged = algebra.compose(first, second)
    assert same(merged(x), second(first(x)))
    assert merged.groups == math.gcd(first.groups, second.groups)
    assert not merged.spatial_rank or merged.output_size(x.shape[2:]) == second.output_size(inner)
    return merged


@exact
@given(data=st.data(), rank=RANKS)
def test_composition_without_padding_behind(data, rank):
    first = data.draw(convs(rank=rank))
    second = data.draw(convs(rank=rank, cin=first.out_channels, padding=((0, 0),) * rank))
    check_composition(data.draw, first, second)


@exact
@given(data=st.data(), rank=SPATIAL, stride=st.integers(1, 3))
def test_composition_of_1x1_and_padded(data, rank, stride):
    """The first may pad and stride: what lies outside its result is 0 all the same without a bias."""
    first = data.draw(convs(rank=rank, kernel=(1,) * rank, stride=(stride,) * rank, bias=False))
    second = data.draw(convs(rank=rank, cin=first.out_channels))
    check_composition(data.draw, first, second)


@exact
@given(data=st.data(), rank=SPATIAL, order=st.booleans())
def test_composition_of_1x1_and_transposed(data, rank, order):
    ones = {"kernel": (1,) * rank, "stride": (1,) * rank, "padding": ((0, 0),) * rank}
    if order:
        first = data.draw(convs(rank=rank, bias=False, **ones))
        second = data.draw(convs(rank=rank, cin=first.out_channels, transposed=True))
    else:
        first = data.draw(convs(rank=rank, transposed=True))
        second = data.draw(convs(rank=rank, cin=first.out_channels, **ones))
    check_composition(data.draw, first, second)


def test_depthwise_behind_depthwise_stays_depthwise():
    first = Conv(torch.randn(6, 1, 3, 3), torch.randn(6).double(), padding=((1, 1), (1, 1)), groups=6)
    second = Conv(torch.randn(12, 1, 2, 3), torch.randn(12).double(), (2, 1), groups=6)
    merged, x = algebra.compose(first, second), torch.randn(1, 6, 9, 9).double()
    assert merged.groups == 6 and merged.weight.shape == (12, 1, 4, 5)
    assert same(merged(x), second(first(x)))


def test_a_wider_step_of_the_second_stays_a_dilation():
    first = Conv(torch.randn(4, 4, 3).double(), stride=(2,), dilation=(2,))
    second = Conv(torch.randn(4, 4, 3).double(), dilation=(2,))
    merged = algebra.compose(first, second)
    assert (merged.kernel_size, merged.dilation, merged.stride) == ((7,), (2,), (2,))


def test_a_1x1_convolution_goes_behind_average_pooling():
    """``pool(conv(x)) = conv(pool(x))``, and as one strided convolution."""
    pool = algebra.average_pool(8, (2, 2), (2, 2), ((0, 0), (0, 0)))
    conv, x = Conv(torch.randn(4, 8, 1, 1), torch.randn(4).double()), torch.randn(1, 8, 6, 6).double()
    behind = algebra.average_pool(4, (2, 2), (2, 2), ((0, 0), (0, 0)))
    wanted = F.avg_pool2d(conv(x), 2)
    assert same(algebra.compose(conv, behind)(x), wanted)
    assert same(algebra.compose(pool, conv)(x), wanted)


PADDED = Conv(torch.ones(4, 4, 3, 3), padding=((1, 1), (1, 1)))


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (PADDED, PADDED, "more than one tap"),
        (Conv(torch.ones(4, 4, 1, 1), torch.ones(4).double()), PADDED, "the bias of"),
        (Conv(torch.ones(4, 4, 1, 1), padding=((-1, 0), (0, 0))), PADDED, "crops"),
        (PADDED, Conv(torch.ones(4, 6, 1, 1)), "does not fit"),
        (PADDED, Conv(torch.ones(4, 4)), "does not fit"),
        (PADDED, Conv(torch.ones(4, 4, 2, 2), stride=(2, 2), transposed=True), "1x1"),
        (Conv(torch.ones(4, 4, 2, 2), stride=(2, 2), transposed=True), PADDED, "1x1"),
        (Conv(torch.ones(4, 4, 1, 1), torch.ones(4).double()),
         Conv(torch.ones(4, 4, 2, 2), stride=(2, 2), transposed=True), "the bias of"),
    ],
)  # fmt: skip
def test_compositions_that_are_refused(first, second, reason):
    with pytest.raises(ValueError, match=reason):
        algebra.compose(first, second)


def test_padding_on_one_axis_refuses_taps_on_that_axis_only():
    first = Conv(torch.randn(4, 4, 1, 3).double())
    x = torch.randn(1, 4, 7, 7).double()
    second = Conv(torch.randn(4, 4, 3, 2).double(), padding=((1, 2), (0, 0)))
    assert same(algebra.compose(first, second)(x), second(first(x)))
    with pytest.raises(ValueError, match="more than one tap"):
        algebra.compose(first, replace(second, padding=((1, 2), (0, 1))))


def test_a_border_of_the_bias_merges():
    """DBB pads the first branch's result with its own bias; that is what the composition without padding says."""
    first, x = Conv(torch.randn(4, 4, 1, 1).double()), torch.randn(1, 4, 5, 5).double()
    k, shift = torch.randn(4).double(), torch.randn(4).double()
    second = Conv(torch.randn(4, 4, 3, 3).double(), torch.randn(4).double())
    inner = F.pad(first(x) * k.reshape(-1, 1, 1), (1, 1, 1, 1)) + shift.reshape(-1, 1, 1)
    absorbed = algebra.absorb_padding(second.affine_input(k, shift), (1, 1), (1, 1))
    assert same(algebra.compose(first, absorbed)(x), second(inner))


def test_a_composition_that_forgets_the_stride_is_caught(monkeypatch):
    """Planted: the second's taps put next to each other although the first strides."""
    first = Conv(torch.randn(4, 4, 3).double(), stride=(2,))
    second = Conv(torch.randn(4, 4, 3).double())
    x, product = torch.randn(1, 4, 15).double(), composition._product

    def wrong(*args):
        kernel = product(*args[:-1], [(1, 1)] * len(args[-1]))
        return F.pad(kernel, (0, 2))

    assert same(algebra.compose(first, second)(x), second(first(x)))
    monkeypatch.setattr(composition, "_product", wrong)
    assert not same(algebra.compose(first, second)(x), second(first(x)))


# ── side by side, explicit padding ──────────────────────────────────────────────────────────────────────────────────


@exact
@given(data=st.data(), rank=RANKS, transposed=st.booleans())
def test_concatenation(data, rank, transposed):
    base = replace(data.draw(convs(rank=rank, cin=4, cout=6)), groups=1)
    parts = []
    for _ in range(data.draw(st.integers(1, 3))):
        other = data.draw(convs(rank=rank, cin=4, kernel=base.kernel_size))
        rows = tensor(data.draw, other.out_channels, 4, *base.kernel_size, dtype=other.weight.dtype)
        if transposed and rank:
            rows = rows.transpose(0, 1)
        geometry = {"stride": base.stride, "dilation": base.dilation, "padding": base.padding, "groups": 1}
        parts.append(replace(other, weight=rows, transposed=transposed and rank > 0, **geometry))
    x = inputs(data.draw, parts[0])
    assume(rank == 0 or min(parts[0].output_size(x.shape[2:])) > 0)
    axis = 1 if rank else -1
    assert same(algebra.concatenate(parts)(x), torch.cat([part(x) for part in parts], axis))


def test_concatenated_weights_stay_raw():
    a, b = Conv(torch.randn(4, 3, 1, 1)), Conv(torch.randn(2, 3, 1, 1)).scale_output(2.0)
    merged = algebra.concatenate([a, b])
    assert merged.weight.dtype == torch.float32 and merged.bias is None
    assert merged.out_scale.tolist() == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Conv(torch.zeros(4, 4, 1, 1)), "same geometry"),
        (Conv(torch.zeros(4, 4, 3, 3), padding=((1, 1), (0, 2))), "same geometry"),
        (Conv(torch.zeros(4, 2, 3, 3), padding=((1, 1), (1, 1)), groups=2), "has groups"),
        (Conv(torch.zeros(4, 5, 3, 3), padding=((1, 1), (1, 1))), "same channels"),
    ],
)
def test_concatenations_that_are_refused(other, reason):
    with pytest.raises(ValueError, match=reason):
        algebra.concatenate([PADDED, other])


@exact
@given(data=st.data(), rank=SPATIAL)
def test_padding_in_front(data, rank):
    conv = data.draw(convs(rank=rank))
    lo, hi = several(data.draw, rank, -2, 3), several(data.draw, rank, -2, 3)
    own = [side for pair in conv.padding for side in pair]
    outer = [side for pair in zip(lo, hi, strict=True) for side in pair]
    if any(side < 0 < mine for mine, side in zip(own, outer, strict=True)):
        with pytest.raises(ValueError, match="crops what"):
            algebra.absorb_padding(conv, lo, hi)
        return
    x = tensor(data.draw, 1, conv.in_channels, *(reach + 6 for reach in conv.reach))
    padded = F.pad(x, [side for pair in reversed(list(zip(lo, hi, strict=True))) for side in pair])
    merged = algebra.absorb_padding(conv, lo, hi)
    assert same(merged(x), conv(padded))
    assert merged.pads_zeros == any(side > 0 for side in [*merged.padding[0], *sum(merged.padding, ())])


def test_paddings_that_are_refused():
    with pytest.raises(ValueError, match="no padding of its own"):
        algebra.absorb_padding(Conv(torch.zeros(4, 4)), (), ())
    with pytest.raises(ValueError, match="no padding of its own"):
        algebra.absorb_padding(Conv(torch.zeros(4, 4, 2), transposed=True), (1,), (1,))
    with pytest.raises(ValueError, match="spatial axes"):
        algebra.absorb_padding(PADDED, (1,), (1,))

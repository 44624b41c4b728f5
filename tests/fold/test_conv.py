"""A convolution as a value, its affines and its neighbours, against direct evaluation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from foldexport.fold import conv as algebra
from foldexport.fold.conv import Conv, value
from tests.fold.random_convs import RANKS, SPATIAL, convs, exact, inputs, on_channels, same, several, tensor

PADDED = Conv(torch.ones(4, 4, 3, 3), padding=((1, 1), (1, 1)))


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
        padding = tuple((reach, reach + 1) for reach in conv.reach)
        conv = replace(conv, stride=(1,) * rank, output_padding=(0,) * rank, padding=padding)
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
    sizes = [reach + sum(pair) + 4 for reach, pair in zip(conv.reach, conv.padding, strict=True)]
    y = conv(torch.ones(1, conv.in_channels, *sizes))
    spread = (y - y.flatten(2)[..., y.flatten(2).shape[-1] // 2].reshape(1, -1, *(1,) * rank)).abs().max()
    assert conv.pads_zeros == bool(spread > 1e-9)


def test_a_shift_is_summed_in_pieces(monkeypatch):
    a, p, t, wanted = torch.randn(6).double(), torch.randn(12).double(), torch.randn(6).double(), None
    conv = Conv(torch.randn(12, 3, 3, 3), groups=2, in_scale=a, out_scale=p)
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

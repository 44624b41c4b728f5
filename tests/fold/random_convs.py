"""Random convolutions, and how their results are compared: float64, 1e-12 of the peak."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import assume, settings
from hypothesis import strategies as st

from foldexport.fold.conv import Conv

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

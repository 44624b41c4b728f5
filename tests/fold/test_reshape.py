"""Affines through views and shuffles: a mapped affine on the moved tensor is the moved value."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from foldexport.fold.affine import Affine
from foldexport.fold.reshape import (
    channel_shuffle,
    map_view,
    merge_channels,
    pixel_shuffle,
    pixel_unshuffle,
    split_channels,
    unmap_view,
)

exact = settings(deadline=None, derandomize=True, max_examples=300)


def tensor(draw, *shape):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def on_channels(size, rank, axis=1):
    return Affine.of_vectors(torch.randn(size).double(), torch.randn(size).double(), axis, rank)


def same(actual, wanted):
    assert actual.shape == wanted.shape
    return (actual - wanted).abs().max() <= 1e-12 * max(1.0, wanted.abs().max())


@st.composite
def shapes(draw):
    """Two shapes of the same number of values, cut at random from the same prime factors."""
    factors = draw(st.lists(st.sampled_from([2, 2, 3]), min_size=1, max_size=6))

    def cut():
        places = sorted(draw(st.sets(st.integers(1, len(factors)), max_size=3)))
        parts = [factors[i:j] for i, j in itertools.pairwise([0, *places, len(factors)])]
        return tuple(math.prod(part) for part in parts)

    return cut(), cut()


@exact
@given(data=st.data(), both=shapes())
def test_views(data, both):
    in_shape, out_shape = both
    sizes = [[size if data.draw(st.booleans()) else 1 for size in in_shape] for _ in range(2)]
    affine = Affine(*(tensor(data.draw, *part) for part in sizes))
    s = tensor(data.draw, *in_shape)
    mapped = map_view(affine, in_shape, out_shape)
    assert same(mapped.apply(s.reshape(out_shape)), affine.apply(s).reshape(out_shape))
    assert mapped.compressed() is mapped
    back = unmap_view(mapped, in_shape, out_shape)
    assert back.equals(affine) and back.scale.shape == affine.compressed().scale.shape


@exact
@given(data=st.data(), both=shapes())
def test_views_with_a_symbolic_axis(data, both):
    """What is claimed from the traced size holds at every other size that the view accepts."""
    in_shape, out_shape = both
    d_in, d_out = data.draw(st.integers(0, len(in_shape) - 1)), data.draw(st.integers(0, len(out_shape) - 1))
    sizes = [1 if i == d_in or data.draw(st.booleans()) else size for i, size in enumerate(in_shape)]
    signs = tensor(data.draw, *sizes).sign()  # few values, so that many maps exist
    affine = Affine.of(signs, 0.5, len(sizes))
    mapped = map_view(affine, in_shape, out_shape, {d_in}, {d_out})
    assume(mapped is not None)
    assert mapped.scale.shape[d_out] == mapped.shift.shape[d_out] == 1
    for numerator, denominator in [(1, 1), (2, 1), (3, 1), (5, 1), (1, 2), (1, 3), (3, 2)]:
        if in_shape[d_in] * numerator % denominator or out_shape[d_out] * numerator % denominator:
            continue
        larger = [size * numerator // denominator if i == d_in else size for i, size in enumerate(in_shape)]
        target = [size * numerator // denominator if i == d_out else size for i, size in enumerate(out_shape)]
        s = tensor(data.draw, *larger)
        assert same(mapped.apply(s.reshape(target)), affine.apply(s).reshape(target))


@pytest.mark.parametrize(
    ("in_shape", "out_shape", "axis", "wanted"),
    [
        ((2, 3, 4, 5), (2, 60), 1, (1, 60)),  # channel-first flatten repeats
        ((2, 4, 5, 3), (2, 60), 3, (1, 60)),  # channel-last flatten tiles
        ((2, 3, 1, 1), (2, 3), 1, (1, 3)),
        ((2, 3), (2, 3, 1, 1), 1, (1, 3, 1, 1)),
        ((2, 6, 4, 4), (2, 2, 3, 4, 4), 1, (1, 2, 3, 1, 1)),
        ((2, 6, 4, 5), (2, 6, 20), 1, (1, 6, 1)),
        ((2, 20, 6), (2, 4, 5, 6), 2, (1, 1, 1, 6)),
        ((2, 1, 6, 1), (1, 2, 6), 2, (1, 1, 6)),
    ],
)
def test_common_views(in_shape, out_shape, axis, wanted):
    affine, s = on_channels(in_shape[axis], len(in_shape), axis), torch.randn(in_shape).double()
    batch_out = next(i for i, size in enumerate(out_shape) if size == 2)
    mapped = map_view(affine, in_shape, out_shape, {0}, {batch_out})
    assert mapped.scale.shape == mapped.shift.shape == wanted
    assert same(mapped.apply(s.reshape(out_shape)), affine.apply(s).reshape(out_shape))
    assert unmap_view(mapped, in_shape, out_shape, {0}, {batch_out}).equals(affine)


@pytest.mark.parametrize(
    ("in_shape", "axis", "out_shape", "dynamic_in", "dynamic_out", "reason"),
    [
        ((2, 3, 4, 4), 1, (2, 48), {0, 2}, {0, 1}, "the flattened axis is symbolic"),
        ((2, 3, 4, 4), 1, (6, 16), {0}, {0}, "channels are merged into the batch"),
        ((2, 3, 4), 1, (3, 2, 4), {0}, {1}, "batch and channels are reinterpreted"),
        ((2, 2, 4), 1, (2, 2, 4), {0}, {1}, "equal sizes hide that the batch axis moves"),
        ((2, 3, 2), 1, (2, 3, 2), {0, 2}, {2}, "two symbolic axes become one"),
        ((2, 2, 6), 2, (2, 3, 4), {1}, {2}, "the symbolic axis goes from the front of its group to its end"),
    ],
)
def test_views_that_are_refused(in_shape, axis, out_shape, dynamic_in, dynamic_out, reason):
    affine = on_channels(in_shape[axis], len(in_shape), axis)
    assert map_view(affine, in_shape, out_shape, dynamic_in, dynamic_out) is None, reason
    constant = Affine.of(2.0, 1.0, len(in_shape))
    assert map_view(constant, in_shape, out_shape, dynamic_in, dynamic_out).scale.shape == (1,) * len(out_shape)


def test_groups_split_from_the_batch_are_mapped_where_they_agree():
    """``[N, C, H, W] → [N·G, C/G, H, W]``: representable where every group has the same values."""
    affine = on_channels(3, 4)
    tiled = Affine(*(part.tile(1, 2, 1, 1) for part in (affine.scale, affine.shift)))
    mapped = map_view(tiled, (2, 6, 4, 4), (4, 3, 4, 4), {0}, {0})
    assert mapped.equals(affine) and mapped.scale.shape == (1, 3, 1, 1)
    assert map_view(on_channels(6, 4), (2, 6, 4, 4), (4, 3, 4, 4), {0}, {0}) is None


def test_shapes_that_do_not_match_are_refused():
    assert map_view(on_channels(3, 2), (2, 3), (2, 4)) is None
    assert map_view(on_channels(3, 3), (2, 3, 0), (2, 0)) is None
    assert map_view(Affine.identity(2), (2, 3), (6,)).rank == 1


@exact
@given(data=st.data(), groups=st.sampled_from([1, 2, 3, 6, 12]), cut=st.booleans())
def test_channel_shuffle(data, groups, cut):
    affine = Affine.of_vectors(tensor(data.draw, 12), 0.0 if cut else tensor(data.draw, 12), 1, 4)
    s = tensor(data.draw, 2, 12, 2, 3)
    moved, value = F.channel_shuffle(s, groups), F.channel_shuffle(affine.apply(s), groups)
    mapped = channel_shuffle(affine, groups)
    assert same(mapped.apply(moved), value)
    assert channel_shuffle(mapped, 12 // groups).equals(affine)
    split = map_view(affine, (2, 12, 2, 3), (2, groups, 12 // groups, 2, 3), {0}, {0})
    swapped = split.permute((0, 2, 1, 3, 4))
    assert map_view(swapped, (2, 12 // groups, groups, 2, 3), (2, 12, 2, 3), {0}, {0}).equals(mapped)


@exact
@given(data=st.data(), r=st.integers(1, 3), batch=st.sampled_from([(), (2,), (2, 3)]))
def test_pixel_shuffles(data, r, batch):
    narrow = Affine.of_vectors(tensor(data.draw, 4), tensor(data.draw, 4), -3, len(batch) + 3)
    wide = split_channels(narrow, r * r)
    small, large = tensor(data.draw, *batch, 4 * r * r, 2, 3), tensor(data.draw, *batch, 4, 2 * r, 3 * r)
    mapped = pixel_shuffle(wide, r)
    assert same(mapped.apply(F.pixel_shuffle(small, r)), F.pixel_shuffle(wide.apply(small), r))
    assert mapped.equals(narrow)
    mapped = pixel_unshuffle(narrow, r)
    assert same(mapped.apply(F.pixel_unshuffle(large, r)), F.pixel_unshuffle(narrow.apply(large), r))


def test_pixel_shuffles_that_are_refused():
    assert pixel_shuffle(on_channels(8, 4), 2) is None
    assert pixel_shuffle(on_channels(3, 4, axis=2), 2) is None
    assert pixel_unshuffle(on_channels(3, 4, axis=3), 2) is None
    assert merge_channels(Affine.of(3.0, 1.0, 4), 4).scale.shape == (1, 1, 1, 1)
    assert split_channels(Affine.identity(4), 4).is_identity


def test_repeating_where_values_tile_is_caught():
    """Planted: a channel-last flatten mapped like a channel-first one."""
    affine, s = on_channels(3, 4, axis=3), torch.randn(2, 4, 5, 3).double()
    wanted = affine.apply(s).reshape(2, 60)
    assert same(map_view(affine, s.shape, (2, 60)).apply(s.reshape(2, 60)), wanted)
    wrong = Affine(*(part.reshape(1, 3).repeat_interleave(20, 1) for part in (affine.scale, affine.shift)))
    assert not same(wrong.apply(s.reshape(2, 60)), wanted)

"""Pending affines against direct evaluation, in float64, at 1e-12."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foldexport.fold.affine import Affine, compress

exact = settings(deadline=None, derandomize=True, max_examples=100)
SHAPE = (2, 6, 3, 4)


def tensor(draw, *shape):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@st.composite
def affines(draw, shape=SHAPE, axes=None):
    """A random affine: each part varies on some axes, or is the neutral constant."""
    parts = []
    for neutral in (1.0, 0.0):
        if draw(st.integers(0, 3)) == 0:
            parts.append(torch.full((1,) * len(shape), neutral, dtype=torch.float64))
            continue
        free = range(1, len(shape)) if axes is None else axes
        sizes = [size if axis in free and draw(st.booleans()) else 1 for axis, size in enumerate(shape)]
        parts.append(tensor(draw, *sizes))
    return Affine(*parts)


def same(actual, wanted):
    assert actual.shape == wanted.shape
    return (actual - wanted).abs().max() <= 1e-12 * max(1.0, wanted.abs().max())


def values(affine, shape=SHAPE):
    """Scale and shift written out."""
    return affine.scale.expand(shape), affine.shift.expand(shape)


@exact
@given(data=st.data())
def test_composition_and_inverse(data):
    inner, outer, s = data.draw(affines()), data.draw(affines()), tensor(data.draw, *SHAPE)
    v = inner.scale * s + inner.shift
    assert same(inner.apply(s), v)
    assert same(inner.then(outer).apply(s), outer.scale * v + outer.shift)
    back = inner.then(inner.inverse())
    assert same(back.scale.expand(SHAPE), torch.ones(SHAPE).double())
    assert (back.shift.abs() <= 1e-12 * (1 + (inner.shift / inner.scale).abs().max())).all()


@exact
@given(data=st.data())
def test_changes_of_the_value(data):
    affine, s, k, u = data.draw(affines()), tensor(data.draw, *SHAPE), tensor(data.draw, 6, 1, 1), tensor(data.draw, 4)
    v = affine.scale * s + affine.shift
    assert same(affine.scaled(k).apply(s), k * v)
    assert same(affine.scaled(-2.5).apply(s), -2.5 * v)
    assert same(affine.shifted(u).apply(s), v + u)
    assert same(affine.negated().apply(s), -v)


@exact
@given(data=st.data())
def test_maps_along_axes(data):
    affine, s = data.draw(affines()), tensor(data.draw, *SHAPE)
    v, axis = affine.scale * s + affine.shift, data.draw(st.integers(0, 3))
    dims = data.draw(st.permutations(range(4)))
    assert same(affine.permute(dims).apply(s.permute(*dims)), v.permute(*dims))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, SHAPE[axis])] * 2)))
    step = data.draw(st.integers(1, 3))
    for index in (range(start, stop, step), slice(start, stop, step), torch.tensor([1, 0, 1])):
        at = index if isinstance(index, torch.Tensor) else torch.arange(SHAPE[axis])[start:stop:step]
        if at.numel():
            assert same(affine.slice(axis, index).apply(s.index_select(axis, at)), v.index_select(axis, at))
    assert same(affine.slice(axis, -1).apply(s.select(axis, -1)), v.select(axis, -1))
    assert same(affine.unsqueeze(axis).apply(s.unsqueeze(axis)), v.unsqueeze(axis))
    assert same(affine.unsqueeze(axis).squeeze(axis).apply(s), v)
    assert same(affine.expand(6).apply(s.expand(3, 1, *SHAPE)), v.expand(3, 1, *SHAPE))


@exact
@given(data=st.data())
def test_concatenation(data):
    axis, sizes = data.draw(st.integers(1, 3)), data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    shapes = [SHAPE[:axis] + (size,) + SHAPE[axis + 1 :] for size in sizes]
    parts = [data.draw(affines(shape)) for shape in shapes]
    if data.draw(st.booleans()):
        parts = [parts[0].slice(axis, range(1))] * len(parts)
    stored = [tensor(data.draw, *shape) for shape in shapes]
    joined = Affine.cat(parts, sizes, axis)
    wanted = torch.cat([part.scale * s + part.shift for part, s in zip(parts, stored, strict=True)], axis)
    assert same(joined.apply(torch.cat(stored, axis)), wanted)
    assert same(Affine.cat(parts, sizes, axis - 4).apply(torch.cat(stored, axis)), wanted)


@exact
@given(data=st.data())
def test_axes_and_compression(data):
    affine = data.draw(affines())
    wide = Affine(*(part.clone() for part in values(affine)))
    axes = tuple(axis for axis in range(4) if affine.scale.shape[axis] > 1 or affine.shift.shape[axis] > 1)
    assert wide.axes() == affine.axes() == axes
    exact_again = wide.compressed()
    assert exact_again.scale.shape == affine.scale.shape and exact_again.shift.shape == affine.shift.shape
    assert exact_again.equals(wide) and affine.compressed() is affine
    assert [wide.varies_only_on(axis) for axis in range(4)] == [set(axes) <= {axis} for axis in range(4)]
    if set(axes) <= {1}:
        for form in (wide, affine):
            scale, shift = form.vector(1, 6)
            assert torch.equal(scale.reshape(1, 6, 1, 1).expand(SHAPE), values(affine)[0])
            assert torch.equal(shift.reshape(1, 6, 1, 1).expand(SHAPE), values(affine)[1])


def test_neutral_parts_are_recognised():
    one = Affine.identity(4)
    assert one.is_identity and one.rank == 4 and one.axes() == () and one.uniform_scale() == 1.0
    assert Affine.of(torch.ones(6, 1, 1), 0, 4).is_identity
    assert not Affine.of(1.0, 1e-300, 4).has_zero_shift and not Affine.of(1 + 2**-52, 0, 4).has_unit_scale
    assert one.then(one) is one and one.inverse() is one and one.compressed() is one
    s = torch.randn(2, 3)
    assert Affine.identity(2).apply(s) is s
    other = Affine.of(2.0, 0.0, 2)
    assert Affine.identity(2).then(other) is other and other.then(Affine.identity(2)) is other
    assert Affine.cat([one, one], [2, 3], 1).is_identity
    assert Affine.cat([Affine.of(2, 0, 4)] * 2, [2, 3], 1).scale.numel() == 1


def test_alignment_and_types():
    vector = torch.arange(1, 5, dtype=torch.float32)
    affine = Affine.of(vector, 3, 4)
    assert affine.scale.shape == (1, 1, 1, 4) and affine.scale.dtype == torch.float64 and affine.axes() == (3,)
    assert Affine.of_vectors(vector, 0.0, 1, 3).scale.shape == (1, 4, 1)
    assert Affine.of_vectors(vector, vector, -1, 3).shift.shape == (1, 1, 4)
    assert Affine.of(torch.tensor(2.0), torch.tensor(1), 0).apply(torch.tensor(3.0)) == 7
    assert affine.apply(torch.ones(1, 2, 3, 4)).dtype == torch.float32
    assert affine.apply(torch.ones(1, 2, 3, 4, dtype=torch.int64)).dtype == torch.float64
    assert affine.uniform_scale() is None and Affine.of(torch.full((3, 1), 0.5), 0, 2).uniform_scale() == 0.5
    assert Affine.of(float("nan"), 0, 1).has_unit_scale is False


def test_refusals():
    with pytest.raises(ValueError, match="1 of 3 scales are 0"):
        Affine.of(torch.tensor([1.0, 0.0, 2.0]), 0, 2).inverse()
    with pytest.raises(ValueError, match="more axes than the tensor's 1"):
        Affine.of(torch.ones(2, 2), 0, 1)
    both = Affine.of(torch.randn(3, 4), 0, 2)
    with pytest.raises(ValueError, match=r"varies on axes \(0, 1\), wanted axis 1 alone"):
        both.vector(-1, 4)
    with pytest.raises(ValueError, match=r"axes \[0\] cannot be dropped"):
        both.squeeze(0)


def test_compression_keeps_what_differs_in_the_last_bit():
    tensor = torch.ones(1, 3, 2, dtype=torch.float64)
    tensor[0, 2, 1] += 2**-52
    assert compress(tensor) is tensor
    assert compress(torch.full((2, 3), 7.0)).tolist() == [[7.0]]


def test_a_dropped_term_is_caught():
    """Planted: ``A·a ⊙ s + T`` without ``A·t``."""
    inner, outer = Affine.of(2.0, 3.0, 2), Affine.of(5.0, 7.0, 2)
    s = torch.randn(3, 4, dtype=torch.float64)
    wanted = 5.0 * (2.0 * s + 3.0) + 7.0
    assert same(inner.then(outer).apply(s), wanted)
    assert not same(Affine(outer.scale * inner.scale, outer.shift).apply(s), wanted)

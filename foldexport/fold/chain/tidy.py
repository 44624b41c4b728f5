"""What is left to do once skip connections are gone: linear neighbours become one, clamps with one bound plain ReLUs."""

from __future__ import annotations

import torch

from foldexport.fold import conv as algebra
from foldexport.fold import reshape
from foldexport.fold.affine import Affine
from foldexport.fold.chain.intervals import along_channels
from foldexport.fold.chain.network import Network
from foldexport.fold.chain.plain import Plain, dead_channels, one_bound
from foldexport.fold.conv import Conv
from foldexport.fold.stored import Stored, channel_axis

WORTH = 1.25  # times the multiply-adds of two convolutions that one may take: it moves one tensor less


def tidy(network: Network) -> None:
    """Compose what can be composed, then make clamps plain."""
    for stored in network.result().order:
        if stored.kind == "affine":
            _into_convolution(network, stored)
    for stored in network.result().order:
        if stored.kind == "conv":
            _composed(network, stored)
    for stored in reversed(network.result().order):  # one that gets a convolution in front is what another waits for
        if stored.kind == "clamp":
            _plain(network, stored)


def _is_plain_conv(stored: Stored) -> bool:
    return stored.kind == "conv" and not stored.fixed and not stored.conv.transposed and channel_axis(stored) == 1


def _feeds(network: Network, source: Stored, stored: Stored) -> bool:
    """Whether a convolution feeds a tensor's maker and nothing else."""
    return _is_plain_conv(source) and network.reader(source) is stored


def _into_convolution(network: Network, stored: Stored) -> None:
    """An affine that only a convolution feeds goes into its rows."""
    source, affine = stored.inputs[0], stored.attrs["affine"]
    if not _feeds(network, source, stored) or not affine.varies_only_on(1):
        return
    conv = source.conv.affine_output(*affine.vector(1, stored.shape[1]))
    claims = [claim.moved(affine) for claim in network.claims.get(source, ()) if claim.channels is None]
    claims += network.claims.get(stored, [])
    network.replace(stored, network.emit(source, "conv", source.inputs[0], claims, conv=conv, shared=None))


def _composed(network: Network, stored: Stored) -> None:
    """A convolution that only another one reads becomes part of it, where that is worth it."""
    source = stored.inputs[0]
    if not _is_plain_conv(stored) or not _feeds(network, source, stored):
        return
    if not network.is_new(source) and not network.is_new(stored):
        return
    first, second, sizes = source.conv, stored.conv, source.inputs[0].shape[2:]
    try:
        cost = algebra.composed_cost(first, second, sizes).macs
        if cost > WORTH * (first.macs(sizes) + second.macs(first.output_size(sizes))):
            return
        conv = algebra.compose(first, second)
    except ValueError:
        return
    claims = network.claims.get(stored, [])
    network.replace(stored, network.emit(source, "conv", source.inputs[0], claims, shape=stored.shape, conv=conv, shared=None))


def _plain(network: Network, stored: Stored) -> None:
    """A clamp with one bound in front of a convolution: ReLU, and its affine in the convolutions on either side.

    Where no convolution lies before what was a ReLU, it gets one that multiplies each channel by its own factor.
    """
    source = stored.inputs[0]
    bounds = [along_channels(stored.attrs[end], stored) for end in ("lower", "upper")]
    if any(bound is None for bound in bounds) or _is_relu(*bounds):
        return
    if any(claim.channels is not None for each in (source, stored) for claim in network.claims.get(each, ())):
        return
    way = _to_convolution(network, stored)
    if way is None or not (_feeds(network, source, stored) or stored.op == "relu"):
        return
    *between, reader = way
    dead = dead_channels(stored, reader.conv, network)
    found = one_bound(*bounds, dead)
    if found is None or found.drowns(lambda scale, shift: network.rms(source, scale, shift)):
        return
    back = Affine.of_vectors(found.back_scale, found.back_shift, 1, stored.rank)
    behind = _behind(between, back)
    if behind is None or not behind.varies_only_on(channel_axis(reader)):
        return
    try:
        axis = channel_axis(reader)
        conv = reader.conv.affine_input(*behind.vector(axis, reader.conv.in_channels))
    except ValueError:
        return
    _replace(network, way, source, stored, found, conv)


def _is_relu(lower: torch.Tensor, upper: torch.Tensor) -> bool:
    return bool((lower == 0).all()) and bool((upper == float("inf")).all())


def _to_convolution(network: Network, stored: Stored) -> list[Stored] | None:
    """What lies between a clamp and the convolution that reads it, and that convolution; None where others read it too."""
    way, current = [], stored
    while True:
        reader = network.reader(current)
        if reader is None or len(reader.inputs) != 1:
            return None
        way.append(reader)
        if reader.kind == "conv":
            return None if reader.fixed else way
        if reader.kind not in ("pool", "max_pool", "view"):
            return None
        current = reader


def _behind(between: list[Stored], affine: Affine) -> Affine | None:
    """The affine behind pools and views; None where one of them does not let it pass."""
    for stored in between:
        operand = stored.inputs[0]
        if stored.kind == "view":
            mapped = reshape.map_view(affine, operand.shape, stored.shape, operand.dynamic, stored.dynamic)
            if stored.op not in ("flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten") or mapped is None:
                return None
            affine = mapped
            continue
        if stored.kind == "max_pool" and not bool((affine.scale > 0).all()):
            return None
        if stored.kind == "pool" and not stored.attrs["keeps_constants"] and not affine.has_zero_shift:
            return None
        if stored.rank != operand.rank:
            gone = list(range(2, operand.rank))
            if stored.rank != operand.rank - len(gone) or any(axis in gone for axis in affine.axes()):
                return None
            affine = affine.squeeze(gone)
    return affine


def _replace(network: Network, way: list[Stored], source: Stored, stored: Stored, found: Plain, conv: Conv) -> None:
    before = Affine.of_vectors(found.scale, found.shift, 1, stored.rank)
    back = Affine.of_vectors(found.back_scale, found.back_shift, 1, stored.rank)
    made = _made(network, source, stored, found, _moved(network, source, before))
    zero = torch.zeros((1,) * stored.rank, dtype=torch.float64)
    relu = network.emit(stored, "clamp", made, _moved(network, stored, back.inverse()), lower=zero, upper=zero + float("inf"))
    relu.op = "relu"
    *between, reader = way
    current, affine = relu, back
    for each in between:
        affine = _behind([each], affine)
        current = network.again(each, current, _moved(network, each, affine.inverse()))
    final = network.emit(reader, "conv", current, network.claims.get(reader, []), conv=conv, shared=None)
    network.replace(reader, final)


def _made(network: Network, source: Stored, stored: Stored, found: Plain, claims: list) -> Stored:
    """What the ReLU reads: the convolution in front with other rows, or a new one."""
    if _feeds(network, source, stored):
        conv, operand, like = source.conv.affine_output(found.scale, found.shift), source.inputs[0], source
    else:
        conv = algebra.identity(source.shape[1], source.rank - 2).affine_output(found.scale, found.shift)
        operand, like = source, stored
    made = network.emit(like, "conv", operand, claims, shape=source.shape, conv=conv, shared=None)
    made.op = "conv"
    return made


def _moved(network: Network, stored: Stored, change: Affine) -> list:
    return [claim.moved(change) for claim in network.claims.get(stored, ())]

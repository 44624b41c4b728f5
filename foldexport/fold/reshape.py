"""Pending affines through operators that only move values: view, pixel shuffle, channel shuffle.

Each map returns None where the affine of the result cannot be written with size 1 on its symbolic axes, or would vary
along space. Views are bijections, so the way back, from the result to the operand, is the view the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from torch import Tensor

from foldexport.fold.affine import Affine, compress


def map_view(
    affine: Affine,
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    dynamic_in: Collection[int] = (),
    dynamic_out: Collection[int] = (),
) -> Affine | None:
    """The affine of ``v.reshape(out_shape)``, given that of v.

    Shapes are sizes at the traced example; axes in ``dynamic_in`` and ``dynamic_out`` are symbolic. The shapes are cut
    into the smallest groups of axes with equal products; only groups along which the affine varies are written out. A
    channel-first flatten repeats each value, a channel-last one tiles them. None where the result varies along a
    symbolic axis, or where that cannot be told from the traced sizes alone.
    """
    rank = len(out_shape)
    if affine.is_identity:
        return Affine.identity(rank)
    affine = affine.compressed()
    groups = _groups(in_shape, out_shape, dynamic_in, dynamic_out)
    parts = [_map_tensor(part, rank, groups, in_shape, out_shape) for part in (affine.scale, affine.shift)]
    if any(part is None for part in parts):
        return None
    mapped = Affine(*parts)
    return None if set(mapped.axes()) & set(dynamic_out) else mapped


def unmap_view(
    affine: Affine,
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    dynamic_in: Collection[int] = (),
    dynamic_out: Collection[int] = (),
) -> Affine | None:
    """The affine on v that ``v.reshape(out_shape)`` turns into ``affine``; None where there is none."""
    return map_view(affine, out_shape, in_shape, dynamic_out, dynamic_in)


class _Group:
    """Axes of the operand and of the result that hold the same values; axes of size 1 are in no group."""

    def __init__(self) -> None:
        self.inputs: list[int] = []
        self.outputs: list[int] = []

    def is_complete(
        self, size_in: int, size_out: int, dynamic_in: Collection[int], dynamic_out: Collection[int]
    ) -> bool:
        """Whether both sides hold the same number of values.

        A symbolic axis on one side only is a coincidence of the traced sizes; the group then has to grow.
        """
        if not self.inputs or not self.outputs or size_in != size_out:
            return False
        return any(a in dynamic_in for a in self.inputs) == any(a in dynamic_out for a in self.outputs)

    def is_regular(self, dynamic_in: Collection[int], dynamic_out: Collection[int]) -> bool:
        """Whether what holds at the traced sizes always holds: no symbolic axis, or the first or last on both sides.

        With ``[D, …]`` on both sides values repeat with the product of the other axes, and D·|in| sees every
        combination; with ``[…, D]`` the places where values change scale with D. Elsewhere sizes decide.
        """
        symbolic_in = [axis in dynamic_in for axis in self.inputs]
        symbolic_out = [axis in dynamic_out for axis in self.outputs]
        if not any(symbolic_in) and not any(symbolic_out):
            return True
        if sum(symbolic_in) != 1 or sum(symbolic_out) != 1:
            return False
        return (symbolic_in[0] and symbolic_out[0]) or (symbolic_in[-1] and symbolic_out[-1])


def _groups(
    in_shape: Sequence[int], out_shape: Sequence[int], dynamic_in: Collection[int], dynamic_out: Collection[int]
) -> list[tuple[_Group, bool]] | None:
    """Minimal groups from the left, each with whether it is regular; None where the products never meet."""
    inputs = [axis for axis, size in enumerate(in_shape) if size != 1 or axis in dynamic_in]
    outputs = [axis for axis, size in enumerate(out_shape) if size != 1 or axis in dynamic_out]
    if math.prod(in_shape) != math.prod(out_shape) or 0 in in_shape:
        return None
    groups: list[tuple[_Group, bool]] = []
    while inputs or outputs:
        group = _Group()
        size_in = size_out = 1
        while not group.is_complete(size_in, size_out, dynamic_in, dynamic_out) and (inputs or outputs):
            if outputs and (size_in > size_out or not inputs or (group.inputs and not group.outputs)):
                group.outputs.append(outputs.pop(0))
                size_out *= out_shape[group.outputs[-1]]
            else:
                group.inputs.append(inputs.pop(0))
                size_in *= in_shape[group.inputs[-1]]
        groups.append((group, group.is_regular(dynamic_in, dynamic_out)))
    return groups


def _map_tensor(
    tensor: Tensor,
    rank: int,
    groups: list[tuple[_Group, bool]] | None,
    in_shape: Sequence[int],
    out_shape: Sequence[int],
) -> Tensor | None:
    if tensor.numel() == 1:
        return tensor.reshape((1,) * rank)
    if groups is None:
        return None
    target_in, target_out = [1] * len(in_shape), [1] * rank
    for group, regular in groups:
        if all(tensor.shape[axis] == 1 for axis in group.inputs):
            continue
        if not regular:
            return None
        for axis in group.inputs:
            target_in[axis] = in_shape[axis]
        for axis in group.outputs:
            target_out[axis] = out_shape[axis]
    return compress(tensor.expand(target_in).reshape(target_out))


def split_channels(affine: Affine, factor: int) -> Affine | None:
    """Channels ``[…, C, H, W]`` as ``[…, C·factor, H, W]``, each repeated: pixel_unshuffle, or pixel_shuffle backwards.

    None where the affine varies along other axes.
    """
    if not affine.varies_only_on(-3):
        return None
    affine = affine.compressed()
    return Affine(*(t if t.shape[-3] == 1 else t.repeat_interleave(factor, -3) for t in (affine.scale, affine.shift)))


def merge_channels(affine: Affine, factor: int) -> Affine | None:
    """Channels ``[…, C·factor, H, W]`` as ``[…, C, H, W]``: pixel_shuffle, or pixel_unshuffle backwards.

    None where values within a group of ``factor`` channels differ, or the affine varies along other axes.
    """
    if not affine.varies_only_on(-3):
        return None
    parts = []
    for tensor in (affine.compressed().scale, affine.compressed().shift):
        if tensor.shape[-3] > 1:
            grouped = tensor.unflatten(-3, (-1, factor))
            first = grouped.narrow(-3, 0, 1)
            if not bool((grouped == first).all()):
                return None
            tensor = first.squeeze(-3)
        parts.append(tensor)
    return Affine(*parts)


def pixel_shuffle(affine: Affine, upscale: int) -> Affine | None:
    """``[…, C·r², H, W] → […, C, H·r, W·r]`` (torch.nn.PixelShuffle)."""
    return merge_channels(affine, upscale * upscale)


def pixel_unshuffle(affine: Affine, downscale: int) -> Affine | None:
    """``[…, C, H·r, W·r] → […, C·r², H, W]`` (torch.nn.PixelUnshuffle)."""
    return split_channels(affine, downscale * downscale)


def channel_shuffle(affine: Affine, groups: int) -> Affine:
    """``[N, G·K, …]``: channel ``g·K + k`` goes to ``k·G + g`` (torch.nn.ChannelShuffle); with K groups back."""
    affine = affine.compressed()
    return Affine(*(_shuffled(tensor, groups) for tensor in (affine.scale, affine.shift)))


def _shuffled(tensor: Tensor, groups: int) -> Tensor:
    return tensor if tensor.shape[1] == 1 else tensor.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)

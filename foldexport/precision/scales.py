"""Giving groups their scales: the rewriting of weights, bounds and constants, and the proof that nothing else changed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from foldexport.errors import EquivalenceError
from foldexport.precision.groups import BOUNDED, ONE, PADS, Groups, Slot, is_real
from foldexport.precision.walk import walk

TOLERANCE = 1e-11  # of a channel's peak, for scales that are no powers of two: as in the certificate


def rescaled(module: fx.GraphModule, groups: Groups, scales: dict[int, float]) -> fx.GraphModule:
    """A copy of a float64 program whose values are ``ρ ⊙ v``. scales: ρ by root; groups that are not named have 1."""
    result = copy.deepcopy(module)
    twins = dict(zip(module.graph.nodes, result.graph.nodes, strict=True))
    done: set[str] = set()
    with torch.no_grad():
        for layer in groups.layers:
            made, read = (factors(groups, node, scales) for node in (layer.node, layer.reads))
            if layer.constant is not None:
                _buffer(result, layer.constant).mul_(_single(made) / _single(read))
            elif layer.node.target not in done:
                done.add(layer.node.target)
                _scale_layer(result.get_submodule(layer.node.target), read, made)
        for node in groups.constants:
            if node.target not in done:  # one buffer may be read through several nodes
                done.add(node.target)
                _buffer(result, node).mul_(_single(factors(groups, node, scales)))
    for node in sorted(groups.numbers, key=lambda each: each.name):
        if node.op != "call_module" or node.target not in done:
            done.add(node.target if node.op == "call_module" else node.name)
            _scale_numbers(result, twins[node], _single(factors(groups, node, scales)))
    result.recompile()
    return result


def factors(groups: Groups, node: fx.Node, scales: dict[int, float]) -> Tensor:
    """``[C]``: ρ of a value."""
    roots = groups.roots(node)
    return torch.from_numpy(np.asarray([1.0 if root == ONE else scales.get(int(root), 1.0) for root in roots]))


def along(vector: Tensor, slot: Slot, rank: int) -> Tensor:
    """``[C]`` on a slot's axis of a value of ``rank`` axes."""
    if rank == 0:
        return vector.reshape(())
    return vector.reshape([-1 if axis == slot.axis else 1 for axis in range(rank)])


@torch.no_grad()
def prove(original: fx.GraphModule, changed: fx.GraphModule, groups: Groups, scales: dict[int, float], inputs: tuple) -> int:
    """Compare every value of both programs: ``v' = ρ ⊙ v``; returns how many were compared.

    Powers of two change no significand, so with them the two sides must have the same bits; other scales are allowed
    `TOLERANCE` of the channel's peak. Every operator of the changed program reads its own values, so a layer that reads a
    rescaled value and was not compensated differs at its own result.

    Raises EquivalenceError, naming the operator.
    """
    exact = all(np.frexp(scale)[0] == 0.5 for scale in scales.values())
    compared = 0
    for (node, value), (_, found) in zip(walk(original, inputs), walk(changed, inputs), strict=True):
        if node not in groups.slots or not is_real(value):
            continue
        pairs = zip(value, found, strict=True) if isinstance(value, list | tuple) else [(value, found)]
        for one, other in pairs:
            vector = factors(groups, node, scales)
            wanted = one * (along(vector, groups.slots[node], one.dim()) if len(vector) in one.shape else _single(vector))
            if not (_same(wanted, other) if exact else _close(wanted, other, groups.slots[node])):
                worst = float((wanted - other).abs().max() / wanted.abs().max().clamp_min(1e-300))
                raise EquivalenceError(
                    f"rescaling changed '{node.name}' ({node.target}) by {worst:.2g} of its peak: a layer was not compensated"
                )
        compared += 1
    return compared


def _same(wanted: Tensor, found: Tensor) -> bool:
    return wanted.shape == found.shape and bool(((wanted == found) | (wanted.isnan() & found.isnan())).all())


def _close(wanted: Tensor, found: Tensor, slot: Slot) -> bool:
    if wanted.shape != found.shape:
        return False
    axes = [axis for axis in range(wanted.dim()) if axis != slot.axis]
    peak = wanted.abs().amax(axes, keepdim=True) if axes else wanted.abs()
    floor = 1e-6 * wanted.abs().max() if wanted.numel() else 0.0
    return bool(((wanted - found).abs() <= TOLERANCE * torch.clamp(peak, min=float(floor))).all())


def _scale_layer(layer: nn.Module, read: Tensor, made: Tensor) -> None:
    """``W' = W·ρ_out/ρ_in``, ``b' = b·ρ_out``; a normalisation, whose operand has ρ = 1, scales its γ and β."""
    weight = layer.weight
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        weight.mul_(made / read)
    elif isinstance(layer, nn.LayerNorm | nn.GroupNorm):
        weight.mul_(made)
    elif isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        groups = layer.groups  # [Cin, Cout/G, *k]
        weight.div_(_column(read, weight, 0))
        per_group = made.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
        weight.mul_(per_group.reshape(*per_group.shape, *[1] * (weight.dim() - 2)))
    else:
        groups = getattr(layer, "groups", 1)  # [Cout, Cin/G, *k]
        weight.mul_(_column(made, weight, 0))
        per_group = read.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
        weight.div_(per_group.reshape(*per_group.shape, *[1] * (weight.dim() - 2)))
    if getattr(layer, "bias", None) is not None:
        layer.bias.mul_(made)


def _column(vector: Tensor, weight: Tensor, axis: int) -> Tensor:
    return vector.reshape([-1 if each == axis else 1 for each in range(weight.dim())])


def _scale_numbers(module: fx.GraphModule, node: fx.Node, factor: float) -> None:
    """Bounds, addends and pad values follow their group."""
    if factor == 1.0:
        return
    if node.op == "call_module":
        layer = module.get_submodule(node.target)
        if isinstance(layer, BOUNDED):
            module.set_submodule(node.target, nn.Hardtanh(layer.min_val * factor, layer.max_val * factor))
        elif isinstance(layer, PADS):
            layer.value = layer.value * factor
        return
    node.args = tuple(_times(each, factor) for each in node.args)
    node.kwargs = {key: each if key == "alpha" else _times(each, factor) for key, each in node.kwargs.items()}


def _times(value: Any, factor: float) -> Any:
    """A number, but no switch, times the factor; anything else as it is."""
    return value * factor if isinstance(value, int | float) and not isinstance(value, bool) else value


def _single(vector: Tensor) -> Any:
    """The one factor of a value that is scaled as a whole."""
    if not bool((vector == vector[0]).all()):
        raise AssertionError("a value with one factor has several: its groups were not tied")
    return float(vector[0])


def _buffer(module: fx.GraphModule, node: fx.Node) -> Tensor:
    return module.get_buffer(node.target)

"""Ranges equalised between layers, channel by channel, before a network is quantised.

A tensor of activations is quantised with one step for all of its channels, a layer's weights with one step per output channel.
So a channel whose values are much smaller than the tensor's largest has few steps left, and so have small weights that read it.
Scaling channel c by ρ moves range from one to the other: with a(c) its activation's peak over the tensor's, and w(c) the peak of
the weights that read it, each over its output channel's, over the layer's, both come to the same at

    ρ(c) = √( w(c) / a(c) ),        a(c)·ρ(c) = w(c)/ρ(c) = √( a(c)·w(c) ).

After Nagel et al. 2019 ("Data-free quantization through weight equalization and bias correction", section 4.1), with the measured
activations in place of the ranges of the layer in front, as in Xiao et al. 2022 ("SmoothQuant", equation 4, α = ½). Channels that
are tied (ReLU, pooling, addition, a residual trunk: foldexport.precision.groups) take one ρ, by the largest a and w among them.
ρ is rounded to a power of two, so that nothing but exponents changes and the equalised network is proved bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, fx, nn

from foldexport.precision.groups import ONE, Groups, groups_of, is_real
from foldexport.precision.ranges import measure
from foldexport.precision.scales import prove, rescaled
from foldexport.precision.walk import walk

LARGEST = 16.0  # ρ and 1/ρ: a channel that no sample brings to life is not blown up


@torch.no_grad()
def equalised(module: fx.GraphModule, inputs: Sequence[tuple]) -> tuple[fx.GraphModule, int, int]:
    """The float64 program with equal ranges, how many groups of channels were scaled, and how many values were proved equal."""
    groups = groups_of(module, measure(module, inputs[:1]).shapes, per_channel=True)
    scales = _scales(module, groups, _activations(module, groups, inputs))
    if not scales:
        return module, 0, 0
    changed = rescaled(module, groups, scales)
    return changed, len(scales), prove(module, changed, groups, scales, inputs[0])


def _activations(module: fx.GraphModule, groups: Groups, inputs: Sequence[tuple]) -> dict[fx.Node, Tensor]:
    """``[C]``: each channel's peak over all samples."""
    peaks: dict[fx.Node, Tensor] = {}
    for given in inputs:
        for node, value in walk(module, given):
            if node in groups.slots and isinstance(value, Tensor) and is_real(value) and value.dim() > groups.slots[node].axis:
                slot = groups.slots[node]
                peak = value.abs().transpose(0, slot.axis).flatten(1).amax(1)
                if len(peak) == len(slot.ids):
                    peaks[node] = torch.maximum(peaks[node], peak) if node in peaks else peak
    return peaks


def _scales(module: fx.GraphModule, groups: Groups, peaks: dict[fx.Node, Tensor]) -> dict[int, float]:
    values: dict[int, float] = {}
    weights: dict[int, float] = {}
    for layer in groups.layers:
        layer_module = module.get_submodule(layer.node.target) if layer.node.op == "call_module" else None
        columns = _columns(layer_module)
        if columns is None or layer.reads not in peaks or len(columns) != len(peaks[layer.reads]):
            continue
        _collect(values, groups.roots(layer.reads), peaks[layer.reads])
        _collect(weights, groups.roots(layer.reads), columns)
    scales = {}
    for root, value in values.items():
        if root != ONE and value > 0 and weights.get(root, 0.0) > 0:
            scale = 2.0 ** np.rint(0.5 * np.log2(weights[root] / value))
            scale = float(np.clip(scale, 1.0 / LARGEST, LARGEST))
            if scale != 1.0:
                scales[root] = scale
    return scales


def _collect(into: dict[int, float], roots: np.ndarray, sizes: Tensor) -> None:
    largest = float(sizes.max())
    if largest > 0:
        for root, size in zip(roots.tolist(), (sizes / largest).tolist()):
            into[root] = max(into.get(root, 0.0), size)


def _columns(layer: nn.Module | None) -> Tensor | None:
    """``[Cin]``: the largest weight that reads each channel, in units of its own output channel's largest."""
    if isinstance(layer, nn.Linear):
        weight = layer.weight
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        weight = layer.weight.flatten(2).abs().amax(2)
    else:
        return None
    groups = getattr(layer, "groups", 1)
    rows = weight.abs() / weight.abs().amax(1, keepdim=True).clamp_min(1e-300)  # [Cout, Cin/G]
    return rows.reshape(groups, -1, rows.shape[1]).amax(1).reshape(-1)

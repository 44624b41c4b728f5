"""Random weights and batch-norm statistics that make a wrong fold visible.

At initialisation a batch norm is nearly the identity (mean 0, variance 1, gamma 1, beta 0), so a fold that ignores
it altogether is off by 1e-5 only. Every test of the fold therefore starts from `randomise`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

TINY = 1e-8


def randomise(module: nn.Module, seed: int, *, zero: float = 0.0, tiny: float = 0.0, signs: bool = True,
              example: Tensor | None = None) -> nn.Module:
    """Draws every weight and statistic of ``module`` anew, in place, and returns it in eval mode.

    Batch norm: ``mu ~ N(0, 0.5^2)``, ``sigma^2 ~ U[0.3, 3]``, ``|gamma| ~ U[0.5, 1.5]``, ``beta ~ U[-1, 1]``, so that
    ``|beta / gamma| <= 2``. Convolutions and linear layers: ``W ~ N(0, 2 / fan_in)``, ``b ~ N(0, 0.2^2)``, so that
    activations stay near one. Weights under a parametrisation keep their initialisation.

    zero, tiny: the share of channels of each batch norm whose gamma is exactly 0 and 1e-8; at least one channel
        when it is positive.
    signs: gamma of both signs (both occur in every batch norm of two or more channels), else positive.
    example: an input batch; running statistics are then drawn around the statistics that it gives,
        ``mu = mean + U[-1, 1] * std`` and ``sigma^2 = var * U[0.3, 3]``, which keeps deep networks near one as well.
    """
    generator = torch.Generator().manual_seed(seed)
    module.eval()
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, _BatchNorm):
                _randomise_batch_norm(child, generator, zero, tiny, signs)
            elif isinstance(child, (nn.LayerNorm, nn.GroupNorm)):
                _randomise_affine(child, generator, 0.0, 0.0, signs)
            elif isinstance(child, (_ConvNd, nn.Linear)):
                _randomise_weight(child, generator)
            elif isinstance(child, nn.PReLU):
                child.weight.copy_(uniform(child.weight.shape, 0.1, 0.6, generator))
        if example is not None:
            _recentre(module, example, generator)
    return module


def uniform(shape: torch.Size | tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """``U[low, high]`` of the given shape."""
    return low + (high - low) * torch.rand(tuple(shape), generator=generator)


def gammas(channels: int, generator: torch.Generator, zero: float, tiny: float, signs: bool) -> Tensor:
    """Batch-norm weights ``[C]``: ``|gamma| ~ U[0.5, 1.5]``, the asked shares of them exactly 0 and 1e-8."""
    gamma = uniform((channels,), 0.5, 1.5, generator)
    order = torch.randperm(channels, generator=generator)
    zeros, tinies = math.ceil(zero * channels), math.ceil(tiny * channels)
    gamma[order[:zeros]] = 0.0
    gamma[order[zeros:zeros + tinies]] = TINY
    if signs:
        gamma[order[::2]] *= -1
    return gamma


def _randomise_affine(norm: nn.Module, generator: torch.Generator, zero: float, tiny: float, signs: bool) -> None:
    if norm.weight is None:
        return
    drawn = gammas(norm.weight.numel(), generator, zero, tiny, signs)
    norm.weight.copy_(drawn.reshape(norm.weight.shape))
    if norm.bias is not None:
        norm.bias.copy_(uniform(norm.bias.shape, -1.0, 1.0, generator))


def _randomise_batch_norm(norm: _BatchNorm, generator: torch.Generator, zero: float, tiny: float, signs: bool) -> None:
    _randomise_affine(norm, generator, zero, tiny, signs)
    if norm.running_mean is None:
        return
    norm.running_mean.copy_(0.5 * torch.randn(norm.running_mean.shape, generator=generator))
    norm.running_var.copy_(uniform(norm.running_var.shape, 0.3, 3.0, generator))


def _randomise_weight(layer: nn.Module, generator: torch.Generator) -> None:
    if layer.bias is not None:
        layer.bias.copy_(0.2 * torch.randn(layer.bias.shape, generator=generator))
    if parametrize.is_parametrized(layer, "weight"):
        return
    shape = layer.weight.shape
    fan_in = shape[1:].numel()
    if isinstance(layer, _ConvTransposeNd):
        fan_in = shape[0] // layer.groups * shape[2:].numel()
    layer.weight.copy_(math.sqrt(2 / fan_in) * torch.randn(shape, generator=generator))


def _recentre(module: nn.Module, example: Tensor, generator: torch.Generator) -> None:
    def observe(norm: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        value = inputs[0]
        axes = [axis for axis in range(value.dim()) if axis != 1]
        var, mean = torch.var_mean(value, axes, correction=0)
        # A dead channel has no variance of its own; dividing by nothing would make the network explode.
        var = var.clamp_min(0.05 * float(var.mean()) + 1e-3)
        norm.running_mean.copy_(mean + uniform(mean.shape, -1.0, 1.0, generator) * var.sqrt())
        norm.running_var.copy_(var * uniform(var.shape, 0.3, 3.0, generator))

    norms = [child for child in module.modules() if isinstance(child, _BatchNorm) and child.running_mean is not None]
    hooks = [norm.register_forward_pre_hook(observe) for norm in norms]
    try:
        module(example)
    finally:
        for hook in hooks:
            hook.remove()

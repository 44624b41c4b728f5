"""The table of blocks: what each is built from, and which operators it must have once folded.

Counts are by ATen family (`tests.fold.checks.operators`); flatten and view cost nothing and are not listed. ``kept``
names the module that the ledger has to give a reason for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.fold.affine_blocks import BEFORE_CONVOLUTION, BEHIND_CONVOLUTION
from tests.fold.layers import MODULES, DiracConv, Gate, Sum, WeightStandardisedConv, chain, conv, conv_bn
from tests.fold.merged_blocks import MERGED, REFUSED_MERGES
from tests.fold.residuals import (
    AlphaBlock,
    ConvNeXtBlock,
    DenseBlock,
    PaddedShortcut,
    PostactivationBlock,
    PreactivationBlock,
    ScaledBlock,
    headed,
)
from tests.fold.rows import Block, block, bn, normed


def _weight_normed(channels: int) -> nn.Module:
    layer = parametrizations.weight_norm(conv(channels, channels))
    # Right after registration g is the norm of v, and the parametrisation would be the identity.
    layer.parametrizations.weight.original0.data *= torch.linspace(-1.5, 1.5, channels).view(-1, 1, 1, 1)
    return layer


def _weighted(layer: Callable[[int], nn.Module]) -> dict[int, Block]:
    """At 8 channels, and at 64, where constant folders with a size limit give up."""
    return {
        channels: block(
            lambda channels=channels: chain(conv=layer(channels), bn=bn(channels), relu=nn.ReLU()),
            (channels, 6, 6), conv=1, relu=1,
        )
        for channels in (8, 64)
    }


PARAMETRISED = {
    f"{name}_{channels}": row
    for name, layer in {
        "weight_norm": _weight_normed,
        "spectral_norm": lambda c: parametrizations.spectral_norm(conv(c, c)),
        "weight_standardised": lambda c: WeightStandardisedConv(c, c, 3, padding=1),
    }.items()
    for channels, row in _weighted(layer).items()
} | {
    f"dirac{dims}d": block(
        lambda dims=dims: normed(DiracConv(dims, 8, 12), 12, dims).append(nn.ReLU()), (8, 6, 5, 4)[: dims + 1],
        conv=1, relu=1,
    )
    for dims in MODULES
}

RESIDUAL = {
    "scaled_projection": block(lambda: ScaledBlock(8, 12, project=True), conv=3, relu=2, add=1),
    "scaled_chain": block(
        lambda: headed(8, *(ScaledBlock(8, 8, project=False) for _ in range(3))), (3, 8, 8),
        conv=7, relu=7, add=3, avg_pool=1, linear=1,
    ),
    "alpha_on_skip": block(
        lambda: headed(8, AlphaBlock(8, 0.7, on_skip=True), AlphaBlock(8, 1.2, on_skip=True)), (3, 8, 8),
        conv=5, relu=5, add=2, avg_pool=1, linear=1,
    ),
    "negative_alpha_on_skip": block(
        lambda: headed(8, AlphaBlock(8, -0.7, on_skip=True), AlphaBlock(8, -1.2, on_skip=True)), (3, 8, 8),
        conv=5, relu=4, clamp=1, add=2, avg_pool=1, linear=1,
    ),
    "rezero": block(
        lambda: headed(8, AlphaBlock(8, 0.3, on_skip=False)), (3, 8, 8), conv=3, relu=3, add=1, avg_pool=1, linear=1
    ),
    "rezero_at_zero": block(
        lambda: headed(8, AlphaBlock(8, 0.0, on_skip=False)), (3, 8, 8), conv=1, relu=1, avg_pool=1, linear=1
    ),
    "skip_at_zero": block(
        lambda: headed(8, AlphaBlock(8, 0.0, on_skip=True)), (3, 8, 8), conv=3, relu=3, avg_pool=1, linear=1
    ),
    "zero_gamma_branch": block(
        lambda: headed(8, Sum(x=nn.Identity(), f=chain(relu=nn.ReLU(), unit=conv_bn(8, 8)))), (3, 8, 8),
        zero=1.0, conv=1, relu=1, avg_pool=1, linear=1,
    ),
    "preactivation": block(
        lambda: headed(8, PreactivationBlock(8), PreactivationBlock(8)), (3, 8, 8),
        signs=False, conv=5, relu=5, add=2, avg_pool=1, linear=1,
    ),
    # The stem takes the signs of the first batch norm; later readers of the trunk need min(s, 0) where theirs differ.
    "preactivation_signs": block(
        lambda: headed(8, PreactivationBlock(8), PreactivationBlock(8)), (3, 8, 8),
        conv=5, relu=3, clamp=2, add=2, avg_pool=1, linear=1,
    ),
    "postactivation": block(lambda: PostactivationBlock(8), conv=2, relu=2, add=1),
    "padded_shortcut": block(lambda: PaddedShortcut(8, 12), conv=1, avg_pool=1, pad=1, add=1, relu=1),
    "bn_padded_shortcut": block(
        lambda: chain(stem=conv_bn(3, 8), relu=nn.ReLU(), bn=bn(), unit=PaddedShortcut(8, 12), head=conv(12, 4, padding=0)),
        (3, 8, 8), conv=3, avg_pool=1, pad=1, add=1, relu=1, clamp=1,
    ),
    "dense": block(DenseBlock, (3, 8, 8), conv=6, relu=3, clamp=2, cat=2),
    "convnext": block(
        lambda: ConvNeXtBlock(8), conv=1, permute=2, layer_norm=1, linear=2, gelu=1, add=1, kept="norm"
    ),
}

CONTROLS = {
    "gate": block(
        lambda: chain(unit=conv_bn(8, 8), gate=Gate(8, 4)),
        kept="gate", conv=3, avg_pool=1, relu=1, sigmoid=1, mul=1,
    ),
    "bn_gate_conv": block(
        lambda: chain(bn=bn(), gate=Gate(8, 4), conv=conv(8, 8, padding=0)),
        kept="bn", add=1, conv=3, avg_pool=1, relu=1, sigmoid=1, mul=1,
    ),
    "negative_gamma_maxpool": block(
        lambda: chain(relu=nn.ReLU(), bn=bn(), pool=nn.MaxPool2d(2), conv=conv(8, 8, padding=0)),
        kept="bn", relu=1, mul=1, max_pool=1, conv=1,
    ),
    "batch_statistics": block(
        lambda: chain(conv=conv(8, 8), bn=nn.BatchNorm2d(8, track_running_stats=False), relu=nn.ReLU()),
        kept="bn", conv=1, batch_norm=1, relu=1,
    ),
    "group_norm": block(
        lambda: chain(conv=conv(8, 8), norm=nn.GroupNorm(2, 8), relu=nn.ReLU()),
        kept="norm", conv=1, group_norm=1, relu=1,
    ),
    "group_norm_conv": block(
        lambda: chain(norm=nn.GroupNorm(2, 8), conv=conv(8, 8, padding=0)), kept="norm", group_norm=1, conv=1
    ),
    "layer_norm_linear": block(
        lambda: chain(norm=nn.LayerNorm(16), fc=nn.Linear(16, 8)), (5, 16), kept="norm", layer_norm=1, linear=1
    ),
}

BLOCKS: dict[str, Block] = {
    **BEHIND_CONVOLUTION, **BEFORE_CONVOLUTION, **MERGED, **REFUSED_MERGES, **PARAMETRISED, **RESIDUAL, **CONTROLS,
}

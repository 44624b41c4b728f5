"""The transfer table: what every operator does with a pending affine on its operands.

To add an operator, write one function in the file of its kind and give it a line here. A transfer function gets the
:class:`~foldexport.fold.passes.Fold` and the node, puts the node's value with ``fold.put`` and returns True; it returns False
when the node is not of the form it knows, and the operator is then opaque: its operands are wanted exactly. Operators that
emit nothing (batch norm, arithmetic with constants) are in :mod:`foldexport.fold.pending`.
"""

from __future__ import annotations

from foldexport.fold.transfer import activation, combine, convolution, normalise, pool, views
from foldexport.fold.transfer.opaque import opaque

TRANSFER = {
    # convolution and linear: absorb the pending affine into their weights
    "conv1d": convolution.convolution,
    "conv2d": convolution.convolution,
    "conv3d": convolution.convolution,
    "convolution": convolution.convolution,
    "conv_transpose1d": convolution.convolution,
    "conv_transpose2d": convolution.convolution,
    "conv_transpose3d": convolution.convolution,
    "linear": convolution.linear,
    "addmm": convolution.linear,
    "mm": convolution.linear,
    "matmul": convolution.linear,
    # clamps: through per-channel bounds
    "relu": activation.clamp,
    "relu6": activation.clamp,
    "hardtanh": activation.clamp,
    "clamp": activation.clamp,
    "clamp_min": activation.clamp,
    "clamp_max": activation.clamp,
    "threshold": activation.clamp,
    "maximum": combine.maximum,
    "minimum": combine.maximum,
    "leaky_relu": activation.leaky,
    "prelu": activation.leaky,
    # pooling and resampling: pass it
    "max_pool1d": pool.max_pool,
    "max_pool2d": pool.max_pool,
    "max_pool3d": pool.max_pool,
    "max_pool2d_with_indices": pool.max_pool_with_indices,
    "adaptive_max_pool1d": pool.max_pool_with_indices,
    "adaptive_max_pool2d": pool.max_pool_with_indices,
    "amax": pool.max_pool,
    "avg_pool1d": pool.average,
    "avg_pool2d": pool.average,
    "avg_pool3d": pool.average,
    "adaptive_avg_pool1d": pool.average,
    "adaptive_avg_pool2d": pool.average,
    "adaptive_avg_pool3d": pool.average,
    "_adaptive_avg_pool2d": pool.average,
    "mean": pool.mean,
    "upsample_nearest1d": pool.resample,
    "upsample_nearest2d": pool.resample,
    "upsample_nearest3d": pool.resample,
    "upsample_linear1d": pool.resample,
    "upsample_bilinear2d": pool.resample,
    "upsample_bicubic2d": pool.resample,
    "upsample_trilinear3d": pool.resample,
    "pad": pool.pad,
    "constant_pad_nd": pool.pad,
    "slice_scatter": pool.border,
    "reflection_pad1d": pool.resample,
    "reflection_pad2d": pool.resample,
    "reflection_pad3d": pool.resample,
    "replication_pad1d": pool.resample,
    "replication_pad2d": pool.resample,
    "replication_pad3d": pool.resample,
    # views: map it
    "view": views.reshape,
    "reshape_as": views.reshape,
    "view_as": views.reshape,
    "reshape": views.reshape,
    "_unsafe_view": views.reshape,
    "flatten": views.reshape,
    "unflatten": views.reshape,
    "squeeze": views.reshape,
    "unsqueeze": views.reshape,
    "permute": views.permute,
    "transpose": views.permute,
    "t": views.permute,
    "movedim": views.permute,
    "swapaxes": views.permute,
    "slice": views.index,
    "select": views.index,
    "narrow": views.index,
    "expand": views.expand,
    "split": views.split,
    "split_with_sizes": views.split,
    "chunk": views.split,
    "unbind": views.split,
    "channel_shuffle": views.channel_shuffle,
    "pixel_shuffle": views.pixel_shuffle,
    "pixel_unshuffle": views.pixel_shuffle,
    # two variables
    "add": combine.add,
    "sub": combine.add,
    "mul": combine.gate,
    "cat": combine.concatenate,
    "stack": combine.stack,
    # statistics of the input itself
    "layer_norm": normalise.layer_norm,
    "group_norm": normalise.group_norm,
    "batch_norm": normalise.batch_statistics,
    "instance_norm": normalise.batch_statistics,
}

__all__ = ["TRANSFER", "opaque"]

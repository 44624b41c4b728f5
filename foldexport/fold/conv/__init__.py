"""Convolutions as values: exact algebra in float64, no graph.

Merges raise ValueError with the reason where the merged convolution would not be the same function. Whether a merge is
worth it is the caller's question: compare :func:`cost` before and after.
"""

from foldexport.fold.conv.composition import compose
from foldexport.fold.conv.layout import untransposed
from foldexport.fold.conv.simple import absorb_padding, average_pool, concatenate, identity
from foldexport.fold.conv.summation import add
from foldexport.fold.conv.value import Conv, Cost, cost

__all__ = [
    "Conv",
    "Cost",
    "absorb_padding",
    "add",
    "average_pool",
    "compose",
    "concatenate",
    "cost",
    "identity",
    "untransposed",
]

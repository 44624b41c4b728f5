"""Convolutions as values: exact algebra in float64, no graph.

Merges raise ValueError with the reason where the merged convolution would not be the same function. Whether a merge is
worth it is the caller's question: compare :func:`cost` with
:func:`added_cost` and :func:`composed_cost`, which need no weights.
"""

from foldexport.fold.conv.composition import compose, composed_cost
from foldexport.fold.conv.layout import untransposed
from foldexport.fold.conv.simple import absorb_padding, average_pool, concatenate, identity
from foldexport.fold.conv.summation import add, added_cost
from foldexport.fold.conv.value import Conv, Cost, cost

__all__ = [
    "Conv",
    "Cost",
    "absorb_padding",
    "add",
    "added_cost",
    "average_pool",
    "compose",
    "composed_cost",
    "concatenate",
    "cost",
    "identity",
    "untransposed",
]

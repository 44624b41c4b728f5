"""The names that DiracNets have on disk, and those of `foldexport.zoo.diracnet.DiracNet`.

Published, unfolded     network                                 shape
``conv``                ``features.conv.weight``                ``[C, 3, k, k]``
``bn.*``                ``features.bn.*``                       ``[C]``
``group0.block0.conv``  ``features.group0.block0.conv.weight``  ``[Cout, Cin, 3, 3]``
``group0.block0.alpha`` ``features.group0.block0.conv.alpha``   ``[Cout]``, version 1 ``[1]``
``group0.block0.beta``  ``features.group0.block0.conv.beta``    ``[Cout]``, version 1 ``[1]``
``group0.block0.bn.*``  ``features.group0.block0.bn.*``         ``[Cout]``
``eye64_32_3_3``        ``….conv.delta`` of that shape          ``[64, 32, 3, 3]``
``fc.*``                ``fc.*``

Published folded files have the network's own names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

_BLOCK = r"group\d+\.block\d+"
_FROM_PUBLISHED = (
    (re.compile(r"conv"), r"features.conv.weight"),
    (re.compile(r"(bn\.\w+)"), r"features.\1"),
    (re.compile(rf"({_BLOCK}\.conv)"), r"features.\1.weight"),
    (re.compile(rf"({_BLOCK})\.(alpha|beta)"), r"features.\1.conv.\2"),
    (re.compile(rf"({_BLOCK}\.bn\.\w+)"), r"features.\1"),
    (re.compile(r"(fc\.\w+)"), r"\1"),
)
_EYE = re.compile(r"eye(\d+)_(\d+)(_\d+)*")

KEYS = (
    *(pattern.pattern for pattern, _ in _FROM_PUBLISHED),
    _EYE.pattern,
    rf"features\.(conv|bn|{_BLOCK}\.(conv|bn))\.\w+",
)


def is_published(keys: Sequence[str]) -> bool:
    """Whether these are the unfolded names of the original code: no ``features.``, scales beside a block's ``conv``."""
    return any(re.fullmatch(rf"{_BLOCK}\.(alpha|beta|conv)", key) for key in keys)


def is_network(keys: Sequence[str]) -> bool:
    """Whether these are the network's own names, folded or not."""
    return any(re.fullmatch(rf"features\.{_BLOCK}\.conv\.(weight|bias|alpha|beta)", key) for key in keys)


def eye_name(shape: Sequence[int]) -> str:
    """The published name of the delta of this shape."""
    return "eye" + "_".join(map(str, shape))


def published_key(key: str, shape: Sequence[int] = ()) -> str:
    """The published name of a tensor of the network; a delta is named by its ``shape``."""
    if key == "features.conv.weight":
        return "conv"
    if key.endswith(".conv.delta") and shape:
        return eye_name(shape)
    name = key.removeprefix("features.").replace(".conv.weight", ".conv")
    return re.sub(r"\.conv\.(alpha|beta)$", r".\1", name)


def from_published(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """``(state, eyes, surplus)``: tensors by the network's names, deltas by the published ones, and other keys."""
    state, eyes, surplus = {}, {}, []
    for key, tensor in tensors.items():
        if _EYE.fullmatch(key):
            eyes[key] = tensor
            continue
        name = next((p.sub(new, key) for p, new in _FROM_PUBLISHED if p.fullmatch(key)), None)
        if name is None:
            surplus.append(key)
        else:
            state[name] = tensor
    return state, eyes, surplus


def to_published(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A DiracNet's ``state_dict`` as the original's older layout, ``(params, stats)``, float32 copies.

    ``params`` holds what is learned, ``stats`` the running statistics and each distinct delta once.
    """
    params, stats = {}, {}
    for key, tensor in state.items():
        leaf = key.rpartition(".")[2]
        if leaf == "num_batches_tracked":
            continue
        place = stats if leaf in ("delta", "running_mean", "running_var") else params
        place[published_key(key, tensor.shape)] = tensor.detach().float().contiguous().clone()
    return params, stats

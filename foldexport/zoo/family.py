"""What a family of architectures declares, and what identifying a checkpoint gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(eq=False)
class Identified:
    """A checkpoint recognised as a network.

    ``module`` is in eval mode with the weights loaded. ``preprocessing`` has timm's field names: ``input_size``
    (channels, height, width), ``mean`` and ``std`` of RGB in 0 … 1, ``interpolation``, ``crop_pct``, ``num_classes``,
    ``label_names``. ``reason`` says which keys and shapes gave the architecture away; ``notes`` what was changed or
    filled in while loading.
    """

    module: nn.Module
    name: str
    description: str
    reason: str
    input_shape: tuple[int, ...]
    num_classes: int
    preprocessing: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Family:
    """One family of architectures.

    ``arch``: its name for ``--arch``. ``keys``: regular expressions that its state-dict keys match in full, in any of
    its layouts. ``recognises(tensors)``: whether this is one of its checkpoints, however damaged.
    ``load(tensors, arch_args, source)``: the network with the weights in it; raises CheckpointError where they do not
    fit, UsageError for ``arch_args`` that make no network.
    """

    name: str
    arch: str
    keys: tuple[str, ...]
    recognises: Callable[[Mapping[str, Tensor]], bool]
    load: Callable[[dict[str, Tensor], dict[str, Any], str], Identified]

    def fitting(self, keys: Iterable[str]) -> int:
        """How many of the keys could be this family's."""
        pattern = re.compile("|".join(self.keys))
        return sum(pattern.fullmatch(key) is not None for key in keys)

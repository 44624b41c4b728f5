"""Numbers that the keys and shapes of a state dict give away."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR = {
    "input_size": (3, 32, 32), "interpolation": "bilinear", "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616),
}  # fmt: skip
IMAGENET = {
    "input_size": (3, 224, 224), "interpolation": "bilinear", "crop_pct": 0.875,
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip


def preprocessing(stem: str, num_classes: int) -> dict[str, Any]:
    """``stem`` "cifar" or "imagenet": what such networks are trained on, in timm's field names."""
    fields = {**(CIFAR if stem == "cifar" else IMAGENET), "num_classes": num_classes}
    if stem == "cifar" and num_classes == 10:
        fields["label_names"] = CIFAR10_CLASSES
    return fields


def most_common(values: Iterable[Any]) -> Any:
    """The value that occurs most; raises IndexError where there is none."""
    return Counter(values).most_common(1)[0][0]


def counts(state: Iterable[str], pattern: str) -> tuple[int, ...]:
    """Blocks of each stage, from keys that match ``pattern`` with groups (stage, block), both counted from the least.

    ``counts(keys, r"layer(\\d+)\\.(\\d+)\\.conv1\\.weight")`` is ``(2, 2, 2, 2)`` of a ResNet-18. The highest block
    counts: one without its weight is missing, not absent. Raises IndexError where no key matches, ValueError where there
    are more blocks than keys.
    """
    highest: dict[int, int] = {}
    keys = list(state)
    for key in keys:
        if match := re.fullmatch(pattern, key):
            stage, block = int(match[1]), int(match[2])
            highest[stage] = max(highest.get(stage, 0), block + 1)
    if not highest:
        raise IndexError(pattern)
    if sum(highest.values()) > len(keys):
        raise ValueError(f"{len(keys)} keys are not {sum(highest.values())} blocks")
    return tuple(highest[stage] for stage in sorted(highest))


def shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """The shape of one tensor; raises KeyError."""
    return tuple(state[key].shape)


def dashed(numbers: Iterable[int]) -> str:
    """``3-4-6-3``."""
    return "-".join(map(str, numbers))

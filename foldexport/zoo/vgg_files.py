"""VGG checkpoints: which configuration, classifier and image size the keys and shapes are of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from foldexport.zoo import reading
from foldexport.zoo.structure import Candidate, Layout, Structure
from foldexport.zoo.vgg import CONFIGURATIONS, IMAGENET_POOLED, POOL, configuration, pixels, side, vgg

KEYS = (
    r"features\.\d+\.(weight|bias|running_mean|running_var|num_batches_tracked)",
    r"classifier\.(\d+\.)?(weight|bias)", r"linear\.(weight|bias)",
)  # fmt: skip
ARGUMENTS = ("depth", "batch_norm", "num_classes", "classifier", "hidden", "pooled", "layers", "bias")
LINEAR = Layout.of("linear", r"linear\.(weight|bias)", [("linear.*", "classifier.*")])
FEWEST_CONVOLUTIONS = 3


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Convolutions features.N, the first and most of the others 3x3, a classifier, and hardly another key."""
    weights = [tensor for key, tensor in state.items() if re.fullmatch(r"features\.\d+\.weight", key)]
    kernels = [tensor.shape[2:] for tensor in weights if tensor.dim() == 4]
    pattern = re.compile("|".join(KEYS))
    ours = sum(pattern.fullmatch(key) is not None for key in state)
    first = state.get("features.0.weight")
    return (
        len(kernels) >= FEWEST_CONVOLUTIONS
        and sum(kernel == (3, 3) for kernel in kernels) >= 0.7 * len(kernels)
        and (first is None or first.dim() != 4 or first.shape[2:] == (3, 3))
        and any(key.startswith("classifier.") for key in state)
        and ours >= 0.9 * len(state)
    )


def read(state: Mapping[str, Tensor]) -> Sequence[Candidate]:
    """The one network that keys and shapes are of."""
    batch_norm = any(re.fullmatch(r"features\.\d+\.running_(mean|var)", key) for key in state)
    places = _convolutions(state, batch_norm)
    if not places:
        raise IndexError("features.N")
    layers, gaps = _layers(state, places, batch_norm)
    depth = sum(layer != POOL for layer in layers) + 3
    standard = depth in CONFIGURATIONS and configuration(depth) == layers
    linears, sizes = _classifier(state)
    channels = next(layer for layer in reversed(layers) if layer != POOL)
    pooled = _pooled(state, linears, channels)
    arguments = {
        "depth": depth, "batch_norm": batch_norm, "num_classes": sizes[-1], "classifier": linears, "hidden": sizes[:-1],
        "pooled": pooled, "layers": None if standard else layers,
        "bias": any(f"features.{place}.bias" in state for place in places),
    }  # fmt: skip
    where = f"classifier.{', classifier.'.join(map(str, linears))}" if linears else "classifier"
    reason = (
        f"{depth - 3} convolutions features.N and {'' if batch_norm else 'no '}batch norms, {gaps} places between them left for "
        f"pools, one behind: depth {depth}; linear layers {where}, the first reads {channels} channels at {pooled}x{pooled} "
        f"positions: {pixels(layers, pooled)} pixels; the last has {sizes[-1]} rows"
    )
    return [Candidate(arguments, reason)]


def _convolutions(state: Mapping[str, Tensor], batch_norm: bool) -> list[int]:
    """Places of the convolutions in ``features``; the one whose weight is missing is known by its bias or batch norm."""
    places: dict[int, set[str]] = {}
    for key in state:
        if match := re.fullmatch(r"features\.(\d{1,4})\.(\w+)", key):
            places.setdefault(int(match[1]), set()).add(match[2])
    norms = {place for place, leaves in places.items() if leaves & {"running_mean", "running_var"}}
    return sorted({place - 1 for place in norms} if batch_norm else places)


def _layers(state: Mapping[str, Tensor], places: Sequence[int], batch_norm: bool) -> tuple[tuple[int | str, ...], int]:
    """Channels and pools, and how many of the pools show as a gap. Raises ValueError for gaps of another kind."""
    step, layers, gaps = 3 if batch_norm else 2, [], 0
    for place, following in zip(places, [*places[1:], None]):
        layers.append(_width(state, place, following))
        gap = 0 if following is None else following - place - step
        if gap not in (0, 1):
            raise ValueError(f"{gap} modules between features.{place} and features.{following}")
        gaps += gap
        layers += [POOL] * gap
    return (*layers, POOL), gaps


def _width(state: Mapping[str, Tensor], place: int, following: int | None) -> int:
    """Channels that a convolution writes, as most of the tensors around it have them."""
    named = (f"features.{place}.weight", f"features.{place}.bias", f"features.{place + 1}.running_mean")
    votes = [state[key].shape[0] for key in named if key in state and state[key].dim()]
    behind = state.get(f"features.{following}.weight")
    if behind is not None and behind.dim() == 4:
        votes.append(behind.shape[1])
    return reading.most_common(votes)


def _classifier(state: Mapping[str, Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Places of the linear layers, none for one without a sequence; and what each of them writes."""
    found = {int(m[1]) for key in state if (m := re.fullmatch(r"classifier\.(\d{1,2})\.(weight|bias)", key))}
    names = [f"classifier.{place}" for place in sorted(found)] or ["classifier"]
    writes = [reading.most_common(state[key].shape[0] for key in (f"{n}.weight", f"{n}.bias") if key in state) for n in names]
    return tuple(sorted(found)), tuple(writes)


def _pooled(state: Mapping[str, Tensor], linears: tuple[int, ...], channels: int) -> int:
    """Positions a side that the first linear layer reads; where its weight is missing, what such classifiers read."""
    weight = state.get(f"classifier.{linears[0]}.weight" if linears else "classifier.weight")
    if weight is not None and weight.dim() == 2:
        return side(weight.shape[1] // channels)
    return IMAGENET_POOLED if len(linears) > 1 else 1


def describe(arguments: Mapping[str, Any]) -> str:
    """For instance "VGG-16, batch norm, 224 pixels, 1000 classes"."""
    layers = arguments.get("layers")
    words = f" ({reading.dashed(layers)})" if layers else ""
    norm, classes = "batch norm" if arguments.get("batch_norm") else "no batch norm", arguments.get("num_classes", 1000)
    return f"VGG-{arguments.get('depth', 16)}{words}, {norm}, {_pixels(arguments)} pixels, {classes} classes"


def _pixels(arguments: Mapping[str, Any]) -> int:
    layers = arguments.get("layers") or configuration(arguments.get("depth", 16))
    return pixels(layers, arguments.get("pooled", IMAGENET_POOLED))


def preprocessing(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """CIFAR's up to 32 pixels, else ImageNet's."""
    size = _pixels(arguments)
    fields = reading.preprocessing("cifar" if size <= 32 else "imagenet", arguments.get("num_classes", 1000))
    return fields | {"input_size": (3, size, size)}


FAMILY = Structure(
    name="VGG", arch="vgg", keys=KEYS, arguments=ARGUMENTS, recognises=recognises, read=read, build=vgg, describe=describe,
    preprocessing=preprocessing, layouts=(LINEAR,),
).family()  # fmt: skip

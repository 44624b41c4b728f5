"""Checkpoints of residual networks without batch norm: which scheme, depth and width the keys and shapes are of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foldexport.zoo import reading
from foldexport.zoo.nfresnet import BLOCKS, BOTTLENECK_DEPTHS, SCHEMES, SUM_SCALED, nfresnet
from foldexport.zoo.structure import Candidate, Structure

_BLOCK = r"layer(\d{1,3})\.(\d{1,4})"
KEYS = (
    rf"{_BLOCK}\.(conv[123]|shortcut)\.(weight|bias|gain)",
    rf"{_BLOCK}\.(sum_scale|skip_scale|residual_scale|input_std)",
    rf"{_BLOCK}\.norm[123]\.\w+",
    r"conv1\.(weight|bias|gain)", r"norm\.\w+", r"fc\.(weight|bias)",
)  # fmt: skip
# A key with this ending and none of those says which scheme; asked in this order.
_MARKS = (
    ("nf", ".gain"), ("batchnorm", ".norm1.weight"), ("rescale", ".skip_scale", ".sum_scale"),
    ("skipinit", ".residual_scale"), ("learnscalar", ".skip_scale"),
)  # fmt: skip


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Residual blocks of biased convolutions, or our names of scalars or norms, beside a plain shortcut convolution."""
    scalars = any(key.endswith((".sum_scale", ".skip_scale", ".input_std")) for key in state)
    named = any(key.endswith(".norm1.weight") for key in state) and "norm.weight" in state
    biased = "layer1.0.conv1.bias" in state and "layer1.0.conv2.bias" in state
    return "conv1.weight" in state and (scalars or named or (biased and not any(".bn" in key for key in state)))


def _scheme(state: Mapping[str, Tensor]) -> str:
    for scheme, mark, *absent in _MARKS:
        if any(key.endswith(mark) for key in state) and not any(key.endswith(tuple(absent)) for key in state if absent):
            return scheme
    return "convshort" if any(key.endswith(".1.shortcut.weight") for key in state) else "idshort"


def read(state: Mapping[str, Tensor]) -> Sequence[Candidate]:
    """The one network that keys and shapes are of; c = √½ where the file does not hold it."""
    blocks = reading.counts(state, rf"{_BLOCK}\.conv1\.weight")
    bottleneck = any(key.endswith(".conv3.weight") for key in state)
    width, _, kernel, _ = reading.shape(state, "conv1.weight")
    depths = [d for d, count in BLOCKS.items() if count == blocks and (d in BOTTLENECK_DEPTHS) == bottleneck]
    scheme, stem = _scheme(state), "imagenet" if kernel == 7 else "cifar"
    arguments = {
        "depth": depths[0] if depths else (50 if bottleneck else 18), "scheme": scheme, "width": width,
        "num_classes": reading.shape(state, "fc.weight")[0], "stem": stem, "c": math.sqrt(0.5),
        "blocks": None if depths else blocks,
    }  # fmt: skip
    scales = [float(tensor) for key, tensor in state.items() if key.endswith(".sum_scale") and tensor.numel() == 1]
    notes = ()
    if scales:
        arguments["c"] = reading.most_common(scales)
    elif scheme in SUM_SCALED:
        notes = ("c = √½, the paper's: the file does not hold it; --arch-arg c=… takes another",)
    kind = "three convolutions (bottleneck)" if bottleneck else "two convolutions"
    reason = (
        f"{_evidence(scheme, bool(scales))}; blocks of {kind}, {reading.dashed(blocks)}; "
        f"{kernel}x{kernel} stem of {width} channels: {stem}; fc has {arguments['num_classes']} rows"
    )
    return [Candidate(arguments, reason, notes)]


def _evidence(scheme: str, scaled: bool) -> str:
    return {
        "nf": "keys conv1.gain: weights standardised",
        "batchnorm": "keys norm1 and a shortcut convolution in every block",
        "rescale": "keys skip_scale and residual_scale in every block",
        "skipinit": "keys residual_scale alone",
        "learnscalar": "keys skip_scale where sizes are equal",
        "convshort": "no norm, a shortcut convolution in every block",
        "idshort": "no norm, a shortcut convolution only where sizes differ",
    }[scheme] + (", sum_scale in every block" if scaled else "")


def describe(arguments: Mapping[str, Any]) -> str:
    """For instance "ResNet-18 without batch norm, IdShort c·(x + f(x)), CIFAR, width 16, 10 classes"."""
    scheme, stem = arguments.get("scheme", "idshort"), arguments.get("stem", "cifar")
    kind = "with batch norm" if scheme == "batchnorm" else "without batch norm"
    blocks = arguments.get("blocks")
    size = f"ResNet ({reading.dashed(blocks)} blocks)" if blocks else f"ResNet-{arguments.get('depth', 18)}"
    c = arguments.get("c", math.sqrt(0.5))
    scale = f", c = {'√½' if math.isclose(c, math.sqrt(0.5), rel_tol=1e-6) else format(c, 'g')}" if scheme in SUM_SCALED else ""
    return (
        f"{size} {kind}, {scheme}: {SCHEMES.get(scheme, '?')}{scale}, {'ImageNet' if stem == 'imagenet' else 'CIFAR'}, "
        f"width {arguments.get('width', 64)}, {arguments.get('num_classes') or 10} classes"
    )


def preprocessing(arguments: Mapping[str, Any]) -> dict[str, Any]:
    stem = arguments.get("stem", "cifar")
    return reading.preprocessing(stem, arguments.get("num_classes") or (10 if stem == "cifar" else 1000))


def constants(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """c, which a file that was not written by this network's own code may leave out."""
    return {r".*\.sum_scale": torch.tensor(arguments.get("c", math.sqrt(0.5)))}


FAMILY = Structure(
    name="normalizer-free ResNet", arch="nfresnet", keys=KEYS,
    arguments=("depth", "scheme", "width", "num_classes", "stem", "c", "blocks"),
    recognises=recognises, read=read, build=nfresnet, describe=describe, preprocessing=preprocessing, constants=constants,
).family()  # fmt: skip

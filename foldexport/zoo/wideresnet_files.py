"""Checkpoints of wide residual networks: which depth, width and projection the keys and shapes are of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from foldexport.zoo import reading
from foldexport.zoo.structure import Candidate, Layout, Structure
from foldexport.zoo.wideresnet import WIDTHS, wideresnet

_BLOCK = r"(?:sub_)?group(\d{1,2})\.block(\d{1,4})"
_OWN = (rf"{_BLOCK}\.(bn[01]\.\w+|(conv[01]|convdim)\.(weight|bias))", r"conv0\.(weight|bias)", r"bn\.\w+", r"fc\.(weight|bias)")
KEYS = (
    *_OWN, r"conv0", r"group\d\.block\d+\.(conv[01]|convdim)",
    r"(sub_)?block[123]\.layer\.\d+\.(bn[12]\.\w+|(conv[12]|convShortcut)\.weight)", r"(conv1|bn1|linear|init_conv)\.\w+",
    r"layer[123]\.\d+\.(bn[12]\.\w+|(conv[12]|shortcut\.0)\.(weight|bias))", r"conv[234]\.\d+\.(residual\.\d|shortcut\.0)\.\w+",
)  # fmt: skip
ARGUMENTS = ("depth", "width", "num_classes", "projection", "strided", "bias", "blocks", "sub_group")
# What the paper's code normalises with, RGB in 0 … 1.
NORMALISATION = {"mean": (125.3 / 255, 123.0 / 255, 113.9 / 255), "std": (63.0 / 255, 62.1 / 255, 66.7 / 255)}

# The paper's code: convolutions are bare weights.
FUNCTIONAL = Layout.of("functional", r"group\d\.block\d+\.conv[01]", [
    ("conv0", "conv0.weight"),
    *((f"group#.block#.{name}", f"group#.block#.{name}.weight") for name in ("conv0", "conv1", "convdim")),
])  # fmt: skip
_STEPS = (("bn1", "bn0"), ("conv1", "conv0"), ("bn2", "bn1"), ("conv2", "conv1"))
# Modules block1 to block3; robust training has a fourth, sub_block1, that is never called.
LAYER = Layout.of("block.layer", r"block[123]\.layer\.\d+\.conv[12]\.weight", [
    ("conv1.*", "conv0.*"), ("bn1.*", "bn.*"),
    *((f"{theirs}.layer.#.{step}.*", f"{ours}.block#.{name}.*")
      for theirs, ours in [*((f"block{g + 1}", f"group{g}") for g in range(3)), ("sub_block1", "sub_group0")]
      for step, name in (*_STEPS, ("convShortcut", "convdim"))),
])  # fmt: skip
# With biases; the second convolution strides, and projections read the trunk.
BIASED = Layout.of("layer, with biases", r"layer[123]\.\d+\.shortcut\.0\.bias", [
    ("conv1.*", "conv0.*"), ("bn1.*", "bn.*"), ("linear.*", "fc.*"),
    *((f"layer{g + 1}.#.{step}.*", f"group{g}.block#.{name}.*")
      for g in range(3) for step, name in (*_STEPS, ("shortcut.0", "convdim"))),
], {"projection": "trunk", "strided": 2})  # fmt: skip
# With biases, as unnamed sequences: batch norm, ReLU, convolution, batch norm, ReLU, dropout, convolution.
SEQUENTIAL = Layout.of("residual", r"conv[234]\.\d+\.residual\.\d\.\w+", [
    ("init_conv.*", "conv0.*"), ("linear.*", "fc.*"),
    *((f"conv{g + 2}.#.{step}.*", f"group{g}.block#.{name}.*") for g in range(3) for step, name in (
        ("residual.0", "bn0"), ("residual.2", "conv0"), ("residual.3", "bn1"), ("residual.6", "conv1"), ("shortcut.0", "convdim"))),
], {"projection": "trunk", "strided": 1})  # fmt: skip


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Groups of blocks bn0, conv0, bn1, conv1 whose batch norms stand in front, and hardly another key."""
    pattern = re.compile("|".join(_OWN))
    ours = sum(pattern.fullmatch(key) is not None for key in state)
    weights = [key for key in state if re.fullmatch(rf"{_BLOCK}\.conv[01]\.weight", key)]
    return bool(weights) and ours >= 0.9 * len(state) and _norms_in_front(state, weights)


def _norms_in_front(state: Mapping[str, Tensor], weights: Sequence[str]) -> bool:
    """Whether batch norms have the channels that their convolution reads, as most say whose two sides differ."""
    votes = []
    for key in weights:
        norm = state.get(key.replace("conv", "bn"))
        if norm is not None and state[key].dim() == 4 and state[key].shape[0] != state[key].shape[1]:
            votes.append(norm.shape[:1] == state[key].shape[1:2])
    return bool(votes) and reading.most_common(votes)


def read(state: Mapping[str, Tensor]) -> Sequence[Candidate]:
    """The one network of the keys and shapes; with biases every form that such networks are published in."""
    blocks = reading.counts(state, rf"(?!sub_){_BLOCK}\.(?:conv|bn)[01]\.\w+")
    width = reading.most_common(_widths(state))
    depth = 2 * sum(blocks) + 4
    head = state.get("fc.weight", state.get("fc.bias"))
    arguments = {
        "depth": depth, "width": int(width) if width == int(width) else width, "num_classes": 10 if head is None else head.shape[0],
        "bias": any(key.endswith((".conv0.bias", ".conv1.bias")) for key in state),
        "blocks": None if len(set(blocks)) == 1 and len(blocks) == len(WIDTHS) else blocks,
        "sub_group": any(key.startswith("sub_group0.") for key in state),
    }  # fmt: skip
    reason = (
        f"batch norms in front of the convolutions; {reading.dashed(blocks)} blocks of two: depth {depth}; groups of "
        f"{reading.dashed(int(base * width) for base in WIDTHS)} channels where width 1 has {reading.dashed(WIDTHS)}; "
        f"convolutions {'with' if arguments['bias'] else 'without'} biases; the last layer has {arguments['num_classes']} rows"
    )
    notes = ("the file has a second first group that its network never calls: it is left out of what is exported",)
    kept = notes if arguments["sub_group"] else ()
    if not arguments["bias"]:
        return [Candidate({**arguments, "projection": "activation", "strided": 1}, reason, kept)]
    return [
        Candidate({**arguments, "projection": projection, "strided": strided}, reason, (*kept, _form_note(projection, strided)))
        for projection, strided in (("trunk", 2), ("trunk", 1), ("activation", 1))
    ]


def _form_note(projection: str, strided: int) -> str:
    return (
        "no key says what the 1x1 convolutions read and which convolution of a block strides: "
        f"the {projection} and number {strided} unless --arch-arg projection=…, strided=…"
    )


def _widths(state: Mapping[str, Tensor]) -> list[float]:
    """What every convolution of a block says of the width."""
    found = []
    for key, tensor in state.items():
        match = re.fullmatch(rf"{_BLOCK}\.conv[01]\.weight", key)
        if match and tensor.dim() == 4 and int(match[1]) < len(WIDTHS):
            found.append(tensor.shape[0] / WIDTHS[int(match[1])])
    return found


def describe(arguments: Mapping[str, Any]) -> str:
    """For instance "WRN-28-10, CIFAR, 10 classes"."""
    blocks = arguments.get("blocks")
    parts = [
        f"WRN-{arguments.get('depth', 28)}-{arguments.get('width', 10):g}", f"{reading.dashed(blocks)} blocks" if blocks else "",
        "CIFAR", "biases, projections of the trunk" if arguments.get("projection") == "trunk" else "",
        "strides in the second convolution" if arguments.get("strided") == 2 else "", f"{arguments.get('num_classes', 10)} classes",
    ]  # fmt: skip
    return ", ".join(part for part in parts if part)


def preprocessing(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return reading.preprocessing("cifar", arguments.get("num_classes", 10)) | NORMALISATION


FAMILY = Structure(
    name="wide ResNet", arch="wideresnet", keys=KEYS, arguments=ARGUMENTS, recognises=recognises, read=read, build=wideresnet,
    describe=describe, preprocessing=preprocessing, layouts=(FUNCTIONAL, LAYER, BIASED, SEQUENTIAL),
).family()  # fmt: skip

"""Checkpoints of MobileOne, trained and deployed: which variant the keys and shapes are of.

The authors' names (`stage0.rbr_conv.0`, deployed `reparam_conv`), those of timm (`stem.conv_kxk.0`, deployed `reparam_conv`),
and those of a folded network, where the first branch's convolution has become biased.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from foldexport.zoo import reading
from foldexport.zoo.mobileone import BLOCKS, VARIANTS, mobileone
from foldexport.zoo.structure import Candidate, Layout, Structure

_BLOCK = r"stage([1-9])\.(\d{1,4})"
_BRANCHES = r"(?:rbr_(?:conv\.\d{1,3}|scale)\.(?:conv|bn)|rbr_skip|reparam_conv)\.\w+"
KEYS = (
    rf"(stage0|{_BLOCK})\.({_BRANCHES}|se\.(reduce|expand)\.(weight|bias))", r"linear\.(weight|bias)",
    r"(stem|stages\.\d\.\d{1,4})\.(conv_kxk\.\d{1,3}\.(conv|bn)|conv_scale\.(conv|bn)|identity|reparam_conv|attn\.fc[12])\.\w+",
    r"head\.fc\.(weight|bias)",
)  # fmt: skip
ARGUMENTS = ("name", "num_classes", "deploy", "blocks", "widths", "branches", "se")
_TIMM_NAMES = (
    ("conv_kxk", "rbr_conv"), ("conv_scale", "rbr_scale"), ("identity", "rbr_skip"), ("reparam_conv", "reparam_conv"),
    ("attn.fc1", "se.reduce"), ("attn.fc2", "se.expand"),
)  # fmt: skip
TIMM = Layout.of(
    "timm", r"stem\.(conv_kxk\.\d+\.(conv|bn)|reparam_conv)\.\w+",
    [
        *((f"stem.{theirs}.*", f"stage0.{ours}.*") for theirs, ours in _TIMM_NAMES),
        *((f"stages.{s}.#.{theirs}.*", f"stage{s + 1}.#.{ours}.*") for s in range(9) for theirs, ours in _TIMM_NAMES),
        ("head.fc.*", "linear.*"),
    ],
)  # fmt: skip
FOLDED = Layout.of("folded", r"stage0\.rbr_conv\.0\.conv\.bias", [
    (f"*.rbr_conv.0.conv.{leaf}", f"*.reparam_conv.{leaf}") for leaf in ("weight", "bias")
])  # fmt: skip


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Blocks of numbered stages with MobileOne's branches, 1x1 convolutions among them: RepVGG has none when deployed."""
    block = re.compile(rf"{_BLOCK}\.{_BRANCHES}")
    pointwise = any(tensor.shape[2:] == (1, 1) for key, tensor in state.items() if block.fullmatch(key))
    return pointwise and sum(block.fullmatch(key) is not None for key in state) > 1


def read(state: Mapping[str, Tensor]) -> Sequence[Candidate]:
    """The one network that keys and shapes are of."""
    blocks = tuple(-(-modules // 2) for modules in reading.counts(state, rf"{_BLOCK}\..+"))  # depthwise, pointwise
    widths = tuple(_width(state, stage) for stage in range(1, len(blocks) + 1))
    se = tuple(_gated(state, stage, count) for stage, count in enumerate(blocks, 1))
    deploy = sum("reparam_conv" in key for key in state) > sum("rbr_conv" in key for key in state)
    branches = None if deploy else _branches(state)
    name = next((name for name in VARIANTS if _is(name, blocks, widths, branches, se)), None)
    own = {"blocks": blocks, "widths": widths, "branches": branches, "se": se}
    arguments = {"name": name} if name else {key: value for key, value in own.items() if value is not None}
    head = state["linear.weight"] if "linear.weight" in state else state["linear.bias"]
    arguments |= {"num_classes": head.shape[0], "deploy": deploy}
    sums = "one biased convolution in every block, branches merged" if deploy else f"{branches} + 1 branches in depthwise blocks"
    gates = f", squeeze-and-excitation in the last {reading.dashed(se)} of a stage's blocks" if any(se) else ""
    reason = (
        f"{sums}{gates}; {reading.dashed(blocks)} pairs of depthwise and pointwise blocks of {reading.dashed(widths)} channels: "
        f"{_called(arguments) if name else 'no published variant'}; the linear layer has {head.shape[0]} rows"
    )
    return [Candidate(arguments, reason, ("stem with stride 2, as published: no key says it",))]


def _width(state: Mapping[str, Tensor], stage: int) -> int:
    """The channels that most tensors of the stage's pointwise blocks have; raises IndexError where there is none."""
    pointwise = re.compile(rf"stage{stage}\.\d*[13579]\.{_BRANCHES}")
    return reading.most_common(tensor.shape[0] for key, tensor in state.items() if tensor.dim() and pointwise.fullmatch(key))


def _gated(state: Mapping[str, Tensor], stage: int, count: int) -> int:
    """How many of the stage's last pairs squeeze and excite."""
    matches = (re.fullmatch(rf"stage{stage}\.(\d+)\.se\..+", key) for key in state)
    return count - min((int(match[1]) // 2 for match in matches if match), default=count)


def _branches(state: Mapping[str, Tensor]) -> int:
    """Convolution branches of most blocks; raises IndexError where there is none."""
    highest: dict[str, int] = {}
    for key in state:
        if match := re.fullmatch(rf"({_BLOCK})\.rbr_conv\.(\d+)\..+", key):
            highest[match[1]] = max(highest.get(match[1], 0), int(match[4]) + 1)
    return reading.most_common(highest.values())


def _is(name: str, blocks: tuple[int, ...], widths: tuple[int, ...], branches: int | None, se: tuple[int, ...]) -> bool:
    variant = VARIANTS[name]
    same = (BLOCKS, variant.widths, variant.se) == (blocks, widths, se)
    return same and branches in (variant.branches, None)


def _called(arguments: Mapping[str, Any]) -> str:
    """ "MobileOne-S0", or the sizes of one that was not published."""
    name = arguments.get("name") or "S0"
    variant = VARIANTS.get(name, VARIANTS["S0"])
    own = {key: arguments[key] for key in ("blocks", "widths", "branches", "se") if arguments.get(key) is not None}
    if not own:
        return f"MobileOne-{name}"
    se = own.get("se", ())
    parts = [f"{_listed(own.get('blocks', BLOCKS))} blocks", f"channels {_listed(own.get('widths', variant.widths))}"]
    parts += [f"{own['branches']} branches"] if "branches" in own else []
    parts += [f"squeeze-and-excitation {_listed(se)}"] if isinstance(se, Sequence) and any(se) else []
    return ", ".join(["MobileOne", *parts])


def _listed(numbers: Any) -> str:
    return reading.dashed(numbers) if isinstance(numbers, Sequence) else str(numbers)


def describe(arguments: Mapping[str, Any]) -> str:
    """For instance "MobileOne-S0, training graph, 1000 classes"."""
    state = "deployed" if arguments.get("deploy") else "training graph"
    return f"{_called(arguments)}, {state}, {arguments.get('num_classes', 1000)} classes"


def preprocessing(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """That of timm's files: S0 is tested on a crop of 0.875, the others of 0.9."""
    small = arguments.get("name", "S0") == "S0"
    return reading.preprocessing("imagenet", arguments.get("num_classes", 1000)) | ({} if small else {"crop_pct": 0.9})


FAMILY = Structure(
    name="MobileOne", arch="mobileone", keys=KEYS, arguments=ARGUMENTS, recognises=recognises, read=read, build=mobileone,
    describe=describe, preprocessing=preprocessing, layouts=(TIMM, FOLDED),
).family()  # fmt: skip

"""Checkpoints of RepVGG, trained and deployed: which variant the keys and shapes are of.

The authors' names (`stage0.rbr_dense`, deployed `rbr_reparam`), those of timm (`stem.conv_kxk`, deployed `reparam_conv`), and
those of a folded network, where the first branch's convolution has become biased.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foldexport.zoo import reading
from foldexport.zoo.repvgg import STEM_WIDTH, VARIANTS, groups_of_blocks, repvgg
from foldexport.zoo.structure import Candidate, Layout, Structure

_BLOCK = r"stage([1-9])\.(\d{1,4})"
_BRANCHES = r"(?:rbr_(?:dense|1x1)\.(?:conv|bn)|rbr_identity|rbr_reparam)\.\w+"
KEYS = (
    rf"(stage0|{_BLOCK})\.({_BRANCHES}|se\.(down|up)\.(weight|bias))", r"linear\.(weight|bias)", "stem_stride",
    r"(stem|stages\.\d\.\d{1,4})\.(conv_(kxk|1x1)\.(conv|bn)|identity|reparam_conv|attn\.fc[12])\.\w+", r"head\.fc\.(weight|bias)",
)  # fmt: skip
ARGUMENTS = ("name", "num_classes", "stem", "deploy", "blocks", "widths", "groups", "se")
_TIMM_NAMES = (
    ("conv_kxk", "rbr_dense"), ("conv_1x1", "rbr_1x1"), ("identity", "rbr_identity"), ("reparam_conv", "rbr_reparam"),
    ("attn.fc1", "se.down"), ("attn.fc2", "se.up"),
)  # fmt: skip
TIMM = Layout.of(
    "timm", r"stem\.(conv_kxk\.(conv|bn)|reparam_conv)\.\w+",
    [
        *((f"stem.{theirs}.*", f"stage0.{ours}.*") for theirs, ours in _TIMM_NAMES),
        *((f"stages.{s}.#.{theirs}.*", f"stage{s + 1}.#.{ours}.*") for s in range(9) for theirs, ours in _TIMM_NAMES),
        ("head.fc.*", "linear.*"),
    ],
    {"stem": "imagenet"},  # timm's stem of this kind has no other stride
)  # fmt: skip
FOLDED = Layout.of("folded", r"stage0\.rbr_dense\.conv\.bias", [
    (f"*.rbr_dense.conv.{leaf}", f"*.rbr_reparam.{leaf}") for leaf in ("weight", "bias")
])  # fmt: skip


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Blocks of numbered stages with branches rbr_…, and no 1x1 convolution among deployed ones, as MobileOne has."""
    block = re.compile(rf"{_BLOCK}\.{_BRANCHES}")
    pointwise = any(key.endswith("rbr_reparam.weight") and tensor.shape[2:] == (1, 1) for key, tensor in state.items())
    return not pointwise and sum(block.fullmatch(key) is not None for key in state) > 1


def read(state: Mapping[str, Tensor]) -> Sequence[Candidate]:
    """The one network that keys and shapes are of, with either stem where nothing says which."""
    blocks = reading.counts(state, rf"{_BLOCK}\..+")
    widths = tuple(_width(state, stage) for stage in range(1, len(blocks) + 1))
    se = any(".se." in key for key in state)
    deploy = sum("rbr_reparam" in key for key in state) > sum("rbr_dense" in key for key in state)
    found = _groups(state, blocks, widths)
    name = next((name for name in VARIANTS if _is(name, blocks, widths, found, se)), None)
    groups = _shortest(found)
    arguments = {"name": name} if name else {"blocks": blocks, "widths": widths, "groups": groups, "se": se}
    head = state["linear.weight"] if "linear.weight" in state else state["linear.bias"]
    arguments |= {"num_classes": head.shape[0], "deploy": deploy}
    reason = (
        f"{_evidence(deploy, se, groups)}; {reading.dashed(blocks)} blocks of {reading.dashed(widths)} channels: "
        f"{_called(arguments) if name else 'no published variant'}; the linear layer has {head.shape[0]} rows"
    )
    if "stem_stride" in state:
        stride = int(state["stem_stride"])
        stem = "cifar" if stride == 1 else "imagenet"
        return [Candidate({**arguments, "stem": stem}, f"{reason}; stem_stride is {stride}")]
    if name and head.shape[0] == 1000:
        return [Candidate({**arguments, "stem": "imagenet"}, reason, ("stem with stride 2, as published: no key says it",))]
    return [Candidate({**arguments, "stem": stem}, reason) for stem in ("imagenet", "cifar")]


def _width(state: Mapping[str, Tensor], stage: int) -> int:
    """The channels that most tensors of the stage's branches have; raises IndexError where there is none."""
    branch = re.compile(rf"stage{stage}\.\d+\.{_BRANCHES}")
    return reading.most_common(tensor.shape[0] for key, tensor in state.items() if tensor.dim() and branch.fullmatch(key))


def _groups(state: Mapping[str, Tensor], blocks: Sequence[int], widths: Sequence[int]) -> tuple[int | None, ...]:
    """Groups of each block, from the channels that its filters read; None where they do not say."""
    found: list[int | None] = []
    reads = min(STEM_WIDTH, widths[0])
    for s, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
        for b in range(count):
            keys = (f"stage{s}.{b}.rbr_{branch}.weight" for branch in ("reparam", "dense.conv", "1x1.conv"))
            sizes = {state[key].shape[1] for key in keys if key in state and state[key].dim() == 4}
            size = sizes.pop() if len(sizes) == 1 else 0
            found.append(reads // size if size and reads % size == 0 else None)
            reads = width
    return tuple(found)


def _agrees(groups: Sequence[int], found: Sequence[int | None]) -> bool:
    return all(theirs in (ours, None) for ours, theirs in zip(groups, found, strict=True))


def _is(name: str, blocks: tuple[int, ...], widths: tuple[int, ...], found: Sequence[int | None], se: bool) -> bool:
    variant = VARIANTS[name]
    same = (variant.blocks, variant.widths, variant.se) == (blocks, widths, se)
    return same and _agrees(groups_of_blocks(variant.groups, len(found)), found)


def _shortest(found: Sequence[int | None]) -> int | tuple[int, ...]:
    """The groups of every second layer where that says it all, else of each block."""
    numbers = sorted({1, *(each for each in found if each)})
    each = tuple(number or 1 for number in found)
    return next((number for number in numbers if _agrees(groups_of_blocks(number, len(found)), found)), each)


def _evidence(deploy: bool, se: bool, groups: int | Sequence[int]) -> str:
    branches = "one biased 3x3 convolution in every block, branches merged" if deploy else "a 3x3 and a 1x1 branch in every block"
    gates = ", squeeze-and-excitation" if se else ""
    if not isinstance(groups, int):
        return f"{branches}{gates}, groups {reading.dashed(groups)}"
    return f"{branches}{gates}" + (f", every second layer in {groups} groups" if groups > 1 else "")


def _called(arguments: Mapping[str, Any]) -> str:
    """ "RepVGG-A0", or the sizes of one that was not published."""
    own = [key for key in ("blocks", "widths", "groups", "se") if arguments.get(key) is not None]
    name = arguments.get("name") or "A0"
    if not own:
        return f"RepVGG-{name}"
    variant = VARIANTS.get(name, VARIANTS["A0"])
    sizes = {key: arguments[key] if key in own else getattr(variant, key) for key in ("blocks", "widths", "groups", "se")}
    groups = sizes["groups"]
    parts = ["RepVGG", f"{_listed(sizes['blocks'])} blocks", f"channels {_listed(sizes['widths'])}"]
    parts += [f"groups {_listed(groups)}"] if groups != 1 else []
    return ", ".join([*parts, "squeeze-and-excitation"] if sizes["se"] else parts)


def _listed(numbers: Any) -> str:
    return reading.dashed(numbers) if isinstance(numbers, Sequence) else str(numbers)


def describe(arguments: Mapping[str, Any]) -> str:
    """For instance "RepVGG-A0, training graph, ImageNet stem, 1000 classes"."""
    stem = arguments.get("stem", "imagenet")
    classes = arguments.get("num_classes") or (10 if stem == "cifar" else 1000)
    state = "deployed" if arguments.get("deploy") else "training graph"
    return f"{_called(arguments)}, {state}, {'CIFAR' if stem == 'cifar' else 'ImageNet'} stem, {classes} classes"


def preprocessing(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """That of the authors' test script; D2se is tested at 320x320, without a crop."""
    stem = arguments.get("stem", "imagenet")
    fields = reading.preprocessing(stem, arguments.get("num_classes") or (10 if stem == "cifar" else 1000))
    large = {"input_size": (3, 320, 320), "crop_pct": 1.0} if arguments.get("name") == "D2se" and stem == "imagenet" else {}
    return fields | large


def constants(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The marker of a CIFAR stem, which other code does not write."""
    return {"stem_stride": torch.tensor(1)} if arguments.get("stem") == "cifar" else {}


FAMILY = Structure(
    name="RepVGG", arch="repvgg", keys=KEYS, arguments=ARGUMENTS, recognises=recognises, read=read, build=repvgg,
    describe=describe, preprocessing=preprocessing, layouts=(TIMM, FOLDED), constants=constants,
).family()  # fmt: skip

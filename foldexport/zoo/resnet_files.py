"""Checkpoints of residual networks: which depth, width, stem and shortcut the keys and shapes are of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from foldexport.zoo import reading
from foldexport.zoo.resnet import BASE_WIDTH, BLOCKS, BOTTLENECK_DEPTHS, EXPANSION, HEADS, SHORTCUTS, default_width, resnet
from foldexport.zoo.structure import Candidate, Layout, Structure

_BLOCK = r"layer(\d{1,3})\.(\d{1,4})"
_OWN = (
    r"conv1\.(weight|bias)", r"bn1\.\w+", rf"{_BLOCK}\.(conv[123]\.(weight|bias)|bn[123]\.\w+)",
    rf"{_BLOCK}\.(downsample|shortcut)\.(0\.(weight|bias)|1\.\w+)", r"(fc|linear)\.(weight|bias)",
)  # fmt: skip
KEYS = (*_OWN, r"conv1\.[01]\.\w+", r"conv[2-5]_x\.\d+\.(residual_function|shortcut)\.\d\.\w+",
        r"conv0\.(weight|bias)", r"group\d\.block\d+\.conv(\d|_dim)\.(weight|bias)")  # fmt: skip
ARGUMENTS = (
    "depth", "num_classes", "stem", "shortcut", "groups", "width_per_group", "stride_in_1x1", "width", "stem_width",
    "bottleneck", "blocks", "batch_norm", "bias", "projection_bias", "head",
)  # fmt: skip
MAX_STAGES = 6

_STRIDE_NOTE = (
    "no key says which convolution of a bottleneck strides: its 3x3, as in torchvision, "
    "unless --arch-arg stride_in_1x1=true (its first 1x1, as in Caffe)"
)
_PAD_NOTE = (
    "no key says where shortcuts without parameters put their zeros: on both sides of the channels, as in the code that calls "
    "its last layer `linear`, unless --arch-arg shortcut=pad_behind"
)

# Blocks as torchvision names them, but for the projection.
SHORTCUT = Layout.of("shortcut", rf"{_BLOCK}\.shortcut\.[01]\.\w+", [("layer#.#.shortcut.*", "layer#.#.downsample.*")])
# Stem and branches as unnamed sequences: convolution, batch norm, ReLU, convolution, batch norm, …
SEQUENTIAL = Layout.of(
    "residual_function", r"conv[2-5]_x\.\d+\.residual_function\.\d\.\w+",
    [
        ("conv1.0.*", "conv1.*"), ("conv1.1.*", "bn1.*"),
        *((f"conv{s + 1}_x.#.residual_function.{3 * i + place}.*", f"layer{s}.#.{name}{i + 1}.*")
          for s in range(1, 5) for i in range(3) for place, name in enumerate(("conv", "bn"))),
        *((f"conv{s + 1}_x.#.shortcut.*", f"layer{s}.#.downsample.*") for s in range(1, 5)),
    ],
)  # fmt: skip
# The published WRN-50-2-bottleneck, its batch norms folded.
GROUPS = Layout.of(
    "group", r"group\d\.block\d+\.conv_dim\.weight",
    [
        ("conv0.*", "conv1.*"),
        *((f"group{s}.block#.conv{i}.*", f"layer{s + 1}.#.conv{i + 1}.*") for s in range(4) for i in range(3)),
        *((f"group{s}.block#.conv_dim.*", f"layer{s + 1}.#.downsample.0.*") for s in range(4)),
    ],
)  # fmt: skip


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Blocks conv1, bn1, conv2, bn2 whose projection has a batch norm, or that have none and norm what they convolved."""
    if not any(re.fullmatch(rf"{_BLOCK}\.conv1\.weight", key) for key in state) or not _mostly_ours(state):
        return False
    projections = [key for key in state if re.fullmatch(rf"{_BLOCK}\.downsample\..+", key)]
    if not any(".bn" in key for key in state):
        return bool(projections) and any(re.fullmatch(rf"{_BLOCK}\.conv1\.bias", key) for key in state)
    if projections:
        return any(re.fullmatch(rf"{_BLOCK}\.downsample\.1\.\w+", key) and state[key].dim() == 1 for key in projections)
    return any(key.startswith("bn1.") for key in state) and _norms_behind(state)


def _mostly_ours(state: Mapping[str, Tensor]) -> bool:
    """Of the keys nine in ten have a name of this family: others hold gates, attention, deeper stems."""
    pattern = re.compile("|".join(_OWN))
    return sum(pattern.fullmatch(key) is not None for key in state) >= 0.9 * len(state)


def _norms_behind(state: Mapping[str, Tensor]) -> bool:
    """Whether batch norms have the channels that their convolution writes, as most of those say whose two sides differ."""
    votes = []
    for key, weight in _weights(state, r"[123]"):
        norm = state.get(key.replace(".conv", ".bn"))
        if norm is not None and weight.shape[0] != weight.shape[1]:
            votes.append(norm.shape[:1] == weight.shape[:1])
    return bool(votes) and reading.most_common(votes)


def _weights(state: Mapping[str, Tensor], number: str) -> Iterator[tuple[str, Tensor]]:
    """Weights of the blocks' convolutions of that number, a regular expression."""
    for key, tensor in state.items():
        if re.fullmatch(rf"{_BLOCK}\.conv{number}\.weight", key) and tensor.dim() == 4 and tensor.numel():
            yield key, tensor


def read(state: Mapping[str, Tensor]) -> Sequence[Candidate]:
    """The network that the keys and shapes are of; two where nothing says where option A puts its zeros."""
    blocks = reading.counts(state, rf"{_BLOCK}\.(?:conv|bn)\d\.\w+")
    if len(blocks) > MAX_STAGES:
        raise ValueError(f"{len(blocks)} stages")
    bottleneck = any(re.fullmatch(rf"{_BLOCK}\.conv3\.weight", key) for key in state)
    kernel, stem_width = _stem(state, blocks)
    stem = "imagenet" if kernel == 7 else "cifar"
    width, groups, width_per_group = _widths(state, bottleneck)
    head = next((name for name in HEADS if f"{name}.weight" in state or f"{name}.bias" in state), None)
    depth, standard = _depth(blocks, stem, bottleneck)
    arguments = {
        "depth": depth, "num_classes": _rows(state, head), "stem": stem, "groups": groups, "width_per_group": width_per_group,
        "stride_in_1x1": False, "width": width, "stem_width": stem_width or width, "bottleneck": bottleneck,
        "blocks": None if standard else blocks, "batch_norm": any(".bn" in key for key in state),
        "bias": any(key.endswith(".conv1.bias") for key in state),
        "projection_bias": any(key.endswith(".downsample.0.bias") for key in state), "head": head or "fc",
    }  # fmt: skip
    notes = [_STRIDE_NOTE] if bottleneck else []
    if head is None:
        notes.append("the file has no fc and no linear: the network gives the pooled features")
    reason = _reason(arguments, kernel, blocks, head)
    return [
        Candidate({**arguments, "shortcut": shortcut}, f"{reason}; {evidence}", (*notes, *more))
        for shortcut, evidence, *more in _shortcuts(state, head)
    ]


def _shortcuts(state: Mapping[str, Tensor], head: str | None) -> list[tuple[str, ...]]:
    """Shortcut, what says so, and the note that it needs."""
    if any(re.fullmatch(rf"{_BLOCK}\.downsample\.0\.\w+", key) for key in state):
        normed = any(re.fullmatch(rf"{_BLOCK}\.downsample\.1\.\w+", key) for key in state)
        return [("projection", "a 1x1 convolution and a batch norm where sizes change" if normed else "1x1 convolutions")]
    evidence = "no parameters where sizes change: zero padded channels"
    if head == "linear":
        return [("pad_both", evidence, _PAD_NOTE)]
    return [("pad_both", evidence), ("pad_behind", evidence)]


def _stem(state: Mapping[str, Tensor], blocks: tuple[int, ...]) -> tuple[int, int | None]:
    """Kernel size and channels of the stem; where its weight is missing, what such stages stand behind."""
    weight = state.get("conv1.weight")
    if weight is not None and weight.dim() == 4:
        return weight.shape[-1], weight.shape[0]
    return 3 if len(blocks) == 3 else 7, None


def _widths(state: Mapping[str, Tensor], bottleneck: bool) -> tuple[int, int, float]:
    """Channels of the first stage, groups and channels of a group, as most blocks have them, halved per stage."""

    def first(number: int, axis: int) -> Iterator[float]:
        for key, weight in _weights(state, str(number)):
            yield weight.shape[axis] / 2 ** (int(re.match(_BLOCK, key)[1]) - 1)

    if not bottleneck:
        return int(reading.most_common(first(2, 0))), 1, BASE_WIDTH
    width = int(reading.most_common(first(3, 0))) // EXPANSION
    groups = reading.most_common(weight.shape[0] // weight.shape[1] for _, weight in _weights(state, "2"))
    per_group = reading.most_common(first(2, 0)) * BASE_WIDTH / (groups * width)
    return width, groups, int(per_group) if per_group == int(per_group) else per_group


def _rows(state: Mapping[str, Tensor], head: str | None) -> int:
    rows = state.get(f"{head}.weight", state.get(f"{head}.bias"))
    return rows.shape[0] if rows is not None and rows.dim() else 0


def _depth(blocks: tuple[int, ...], stem: str, bottleneck: bool) -> tuple[int, bool]:
    """The convolutions of blocks and stem and the linear layer, and whether the constructor makes these blocks of it."""
    depth = sum(blocks) * (3 if bottleneck else 2) + 2
    if depth in BLOCKS:
        return depth, BLOCKS[depth] == blocks and (depth in BOTTLENECK_DEPTHS) == bottleneck
    return depth, stem == "cifar" and len(blocks) == 3 and len(set(blocks)) == 1


def _reason(arguments: Mapping[str, Any], kernel: int, blocks: tuple[int, ...], head: str | None) -> str:
    inside = ""
    if arguments["bottleneck"]:
        inside = f", the 3x3 of {arguments['groups']} groups of {arguments['width_per_group']:g} channels at width {BASE_WIDTH}"
    return (
        f"{reading.dashed(blocks)} blocks of {'three' if arguments['bottleneck'] else 'two'} convolutions: "
        f"depth {arguments['depth']}; {kernel}x{kernel} stem of {arguments['stem_width']} channels: {_dataset(arguments['stem'])}; "
        f"stages from width {arguments['width']}{inside}; "
        f"batch norms {'behind the convolutions' if arguments['batch_norm'] else 'nowhere, but biases'}; "
        + (f"{head} has {arguments['num_classes']} rows" if head else "no last layer")
    )


def _dataset(stem: str) -> str:
    return "ImageNet" if stem == "imagenet" else "CIFAR"


def describe(arguments: Mapping[str, Any]) -> str:
    """For instance "ResNeXt-50 32x4d, ImageNet, 1000 classes"."""
    depth, stem = arguments.get("depth", 50), arguments.get("stem", "imagenet")
    groups, per_group = arguments.get("groups", 1), arguments.get("width_per_group", BASE_WIDTH)
    blocks, width = arguments.get("blocks"), arguments.get("width")
    name = f"ResNet-{depth}"
    if groups > 1:
        name = f"ResNeXt-{depth} {groups}x{per_group:g}d"
    elif per_group != BASE_WIDTH:
        name = f"wide ResNet-{depth}-{per_group / BASE_WIDTH:g}"
    parts = [name, f"{reading.dashed(blocks)} blocks" if blocks else "", _dataset(stem)]
    stages = blocks or BLOCKS.get(depth, (1, 1, 1))
    parts.append(f"width {width}" if width and width != default_width(stages, stem) else "")
    parts.append("strides in the 1x1" if arguments.get("stride_in_1x1") else "")
    if (shortcut := arguments.get("shortcut", "projection")) != "projection":
        parts.append(f"shortcuts without parameters ({SHORTCUTS.get(shortcut, '?')})")
    parts.append("" if arguments.get("batch_norm", True) else "batch norms folded")
    classes = _classes(arguments)
    parts.append(f"{classes} classes" if classes else "no last layer")
    return ", ".join(part for part in parts if part)


def _classes(arguments: Mapping[str, Any]) -> int:
    stated = arguments.get("num_classes")
    return stated if stated is not None else 10 if arguments.get("stem") == "cifar" else 1000


def preprocessing(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return reading.preprocessing(arguments.get("stem", "imagenet"), _classes(arguments))


FAMILY = Structure(
    name="ResNet", arch="resnet", keys=KEYS, arguments=ARGUMENTS, recognises=recognises, read=read, build=resnet,
    describe=describe, preprocessing=preprocessing, layouts=(SHORTCUT, SEQUENTIAL, GROUPS),
).family()  # fmt: skip

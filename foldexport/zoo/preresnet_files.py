"""Checkpoints of pre-activation residual networks: which order, shortcut and size the keys and shapes are of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from foldexport.zoo import reading
from foldexport.zoo.preresnet import EXPANSION, IMAGENET_BLOCKS, ORDERS, SHORTCUTS, preresnet
from foldexport.zoo.structure import Candidate, Layout, Structure

_BLOCK = r"layer(\d{1,3})\.(\d{1,4})"
KEYS = (
    rf"{_BLOCK}\.(conv|bn)[123]\.\w+", rf"{_BLOCK}\.(shortcut|downsample)\.0\.weight",
    rf"{_BLOCK}\.(shortcut_scale|residual_scale)", rf"{_BLOCK}\.(gate|conv_shortcut)\.(weight|bias)",
    r"conv1\.weight", r"bn1?\.\w+", r"(fc|linear)\.(weight|bias)",
)  # fmt: skip
ARGUMENTS = (
    "depth", "order", "shortcut", "projection", "width", "num_classes", "stem", "bottleneck", "blocks", "stem_width", "last_norm",
)  # fmt: skip
# Published code names the last layer "linear" (where nothing stands in front of the pooling) or "fc".
LINEAR = Layout("linear", r"linear\.weight", ((r"linear\.(weight|bias)", r"fc.\1"),))


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Blocks conv1, bn1, conv2, bn2 whose projection, if there is one, has no batch norm."""
    blocks = any(key.startswith("layer1.0.bn1.") for key in state) and any(key.startswith("layer1.0.conv1.") for key in state)
    post = any(key.endswith(("downsample.1.weight", "shortcut.1.weight")) for key in state)
    return blocks and not post and (_full(state) or _settled(state) or _projection(state) != "pad")


def _full(state: Mapping[str, Tensor]) -> bool | None:
    """Whether the batch norms stand in front of the convolutions, as most that change the channels say; None: none does."""
    votes = [front for front, behind in _norm_sizes(state) if front != behind]
    return reading.most_common(votes) if votes else None


def _norm_sizes(state: Mapping[str, Tensor]) -> Iterator[tuple[bool, bool]]:
    """For every batch norm of a block: whether it has the channels that its convolution reads, and those it writes."""
    for key, tensor in state.items():
        if ".conv" in key and key.endswith(".weight") and key.startswith("layer") and tensor.dim() == 4:
            norm = state.get(key.replace(".conv", ".bn"))
            if norm is not None and norm.dim() == 1:
                yield norm.shape[0] == tensor.shape[1], norm.shape[0] == tensor.shape[0]


def _settled(state: Mapping[str, Tensor]) -> bool:
    """Whether a key that only such networks have is there: of a gate, a scaling, a shortcut convolution."""
    return any(key.endswith((".shortcut_scale", ".gate.weight", ".conv_shortcut.weight")) for key in state)


def _projection(state: Mapping[str, Tensor]) -> str:
    if any(key.endswith(".shortcut.0.weight") for key in state):
        return "activation"
    return "trunk" if any(key.endswith(".downsample.0.weight") for key in state) else "pad"


def read(state: Mapping[str, Tensor]) -> Sequence[Candidate]:
    """Every network that has such keys and shapes: the place of the batch norms is visible, that of the ReLUs is not."""
    blocks = reading.counts(state, rf"{_BLOCK}\.conv1\.weight")
    stem_width, _, kernel, _ = reading.shape(state, "conv1.weight")
    bottleneck = any(key.endswith(".conv3.weight") for key in state)
    width = reading.shape(state, "layer1.0.conv1.weight")[0]
    stem = "imagenet" if kernel == 7 else "cifar"
    depth, standard = _depth(blocks, stem, bottleneck)
    base = {
        "depth": depth, "projection": _projection(state), "width": width,
        "num_classes": reading.shape(state, "fc.weight")[0], "stem": stem, "bottleneck": bottleneck,
        "blocks": None if standard else blocks, "stem_width": stem_width, "last_norm": any(key.startswith("bn.") for key in state),
    }  # fmt: skip
    full = _full(state)
    orders = [order for order in ORDERS if full is None or (order == "full") == full]
    place = {True: "in front of the convolutions: full pre-activation", False: "behind the convolutions", None: "on both sides"}
    reason = (
        f"batch norms have as many channels as what stands {place[full]}; "
        f"{reading.dashed(blocks)} blocks of {'three' if bottleneck else 'two'} convolutions: depth {base['depth']}; "
        f"{kernel}x{kernel} stem of {stem_width} channels, stages from {width}: {stem}; fc has {base['num_classes']} rows"
    )
    return [
        Candidate({**base, "order": order, "shortcut": shortcut}, f"{reason}; {evidence}")
        for shortcut, evidence in _shortcuts(state)
        for order in orders
    ]


def _shortcuts(state: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    def has(*endings: str) -> bool:
        return any(key.endswith(endings) for key in state)

    if has(".shortcut_scale"):
        return [("scaling", "keys shortcut_scale: constant scaling")]
    if has(".gate.weight"):
        return [(kind, "keys gate: a gated shortcut") for kind in ("exclusive_gating", "shortcut_gating")]
    if has(".conv_shortcut.weight"):
        return [("conv", "keys conv_shortcut: a 1x1 convolution in every shortcut")]
    return [("identity", "no key beside the convolutions: identity shortcuts")]  # dropout is one, too, in evaluation


def _depth(blocks: tuple[int, ...], stem: str, bottleneck: bool) -> tuple[int, bool]:
    """The convolutions of blocks and stem and the linear layer, and whether the constructor makes these blocks of it."""
    depth = sum(blocks) * (3 if bottleneck else 2) + 2
    if stem == "imagenet":
        return depth, IMAGENET_BLOCKS.get(depth) == blocks and (depth >= 50) == bottleneck
    return depth, len(blocks) == 3 and len(set(blocks)) == 1


def describe(arguments: Mapping[str, Any]) -> str:
    """For instance "pre-activation ResNet-110, full pre-activation, identity shortcut, CIFAR, width 16, 10 classes"."""
    stem, order = arguments.get("stem", "cifar"), arguments.get("order", "full")
    kind = SHORTCUTS.get(arguments.get("shortcut", "identity"), "?")
    width = arguments.get("width") or (16 if stem == "cifar" else 64)
    channels = width * (EXPANSION if arguments.get("bottleneck") else 1)
    blocks = f" ({reading.dashed(arguments['blocks'])} blocks)" if arguments.get("blocks") else ""
    return (
        f"pre-activation ResNet-{arguments.get('depth', 110)}{blocks}, order {order} ({ORDERS.get(order, '?')}), shortcut {kind}, "
        f"{'ImageNet' if stem == 'imagenet' else 'CIFAR'}, {channels} channels in the first stage, "
        f"{arguments.get('num_classes') or (10 if stem == 'cifar' else 1000)} classes"
    )


def preprocessing(arguments: Mapping[str, Any]) -> dict[str, Any]:
    stem = arguments.get("stem", "cifar")
    return reading.preprocessing(stem, arguments.get("num_classes") or (10 if stem == "cifar" else 1000))


FAMILY = Structure(
    name="pre-activation ResNet", arch="preresnet", keys=KEYS, arguments=ARGUMENTS, recognises=recognises, read=read,
    build=preresnet, describe=describe, preprocessing=preprocessing, layouts=(LINEAR,),
).family()  # fmt: skip

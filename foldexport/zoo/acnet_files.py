"""Checkpoints of ACNets: which network, release and form, trained or deployed, the keys and shapes are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from foldexport.zoo import reading
from foldexport.zoo.acnet import IMAGENET_BLOCKS, NETWORKS, acnet, stage_blocks
from foldexport.zoo.structure import Candidate, Structure

_UNIT = r"((acb\.)?((square|ver|hor)_(conv\.weight|bn\.\w+)|fused_conv\.(weight|bias))|conv\.weight|bn\.\w+)"
KEYS = (
    rf"(stem\.)?conv\d{{1,2}}\.{_UNIT}",
    rf"stem\.\d{{1,2}}\.(depthwise|pointwise)\.{_UNIT}",
    rf"stage\d\.((block)?\d{{1,4}}\.)?(conv[123]|shortcut|projection|proj)\.{_UNIT}",
    r"last_bn\.\w+", r"(fc|fc1|fc2|linear|linear1|linear2)\.(weight|bias)",
)  # fmt: skip
ARGUMENTS = ("network", "depth", "width", "num_classes", "release", "deploy", "blocks")
_TRAINED, _DEPLOYED = (".square_conv.weight", ".ver_conv.weight", ".hor_conv.weight"), (".fused_conv.weight", ".fused_conv.bias")
# Asked in this order: a beginning of keys that only this network has, in words.
_MARKS = (
    ("mobilenet", "stem.0.depthwise."), ("vgg", "stem.conv"), ("wrn", "stage1.block1.proj."),
    ("stagewise", "stage4.projection."), ("cifar-stagewise", "stage3.projection."), ("resnet", "stage4.0."),
    ("cifar-resnet", "stage3.0."), ("cifar-quick", "conv3.acb."),
)  # fmt: skip
# Where the first channels are counted, and the last linear layer.
_ENDS = {
    "mobilenet": ("conv1.", "linear"), "vgg": ("stem.conv1.", "linear2"), "wrn": ("stage1.block1.conv2.", "linear"),
    "stagewise": ("conv1.", "fc"), "cifar-stagewise": ("stage1.conv1.", "linear"), "resnet": ("conv1.", "linear"),
    "cifar-resnet": ("conv1.", "linear"), "cifar-quick": ("conv1.", "fc2"),
}  # fmt: skip


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Asymmetric convolution blocks, trained or deployed, where a network of the authors' code has them."""
    blocks = any(key.endswith((*_TRAINED, *_DEPLOYED)) for key in state)
    return blocks and any(".acb." in key for key in state) and _network(state) is not None


def _network(state: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The network and the beginning of keys that gives it away."""
    return next(((name, mark) for name, mark in _MARKS if any(key.startswith(mark) for key in state)), None)


def read(state: Mapping[str, Tensor]) -> Sequence[Candidate]:
    """The one network that keys and shapes are of: no two of these have the same keys and compute different things."""
    found = _network(state)
    if found is None:
        raise KeyError("network")
    network, mark = found
    first, last = _ENDS[network]
    standard = NETWORKS[network]
    deploy = any(key.endswith(_DEPLOYED) for key in state)
    arguments = {
        "network": network, "width": _channels(state, first, standard.width),
        "num_classes": _channels(state, f"{last}.", 1000 if standard.dataset == "imagenet" else 10),
        "release": 2019 if _short_strips(state, network) else 2020, "deploy": deploy,
    }  # fmt: skip
    if standard.depth is not None:
        arguments |= _size(state, network)
    return [Candidate(arguments, _reason(state, arguments, mark, last))]


def _channels(state: Mapping[str, Tensor], unit: str, default: int) -> int:
    """What the tensors of a unit agree on, so that one damaged tensor changes nothing; ``default`` where there are none."""
    found = [tensor.shape[0] for key, tensor in state.items() if key.startswith(unit) and tensor.dim()]
    return reading.most_common(found) if found else default


def _short_strips(state: Mapping[str, Tensor], network: str) -> bool:
    """Whether strips of three taps stand beside a larger kernel, or a block is where the code of 2020 has none."""
    stem = any(key.startswith("conv1.acb.") for key in state)
    if NETWORKS[network].dataset == "imagenet":
        return stem and network != "mobilenet"
    vertical = [t.shape[2] for key, t in state.items() if key.endswith("ver_conv.weight") and t.dim() == 4]
    return network == "cifar-quick" and bool(vertical) and reading.most_common(vertical) == 3


def _size(state: Mapping[str, Tensor], network: str) -> dict[str, Any]:
    """``depth``, and ``blocks`` where they are not that depth's."""
    counted = reading.counts(state, r"stage(\d)\.(?:block)?(\d{1,4})\..+")
    if network == "wrn":  # its blocks are numbered from 1
        counted = tuple(count - 1 for count in counted)
    if NETWORKS[network].dataset == "cifar":
        depth = 2 * sum(counted) + (4 if network == "wrn" else 2)
        regular = len(counted) == 3 and len(set(counted)) == 1
        return {"depth": depth, "blocks": None} if regular else {"depth": NETWORKS[network].depth, "blocks": counted}
    bottleneck = any(".conv3." in key for key in state)
    depth = sum(counted) * (3 if bottleneck else 2) + 2
    if IMAGENET_BLOCKS.get(depth) == counted and (depth >= 50) == bottleneck:
        return {"depth": depth, "blocks": None}
    return {"depth": 50 if bottleneck else 18, "blocks": counted}


def _reason(state: Mapping[str, Tensor], arguments: Mapping[str, Any], mark: str, last: str) -> str:
    deploy = arguments["deploy"]
    form = "keys fused_conv: deployed blocks" if deploy else "keys square_conv, ver_conv, hor_conv: asymmetric convolution blocks"
    parts = [form, f"keys {mark}*: {arguments['network']}"]
    if "depth" in arguments:
        parts.append(f"{reading.dashed(_blocks(arguments))} blocks")
    if arguments["release"] == 2019:
        parts.append("strips of 3 taps beside larger kernels: the code of 2019")
    return "; ".join([*parts, f"{arguments['width']} channels first", f"{last} has {arguments['num_classes']} rows"])


def _blocks(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    network = arguments.get("network", "resnet")
    return tuple(arguments.get("blocks") or stage_blocks(network, arguments.get("depth") or NETWORKS[network].depth))


def describe(arguments: Mapping[str, Any]) -> str:
    """For instance "ACNet, ResNet-18, ImageNet, width 64, 1000 classes, trained"."""
    network = arguments.get("network", "resnet")
    standard = NETWORKS.get(network)
    if standard is None:
        return f"ACNet {network}"
    depth = arguments.get("depth") or standard.depth
    size = "" if depth is None else f" ({reading.dashed(arguments['blocks'])} blocks)" if arguments.get("blocks") else f"-{depth}"
    release = ", release 2019" if arguments.get("release") == 2019 else ""
    return (
        f"ACNet, {network}{size}, {'ImageNet' if standard.dataset == 'imagenet' else 'CIFAR'}, "
        f"width {arguments.get('width') or standard.width}, {_classes(arguments)} classes{release}, "
        f"{'deployed' if arguments.get('deploy') else 'as trained'}"
    )


def _classes(arguments: Mapping[str, Any]) -> int:
    return arguments.get("num_classes") or (1000 if _dataset(arguments) == "imagenet" else 10)


def _dataset(arguments: Mapping[str, Any]) -> str:
    return NETWORKS[arguments.get("network", "resnet")].dataset


def preprocessing(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """ImageNet's usual; on CIFAR the authors normalise with 0.5 throughout."""
    fields = reading.preprocessing(_dataset(arguments), _classes(arguments))
    if _dataset(arguments) == "cifar":
        fields |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return fields


FAMILY = Structure(
    name="ACNet", arch="acnet", keys=KEYS, arguments=ARGUMENTS, recognises=recognises, read=read, build=acnet,
    describe=describe, preprocessing=preprocessing,
).family()  # fmt: skip

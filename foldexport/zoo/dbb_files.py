"""Checkpoints of networks of diverse branch blocks: which network and form, trained or deployed, they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from foldexport.zoo import reading
from foldexport.zoo.dbb import BOTTLENECK_DEPTHS, DEPTHWISE_INTERNAL, RESNET_BLOCKS, dbb
from foldexport.zoo.structure import Candidate, Layout, Structure

_BRANCHES = (
    r"(dbb_(origin|1x1)\.(conv\.weight|bn\.\w+)|dbb_avg\.(conv\.weight|bn\.(bn\.)?\w+|avgbn\.\w+)"
    r"|dbb_1x1_kxk\.((id)?conv1\.weight|bn1\.(bn\.)?\w+|conv2\.weight|bn2\.\w+)|dbb_reparam\.(weight|bias)"
    r"|(square|ver|hor)_(conv\.weight|bn\.\w+))"
)
KEYS = (
    rf"(stage\d\.\d{{1,4}}\.conv[123]|conv1|stem\.\d{{1,2}}\.depthwise)\.{_BRANCHES}",
    r"(stage0\.conv1|stage\d\.\d{1,4}\.(conv[123]|shortcut)|stem\.\d{1,2}\.pointwise)\.(conv\.(weight|bias)|bn\.\w+)",
    r"linear\.(weight|bias)",
)  # fmt: skip
ARGUMENTS = ("network", "depth", "num_classes", "width", "block", "internal", "deploy", "blocks")
# The code wrote the batch norm that pads as a batch norm itself at first, and as a module that holds one since April 2021.
FLAT = Layout(
    "batch norms that pad are not nested",
    r".+\.(dbb_avg\.bn|dbb_1x1_kxk\.bn1)\.(weight|bias|running_mean|running_var)",
    ((r"(.+\.(?:dbb_avg\.bn|dbb_1x1_kxk\.bn1))\.(weight|bias|running_mean|running_var|num_batches_tracked)", r"\1.bn.\2"),),
    ((r"(.+\.(?:dbb_avg\.bn|dbb_1x1_kxk\.bn1))\.bn\.(\w+)", r"\1.\2"),),
)
_WIDTH = {"resnet": ("stage0.conv1.", 64), "mobilenet": ("conv1.", 32)}  # the unit where it is counted, and the published one


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Diverse branch blocks, trained or deployed, or asymmetric ones, where a network of the authors' code has them."""
    return _block(state) is not None and _network(state) is not None


def _block(state: Mapping[str, Tensor]) -> str | None:
    if any(".dbb_" in key for key in state):
        return "dbb"
    asymmetric = any(key.endswith((".square_conv.weight", ".ver_conv.weight")) for key in state)
    return "acb" if asymmetric and not any(".acb." in key for key in state) else None


def _network(state: Mapping[str, Tensor]) -> str | None:
    if any(key.startswith("stem.0.depthwise.") for key in state):
        return "mobilenet"
    return "resnet" if any(key.startswith("stage0.conv1.") for key in state) else None


def read(state: Mapping[str, Tensor]) -> Sequence[Candidate]:
    """The one network that keys and shapes are of: no two of these have the same keys and compute different things."""
    network, block = _network(state), _block(state)
    if network is None or block is None:
        raise KeyError("network")
    deploy = any(".dbb_reparam." in key for key in state)
    arguments = {
        "network": network, "block": block, "deploy": deploy, "width": _channels(state, *_WIDTH[network]),
        "num_classes": _channels(state, "linear.", 1000),
    }  # fmt: skip
    arguments |= _size(state) if network == "resnet" else {"internal": _internal(state)}
    return [Candidate(arguments, _reason(arguments))]


def _channels(state: Mapping[str, Tensor], unit: str, default: int) -> int:
    """What the tensors of a unit agree on, so that one damaged tensor changes nothing; ``default`` where there are none."""
    found = [tensor.shape[0] for key, tensor in state.items() if key.startswith(unit) and tensor.dim()]
    return reading.most_common(found) if found else default


def _internal(state: Mapping[str, Tensor]) -> int:
    """Channels inside the 1x1 → 3x3 branch of depthwise blocks, in units of their own."""
    kernels = [tensor for key, tensor in state.items() if key.endswith(".depthwise.dbb_1x1_kxk.conv2.weight")]
    ratios = [tensor.shape[1] for tensor in kernels if tensor.dim() == 4]
    return reading.most_common(ratios) if ratios else DEPTHWISE_INTERNAL


def _size(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """``depth``, and ``blocks`` where they are not that depth's."""
    counted = reading.counts(state, r"stage([1-9])\.(\d{1,4})\..+")
    bottleneck = any(".conv3." in key for key in state)
    depth = sum(counted) * (3 if bottleneck else 2) + 2
    if RESNET_BLOCKS.get(depth) == counted and (depth in BOTTLENECK_DEPTHS) == bottleneck:
        return {"depth": depth, "blocks": None}
    return {"depth": 50 if bottleneck else 18, "blocks": counted}


def _reason(arguments: Mapping[str, Any]) -> str:
    form = {
        ("dbb", False): "keys dbb_origin, dbb_avg, dbb_1x1_kxk: diverse branch blocks",
        ("dbb", True): "keys dbb_reparam: deployed blocks",
        ("acb", False): "keys square_conv, ver_conv, hor_conv: asymmetric convolution blocks",
    }[arguments["block"], bool(arguments["deploy"])]
    if arguments["network"] == "mobilenet":
        size = "keys stem.0.depthwise.*: mobilenet"
    else:
        blocks = arguments["blocks"] or RESNET_BLOCKS[arguments["depth"]]
        kind = "three" if arguments["depth"] in BOTTLENECK_DEPTHS else "two"
        size = f"keys stage0.conv1.*: resnet; {reading.dashed(blocks)} blocks of {kind} convolutions"
    return f"{form}; {size}; {arguments['width']} channels first; linear has {arguments['num_classes']} rows"


def describe(arguments: Mapping[str, Any]) -> str:
    """For instance "ResNet-18 of diverse branch blocks, ImageNet, width 64, 1000 classes, as trained"."""
    kind = "asymmetric convolution blocks" if arguments.get("block") == "acb" else "diverse branch blocks"
    if arguments.get("network") == "mobilenet":
        name, width = "MobileNet", arguments.get("width") or 32
        if arguments.get("internal", DEPTHWISE_INTERNAL) != DEPTHWISE_INTERNAL:
            kind += f" ({arguments['internal']}x internal channels)"
    else:
        blocks, width = arguments.get("blocks"), arguments.get("width") or 64
        name = f"ResNet ({reading.dashed(blocks)} blocks)" if blocks else f"ResNet-{arguments.get('depth', 18)}"
    return (
        f"{name} of {kind}, ImageNet, width {width}, {arguments.get('num_classes', 1000)} classes, "
        f"{'deployed' if arguments.get('deploy') else 'as trained'}"
    )


def preprocessing(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return reading.preprocessing("imagenet", arguments.get("num_classes", 1000))


FAMILY = Structure(
    name="DBB", arch="dbb", keys=KEYS, arguments=ARGUMENTS, recognises=recognises, read=read, build=dbb,
    describe=describe, preprocessing=preprocessing, layouts=(FLAT,),
).family()  # fmt: skip

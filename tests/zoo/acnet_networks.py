"""ACNets with random statistics, the paper's merge, and the authors' networks written out over their tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldexport.zoo.acnet import NETWORKS, acnet
from tests.statistics import randomise

SMALL = {
    "resnet": {"network": "resnet", "width": 4, "blocks": (1, 2, 1, 1), "num_classes": 5},
    "resnet of 2019": {"network": "resnet", "depth": 50, "width": 4, "blocks": (1, 1, 1, 1), "num_classes": 5, "release": 2019},
    "stagewise": {"network": "stagewise", "width": 4, "blocks": (2, 1, 1, 1), "num_classes": 5},
    "mobilenet": {"network": "mobilenet", "width": 4, "num_classes": 5},
    "cifar-quick": {"network": "cifar-quick", "width": 4},
    "cifar-quick of 2019": {"network": "cifar-quick", "width": 4, "release": 2019},
    "vgg": {"network": "vgg", "width": 4},
    "wrn": {"network": "wrn", "width": 8, "num_classes": 100},
    "cifar-stagewise": {"network": "cifar-stagewise", "depth": 14, "width": 4},
    "cifar-resnet": {"network": "cifar-resnet", "depth": 8, "width": 4},
}


def images(name: str, batch: int = 2) -> Tensor:
    size = 224 if NETWORKS[SMALL[name]["network"]].dataset == "imagenet" else 32
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(7))


def network(name: str, **arguments) -> nn.Module:
    """Random statistics around what the network sees, gammas of both signs."""
    return randomise(acnet(**SMALL[name], **arguments), seed=2, example=images(name))


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The paper's section 3.3, in float64: ``W = Σ γ/√(σ² + ε)·W_b`` about one centre, ``b = Σ β − γ·μ/√(σ² + ε)``."""
    state = {key: value.double() for key, value in state.items()}
    branches = (".square_", ".ver_", ".hor_")
    deployed = {key: value for key, value in state.items() if not any(branch in f".{key}" for branch in branches)}
    for key in [key for key in state if key.endswith("square_conv.weight")]:
        block = key.removesuffix("square_conv.weight")
        kernel, bias = torch.zeros_like(state[key]), 0
        for branch in ("square", "ver", "hor"):
            gamma, beta, mean, var = (state[f"{block}{branch}_bn.{x}"] for x in ("weight", "bias", "running_mean", "running_var"))
            scale, weight = gamma / torch.sqrt(var + 1e-5), state[f"{block}{branch}_conv.weight"]
            rows, columns = ((kernel.shape[i] - weight.shape[i]) // 2 for i in (2, 3))
            kernel[:, :, rows : rows + weight.shape[2], columns : columns + weight.shape[3]] += scale.view(-1, 1, 1, 1) * weight
            bias = bias + beta - mean * scale
        deployed |= {f"{block}fused_conv.weight": kernel, f"{block}fused_conv.bias": bias}
    return deployed


def evaluate(name: str, p: dict[str, Tensor], x: Tensor) -> Tensor:
    """One of the networks of `SMALL` straight from its deployed tensors; x ``[N, 3, H, W]``."""
    if name.startswith("cifar-quick"):
        x = F.max_pool2d(unit(p, "conv1", x).relu(), 3, 2)
        for conv in ("conv2", "conv3"):
            x = F.avg_pool2d(unit(p, conv, x).relu(), 3, 2)
        return linear(p, "fc2", linear(p, "fc1", x.flatten(1)).relu())
    if name == "vgg":
        for i in range(1, 14):
            x = unit(p, f"stem.conv{i}", x).relu()
            x = F.max_pool2d(x, 2) if i in (2, 4, 7, 10, 13) else x
        return linear(p, "linear2", linear(p, "linear1", x.flatten(1)).relu())
    if name == "wrn":
        return wide(p, x)
    if name == "mobilenet":
        x = unit(p, "conv1", x, 2).relu()
        for b in range(13):
            x = unit(p, f"stem.{b}.depthwise", x, 2 if b in (1, 3, 5, 11) else 1).relu()
            x = unit(p, f"stem.{b}.pointwise", x).relu()
        return linear(p, "linear", F.avg_pool2d(x, 7).flatten(1))
    counts = {"resnet": (1, 2, 1, 1), "resnet of 2019": (1, 1, 1, 1), "stagewise": (2, 1, 1, 1), "cifar-resnet": (1, 1, 1)}
    return residual(p, x, counts.get(name, (2, 2, 2)))


def unit(p: dict[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    """A deployed block, or a convolution and its batch norm, whichever has this name."""
    for inner in ("", "acb."):
        if f"{name}.{inner}fused_conv.weight" in p:
            weight, bias = p[f"{name}.{inner}fused_conv.weight"], p[f"{name}.{inner}fused_conv.bias"]
            return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])
    weight = p[f"{name}.conv.weight"]
    return norm(p, f"{name}.bn", F.conv2d(x, weight, None, stride, weight.shape[-1] // 2))


def norm(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.batch_norm(x, *(p[f"{name}.{t}"] for t in ("running_mean", "running_var", "weight", "bias")))


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def branch(p: dict[str, Tensor], block: str, x: Tensor, stride: int) -> Tensor:
    """The convolutions of a residual block; the 3x3 that comes first is strided."""
    if f"{block}.conv3.conv.weight" in p:
        y = unit(p, f"{block}.conv2", unit(p, f"{block}.conv1", x).relu(), stride).relu()
        return unit(p, f"{block}.conv3", y)
    return unit(p, f"{block}.conv2", unit(p, f"{block}.conv1", x, stride).relu())


def residual(p: dict[str, Tensor], x: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """ResNets, with a projection in front of every stage or a shortcut in the blocks that have one."""
    stem = next((name for name in ("conv1", "stage1.conv1") if any(key.startswith(f"{name}.") for key in p)), None)
    imagenet = len(blocks) == 4
    x = unit(p, stem, x, 2 if imagenet else 1).relu()
    x = F.max_pool2d(x, 3, 2, 1) if imagenet else x
    for s, count in enumerate(blocks, 1):
        for b in range(count):
            stride = 2 if s > 1 and b == 0 else 1
            stagewise = f"stage{s}.block0.conv1" in {".".join(key.split(".")[:3]) for key in p}
            block = f"stage{s}.block{b}" if stagewise else f"stage{s}.{b}"
            beside = f"stage{s}.projection" if stagewise and b == 0 else f"{block}.shortcut"
            x = (branch(p, block, x, stride) + (unit(p, beside, x, stride) if f"{beside}.conv.weight" in p else x)).relu()
    return linear(p, "fc" if "fc.weight" in p else "linear", F.avg_pool2d(x, 7 if imagenet else 8).flatten(1))


def wide(p: dict[str, Tensor], x: Tensor) -> Tensor:
    def activated(name: str, x: Tensor, stride: int = 1) -> Tensor:
        y = norm(p, f"{name}.bn", x).relu()
        return F.conv2d(y, p[f"{name}.conv.weight"], None, stride) if name.endswith("proj") else unit(p, name, y, stride)

    x = unit(p, "conv1", x)
    for s in (1, 2, 3):
        for b in (1, 2):
            block, stride = f"stage{s}.block{b}", 2 if s > 1 and b == 1 else 1
            y = activated(f"{block}.conv2", activated(f"{block}.conv1", x, stride))
            x = y + (activated(f"{block}.proj", x, stride) if b == 1 else x)
    return linear(p, "linear", F.avg_pool2d(norm(p, "last_bn", x), 8).flatten(1))

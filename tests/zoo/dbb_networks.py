"""Networks of diverse branch blocks with random statistics, the paper's six transforms, and the networks written out."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldexport.zoo.dbb import dbb
from tests.statistics import randomise

SMALL = {
    "resnet": {"network": "resnet", "width": 8, "blocks": (1, 1, 1, 1), "num_classes": 5},
    "bottlenecks": {"network": "resnet", "depth": 50, "width": 4, "blocks": (1, 2, 1, 1), "num_classes": 5},
    "asymmetric blocks": {"network": "resnet", "width": 8, "blocks": (2, 1, 1, 1), "num_classes": 5, "block": "acb"},
    "mobilenet": {"network": "mobilenet", "width": 4, "num_classes": 5},
    "mobilenet, one internal channel": {"network": "mobilenet", "width": 4, "num_classes": 5, "internal": 1},
    "asymmetric mobilenet": {"network": "mobilenet", "width": 4, "num_classes": 5, "block": "acb"},
}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))


def network(**arguments) -> nn.Module:
    """Random statistics around what the network sees, gammas of both signs."""
    return randomise(dbb(**arguments), seed=2, example=IMAGES)


def normed(state: dict[str, Tensor], norm: str, weight: Tensor, bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Transform I: ``W·γ/√(σ² + ε)`` and ``β + (b − μ)·γ/√(σ² + ε)``."""
    scale = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + 1e-5)
    return weight * scale.view(-1, 1, 1, 1), state[f"{norm}.bias"] + (bias - state[f"{norm}.running_mean"]) * scale


def sequence(first: tuple[Tensor, Tensor], second: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Transforms III and IV: a 1x1 convolution, then k×k, group by group; ``W = Σ_c W₂[o, c]·W₁[c, i]``, ``b = Σ W₂·b₁``."""
    inner, bias = first
    kernels, biases = [], []
    for one, shift, two in zip(inner.chunk(groups), bias.chunk(groups), second.chunk(groups), strict=True):
        kernels.append(torch.einsum("ochw,ci->oihw", two, one[:, :, 0, 0]))
        biases.append(torch.einsum("ochw,c->o", two, shift))
    return torch.cat(kernels), torch.cat(biases)


def merged_block(state: dict[str, Tensor], block: str, groups: int) -> tuple[Tensor, Tensor]:
    """The paper's transforms over the tensors of one block, in float64: ``(W, b)`` of the convolution that it is."""
    state = {key.removeprefix(block): value.double() for key, value in state.items() if key.startswith(block)}
    origin = state["dbb_origin.conv.weight"]
    k, writes = origin.shape[-1], origin.shape[0]
    branches = [normed(state, "dbb_origin.bn", origin)]
    if "dbb_1x1.conv.weight" in state:  # transform VI: a 1x1 kernel in the middle of zeros
        branches.append(normed(state, "dbb_1x1.bn", F.pad(state["dbb_1x1.conv.weight"], (k // 2,) * 4)))
    unit = torch.zeros(writes, writes // groups, 1, 1, dtype=torch.float64)
    unit[torch.arange(writes), torch.arange(writes) % (writes // groups)] = 1
    mean = unit.expand(-1, -1, k, k) / k**2  # transform V: an average pool
    bias = 0.0
    if "dbb_avg.conv.weight" in state:
        mean, bias = sequence(normed(state, "dbb_avg.bn.bn", state["dbb_avg.conv.weight"]), mean, groups)
    branches.append(normed(state, "dbb_avg.avgbn", mean, bias))
    first = state.get("dbb_1x1_kxk.conv1.weight")
    if first is None:
        first = state["dbb_1x1_kxk.idconv1.weight"].clone()
        first[torch.arange(len(first)), torch.arange(len(first)) % first.shape[1]] += 1
    kernel, bias = sequence(normed(state, "dbb_1x1_kxk.bn1.bn", first), state["dbb_1x1_kxk.conv2.weight"], groups)
    branches.append(normed(state, "dbb_1x1_kxk.bn2", kernel, bias))
    return sum(w for w, _ in branches), sum(b for _, b in branches)  # transform II


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the authors' conversion saves: blocks as ``dbb_reparam``, the other batch norms in their convolutions, in float64."""
    state = {key: value.double() for key, value in state.items()}
    deployed = {key: value for key, value in state.items() if key.startswith("linear.")}
    for key in [key for key in state if key.endswith(".dbb_origin.conv.weight")]:
        block = key.removesuffix("dbb_origin.conv.weight")
        groups = len(state[key]) if "depthwise" in key else 1
        deployed[f"{block}dbb_reparam.weight"], deployed[f"{block}dbb_reparam.bias"] = merged_block(state, block, groups)
    for key in [key for key in state if key.endswith(".conv.weight") and ".dbb_" not in key]:
        unit = key.removesuffix("conv.weight")
        deployed[f"{unit}conv.weight"], deployed[f"{unit}conv.bias"] = normed(state, f"{unit}bn", state[key])
    return deployed


def evaluate(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """The authors' networks straight from deployed tensors under their names; x ``[N, 3, H, W]``."""

    def unit(name: str, x: Tensor, stride: int = 1) -> Tensor:
        conv = "dbb_reparam" if f"{name}.dbb_reparam.weight" in p else "conv"
        weight, bias = p[f"{name}.{conv}.weight"], p[f"{name}.{conv}.bias"]
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])

    if "stem.0.pointwise.conv.weight" in p:
        x = unit("conv1", x, 2).relu()
        for b in range(13):
            x = unit(f"stem.{b}.depthwise", x, 2 if b in (1, 3, 5, 11) else 1).relu()
            x = unit(f"stem.{b}.pointwise", x).relu()
    else:
        x = F.max_pool2d(unit("stage0.conv1", x, 2).relu(), 3, 2, 1)
        for block in sorted({match[0] for key in p if (match := re.match(r"stage[1-4]\.\d+", key))}):
            stride, bottleneck = 2 if re.match(r"stage[2-4]\.0", block) else 1, f"{block}.conv3.conv.weight" in p
            y = unit(f"{block}.conv1", x, 1 if bottleneck else stride).relu()
            y = unit(f"{block}.conv2", y, stride if bottleneck else 1)
            y = unit(f"{block}.conv3", y.relu()) if bottleneck else y
            x = (y + (unit(f"{block}.shortcut", x, stride) if f"{block}.shortcut.conv.weight" in p else x)).relu()
    return F.linear(x.mean((2, 3)), p["linear.weight"], p["linear.bias"])

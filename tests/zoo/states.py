"""DiracNets with random statistics, and the paper's equations written out over their published tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from foldexport.zoo.diracnet import DiracNet, Plan
from foldexport.zoo.diracnet_layouts import to_published


def random_network(plan: Plan) -> DiracNet:
    """Weights, alpha, beta, gamma of both signs, means and variances all drawn: no term of the equations is blind."""
    network = DiracNet(plan).eval()
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            leaf = key.rpartition(".")[2]
            if leaf == "running_var":
                tensor.uniform_(0.5, 2.0)
            elif leaf in ("running_mean", "bias", "beta"):
                tensor.normal_(std=0.5)
            elif leaf == "alpha" or key.endswith("bn.weight"):
                tensor.normal_(std=0.2).add_(1.0)
                tensor[::3] *= -1
    return network


def published(network: DiracNet) -> dict[str, Tensor]:
    """The flat tensors of a published file: parameters and statistics together."""
    params, stats = to_published(network.state_dict())
    return {**params, **stats}


def evaluate(p: dict[str, Tensor], plan: Plan, x: Tensor) -> Tensor:
    """The network as the paper defines it, straight from the published tensors ``p``; x ``[N, 3, H, W]``."""
    imagenet, first_version = plan.dataset == "ImageNet", plan.version == 1
    x = F.conv2d(x, p["conv"], stride=2 if imagenet else 1, padding=3 if imagenet else 1)
    x = batch_norm(x, p, "bn")
    x = F.max_pool2d(x, 3, 2, 1) if imagenet else F.relu(x)
    for g, count in enumerate(plan.blocks):
        x = F.max_pool2d(x, 2) if g else x
        for b in range(count):
            w = dirac_weight(p, f"group{g}.block{b}")
            x = torch.cat([x.clamp(min=0), x.clamp(max=0)], 1) if first_version else F.relu(x)
            x = batch_norm(F.conv2d(x, w, padding=1), p, f"group{g}.block{b}.bn")
    x = x if first_version else F.relu(x)
    x = F.avg_pool2d(x, x.shape[-1] if imagenet else 8)
    return F.linear(x.flatten(1), p["fc.weight"], p["fc.bias"])


def batch_norm(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-5)


def dirac_weight(p: dict[str, Tensor], name: str) -> Tensor:
    w = p[f"{name}.conv"]
    delta = p["eye" + "_".join(map(str, w.shape))]
    unit = F.normalize(w.view(w.shape[0], -1), eps=1e-12).view_as(w)
    return p[f"{name}.alpha"].view(-1, 1, 1, 1) * delta + p[f"{name}.beta"].view(-1, 1, 1, 1) * unit

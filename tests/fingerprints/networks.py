"""Networks of torchvision and timm with random weights, and files of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.statistics import randomise
from tests.torchvision_schemas import declare_missing

declare_missing()

import timm  # noqa: E402
from torchvision import models  # noqa: E402


def network(package: str, name: str, **arguments: Any) -> nn.Module:
    """A network in eval mode whose every batch norm and weight is random; nothing is downloaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        build: Callable[..., nn.Module] = timm.create_model if package == "timm" else models.get_model
        made = build(name, **({} if package == "timm" else {"weights": None}), **arguments)
    return randomise(made, seed=0).eval()


def save(folder: Path, module: nn.Module, name: str = "mine.pth", **beside: Any) -> Path:
    """The state dict, or where something lies beside it a checkpoint as training scripts write it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = module.state_dict()
    torch.save({"state_dict": state, **beside} if beside else state, folder / name)
    return folder / name


def same_outputs(first: nn.Module, second: nn.Module, size: tuple[int, ...], rtol: float = 0.0) -> bool:
    """Whether two networks give bitwise the same for two random images of one size; in float64 within ``rtol`` where given."""
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    if rtol:
        first, second, images = copy.deepcopy(first).double(), copy.deepcopy(second).double(), images.double()
    with torch.no_grad():
        ours, theirs = (list(tensors(each(images))) for each in (first, second))
    if [each.shape for each in ours] != [each.shape for each in theirs]:
        return False
    return all(float((a - b).abs().max()) <= rtol * float(b.abs().max()) for a, b in zip(ours, theirs))


def tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    else:
        for each in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from tensors(each)

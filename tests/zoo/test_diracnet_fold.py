"""A DiracNet-18 of ImageNet folds to the published plain chain, name by name."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import foldexport

BLOCKS = (4, 4, 4, 4)
WIDTHS = (64, 128, 256, 512)
CLASSES = 1000


def published_names() -> list[str]:
    """The leaf modules of the published folded DiracNet-18, in order."""
    names = ["features.conv", "features.max_pool0"]
    for group, count in enumerate(BLOCKS):
        if group > 0:
            names.append(f"features.max_pool{group}")
        for block in range(count):
            names += [f"features.group{group}.block{block}.relu", f"features.group{group}.block{block}.conv"]
    return [*names, "features.last_relu", "features.avg_pool", "fc"]


def published_shapes() -> OrderedDict[str, tuple[int, ...]]:
    """The state of the published folded file: keys in order, with their shapes."""
    shapes: OrderedDict[str, tuple[int, ...]] = OrderedDict()
    shapes["features.conv.weight"], shapes["features.conv.bias"] = (64, 3, 7, 7), (64,)
    before = 64
    for group, (count, width) in enumerate(zip(BLOCKS, WIDTHS)):
        for block in range(count):
            key = f"features.group{group}.block{block}.conv"
            shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (width, before, 3, 3), (width,)
            before = width
    shapes["fc.weight"], shapes["fc.bias"] = (CLASSES, WIDTHS[-1]), (CLASSES,)
    return shapes


def older_layout(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """A checkpoint in the layout of the published ones, ``params`` and ``stats``, with random statistics."""
    generator = torch.Generator().manual_seed(seed)
    params: dict[str, Tensor] = {}
    stats: dict[str, Tensor] = {}

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def batch_norm(key: str, width: int) -> None:
        sign = torch.randint(0, 2, (width,), generator=generator) * 2.0 - 1
        params[f"{key}.weight"] = sign * (0.5 + torch.rand(width, generator=generator))
        params[f"{key}.bias"] = 0.5 * draw(width)
        stats[f"{key}.running_mean"] = 0.5 * draw(width)
        stats[f"{key}.running_var"] = 0.3 + 2.7 * torch.rand(width, generator=generator)

    params["conv"] = draw(64, 3, 7, 7) / 12
    batch_norm("bn", 64)
    before = 64
    for group, (count, width) in enumerate(zip(BLOCKS, WIDTHS)):
        for block in range(count):
            key = f"group{group}.block{block}"
            params[f"{key}.conv"] = draw(width, before, 3, 3)
            params[f"{key}.alpha"], params[f"{key}.beta"] = draw(width), draw(width)
            stats[f"eye{width}_{before}_3_3"] = nn.init.dirac_(torch.empty(width, before, 3, 3))
            batch_norm(f"{key}.bn", width)
            before = width
    params["fc.weight"], params["fc.bias"] = draw(CLASSES, before) / before**0.5, draw(CLASSES)
    return {"params": params, "stats": stats}


def reference(state: dict[str, dict[str, Tensor]], x: Tensor) -> Tensor:
    """The network of the paper, from the equations: ``bn(conv2d(relu(x), alpha * delta + beta * normalize(w)))``."""
    params, stats = ({name: value.double() for name, value in state[part].items()} for part in ("params", "stats"))
    functional = nn.functional

    def norm(value: Tensor, key: str) -> Tensor:
        moments = stats[f"{key}.running_mean"], stats[f"{key}.running_var"]
        return functional.batch_norm(value, *moments, params[f"{key}.weight"], params[f"{key}.bias"], eps=1e-5)

    value = norm(functional.conv2d(x, params["conv"], stride=2, padding=3), "bn")
    value = functional.max_pool2d(value, 3, 2, 1)
    for group, count in enumerate(BLOCKS):
        value = functional.max_pool2d(value, 2) if group else value
        for block in range(count):
            key = f"group{group}.block{block}"
            weight = params[f"{key}.conv"]
            unit = functional.normalize(weight.flatten(1), eps=1e-12).view_as(weight)
            alpha, beta = (params[f"{key}.{name}"].view(-1, 1, 1, 1) for name in ("alpha", "beta"))
            dirac = alpha * nn.init.dirac_(torch.empty_like(weight)) + beta * unit
            value = norm(functional.conv2d(value.relu(), dirac, padding=1), f"{key}.bn")
    return functional.linear(value.relu().mean((2, 3)), params["fc.weight"], params["fc.bias"])


@pytest.fixture(scope="module")
def state() -> dict[str, dict[str, Tensor]]:
    return older_layout()


@pytest.fixture(scope="module")
def folded(state, tmp_path_factory: pytest.TempPathFactory):
    path: Path = tmp_path_factory.mktemp("checkpoint") / "diracnet18.pth"
    torch.save(state, path)
    example = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return foldexport.fold(foldexport.load(path), example)


def test_the_older_layout_has_the_published_number_of_parameters(state):
    assert sum(value.numel() for value in state["params"].values()) == 11_523_368


def test_the_leaves_have_the_published_names_in_the_published_order(folded):
    leaves = [name for name, layer in folded.module.named_modules()
              if not list(layer.children()) and not isinstance(layer, nn.Flatten)]
    assert leaves == published_names()


def test_the_layers_are_convolutions_relus_pools_and_one_linear_layer(folded):
    kinds = {name.rpartition(".")[2].rstrip("0123"): type(layer) for name, layer in folded.module.named_modules()
             if not list(layer.children()) and not isinstance(layer, nn.Flatten)}
    average = kinds.pop("avg_pool")
    assert average in (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
    assert kinds == {
        "conv": nn.Conv2d, "max_pool": nn.MaxPool2d, "relu": nn.ReLU, "last_relu": nn.ReLU, "fc": nn.Linear
    }


def test_published_folded_files_load_into_it_and_it_into_them(folded):
    state = folded.module.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == dict(published_shapes())
    assert list(state) == list(published_shapes())
    file = {name: torch.randn(shape) for name, shape in published_shapes().items()}
    kept = {name: value.clone() for name, value in state.items()}
    folded.module.load_state_dict(file, strict=True)
    assert all(torch.equal(value, file[name]) for name, value in folded.module.state_dict().items())
    folded.module.load_state_dict(kept, strict=True)


def test_a_published_network_takes_the_folded_state(folded):
    published = nn.Module()
    for name in published_names():
        parent = published
        *folders, leaf = name.split(".")
        for folder in folders:
            if not hasattr(parent, folder):
                parent.add_module(folder, nn.Sequential())
            parent = getattr(parent, folder)
        shape = published_shapes().get(f"{name}.weight")
        layer = nn.ReLU() if shape is None else (
            nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2:]))
        parent.add_module(leaf, layer)
    published.load_state_dict(folded.module.state_dict(), strict=True)


def test_it_computes_what_the_checkpoint_does(folded, state):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted, found = reference(state, x.double()), folded.module(x).double()
    assert folded.certificate.ok
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert not any(entry.status == "kept" for entry in folded.ledger)

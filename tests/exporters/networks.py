"""Plain networks to export: what a fold gives, without folding."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldexport.verify import compare

IMAGE = (3, 16, 16)
N32 = 2.0**-24  # the floor: the strictest unit there is


def chain(width: int = 8, seed: int = 0) -> nn.Sequential:
    """A folded plain network: convolutions with and without bias, pools, a classifier of ten classes."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.ReLU6(),
        nn.Conv2d(2 * width, width, 1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    ).eval()


class Views(nn.Module):
    """Sizes taken from the input in views; linear layers on the last axis, whose weights a writer may transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.mix = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        y = y.view(y.size(0), y.size(1), -1).transpose(1, 2)
        return self.head(self.mix(y).mean(1).reshape(x.shape[0], -1))


class TwoByThree(nn.Module):
    """Two inputs and three outputs, one of them an input and one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.gate = nn.Linear(5, 4)

    def forward(self, image: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.conv(image) + self.gate(vector)[:, :, None, None]
        return y, image, y


class Tied(nn.Module):
    """One weight under two names, and two equal weights: writers store either once."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.c = nn.Conv2d(4, 1, 1)
        self.b.weight = self.a.weight
        self.register_buffer("low", torch.randn(4, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.maximum(self.b(F.relu(self.a(x))), self.low))


def deep(depth: int = 60, width: int = 8) -> nn.Sequential:
    """A plain network so deep that an error in its first layer leaves no trace in its output.

    Scales fall from layer to layer and biases take over: each layer passes a tenth of its input on.
    """
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    with torch.no_grad():
        for layer in layers[2::2]:
            nn.init.normal_(layer.weight, std=0.1 * (2 / (9 * width)) ** 0.5)
            nn.init.normal_(layer.bias)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).eval()


def probes(*shapes: tuple[int, ...], batches: tuple[int, ...] = (1, 3)) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(7)
    return [tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes) for batch in batches]


def references(module: nn.Module, inputs: list[tuple[Tensor, ...]]) -> list[list[Tensor]]:
    """Float64 outputs per probe, per output; the module is float32 again afterwards."""
    module.double()
    try:
        with torch.no_grad():
            results = [module(*(value.double() for value in probe)) for probe in inputs]
    finally:
        module.float()
    return [list(result) if isinstance(result, tuple) else [result] for result in results]


def proof(exporter, module: nn.Module, inputs: list[tuple[Tensor, ...]], path: Path, weights=None):
    """The comparison of a file with its module."""
    found = exporter.load(path)
    return compare(
        references(module, inputs), found, inputs, N32, format=exporter.name, label=exporter.runtime(), weights=weights
    )


def local_traces(path: Path) -> list[str]:
    """Paths of this machine that occur in the file's bytes, also inside of a zip's compressed records."""
    import sysconfig
    import zipfile

    content = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content += b"".join(archive.read(name) for name in archive.namelist())
    paths = {
        str(Path.cwd()),
        str(Path.home()),
        sysconfig.get_paths()["purelib"],
        str(Path(__file__).parents[2]),
        str(path.parent),
    }
    return [
        each for each in (*sorted(paths - {"/"}), "site-packages", '.py"', "stack_trace") if each.encode() in content
    ]

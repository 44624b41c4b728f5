"""What every format has to show, on networks with random statistics, folded."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from foldexport import api
from foldexport.exporters import Format
from foldexport.exporters.weights import expected_weights, match_weights
from tests.exporters import networks
from tests.exporters.networks import IMAGE
from tests.exporters.test_onnx import EXPORT_SCRIPT
from tests.statistics import randomise

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = (torch.zeros(1, *IMAGE),)


class Skip(nn.Module):
    """A residual block between a strided convolution and a classifier; batch norm with gammas of both signs throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        )
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.body(x)))


def folded() -> nn.Module:
    """`Skip` with random statistics, folded; float32."""
    return api.fold(randomise(Skip(), 5), EXAMPLE, certify=False).module


def found(exporter, module: nn.Module, path: Path, *shapes: tuple[int, ...], weights: bool = True):
    """The comparison of a file at batches of one and three."""
    match = match_weights(expected_weights(module), exporter.weights(path)) if weights else None
    return networks.proof(exporter, module, networks.probes(*(shapes or (IMAGE,))), path, match)


FOLDED_SCRIPT = EXPORT_SCRIPT.replace("networks.chain()", "networks.folded()").replace("networks", "formats")


def from_another_process(row: Format, folder: Path, script: str = EXPORT_SCRIPT) -> list[Path]:
    """The files of ``networks.chain()`` written by another process, in another folder and under another name."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    path = elsewhere / f"another name{row.suffix}"
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, row.name, str(path)]
    subprocess.run(command, cwd=elsewhere, env=environment, check=True, capture_output=True)
    return [path, *row.beside(path)]


def replace(path: Path, before: bytes, after: bytes) -> None:
    """Replace ``before``, which occurs once, in a file."""
    content = path.read_bytes()
    assert content.count(before) == 1, content.count(before)
    path.write_bytes(content.replace(before, after))


def rewrite_zip(path: Path, before: bytes, after: bytes) -> None:
    """Replace ``before``, which occurs in one record, in an archive."""
    with zipfile.ZipFile(path) as archive:
        records = [(each, archive.read(each)) for each in archive.infolist()]
    assert sum(before in content for _, content in records) == 1
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for each, content in records:
            archive.writestr(each, content.replace(before, after))

"""What the TensorRT tests share. They run TensorRT-RTX, which needs no GPU to parse and to build: for full TensorRT they are a
proxy, since both parse ONNX with the same code."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from foldexport.exporters.options import ExportOptions
from foldexport.exporters.tensorrt import flavour
from foldexport.exporters.tensorrt.network import Parsed, parse

FIXED = ExportOptions(dynamic=())
TARGETS = ("8.6", "8.9", "12.0")


def rtx():
    """The TensorRT-RTX library; without it tests skip, but fail where a run installs what the tests need."""
    if not flavour.RTX.module():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"TensorRT-RTX is not installed: {flavour.RTX.install}")
    return flavour.RTX.load()


class Preactivation(nn.Module):
    """A batch norm between ReLU and a convolution, which no ONNX writer folds on its own: it parses to a SCALE layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.relu(self.stem(x)))
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


class Layers(nn.Module):
    """Every kind of layer whose weights the parser handles in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.mix = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 5)
        self.register_buffer("low", torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.depthwise(torch.maximum(self.conv(x), self.low)))
        return self.head(self.mix(x.flatten(2).transpose(1, 2))).mean(1)


class Determinant(nn.Module):
    """An operator that ONNX has and TensorRT has not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.det(x[:, :, :4, :4])


def write(module: nn.Module, path: Path, shape: tuple[int, ...] = (1, 3, 16, 16), options: ExportOptions = FIXED) -> dict:
    """The module's ONNX file; returns the initializers."""
    from foldexport.exporters.onnx.exporter import OnnxExporter

    OnnxExporter().export(module.eval(), (torch.randn(shape),), path, options)
    return OnnxExporter().weights(path)


def parsed(path: Path) -> Parsed:
    found = parse(rtx(), path)
    assert isinstance(found, Parsed), found
    return found


def perturb(path: Path, name: str) -> None:
    """Move one value of one initializer of an ONNX file by one unit in the last place."""
    model = onnx.load(str(path))
    tensor = next(each for each in model.graph.initializer if each.name == name)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[0] = np.nextafter(values.reshape(-1)[0], np.float32(np.inf))
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    path.write_bytes(model.SerializeToString())

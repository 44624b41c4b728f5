"""Checkpoint files for the tests: how they are made, planted with code, and expected to be refused."""

from __future__ import annotations

import os
import pathlib
import subprocess
import zipfile

import pytest
import torch
from torch import nn

from foldexport import checkpoint
from foldexport.errors import CheckpointError

LAYOUTS = {"torch zip": True, "torch legacy": False}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bn.weight": torch.randn(4, generator=generator),
        "bn.running_var": torch.rand(4, generator=generator) + 0.5,
        "bn.num_batches_tracked": torch.tensor(7),
    }


def save(content, path: pathlib.Path, layout: str = "torch zip", **options) -> pathlib.Path:
    torch.save(content, path, _use_new_zipfile_serialization=LAYOUTS[layout], **options)
    return path


def same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(tensors) == list(expected)
    for key, tensor in tensors.items():
        assert type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.is_contiguous()
        assert not tensor.requires_grad and tensor.dtype == expected[key].dtype
        assert torch.equal(tensor, expected[key])


def refused(path: pathlib.Path, *words: str, **options) -> str:
    """The error has exit code 3, one or two lines, no traceback of torch's, and says these words."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(path, **options)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert len(message.splitlines()) <= 2 and "weights_only" not in message and "\x1b" not in message
    for word in (str(path), *words):
        assert word in message, message
    return message


def rewrite_zip(path: pathlib.Path, edits: dict) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, edits.get(name, lambda data: data)(data))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


class Plant:
    """Creates a file when it is unpickled."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def plants(marker: pathlib.Path) -> dict[str, Plant]:
    return {
        "os.system": Plant(os.system, f"touch {marker}"),
        "builtins.eval": Plant(eval, f"open({str(marker)!r}, 'w')"),
        "io.open": Plant(open, str(marker), "w"),
        "subprocess.Popen": Plant(subprocess.Popen, ["touch", str(marker)]),
    }


def write(path: pathlib.Path, data: bytes | str) -> pathlib.Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path

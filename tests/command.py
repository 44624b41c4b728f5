"""Running the command line in this process, and the small networks and files that it is tried on."""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foldexport.cli import main
from foldexport.zoo.diracnet import DiracNet, make_plan
from foldexport.zoo.diracnet_layouts import to_published
from tests.zoo.states import random_network

PLAIN = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width=4):
        super().__init__(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 6, 1), nn.Flatten(2)
        )
"""


@dataclass(frozen=True)
class Result:
    """What a command line gave."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """stdout as one JSON document."""
        return json.loads(self.out)

    @property
    def message(self) -> str:
        """The error without its lead; there is exactly one, of one or two lines, without a traceback."""
        lines = self.err.splitlines()
        starts = [place for place, line in enumerate(lines) if line.startswith("error: ")]
        assert len(starts) == 1, self.err
        message = lines[starts[0] :]
        assert len(message) <= 2 and "Traceback" not in self.err, self.err
        return "\n".join(message).removeprefix("error: ")


def foldexport(*words: object) -> Result:
    """``foldexport words…`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    return Result(code, out.getvalue(), err.getvalue())


def tiny() -> DiracNet:
    """A CIFAR DiracNet of depth 10 with 4, 8 and 16 channels and random statistics."""
    torch.manual_seed(0)
    return random_network(make_plan("CIFAR", 10, 0.25))


def save_dirac(path: Path, network: nn.Module | None = None) -> Path:
    """A DiracNet in its authors' older layout."""
    params, stats = to_published((network or tiny()).state_dict())
    torch.save({"params": params, "stats": stats}, path)
    return path


def save_plain(folder: Path, source: str = PLAIN, name: str = "net") -> tuple[Path, str]:
    """A user's own network and its checkpoint with random statistics: (checkpoint, --arch)."""
    file = folder / f"{name}.py"
    file.write_text(source)
    space: dict[str, Any] = {}
    exec(compile(source, str(file), "exec"), space)
    torch.manual_seed(0)
    network = space["Net"]()
    for child in network.modules():
        if isinstance(child, nn.BatchNorm2d) and child.running_mean is not None:
            nn.init.normal_(child.running_mean)
            nn.init.uniform_(child.running_var, 0.5, 2.0)
            nn.init.normal_(child.weight)
            nn.init.normal_(child.bias)
    checkpoint = folder / f"{name}.pth"
    torch.save(OrderedDict(network.state_dict()), checkpoint)
    return checkpoint, f"{file}:Net"


def files(folder: Path) -> list[str]:
    """Everything below a folder, hidden names too, but for Python's caches."""
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if "__pycache__" not in each.parts)

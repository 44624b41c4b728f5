"""Mean and standard deviation as a part of the network, so that it takes raw pixels: ``--normalize``.

    y = network((x / top − mean) / std)        x: [N, C, …] from 0 to top, mean and std: [C]

They stand in front of the training graph before it is traced, so the fold and every proof see them like any other layer. The
first convolution takes the scale always, and the shift where it pads nothing: behind a border of zeros a bias is not the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foldexport.errors import UsageError

if TYPE_CHECKING:
    from foldexport.trace import Graph

INSIDE = "network."  # of the names in a `Normalized`, which the user's own names are without


@dataclass(frozen=True)
class Raw:
    """Pixels from 0 to ``top`` of which the network wants ``(x / top − mean) / std``, channel by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    top: float = 1.0

    def pixels(self, drawn: Tensor) -> Tensor:
        """What the network sees as ``drawn`` ``[N, C, …]``: ``top · (mean + std · drawn)`` rounded to float32, in drawn's type.

        Multiplications and additions in float64 alone, so the bits are the same on every machine.
        """
        mean, std = (torch.tensor(each, dtype=torch.float64).view(-1, *(1,) * (drawn.dim() - 2)) for each in (self.mean, self.std))
        return (self.top * (mean + std * drawn.double())).float().to(drawn.dtype)

    def to_dict(self) -> dict[str, Any]:
        """For the golden set of a manifest; ``Raw(**…)`` reads it."""
        return {"mean": list(self.mean), "std": list(self.std), "top": self.top}


class Normalize(nn.Module):
    """``(x / top − mean) / std`` per channel; mean and std as ``[C, 1, …]`` for inputs of ``rank`` axes."""

    def __init__(self, raw: Raw, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (-1, *(1,) * (rank - 2))
        self.top = raw.top
        self.register_buffer("mean", torch.tensor(raw.mean, dtype=dtype).view(shape))
        self.register_buffer("std", torch.tensor(raw.std, dtype=dtype).view(shape))
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        scaled = image if self.top == 1.0 else image / self.top
        return (scaled - self.mean) / self.std


class Normalized(nn.Module):
    """A network behind its own normalisation. In its graph the user's modules keep their names (see :func:`named_as_before`)."""

    def __init__(self, network: nn.Module, raw: Raw, rank: int) -> None:
        super().__init__()
        dtype = next((each.dtype for each in network.parameters() if each.is_floating_point()), torch.float32)
        self.first = "input_normalize" if hasattr(network, "normalize") else "normalize"
        self.add_module(self.first, Normalize(raw, rank, dtype))
        self.network, self.raw = network, raw
        self.training = False

    def forward(self, image: Tensor) -> Any:
        return self.network(getattr(self, self.first)(image))


def normalized(network: nn.Module, example: tuple[Tensor, ...], raw: Raw) -> Normalized:
    """The network that takes raw pixels. Raises UsageError as :func:`require_image` does."""
    require_image([value.shape for value in example], raw)
    if not example[0].is_floating_point():
        raise UsageError(f"--normalize: the input is {example[0].dtype}; wanted floating numbers, which can be normalised.")
    return Normalized(network, raw, example[0].dim())


def require_image(shapes: Sequence[Sequence[int]], raw: Raw) -> None:
    """Raise UsageError unless there is one input, and it has as many channels as the mean."""
    if len(shapes) == 1 and len(shapes[0]) > 2 and shapes[0][1] == len(raw.mean):
        return
    found = ", ".join("x".join(map(str, shape)) for shape in shapes)
    raise UsageError(
        f"--normalize: the network takes {found}, the mean has {len(raw.mean)} channels; wanted one input [batch, channels, …] "
        "with a mean and a deviation for each channel (--mean, --std)."
    )


def require(name: str, values: Any, *, positive: bool = False) -> tuple[float, ...]:
    """Mean or std as floats. Raises UsageError for what is no finite number, and for a deviation that is not above 0."""
    try:
        found = tuple(float(each) for each in values)
    except (TypeError, ValueError):
        found = ()
    if not found or not all(math.isfinite(each) and (each > 0 or not positive) for each in found):
        raise UsageError(f"{name} {values}: wanted a {'number above 0' if positive else 'number'} for each channel.")
    return found


def named_as_before(graph: Graph, module: nn.Module) -> Graph:
    """The graph of a :class:`Normalized` with the names that the user gave: ``features.conv``, not ``network.features.conv``."""
    if not isinstance(module, Normalized):
        return graph
    graph.raw = module.raw
    graph.tensors = {name.removeprefix(INSIDE): value for name, value in graph.tensors.items()}
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            node.target = str(node.target).removeprefix(INSIDE)
        path = f"{node.meta.get('module') or ''}."
        node.meta["module"] = path.removeprefix(INSIDE).removesuffix(".")
    return graph

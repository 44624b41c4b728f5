"""Networks that read heights and widths, folded so that other sizes work: the reading stays an operator of the graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foldexport
from foldexport.errors import EquivalenceError, UsageError
from foldexport.trace import trace
from tests.statistics import randomise

SPACE = ("height", "width")
EXAMPLE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Layers(nn.Module):
    def __init__(self, channels: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, channels, 3, stride, 1), nn.BatchNorm2d(channels)
        self.head, self.bn2 = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)

    def stem(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class Segmentation(Layers):
    """Back to the size of the image, as torchvision's segmentation networks end."""

    def __init__(self) -> None:
        super().__init__(stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.bn2(self.head(self.stem(x))), size=x.shape[-2:], mode="bilinear", align_corners=False)


class Pyramid(Layers):
    """A global pool written as a pool of the input's own size, and a coarser 1x1 convolution behind an upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        whole = F.avg_pool2d(y, y.shape[2:]) + F.max_pool2d(y, kernel_size=y.size()[2:])
        return self.narrow(F.interpolate(self.bn2(self.head(whole)), size=y.shape[2:])) + y[:, :2]


class Attention(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        batch, channels, height, width = y.shape
        tokens = y.reshape(batch, channels, height * width)
        mixed = (tokens.transpose(1, 2) @ tokens).softmax(-1) @ tokens.transpose(1, 2)
        return self.bn2(self.head(mixed.transpose(1, 2).view(batch, channels, height, width)))


class Aligned(Layers):
    """A U-Net's step back up: what an odd size lost is padded."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        up = F.interpolate(F.max_pool2d(y, 2), scale_factor=2)  # one short of an odd size
        return self.bn2(self.head(F.pad(up, [0, y.shape[3] - up.shape[3], 0, y.shape[2] - up.shape[2]]) + y))


class SamePadding(Layers):
    """TensorFlow's padding, computed from the size."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(4, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        pads = [max((-(size // -2) - 1) * 2 + 3 - size, 0) for size in (y.shape[3], y.shape[2])]
        return self.strided(F.pad(y, [pads[0] // 2, pads[0] - pads[0] // 2, pads[1] // 2, pads[1] - pads[1] // 2]))


class Positions(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return y * (torch.arange(y.shape[2], device=y.device) / y.shape[2]).view(1, 1, -1, 1)


NETWORKS = [Segmentation, Pyramid, Attention, Aligned, SamePadding, Positions]


def network(kind: type[nn.Module]) -> nn.Module:
    return randomise(kind(), seed=1, example=EXAMPLE)


@pytest.mark.parametrize("kind", NETWORKS, ids=lambda each: each.__name__)
def test_the_folded_module_takes_other_sizes(kind):
    module = network(kind)
    folded = foldexport.fold(module, EXAMPLE, free=SPACE)
    assert [name for name, _ in folded.certificate.probes if "size" in name] == ["second size", "odd size"]
    with torch.no_grad():
        for size in ((19, 23), (33, 18)):
            x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
            wanted, found = module(x), folded.module(x)
            assert found.shape == wanted.shape
            assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", NETWORKS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("form", ["onnx", "torchscript", "pytorch"])
def test_files_take_other_sizes(kind, form, tmp_path):
    suffix = {"onnx": ".onnx", "torchscript": ".torchscript.pt", "pytorch": ".py"}[form]
    folded = foldexport.fold(network(kind), EXAMPLE, free=SPACE)
    foldexport.export(folded, form, tmp_path / f"net{suffix}", dynamic=("batch", *SPACE))


def test_a_ceiling_written_as_a_floor_is_the_same_in_runtimes_that_round_to_zero(monkeypatch, tmp_path):
    """torch.onnx writes ``size // -2`` as a division that rounds towards zero: one column is lost at odd sizes."""
    monkeypatch.setattr("foldexport.trace.by_positive_numbers", lambda graph: None)
    folded = foldexport.fold(network(SamePadding), EXAMPLE, free=SPACE)
    with pytest.raises(EquivalenceError, match="shape"):
        foldexport.export(folded, "onnx", tmp_path / "net.onnx", dynamic=("batch", *SPACE))


@pytest.mark.parametrize("kind", [Segmentation, SamePadding, Positions], ids=lambda each: each.__name__)
def test_numbers_in_place_of_sizes_do_not_pass(kind, monkeypatch):
    """Same padding computes the same at every even size: its numbers are found at an odd one."""
    monkeypatch.setattr("foldexport.api.trace", lambda module, example, free: trace(module, example))
    with pytest.raises(UsageError, match="height and width cannot be free"):
        foldexport.fold(network(kind), EXAMPLE, free=SPACE)


def test_a_branch_on_the_parity_of_a_size_is_seen_at_an_odd_one():
    class Cropped(Layers):
        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.bn2(self.head(y[..., :-1] if y.shape[3] % 2 else y))

    with pytest.raises(UsageError, match="height and width cannot be free"):
        foldexport.fold(network(Cropped), EXAMPLE, free=SPACE)


def test_a_branch_on_a_size_is_told():
    class Branches(Layers):
        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.bn2(self.head(y * 2 if x.shape[2] > 20 else y))

    large = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert "the graph is for heights from 21 on" in foldexport.fold(network(Branches), large, free=SPACE).graph.notes
    assert "the graph is for heights from 2 to 20" in trace(network(Branches), EXAMPLE, free=SPACE).notes


def test_a_size_that_the_network_refuses_is_not_asked_of_the_folded_one():
    class Halved(Layers):
        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.bn2(self.head(F.interpolate(F.max_pool2d(y, 2), scale_factor=2))) + y

    folded = foldexport.fold(network(Halved), EXAMPLE, free=SPACE)
    assert [name for name, _ in folded.certificate.probes if "size" in name] == ["second size"]


def test_a_network_of_one_size_says_so():
    module = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 16 * 16, 3)).eval()
    with pytest.raises(UsageError, match="cannot be free"):
        foldexport.fold(module, EXAMPLE, free=SPACE)


@pytest.mark.parametrize("pool", ["avg_pool2d", "max_pool2d"])
def test_a_window_of_a_square_image_stays_a_window(pool):
    """``x.size(3)`` for both sides is the whole image only where it is square: nothing is changed then."""

    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return getattr(F, pool)(x, x.size(3))

    graph = trace(Square().eval(), EXAMPLE, free=("height",))
    assert [str(node.target) for node in graph.fx.find_nodes(op="call_function", target=getattr(torch.ops.aten, pool).default)]


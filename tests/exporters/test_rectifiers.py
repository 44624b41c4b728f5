"""Per-channel clamps at zero, rewritten as a signed depthwise convolution and a ReLU."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
import torch
from torch import nn

import foldexport
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.onnx.rectifiers import signed
from tests.fold.blocks import BLOCKS
from tests.fold.layers import chain, conv
from tests.statistics import randomise


def folded(module: nn.Module, shape: tuple[int, ...]):
    return foldexport.fold(randomise(module, 0), torch.randn(1, *shape))


def clamps(module: nn.Module) -> int:
    return sum(node.target is torch.clamp for node in module.graph.nodes)


class Grouped(nn.Module):
    """A trunk read by batch norms of other signs, one of them in front of a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.bns = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.grouped, self.pointwise = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.pointwise(torch.relu(self.bns[0](x)))
        y = torch.relu(self.bns[1](x))
        return x + self.grouped(y)


@pytest.mark.parametrize("build, shape", [
    (BLOCKS["preactivation_signs"].build, (3, 8, 8)),
    (Grouped, (3, 6, 6)),
], ids=["preactivation", "grouped"])  # fmt: skip
def test_the_same_values_bit_for_bit_without_clamps(build, shape) -> None:
    """σ is ±1: every product is the same number, and the sums run over the same terms."""
    module = folded(build(), shape).module
    assert clamps(module)
    found, x = signed(module), torch.randn(3, *shape)
    assert found is not module and not clamps(found) and clamps(module)
    with torch.no_grad():
        assert torch.equal(module(x), found(x))


def test_a_clamp_with_another_reader_stays() -> None:
    """What goes to an addition, an output or a resize would carry the sign."""

    class Read(Grouped):
        def forward(self, x):
            x = self.stem(x)
            x = x + self.pointwise(torch.relu(self.bns[0](x)))
            y = torch.relu(self.bns[1](x))
            return self.grouped(y), y.sigmoid()

    module = folded(Read(), (3, 6, 6)).module
    before = clamps(module)
    assert before and signed(module) is module


def test_a_chain_is_left_alone() -> None:
    module = folded(chain(conv=conv(3, 4), bn=nn.BatchNorm2d(4), relu=nn.ReLU()), (3, 6, 6)).module
    assert signed(module) is module


def test_the_file_has_as_many_operators_and_passes_its_proof(tmp_path) -> None:
    network = folded(BLOCKS["preactivation_signs"].build(), (3, 8, 8))
    made = foldexport.export(network, "onnx", tmp_path / "net.onnx")
    nodes = Counter(node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node)
    assert made.comparison.ok and made.comparison.weights_identical[0] == made.comparison.weights_identical[1]
    OnnxExporter().export(network.module, (torch.randn(1, 3, 8, 8),), tmp_path / "plain.onnx")
    plain = Counter(node.op_type for node in onnx.load(tmp_path / "plain.onnx").graph.node)
    assert plain["Max"] == plain["Min"] == 2 and not nodes["Max"] + nodes["Min"]
    assert nodes.total() == plain.total()


def test_a_sign_that_is_lost_is_caught(tmp_path, monkeypatch) -> None:
    """Planted: one reader does not get the sign."""
    from foldexport.errors import EquivalenceError
    from foldexport.exporters.onnx import rectifiers

    plain = rectifiers._rewrite
    monkeypatch.setattr(rectifiers, "_rewrite", lambda module, node, signs, targets: plain(module, node, signs, targets[1:]))
    network = folded(BLOCKS["preactivation_signs"].build(), (3, 8, 8))
    with pytest.raises(EquivalenceError):
        foldexport.export(network, "onnx", tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())

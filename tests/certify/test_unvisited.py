"""Mistakes where no probe comes: beyond a clamp's bound, and behind channels that are 0 on every probe."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import foldexport
from foldexport import probes
from foldexport.certify import certify
from foldexport.fold.rebuild import Program


class Clamped(nn.Module):
    """A ReLU6 that no probe reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        with torch.no_grad():
            self.first.weight.mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu6(self.norm(self.second(nn.functional.relu6(self.first(x))))).mean((2, 3))


class Dead(Clamped):
    """Channel 2 is 0 behind its ReLU; channel 5 of the second convolution has no weights."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.first.bias[2] = -1e5
            self.second.weight[5], self.second.bias[5] = 0.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        z = self.norm(self.second(y)) + y[:, :, 1:-1, 1:-1]
        return nn.functional.max_pool2d(torch.relu(z), 2).mean((2, 3))


def judged(network: nn.Module, plant=lambda program: None):
    torch.manual_seed(0)
    folded = foldexport.fold(network().eval(), torch.randn(2, 3, 8, 8))
    program = folded.refold()
    with torch.no_grad():
        plant(program)
    return certify(folded.graph, program, probes.make(folded.graph))


def unclamp(program: Program) -> None:
    graph = program.module.graph
    clamps = [node for node in graph.nodes if "hardtanh" in str(node.target) or "relu6" in str(node.target).lower()]
    clamps += [node for node in graph.nodes if node.op == "call_module"
               and isinstance(program.module.get_submodule(node.target), nn.ReLU6 | nn.Hardtanh)]  # fmt: skip
    assert clamps
    for node in clamps:
        if node.op == "call_module":
            program.module.set_submodule(node.target, nn.ReLU())
        else:
            node.target, node.args, node.kwargs = torch.ops.aten.relu.default, (node.args[0],), {}
    program.module.recompile()


def spoil_column(program: Program) -> None:
    layers = [layer for layer in program.module.modules() if isinstance(layer, nn.Conv2d) and layer.in_channels == 8]
    layers[0].weight[:, 2] *= -5


def test_faultless_folds_pass_and_silent_channels_are_tried():
    assert judged(Clamped).ok
    found = judged(Dead)
    assert found.ok and found.silent and found.revived


@pytest.mark.parametrize(("network", "plant", "said"), [
    (Clamped, unclamp, "on probe 'normal times 64'"), (Dead, spoil_column, "on probe 'silent channels revived'"),
], ids=["a clamp's bound", "a column behind a dead channel"])  # fmt: skip
def test_what_no_probe_visits_is_seen(network, plant, said):
    found = judged(network, plant)
    assert not found.ok and said in str(found.failures[0]), found.summary()
    assert not any(finding.probe in ("normal", "uniform", "constant", "impulse") for finding in found.failures)

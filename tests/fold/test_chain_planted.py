"""A chain with a mistake in it does not pass: each mistake, planted, is an `EquivalenceError` that names a layer of the block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import foldexport
from foldexport import api
from foldexport.certify import certify
from foldexport.errors import EquivalenceError
from foldexport.fold import chain as chaining
from foldexport.fold.chain import carrying, entry, plain, regions, stacking, widen
from foldexport.fold.chain.intervals import Intervals
from foldexport.fold.conv import Conv
from foldexport.fold.passes import fold_graph
from foldexport.fold.rebuild import Rebuilt, rebuild
from foldexport.probes import make
from foldexport.trace import trace
from tests.fold.layers import chain, conv_bn
from tests.fold.skip_blocks import Skip, before
from tests.networks import Residual
from tests.statistics import randomise

EXAMPLE = torch.linspace(-2, 2, 2 * 3 * 64).sin().reshape(2, 3, 8, 8)


def network(block: nn.Module, out: int = 8) -> nn.Sequential:
    layers = chain(stem=conv_bn(3, 8), relu=nn.ReLU(), block=block, last=nn.Conv2d(out, 4, 3, padding=1))
    return randomise(layers, 0, example=EXAMPLE)


def post() -> nn.Sequential:
    """``relu(f(x) + projection(x))``, x from a ReLU, stride 2 in the first convolution."""
    return network(Residual(8, 16, 2, bottleneck=False, preactivation=False), 16)


def middle() -> nn.Sequential:
    """A bottleneck of stride 2 in its second convolution, whose groups carry x on."""
    return network(Residual(8, 4, 2, bottleneck=True, preactivation=False), 16)


def pre() -> nn.Sequential:
    """``x + f(x)`` behind another one: the trunk is of any sign."""
    blocks = (Residual(8, 8, 1, bottleneck=False, preactivation=True) for _ in range(2))
    return network(nn.Sequential(*blocks))


def shifted() -> nn.Sequential:
    """x ≥ −0.4, carried as x + 0.4; the branch is subtracted."""
    branch = nn.Sequential(conv_bn(8, 8), nn.ReLU(), conv_bn(8, 8))
    return network(nn.Sequential(before("bn-above", 8), Skip(nn.Identity(), branch, nn.Identity(), nn.ReLU(), signs=(1.0, -1.0))))


def bounded() -> nn.Sequential:
    """``max(·, −0.4)`` in the branch."""
    branch = nn.Sequential(conv_bn(8, 8), before("above", 8), conv_bn(8, 8, 1))
    return network(Skip(nn.Identity(), branch, nn.Identity(), nn.ReLU()))


def subtracted() -> nn.Sequential:
    """``f(x) − x``."""
    branch = nn.Sequential(conv_bn(8, 8), nn.ReLU(), conv_bn(8, 8))
    return network(Skip(nn.Identity(), branch, nn.Identity(), nn.ReLU(), signs=(-1.0, 1.0)))


def refused(module: nn.Module) -> str:
    """The message of the error that a chain of the module ends in."""
    with pytest.raises(EquivalenceError) as caught:
        foldexport.fold(module, EXAMPLE, chain=True)
    assert caught.value.exit_code == 4
    return str(caught.value)


def changed(function: Callable, change: Callable) -> Callable:
    """The function with its result changed."""
    return lambda *args, **more: change(function(*args, **more))


def with_rows(change: Callable[[carrying.Rows], carrying.Rows]) -> tuple:
    return carrying, "one_sided", changed(carrying.one_sided, change)


def moved(conv: Conv) -> Conv:
    """Reads one position further."""
    return dataclasses.replace(conv, padding=tuple((lo - 1, hi + 1) for lo, hi in conv.padding))


def neighbours(right: Callable) -> Callable:
    """The rows behind the branch's read the next channel."""
    return lambda first, second: right(first, dataclasses.replace(second, weight=second.weight.roll(1, 1)))


MISTAKES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple], str]] = {
    "Dirac rows of the next channel": (post, lambda: (widen, "stacked", neighbours(stacking.stacked)), "does not carry"),
    "Dirac rows off their centre": (
        post, lambda: (stacking, "_fit", changed(stacking._fit, moved)), "'block.convs.0' does not carry"),
    "groups of the next channel": (
        middle, lambda: (widen, "dirac_groups", changed(stacking.dirac_groups, lambda c: c and dataclasses.replace(
            c, weight=torch.cat([c.weight[:4], c.weight[4:].roll(1, 0)])))), "'block.convs.1' does not carry"),
    "a forgotten minus": (
        pre, lambda: with_rows(lambda rows: dataclasses.replace(rows, scale=rows.scale.abs())), "block.0.convs.1"),
    "a forgotten half": (
        pre, lambda: (carrying, "one_sided", lambda carried, largest: carrying.kept(carried)), "block.0.convs.1"),
    "a forgotten shift": (
        shifted, lambda: (carrying, "carried_on", changed(carrying.carried_on, lambda made: dataclasses.replace(
            made, shift=torch.zeros_like(made.shift)))), "'block.1.branch.2.conv' does not give"),
    "a shift of the wrong sign": (
        shifted, lambda: with_rows(lambda rows: dataclasses.replace(rows, offset=-rows.offset)), "block.1.branch.2.conv"),
    "a sign that nothing proves": (
        pre, lambda: (Intervals, "of", lambda self, stored: (torch.zeros(stored.shape[1]).double(),
                                                             torch.full((stored.shape[1],), torch.inf).double())), "block.0"),
    "a projection without its bias": (
        post, lambda: (regions, "_shortcut", changed(regions._shortcut, lambda c: dataclasses.replace(c, bias=None))),
        "'block.convs.1' does not give"),
    "a shortcut with the wrong sign": (
        subtracted, lambda: (chaining, "find", changed(regions.find, lambda region: dataclasses.replace(
            region, signs=(1.0, -region.signs[1])))), "'block.branch.2.conv' does not give"),
    "a bound that is not taken back": (
        bounded, lambda: (plain, "one_bound", changed(plain.one_bound, lambda p: p and dataclasses.replace(
            p, back_shift=p.back_shift + 1e-6))), "'block.branch.1.0' does not give"),
    "a shared half that is not undone": (
        pre, lambda: (entry, "_with_shared", changed(entry._with_shared, lambda made: dataclasses.replace(
            made, matrix=made.matrix * (1 + 1e-6)))), "does not give"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_caught_and_named(monkeypatch: pytest.MonkeyPatch, name: str):
    build, mistake, words = MISTAKES[name]
    module = build()
    right = foldexport.fold(module, EXAMPLE, chain=True)
    assert right.certificate.ok and not any(entry.status == "kept" for entry in right.ledger)
    monkeypatch.setattr(*mistake())
    assert words in refused(module)


# ---- a weight of the finished chain


def chained(module: nn.Module) -> tuple:
    graph = trace(module, EXAMPLE)
    with torch.no_grad():
        return graph, rebuild(chaining.chain_graph(fold_graph(graph)))


def wide_layers(result: Rebuilt) -> list[tuple[str, fx.Node, list]]:
    """Convolutions with carried rows: (name, node, their images)."""
    found = []
    for node in result.program.module.graph.nodes:
        images = [record for record in result.program.records.get(node.name, ()) if record.image is not None]
        if images and isinstance(result.program.module.get_submodule(node.target), nn.Conv2d):
            found.append((node.target, node, images))
    return found


@pytest.mark.parametrize("build", [post, middle, pre, shifted])
def test_one_weight_of_one_dirac_row(build: Callable[[], nn.Module]):
    """A millionth in a carried row, at the layer and for the channel of the training graph that the row carries."""
    module = build()
    graph, result = chained(module)
    for name, node, images in wide_layers(result):
        layer, record = result.program.module.get_submodule(name), images[-1]
        row, channel = int(record.channels[-1]), int(record.image.index[-1])
        with torch.no_grad():
            kept = layer.weight[row].clone()
            layer.weight[row] += 1e-6
            certificate = certify(graph, result.program, make(graph), module=module)
            layer.weight[row] = kept
        first = certificate.failures[0]
        assert (first.operator, first.channel, first.carried) == (node.name, channel, True)
        assert "does not carry" in str(first)
    assert certify(graph, result.program, make(graph), module=module).ok


@pytest.mark.parametrize("build", [post, middle, pre, shifted])
def test_every_channel_is_held_to_the_training_graph(build: Callable[[], nn.Module]):
    """What a record does not hold a channel to is not proved where it is made."""
    graph, result = chained(build())
    widths = {}

    class Widths(fx.Interpreter):
        def run_node(self, n: fx.Node):
            value = super().run_node(n)
            widths[n.name] = getattr(value, "shape", (0, 0))
            return value

    Widths(result.program.module).run(EXAMPLE.double())
    wide = [name for name, records in result.program.records.items() if any(r.channels is not None for r in records)]
    assert len(wide) >= 2
    for name in wide:
        covered = torch.zeros(widths[name][1], dtype=torch.bool)
        for record in result.program.records[name]:
            covered[record.channels] |= (record.scale != 0).reshape(-1).expand(len(record.channels))
        assert bool(covered.all()), name


def test_an_error_far_from_the_output(monkeypatch: pytest.MonkeyPatch):
    """A millionth in the first widened bias of a deep chain."""
    blocks = (Residual(8, 8, 1, bottleneck=False, preactivation=False) for _ in range(6))
    module, right = network(nn.Sequential(*blocks)), api.rebuild

    def wrong(folded):
        result = right(folded)
        if folded.parts:
            with torch.no_grad():
                result.program.module.get_submodule("block.0.convs.0").bias[-1] += 1e-6
        return result

    monkeypatch.setattr(api, "rebuild", wrong)
    assert "'block.0.convs.0' does not carry" in refused(module)

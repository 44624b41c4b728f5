"""Badly behaved networks of users: those that trace compute the same, and the others are told why, where and what helps."""

from __future__ import annotations

import inspect
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from foldexport import interpret
from foldexport.errors import ModelError, TraceError, UsageError
from foldexport.trace import constants, exporting, forward, trace
from foldexport.trace.kept import Saved
from tests.eager import assert_functional
from tests.statistics import randomise
from tests.trace import odd_networks as odd
from tests.trace import refused_networks as refused

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def assert_same(network: nn.Module, *example: torch.Tensor, called=None):
    """The graph, which computes what the network computes, at batches of one and three where it allows them."""
    graph = trace(network, example)
    assert_functional(graph)
    for batch in (1, 3) if graph.dynamic["batch"] else (example[0].shape[0],):
        inputs = [torch.randn(batch, *e.shape[1:], generator=torch.Generator().manual_seed(batch)) for e in example]
        with torch.no_grad():
            wanted = pytree.tree_leaves((called or network)(*(i.clone() for i in inputs)))
        found = interpret.outputs(graph, inputs, None)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted):
            assert torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other
    return graph


def state_of(module: nn.Module) -> list:
    """Every attribute of every part, down to the identity of what it holds."""
    found = []
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            found.append((name, key, dict(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else value))
    return found


FREE = [
    odd.BranchOnShape, odd.BatchInView, odd.Einsum, odd.Interpolated, odd.Counter, odd.Cached, odd.Timed, odd.Talkative,
    odd.DrawsInTraining, odd.Reused, odd.Hooked, odd.Deployed, odd.MakesLayer, odd.Wrapped, odd.Vmapped, odd.Complex,
    odd.NumPyConstants, odd.DataWrites, odd.MaskedWrite, odd.ManyOutputs, odd.DataclassOutput, odd.Arguments,
]  # fmt: skip


@pytest.mark.parametrize("make", FREE, ids=lambda make: make.__name__)
def test_networks_that_trace(make, capfd):
    network = make().eval()
    before = state_of(network)
    numbers = random.getstate(), torch.get_rng_state(), str(np.random.get_state())
    graph = trace(network, IMAGE)
    assert capfd.readouterr() == ("", "")
    after = state_of(network)
    assert len(before) == len(after) and all(one[:2] == other[:2] for one, other in zip(before, after))
    for one, other in zip(before, after):
        assert one[2] is other[2] or isinstance(one[2], dict | list) and _same_items(one[2], other[2]) or one[2] == other[2], one
    assert random.getstate() == numbers[0] and torch.equal(torch.get_rng_state(), numbers[1])
    assert str(np.random.get_state()) == numbers[2]
    assert graph.dynamic == {"batch": True} and graph.notes == [] and graph.module is network
    assert_same(network, IMAGE)


def _same_items(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(one[key] is other[key] for key in one)
    return len(one) == len(other) and all(a is b for a, b in zip(one, other))


def test_caches_at_module_level_hold_no_tensors_without_values():
    odd.CACHE.clear()
    network = odd.Cached().eval()
    trace(network, IMAGE)
    assert not odd.CACHE and network.row.cache_info().currsize == 0
    assert network(IMAGE).isfinite().all()


READ = [
    (odd.Settings, ["not self.on or self.conv.weight.abs().max() > 9", "range(self.times)", "self.widths.tolist()"]),
    (odd.Selected, ["[:, self.mask]", "np.argwhere(self.indexes", "nonzero()"]),
    (odd.CountsInABuffer, ["if self.calls > 0"]),
    (odd.Inferring, ["if self.on else x"]),
]


@pytest.mark.parametrize(("make", "lines"), READ, ids=lambda value: getattr(value, "__name__", ""))
def test_values_of_weights_are_read_and_told(make, lines):
    graph = assert_same(randomise(make(), 0), IMAGE)
    assert graph.dynamic == {"batch": True}
    said = "\n".join(graph.notes)
    for line in lines:
        assert line in said, said
    assert "odd_networks.py:" in said and "read from weights" in said


def test_another_checkpoint_takes_its_own_way():
    network = odd.Settings().eval()
    network.on.fill_(False)
    graph = trace(network, IMAGE)
    assert torch.equal(interpret.outputs(graph, IMAGE, None)[0], IMAGE)


def test_checks_are_left_out_and_told():
    graph = assert_same(odd.Checked().eval(), IMAGE)
    assert [note.split("`")[1] for note in graph.notes] == [
        "not torch.isnan(x).any() and (not torch.isinf(x).any())", "x.max().item() < 1000000.0", "torch.allclose(x, x)",
        "not torch.isfinite(x).all()", "x.isnan().any()",
    ]  # fmt: skip
    assert all("is not part of the graph" in note for note in graph.notes)


# ---- what is around a network


def block() -> nn.Sequential:
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)), 0)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel], ids=["parallel", "compiled", "averaged"]
)
def test_wrappers_are_taken_off(wrap):
    network = block()
    graph = assert_same(wrap(network).eval(), IMAGE, called=network)
    assert "0.weight" in graph.tensors and graph.dynamic == {"batch": True}
    assert isinstance(graph.module, nn.Sequential)


class ByKeyword(odd.Base):
    def forward(self, x, *, scale=None, mask):
        return self.conv(x) * mask if scale is None else self.conv(x) * mask * scale


def test_inputs_by_keyword():
    mask = torch.randn(2, 1, 8, 8)
    network = ByKeyword().eval()
    graph = assert_same(network, IMAGE, mask, called=lambda x, mask: network(x, mask=mask))
    assert graph.input_names == ["x", "mask"] and graph.dynamic == {"batch": True}
    assert torch.equal(graph.module(IMAGE, mask), network(IMAGE, mask=mask))
    assert trace(network, (IMAGE, mask, mask)).input_names == ["x", "mask", "scale"]


def test_a_batch_that_is_fixed_says_by_which_line():
    class Loop(odd.Base):
        def forward(self, x):
            return torch.stack([self.conv(x[i]) for i in range(len(x))])

    graph = assert_same(Loop().eval(), IMAGE)
    assert graph.dynamic == {"batch": False}
    (note,) = graph.notes
    assert note.startswith("the batch is fixed at 2: test_user_code.py:") and "range(len(x))" in note


def test_nested_deeper_than_tracing_can_go_at_once():
    graph = trace(odd.Deep(120).eval(), IMAGE)
    assert sum("conv2d" in node.name for node in graph.fx.nodes) == 121


def test_nested_deeper_than_python_can_go():
    with pytest.raises(ModelError, match=r"Deep does not run: .*deeper than Python's limit of \d+\.\n.*setrecursionlimit"):
        trace(odd.Deep(400).eval(), IMAGE)


# ---- refusals

TRACES_NOT = [
    (refused.BranchOnValues, "a data-dependent branch", ["`x.sum() > 0` depends", "torch.where"]),
    (refused.LoopOnValues, "a data-dependent loop", ["`x.abs().max() > 0.1`", "fixed number of steps"]),
    (refused.ConditionOverLines, "a data-dependent branch", ["`x.mean() > 0 and x.max() > 1`"]),
    (refused.BranchDeepInside, "a data-dependent branch", ["In module 'layers.1' (ConditionOverLines)"]),
    (refused.BranchInAHook, "a data-dependent branch", ["In module 'conv' (Conv2d)", "`output.max() > 3`"]),
    (refused.NumberForASlice, "a data-dependent number", ["torch.gather"]),
    (refused.IndexIntoAList, "a data-dependent number", ["torch.gather"]),
    (refused.BufferOfTheInput, "a data-dependent branch", ["`part[0] > 0`"]),
    (refused.MaskedIndex, "a data-dependent size", ["x[mask]", "torch.where(mask, a, b)"]),
    (refused.Nonzero, "a data-dependent size", ["nonzero", "topk"]),
    (refused.AssertionWithTwoSides, "a data-dependent assertion", ["one assert for each"]),
    (refused.CaughtCheck, "a data-dependent branch", ["`x.mean() > 0`"]),
    (refused.ObjectOutput, "an output that is no tensor", ["types.SimpleNamespace", "dataclasses"]),
    (refused.GeneratorOutput, "an output that is no tensor", ["generator"]),
    (refused.Threaded, "operators out of sight", ["threads"]),
    (refused.CompiledKernel, "an operator PyTorch cannot see into", ["torch.library.custom_op"]),
    (refused.ShapelessOperator, "an operator without a shape rule", ["shapeless", "register_fake"]),
    (refused.SparseWeight, "", ["sparse", "plain tensors"]),
    (refused.SeededGenerator, "", ["draws from a torch.Generator", "buffer"]),
    (refused.DataOfAnotherShape, "a graph cannot hold it", ["assigned to .data", "Make a new tensor"]),
]


def line_of(network: type) -> int | None:
    """The line marked "here" in the class, or in the function that its hook or forward calls."""
    owner = {"ConditionOverLines": refused.helper, "BranchDeepInside": refused.helper, "BranchInAHook": refused.choosing}
    lines, first = inspect.getsourcelines(owner.get(network.__name__, network))
    return next((first + at for at, line in enumerate(lines) if "# here" in line), None)


def assert_explained(message: str, network: type, words: list[str]) -> None:
    lines = message.splitlines()
    assert len(lines) <= 2 and len(lines[0]) <= 135, message
    assert network.__name__ in lines[0]
    for word in words:
        assert word in message, message
    line = line_of(network)
    if line is not None:
        assert f"refused_networks.py:{line} in " in lines[0], (line, message)


@pytest.mark.parametrize(("make", "what", "words"), TRACES_NOT, ids=lambda value: getattr(value, "__name__", ""))
def test_networks_that_do_not_trace(make, what, words, capfd):
    with pytest.raises(TraceError) as caught:
        trace(make().eval(), IMAGE)
    assert_explained(str(caught.value), make, [what, *words])
    assert str(caught.value).startswith("cannot trace ") and caught.value.__cause__ is not None
    assert capfd.readouterr() == ("", "")


CHANGES = [
    (refused.PythonRandom, ["random in eval mode", "self.training"]),
    (refused.NumPyRandom, ["random in eval mode", "self.training"]),
    (refused.Clock, ["another result at each call", "a clock"]),
    (refused.CallsCount, ["another result at each call", "self.calls"]),
    (refused.WeightsGrow, ["another result at each call", "self.conv.weight"]),
    (refused.HidesModules, ["sets self.modules (int)", "hides nn.Module.modules()", "self.modules_"]),
    (refused.Lazy, ["lazy layers", "'first.weight'", "Load its checkpoint"]),
]


@pytest.mark.parametrize(("make", "words"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_networks_that_are_no_function(make, words):
    network = make()
    for part in nn.Module.modules(network):
        part.training = False
    with pytest.raises(ModelError) as caught:
        trace(network, IMAGE)
    assert_explained(str(caught.value), make, words)


FAILS = [
    (refused.TakesADict, ["a dict is wanted", "the keys image, mask", 'self.network({"image": image, "mask": mask})']),
    (refused.LacksAPart, ["AttributeError", "no attribute 'head'", "does not run as it stands"]),
    (refused.NeedsAPackage, ["ModuleNotFoundError", "surely_not_installed"]),
    (refused.NoForward, ["has no forward()", "--arch"]),
    (refused.OtherTypes, ["x.to(self.weight.dtype)"]),
]


@pytest.mark.parametrize(("make", "words"), FAILS, ids=lambda value: getattr(value, "__name__", ""))
def test_networks_that_do_not_run(make, words):
    with pytest.raises(UsageError) as caught:
        trace(make().eval(), IMAGE)
    assert_explained(str(caught.value), make, words)


def test_a_network_that_wants_a_gpu():
    with pytest.raises(UsageError) as caught:
        trace(refused.NeedsGpu().eval(), IMAGE)
    assert_explained(str(caught.value), refused.NeedsGpu, ["no GPU", "x.to(self.weight.device), not .cuda()"])


def test_a_shape_that_forward_itself_refuses():
    with pytest.raises(UsageError, match=r"rejects input shape 2x3x8x8: AssertionError at refused_networks.py:\d+ .*--input-shape"):
        trace(refused.ShapeChecked().eval(), IMAGE)


def test_too_many_inputs_are_told_with_what_forward_takes():
    with pytest.raises(UsageError, match=r"rejects input shape 2x3x8x8, 2x.*forward takes \(x\), one --input-shape for each"):
        trace(odd.BatchInView().eval(), (IMAGE, IMAGE))


# ---- planted mistakes


def test_a_wrong_value_of_a_weight_is_caught(monkeypatch):
    def known(module, names, notes):
        wrong = {name: tensor - 1 for name, tensor in module.state_dict().items()}
        return lambda: constants.Known(module, wrong, names, notes)

    monkeypatch.setattr(exporting, "known", known)
    with pytest.raises(AssertionError):
        assert_same(odd.CountsInABuffer().eval(), IMAGE)


def test_a_value_that_is_kept_after_a_write_of_the_input_is_caught(monkeypatch):
    monkeypatch.setattr(constants.Known, "_forget", lambda self, storage: None)
    with pytest.raises(AssertionError):
        assert_same(refused.BufferOfTheInput().eval(), IMAGE + 9)


def test_a_network_that_is_not_put_back_is_caught(monkeypatch):
    monkeypatch.setattr(Saved, "restore", lambda self: None)
    network = odd.Cached().eval()
    with pytest.raises(Exception, match="data-dependent"):  # what the call that follows meets: tensors without values
        trace(network, IMAGE)
    assert odd.CACHE
    odd.CACHE.clear()


def test_a_write_through_data_that_is_not_seen_is_caught(monkeypatch):
    monkeypatch.setattr(forward, "REPLACED", {})
    with pytest.raises((AssertionError, TraceError)):
        assert_same(odd.DataWrites().eval(), IMAGE)

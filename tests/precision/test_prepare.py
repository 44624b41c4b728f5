"""What overflows or vanishes is rescaled, proved, or kept in float32 by name; and the error is the type's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import foldexport
from foldexport.api import in_precision
from foldexport.errors import EquivalenceError, PrecisionError, UsageError
from foldexport.precision import prepare as prepared
from foldexport.precision.prepare import prepare
from foldexport.precision.types import HALF, rounded
from tests.precision.networks import Large, Trunk, far, folded
from tests.statistics import randomise

FP16, BF16 = HALF["fp16"], HALF["bf16"]


def in_type(found, kind=FP16, **options):
    inputs = [each for each, _ in found.certificate.references]
    return prepare(found.graph, found.refold(), kind, inputs=inputs, **options)


def state(module: nn.Module) -> set[str]:
    return {str(each.dtype) for each in module.parameters()}


@pytest.mark.parametrize("kind", HALF.values(), ids=list(HALF))
def test_a_network_that_fits_is_rounded_and_nothing_else(kind):
    found = folded(Trunk)
    made = in_type(found, kind)
    assert made.report.before == [] and made.report.rescaled == 0 and not made.report.single
    assert made.report.layers == (6, 6) and state(made.module) == {str(kind.dtype)}
    exact = dict(found.refold().module.named_parameters())
    for name, each in made.module.named_parameters():
        assert torch.equal(each, rounded(exact[name], kind.dtype)), name
    multiple = made.rounding.multiples["folded"].multiple
    assert 0.1 < multiple < 2.0
    y = made.module(torch.randn(3, 3, 8, 8))
    assert y.dtype == torch.float32 and y.shape == (3, 5)


def test_the_module_computes_what_the_emulation_says():
    """The emulated error is that of the module run by PyTorch's own half kernels."""
    found = folded(Trunk)
    made = in_type(found)
    x = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        wanted = copy.deepcopy(found.source).double()(x.double())
        error = (made.module(x).double() - wanted).abs().max() / wanted.abs().max()
    assert float(error) < 4 * made.rounding.multiples["folded"].error


@pytest.mark.parametrize(("exponent", "problem"), [(17, "overflows"), (-20, "vanishes")])
def test_what_does_not_fit_is_listed_and_rescaled(exponent, problem):
    found = far(exponent)
    made = in_type(found)
    listed = {(each["layer"], each["problem"]) for each in made.report.before}
    assert ("a", problem) in listed
    assert made.report.rescaled >= 2 and made.report.compared > 3 and not made.report.single
    assert made.report.layers == (4, 4) and made.rounding.multiples["folded"].multiple < 2.0


def test_without_rescaling_it_stays_in_float32_by_name():
    made = in_type(far(17), rescale=False)
    assert set(made.report.single) >= {"a", "b"} and "overflows" in made.report.single["a"]
    assert made.module.get_submodule("a").weight.dtype == torch.float32
    assert made.report.layers == (4, 1) and made.module.get_submodule("d").weight.dtype == torch.float16


def test_bf16_needs_no_rescaling():
    made = in_type(far(17), BF16)
    assert made.report.before == [] and made.report.rescaled == 0 and made.report.layers == (4, 4)


def test_what_is_pinned_and_too_large_stays_in_float32_with_casts():
    found = folded(Large)
    made = in_type(found)
    assert "large" in made.report.single, made.report.single
    modules = dict(made.module.named_modules())
    assert modules["large"].weight.dtype == torch.float32 and modules["inside"].weight.dtype == torch.float16
    y = made.module(torch.randn(2, 3, 6, 6))
    assert bool(y.isfinite().all()) and y.dtype == torch.float32


def test_a_cast_that_is_missing_is_found():
    found = folded(Large)
    module = in_type(found).module
    cast = next(node for node in module.graph.nodes if node.op == "call_method" and node.args[0].op != "placeholder")
    cast.replace_all_uses_with(cast.args[0])
    module.graph.erase_node(cast)
    module.recompile()
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 3, 6, 6))


def test_a_scale_that_is_not_compensated_ends_in_exit_4(monkeypatch):
    def wrong(module, groups, scales):
        changed = prepared_rescaled(module, groups, scales)
        with torch.no_grad():
            changed.get_submodule("b").weight.mul_(2.0)
        return changed

    prepared_rescaled = prepared.rescaled
    monkeypatch.setattr(prepared, "rescaled", wrong)
    with pytest.raises(EquivalenceError, match="was not compensated"):
        in_type(far(17))


def test_an_overflow_that_no_probe_foresaw_fails(monkeypatch):
    """Were nothing measured, the emulated run itself would overflow and be refused."""
    monkeypatch.setattr(prepared, "misfits", lambda *_: [])
    with pytest.raises(EquivalenceError, match="fp16 noise"):
        in_type(far(17), rescale=False)


def test_weights_that_were_trained_further_are_not_silently_replaced():
    found = foldexport.fold(randomise(Large(), 3), torch.randn(2, 3, 6, 6))
    assert in_precision(found, "fp16") is not None
    with torch.no_grad():
        next(found.module.parameters()).add_(1.0)
    with pytest.raises(UsageError, match="fold again"):
        in_precision(found, "fp16")


def test_a_network_that_fits_nowhere_is_refused():
    class Pinned(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x) * 2.0**18

    found = foldexport.fold(randomise(Pinned(), 0), torch.randn(2, 3, 4, 4))
    with pytest.raises(PrecisionError, match="no layer of the network fits") as caught:
        in_type(found)
    assert caught.value.exit_code == 6


def test_the_unit_does_not_grow_where_the_training_graph_overflows():
    """Digits alone: the same network with its numbers elsewhere has the same noise."""
    near, away = in_type(far(0)), in_type(far(17))
    assert away.rounding.noise == pytest.approx(near.rounding.noise, rel=1e-6)


class Shuffled(nn.Module):
    """A channel shuffle: a view of a transposed tensor, made contiguous by an operator that the fold takes out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, groups=2)

    def forward(self, x):
        x = self.first(x).relu()
        n, c, h, w = x.shape
        return self.second(x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w))


def test_views_of_other_strides():
    found = folded(Shuffled)
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        wanted = found.source(x)
        assert torch.allclose(found.module(x), wanted, atol=1e-5)
        assert torch.allclose(in_type(found).module(x), wanted, atol=1e-2)

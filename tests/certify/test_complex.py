"""Networks with complex inner values, and with outputs that are no real numbers: proved like any other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import foldexport
from foldexport.certify.lockstep import Schedule
from foldexport.certify.rounding import worst_conditioned
from foldexport.fold.passes import fold_graph
from foldexport.fold.rebuild import rebuild
from foldexport.fold.wishes import MAX_SIGMA
from foldexport.probes import make
from foldexport.trace import trace
from tests.fold.checks import inputs, operators, relative_error
from tests.hand_folds import run
from tests.statistics import randomise

SHAPE = (3, 8, 8)


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def unit(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class GlobalFilter(Unit):
    """A learned filter in the frequency domain between two batch norms (Rao et al. 2021, GFNet, equation 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(0.3 * torch.randn(4, 8, 5, 2))
        self.head, self.bn2 = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(self.unit(x), norm="ortho") * torch.view_as_complex(self.filter)
        return self.bn2(self.head(torch.fft.irfft2(spectrum, s=(8, 8), norm="ortho"))).relu()


class Spectrum(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft2(self.unit(x))


class Phases(Unit):
    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.fft2(self.unit(x))
        return torch.fft.ifft2(torch.polar(spectrum.abs().sqrt(), spectrum.angle())).real


class Classes(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return self.unit(x).argmax(1)


class Above(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return self.unit(x) > 0


class Sizes(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor(self.unit(x).shape[2:])


FOLDED = {
    GlobalFilter: {"conv": 2, "fft_rfft2": 1, "mul": 1, "fft_irfft2": 1, "relu": 1},
    Spectrum: {"conv": 1, "fft_rfft2": 1},
    Phases: {"conv": 1, "fft_fft2": 1, "abs": 1, "sqrt": 1, "angle": 1, "polar": 1, "fft_ifft2": 1, "real": 1},
    Classes: {"conv": 1, "argmax": 1},
    Above: {"conv": 1, "gt": 1},
    Sizes: {},
}


@pytest.mark.parametrize(("network", "expected"), FOLDED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_folded_and_proved(network, expected):
    module = randomise(network(), 0)
    (example,) = inputs([SHAPE], batch=2, dtype=torch.float32)
    folded = foldexport.fold(module, example)
    assert folded.certificate.ok and operators(folded.counts_after) == expected
    found, wanted = folded.module(example), module(example)
    if wanted.is_floating_point() or wanted.is_complex():
        assert relative_error(found, wanted) < 1e-5
    else:
        assert torch.equal(found, wanted)


def test_complex_weights_keep_both_parts_when_they_are_rounded():
    (example,) = inputs([SHAPE], batch=2, dtype=torch.float32)
    folded = foldexport.fold(randomise(GlobalFilter(), 0), example)
    kinds = {value.dtype for value in folded.module.state_dict().values()}
    assert kinds == {torch.float32, torch.complex64}


def test_a_wrong_complex_weight_is_named():
    graph = trace(randomise(GlobalFilter(), 0), torch.zeros(2, *SHAPE))
    program = rebuild(fold_graph(graph, MAX_SIGMA)).program
    assert run(graph, program).ok
    (weight,) = [value for value in program.module.buffers() if value.is_complex()]
    with torch.no_grad():
        weight.imag[2, 1, 1] += 1e-7
    failures = run(graph, program).failures
    # Complex values have no records: what reads the spectrum is held to its real value.
    assert failures and {failure.value for failure in failures} == {"fft_irfft2"}


def test_complex_operators_have_a_condition():
    graph = trace(randomise(Phases(), 0), torch.zeros(2, *SHAPE))
    program = rebuild(fold_graph(graph, MAX_SIGMA)).program
    with torch.no_grad():
        found = worst_conditioned(Schedule(graph, program), make(graph)[0])
    named = {blame.operator.partition("_")[0]: blame.error_units for blame in found}
    assert named.keys() == {"conv", "abs", "sqrt", "angle", "real"} and all(named.values())

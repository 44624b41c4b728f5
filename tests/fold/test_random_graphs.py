"""Random graphs fold to the same function, value by value and end to end, with no more operators than before."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

import foldexport
from tests.fold.checks import assert_same, operators, tensors
from tests.fold.programs import INPUT, OPERATORS, Program, Step

PLACES = st.integers(0, 11)
STEPS = st.lists(
    st.builds(Step, st.integers(0, len(OPERATORS) - 1), PLACES, PLACES), min_size=3, max_size=12
)


def listing(program: Program) -> str:
    """The program as one line per value, for a failing example."""
    lines = [f"v{place + 1} = {layer}{operands}"
             for place, (layer, operands) in enumerate(zip(program.layers, program.operands))]
    return "\n".join([*lines, f"returns {program.results}, head {program.head is not None}"])


@settings(max_examples=120, deadline=None, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink],
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(steps=STEPS, seed=st.integers(0, 2**16), head=st.booleans(), extra=st.booleans())
def test_a_random_graph_folds_to_itself(steps: list[Step], seed: int, head: bool, extra: bool):
    program = Program(steps, seed, head=head, extra=extra).double()
    note(listing(program))
    example = torch.randn(2, *INPUT, dtype=torch.float64)
    with torch.no_grad():
        assert all(value.isfinite().all() for value in tensors(program(example)))
    folded = foldexport.fold(program, example)
    # The certificate compares every surviving value with a * s + t; this comparison is of the outputs alone.
    assert folded.certificate.ok
    assert_same(folded, program, INPUT, tolerance=1e-9)
    before, after = operators(folded.counts_before), operators(folded.counts_after)
    assert sum(after.values()) <= sum(before.values())
